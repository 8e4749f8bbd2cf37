"""Read untrusted JSON field by field: whatever is not as expected is a `BundleError` that names the field.

`Fields` reads the values of one file; `parse_object` turns its text into data, without what Python lets pass and strict
JSON does not.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Set
from typing import Any, TypeVar

from edgekit.errors import BundleError

T = TypeVar("T")

_INT64_MAX = 2**63 - 1
# Tabs and line ends may stand in a label; the rest of C0 and C1 could rewrite what a terminal shows.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`, without NaN, repeated keys, broken Unicode or characters that steer a terminal."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands there twice")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
        # Python reads NaN, 1e999 and lone surrogates without complaint; writing them strictly brings them out.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
        strange = next((value for value in _texts(data) if _CONTROL.search(value)), None)
    except RecursionError:
        raise BundleError(f"{where} is nested too deeply; it is no manifest of edgekit's") from None
    except ValueError as error:  # JSONDecodeError, UnicodeEncodeError and the limit on digits are all ValueErrors
        raise BundleError(f"{where} is not valid JSON ({error}); the bundle is damaged, export it again") from error
    if strange is not None:
        raise BundleError(f"{where} holds control characters in {short(strange)}; refusing to show or use them")
    if not isinstance(data, dict):
        raise BundleError(f"{where} must hold a JSON object, got {short(data)}")
    return data


def short(value: object) -> str:
    """`repr`, cut so that a message stays readable whatever an edited file holds."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxlong = 100
    return cut.repr(value)


def _texts(value: Any) -> Iterator[str]:
    """Every string in JSON data, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


class Fields:
    """Reads values out of parsed JSON and names the field in every complaint.

    Args:
        where: the file, for messages.
        optional: names of fields that a file may leave out, whichever object they belong to.
    """

    def __init__(self, where: str, optional: Set[str] = frozenset()) -> None:
        self.where = where
        self._may_miss = optional

    def bad(self, path: str, expected: str, got: object) -> BundleError:
        """The error for a field that holds something else than `expected`."""
        field = f"{self.where}: field {short(path)}"
        return BundleError(f"{field} must be {expected}, got {short(got)}; the bundle was edited")

    def known(self, data: dict[str, Any], cls: type, prefix: str) -> None:
        """Exactly the fields of the dataclass `cls`, optional ones aside."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(data.keys() - fields):
            raise BundleError(f"{self.where}: unknown field {short(prefix + unknown[0])}; the bundle was edited")
        if missing := sorted(fields - self._may_miss - data.keys()):
            raise BundleError(f"{self.where}: field {short(prefix + missing[0])} is missing; export the bundle again")

    def get(self, data: dict[str, Any], key: str, kind: type, prefix: str = "") -> Any:
        """An object (`kind` is dict) or a list."""
        if not isinstance(data[key], kind):
            raise self.bad(prefix + key, "an object" if kind is dict else "a list", data[key])
        return data[key]

    def optional(self, data: dict[str, Any], key: str, read: Callable[[Any, str], T], prefix: str = "") -> T | None:
        """What `read` makes of a field, None where it holds null."""
        return None if data[key] is None else read(data[key], prefix + key)

    def record(self, value: object, cls: type, prefix: str) -> dict[str, Any]:
        """An object with exactly the fields of the dataclass `cls`."""
        if not isinstance(value, dict):
            raise self.bad(prefix.removesuffix("."), "an object", value)
        self.known(value, cls, prefix)
        return value

    def text(self, value: object, path: str) -> str:
        """Any text."""
        if not isinstance(value, str):
            raise self.bad(path, "a text", value)
        return value

    def word(self, data: dict[str, Any], key: str) -> str:
        """A text that can stand in a file name."""
        value = self.text(data[key], key)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise self.bad(key, "letters, digits, '.', '_' and '-'", value)
        return value

    def integer(self, value: Any, path: str) -> int:
        """An integer of 64 bits."""
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _INT64_MAX:
            raise self.bad(path, "an integer of 64 bits", value)
        return value

    def count(self, value: Any, path: str, *, least: int = 0) -> int:
        """An integer of at least `least`."""
        number = self.integer(value, path)
        if number < least:
            raise self.bad(path, f"at least {least}", value)
        return number

    def counts(self, data: dict[str, Any], key: str, prefix: str = "") -> dict[str, int]:
        """An object of counts by name."""
        path = prefix + key
        return {name: self.count(value, f"{path}.{name}") for name, value in self.get(data, key, dict, prefix).items()}

    def flag(self, value: object, path: str) -> bool:
        """True or false."""
        if not isinstance(value, bool):
            raise self.bad(path, "true or false", value)
        return value

    def strings(self, values: object, path: str) -> tuple[str, ...]:
        """A list of texts."""
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self.bad(path, "a list of texts", values)
        return tuple(values)
