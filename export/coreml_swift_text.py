"""Swift text from Python: names that compile, literals, and templates whose placeholders are all filled."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from importlib import resources

import numpy as np

from edgekit.errors import ExportError

# https://docs.swift.org/swift-book/documentation/the-swift-programming-language/lexicalstructure, "Keywords and
# Punctuation": those that are reserved everywhere, and those of contexts in which the generated names stand.
_KEYWORDS = """
associatedtype borrowing class consuming deinit enum extension fileprivate func import init inout internal let
nonisolated open operator precedencegroup private protocol public rethrows static struct subscript typealias var
break case catch continue default defer do else fallthrough for guard if in repeat return switch throw where while
Any as await false is nil self Self super throws true try async actor any some macro each
"""
KEYWORDS = frozenset(_KEYWORDS.split())
# Types that the generated code uses, and what an app is likely to have in scope: a module of the same name hides them.
_NAMES = """
Any Array Axis Bool Bundle CGImage Character Collection CoreGraphics CoreML CoreVideo Data Dictionary Double Entry
Equatable Error Failure Float Foundation ImageIO Input Int Int32 NSNumber Never Optional Outputs Pieces Pixels
Prediction ProcessInfo Protocol Range Recipe Result Sampler Sampling Self Sendable Sequence Set String Swift Task
Tensor TextStream Type UInt8 URL UUID UTF8 VideoToolbox XCTest
"""
_TAKEN = frozenset(_NAMES.split())
_PLACEHOLDER = re.compile(r"@@([A-Z_]+)@@")


def type_name(name: str) -> str:
    """A Swift type's and module's name: `shvit_s1` is ShvitS1, `3d-net.v2` is Model3dNetV2, `data` is DataModel."""
    words = re.findall(r"[A-Za-z0-9]+", name)
    joined = "".join(word[0].upper() + word[1:] for word in words)
    if not joined or joined[0].isdigit():
        joined = f"Model{joined}"
    return f"{joined}Model" if joined in _TAKEN or joined in KEYWORDS else joined


def value_name(name: str, taken: Collection[str] = ()) -> str:
    """A Swift property's or parameter's name: `present.0.key` is present0Key, `class` is `class` in backticks.

    A number is put behind a name that is taken.
    """
    words = re.findall(r"[A-Za-z0-9]+", name)
    joined = "".join(word if index == 0 else word[0].upper() + word[1:] for index, word in enumerate(words))
    joined = joined[:1].lower() + joined[1:]
    if not joined or joined[0].isdigit():
        joined = f"value{joined}"
    found, count = joined, 1
    while quoted(found) in taken:
        count += 1
        found = f"{joined}{count}"
    return quoted(found)


def quoted(name: str) -> str:
    """The name, in backticks where Swift reserves it."""
    return f"`{name}`" if name in KEYWORDS else name


def text(value: str) -> str:
    """A Swift string literal. What could end it, or start an interpolation, is escaped."""
    parts = []
    for character in value:
        if character in '"\\':
            parts.append("\\" + character)
        elif character.isprintable():
            parts.append(character)
        else:
            parts.append(f"\\u{{{ord(character):x}}}")
    return f'"{"".join(parts)}"'


def comment(value: str) -> str:
    """What may stand in a line of comment: one line without control characters."""
    return "".join(character if character.isprintable() else " " for character in value)


def number(value: float) -> str:
    """A literal that Swift reads as the same float32."""
    return repr(float(np.float32(value)))


def array(items: Iterable[str]) -> str:
    """An array literal of literals."""
    return f"[{', '.join(items)}]"


def template(name: str) -> str:
    """The text of a template beside this module."""
    return (resources.files("edgekit.export") / "swift" / name).read_text(encoding="utf-8")


def render(content: str, values: Mapping[str, str]) -> str:
    """Fill the placeholders `@@LIKE_THIS@@`.

    A placeholder that stands alone in its line may have a value of several lines, which get its indentation; the line
    is left out where the value is empty.

    Raises:
        ExportError: a placeholder without a value: the template and its caller do not fit each other.
    """

    def filled(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ExportError(f"a Swift template asks for {match[1]}, which nobody fills; this is a fault of edgekit's")
        return values[match[1]]

    lines = []
    for line in content.splitlines():
        alone = re.fullmatch(r"( *)@@([A-Z_]+)@@", line)
        if alone is None:
            lines.append(_PLACEHOLDER.sub(filled, line))
        elif inner := _PLACEHOLDER.sub(filled, line.strip()):
            lines += [f"{alone[1]}{part}" if part else "" for part in inner.splitlines()]
        elif lines and not lines[-1]:
            lines.pop()  # of the empty lines around it one is enough
    return "\n".join(lines) + "\n"
