"""The manifest of a bundle: what was exported, from what, with which tensors, and which files prove it.

A manifest is plain JSON. Reading one validates every field and never runs code. The schema number rises when an older
reader would misunderstand a newer file; a reader refuses numbers above its own. A file gets the lowest number that has
all its fields, so that older readers take what they can: 2 where an input says what its integers point into, else 1.
"""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, TypeVar

from edgekit.errors import BundleError
from edgekit.runtime.preprocess import ImagePreprocessing

T = TypeVar("T")

MANIFEST = "manifest.json"
REPORT = "report.json"
SCHEMA = 2
DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")

Dim = int | str

_INT64_MAX = 2**63 - 1
# Fields that came with a later schema: left out where they say nothing, so that older files read and are written alike.
_OPTIONAL = frozenset({"index_of"})
# Tabs and line ends may stand in a label; the rest of C0 and C1 could rewrite what a terminal shows.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class DimRange:
    """The sizes that a symbolic dimension may take: `min` to `max`, both included; `max` None means no upper bound."""

    min: int = 1
    max: int | None = None

    def __contains__(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        return f"{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` holds ints and the names of symbolic dimensions, `layout` letters such as NCHW.

    `index_of` is for inputs of integers that point into something: they lie in 0..n-1, where n is the size of the
    symbolic dimension of that name, or the number written there as text, or a sum of these such as "V+Q+1".
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    layout: str | None = None
    preprocessing: ImagePreprocessing | None = None
    index_of: str | None = None

    def __str__(self) -> str:
        below = "" if self.index_of is None else f" < {self.index_of}"
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{below}"

    def index_limit(self, sizes: Mapping[str, int]) -> int | None:
        """One more than the largest value that the input may hold, for these sizes; None where it is no index."""
        if self.index_of is None:
            return None
        return sum(int(term) if term.isdigit() else sizes[term] for term in self.index_of.split("+"))


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes, its SHA-256 in hex, and what it is for (`model`, `samples`, ...)."""

    role: str
    size: int
    sha256: str


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from: `shipped`, `random` (then with the seed), `file` or `program`; and their hash."""

    source: str
    sha256: str
    seed: int | None = None
    file: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The exported PyTorch model: `source` is a zoo name, `package.module:factory`, a .pt2 file's name or a class."""

    source: str
    weights: WeightsInfo
    parameters: int
    macs: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomOp:
    """A custom op in the graph, how many nodes use it, and the kernels known to serve it."""

    domain: str
    name: str
    version: int
    nodes: int
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All that a device needs to know of a bundle. Read with `Manifest.from_json`, written with `to_json`.

    `opsets` maps operator domains to versions, `ops` the graph's operators to how many nodes use them; `calibration`
    says what int8 was calibrated on; `verification` holds the figures of the check at export.
    """

    name: str
    model: ModelInfo
    target: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    opsets: dict[str, int] = field(default_factory=dict)
    ir_version: int | None = None
    ops: dict[str, int] = field(default_factory=dict)
    custom_ops: tuple[CustomOp, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    calibration: str | None = None
    verification: dict[str, Any] = field(default_factory=dict)

    @property
    def model_file(self) -> str:
        """The name of the file with the role `model`."""
        for name, entry in self.files.items():
            if entry.role == "model":
                return name
        raise BundleError(f"the manifest of {self.name!r} lists no file with the role 'model'")

    def to_json(self) -> str:
        """The manifest as JSON text, with keys in a fixed order, so that equal exports give equal files."""
        data: dict[str, Any] = {"schema": SCHEMA if any(spec.index_of for spec in self.inputs) else 1}
        data.update(_plain(self))
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "manifest.json") -> Manifest:
        """Read and validate a manifest; every fault raises a `BundleError` that names the field."""
        data = _parse(text, where)
        schema = data.pop("schema", None)
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise BundleError(
                f"{where} has no valid 'schema' number (got {_short(schema)}); is this an edgekit bundle?"
            )
        if schema > SCHEMA:
            raise BundleError(
                f"{where} has schema {_short(schema)}, this edgekit reads up to {SCHEMA}; "
                "upgrade with: pip install -U edgekit"
            )
        return _Reader(where).manifest(data)


def safe_name(name: str) -> bool:
    """Whether `name` is a relative POSIX path that stays inside the bundle's folder, on every system."""
    if not name or "\\" in name or ":" in name or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def _parse(text: str, where: str) -> dict[str, Any]:
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
        raise BundleError(f"{where} holds control characters in {_short(strange)}; refusing to show or use them")
    if not isinstance(data, dict):
        raise BundleError(f"{where} must hold a JSON object, got {_short(data)}")
    return data


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


def _points(spec: TensorSpec, sizes: Set[str]) -> bool:
    """Whether `index_of` makes sense: a sum of `sizes` and of numbers of at least 1, for integers."""
    terms = (spec.index_of or "").split("+")
    known = (re.fullmatch(r"[1-9][0-9]{0,17}", t) is not None if t.isdigit() else t in sizes for t in terms)
    return "int" in spec.dtype and all(known)


def _short(value: object) -> str:
    """`repr`, cut so that a message stays readable whatever an edited manifest holds."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxlong = 100
    return cut.repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, ImagePreprocessing):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in fields.items() if item is not None or name not in _OPTIONAL}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Reader:
    """Turns parsed JSON into a Manifest and names the field in every complaint."""

    def __init__(self, where: str) -> None:
        self.where = where

    def manifest(self, data: dict[str, Any]) -> Manifest:
        self._known(data, Manifest, "")
        dims = {
            self._text(name, "dims"): self._dim_range(entry, f"dims.{name}.")
            for name, entry in self._get(data, "dims", dict).items()
        }
        return Manifest(
            name=self._word(data, "name"),
            model=self._model(self._get(data, "model", dict)),
            target=self._word(data, "target"),
            precision=self._word(data, "precision"),
            inputs=self._tensors(data, "inputs", dims),
            outputs=self._tensors(data, "outputs", dims),
            dims=dims,
            labels=self._optional(data, "labels", self._strings),
            opsets=self._counts(data, "opsets"),
            ir_version=self._optional(data, "ir_version", self._int),
            ops=self._counts(data, "ops"),
            custom_ops=tuple(self._custom_ops(data)),
            files=self._files(self._get(data, "files", dict)),
            tools={k: self._text(v, f"tools.{k}") for k, v in self._get(data, "tools", dict).items()},
            calibration=self._optional(data, "calibration", self._text),
            verification=self._get(data, "verification", dict),
        )

    def _bad(self, path: str, expected: str, got: object) -> BundleError:
        field = f"{self.where}: field {_short(path)}"
        return BundleError(f"{field} must be {expected}, got {_short(got)}; the bundle was edited")

    def _known(self, data: dict[str, Any], cls: type, prefix: str) -> None:
        """Exactly the fields of `cls`, as `to_json` writes them."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(data.keys() - fields):
            raise BundleError(f"{self.where}: unknown field {_short(prefix + unknown[0])}; the bundle was edited")
        if missing := sorted(fields - _OPTIONAL - data.keys()):
            raise BundleError(f"{self.where}: field {_short(prefix + missing[0])} is missing; export the bundle again")

    def _get(self, data: dict[str, Any], key: str, kind: type, prefix: str = "") -> Any:
        if not isinstance(data[key], kind):
            raise self._bad(prefix + key, "an object" if kind is dict else "a list", data[key])
        return data[key]

    def _optional(self, data: dict[str, Any], key: str, read: Callable[[Any, str], T], prefix: str = "") -> T | None:
        return None if data[key] is None else read(data[key], prefix + key)

    def _object(self, value: object, cls: type, prefix: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._bad(prefix.removesuffix("."), "an object", value)
        self._known(value, cls, prefix)
        return value

    def _text(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise self._bad(path, "a text", value)
        return value

    def _word(self, data: dict[str, Any], key: str) -> str:
        value = self._text(data[key], key)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise self._bad(key, "letters, digits, '.', '_' and '-'", value)
        return value

    def _int(self, value: object, path: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _INT64_MAX:
            raise self._bad(path, "an integer of 64 bits", value)
        return value

    def _count(self, value: object, path: str) -> int:
        if self._int(value, path) < 0:
            raise self._bad(path, "at least 0", value)
        return self._int(value, path)

    def _counts(self, data: dict[str, Any], key: str) -> dict[str, int]:
        return {name: self._count(value, f"{key}.{name}") for name, value in self._get(data, key, dict).items()}

    def _strings(self, values: object, path: str) -> tuple[str, ...]:
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self._bad(path, "a list of texts", values)
        return tuple(values)

    def _dim_range(self, entry: object, prefix: str) -> DimRange:
        data = self._object(entry, DimRange, prefix)
        low, high = self._count(data["min"], f"{prefix}min"), self._optional(data, "max", self._count, prefix)
        if high is not None and high < low:
            raise self._bad(f"{prefix}max", f"at least the min, {low}", high)
        return DimRange(low, high)

    def _files(self, entries: dict[str, Any]) -> dict[str, FileEntry]:
        files = {name: self._file(name, entry) for name, entry in entries.items()}
        if sum(entry.role == "model" for entry in files.values()) != 1:
            raise self._bad("files", "an object with one file of the role 'model'", sorted(files))
        return files

    def _file(self, name: str, entry: object) -> FileEntry:
        if not safe_name(name):
            raise BundleError(
                f"{self.where}: the file name {_short(name)} leaves the bundle's folder or is not portable; "
                "refusing to open it"
            )
        if name in (MANIFEST, REPORT):
            raise BundleError(f"{self.where}: {name} cannot be listed in 'files'; the bundle was edited")
        prefix = f"files.{name}."
        data = self._object(entry, FileEntry, prefix)
        role, digest = self._text(data["role"], f"{prefix}role"), self._text(data["sha256"], f"{prefix}sha256")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise self._bad(f"{prefix}sha256", "64 hexadecimal digits", digest)
        return FileEntry(role, self._count(data["size"], f"{prefix}size"), digest)

    def _model(self, data: dict[str, Any]) -> ModelInfo:
        self._known(data, ModelInfo, "model.")
        weights = self._object(data["weights"], WeightsInfo, "model.weights.")
        return ModelInfo(
            source=self._text(data["source"], "model.source"),
            weights=WeightsInfo(
                source=self._text(weights["source"], "model.weights.source"),
                sha256=self._text(weights["sha256"], "model.weights.sha256"),
                seed=self._optional(weights, "seed", self._int, "model.weights."),
                file=self._optional(weights, "file", self._text, "model.weights."),
            ),
            parameters=self._count(data["parameters"], "model.parameters"),
            macs=self._optional(data, "macs", self._count, "model."),
            options=self._get(data, "options", dict, "model."),
        )

    def _tensors(self, data: dict[str, Any], key: str, dims: dict[str, DimRange]) -> tuple[TensorSpec, ...]:
        entries = enumerate(self._get(data, key, list))
        # The sizes of outputs may be expressions, such as N + 1; those of inputs are names that have a range.
        specs = [self._tensor(entry, f"{key}[{i}].", dims if key == "inputs" else None) for i, entry in entries]
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) < len(names):
            raise self._bad(key, "a list with at least one tensor, each with a name of its own", names)
        sizes = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)} if key == "inputs" else set()
        for index, spec in enumerate(specs):
            if spec.index_of is not None and not _points(spec, sizes):
                expected = "a number, a dimension of the inputs or a sum of them, for an input of integers"
                raise self._bad(f"{key}[{index}].index_of", expected, spec.index_of)
        return tuple(specs)

    def _tensor(self, entry: object, prefix: str, dims: dict[str, DimRange] | None) -> TensorSpec:
        data = self._object(entry, TensorSpec, prefix)
        dtype = self._text(data["dtype"], f"{prefix}dtype")
        if dtype not in DTYPES:
            raise self._bad(f"{prefix}dtype", f"one of {', '.join(DTYPES)}", dtype)
        shape = self._get(data, "shape", list, prefix)
        for dim in shape:
            if isinstance(dim, str) and (dims is None or dim in dims):
                continue
            if isinstance(dim, str):
                raise self._bad(f"{prefix}shape", "sizes and names listed in 'dims'", shape)
            self._count(dim, f"{prefix}shape")
        return TensorSpec(
            name=self._text(data["name"], f"{prefix}name"),
            dtype=dtype,
            shape=tuple(shape),
            layout=self._optional(data, "layout", self._text, prefix),
            preprocessing=self._optional(data, "preprocessing", self._preprocessing, prefix),
            index_of=self._optional({"index_of": None, **data}, "index_of", self._text, prefix),
        )

    def _preprocessing(self, recipe: Any, path: str) -> ImagePreprocessing:
        try:
            return ImagePreprocessing.from_json(recipe)
        except BundleError as error:
            raise BundleError(f"{self.where}: {path.removesuffix('preprocessing')}{error}") from error

    def _custom_ops(self, data: dict[str, Any]) -> Iterator[CustomOp]:
        for index, entry in enumerate(self._get(data, "custom_ops", list)):
            prefix = f"custom_ops[{index}]."
            item = self._object(entry, CustomOp, prefix)
            yield CustomOp(
                domain=self._text(item["domain"], f"{prefix}domain"),
                name=self._text(item["name"], f"{prefix}name"),
                version=self._count(item["version"], f"{prefix}version"),
                nodes=self._count(item["nodes"], f"{prefix}nodes"),
                kernels=self._strings(item["kernels"], f"{prefix}kernels"),
            )
