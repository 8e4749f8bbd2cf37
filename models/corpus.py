"""The text on which the shipped byte-level language model is trained: docstrings that come with Python itself.

Two sources, both part of every Python installation, so nothing is downloaded and no module is imported for its side
effects: the docstrings of the standard library, found by parsing its source, and the language reference's topics that
`help()` shows (`pydoc_data.topics`). The text depends on the Python version; `Corpus.sha256` tells which it was.

A document is a module's docstrings or a topic. The split goes by document name, so a module is in one part as a whole,
and a docstring that both parts have is left out of the validation part.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgekit.errors import UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Iterator

Part = Literal["train", "validation"]
PARTS: tuple[Part, ...] = ("train", "validation")

# Tests and installed packages differ between installations; idlelib, tkinter and the like are missing from some.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"}
)
VALIDATION_SHARE = 10  # one document in so many
SHORTEST_DOCSTRING = 24  # bytes; shorter ones are mostly "See above."


@dataclass(frozen=True)
class Corpus:
    """One part of the text.

    Attributes:
        names: module names (`json.decoder`) and topics (`topic:lambda`), sorted.
        documents: UTF-8 text of each.
        sha256: of all names and documents.
    """

    names: tuple[str, ...]
    documents: tuple[bytes, ...]
    sha256: str

    @property
    def bytes(self) -> int:
        """How many bytes of text there are."""
        return sum(map(len, self.documents))


def load_corpus(part: Part) -> Corpus:
    """The documents of one part, in a fixed order; a parse of the standard library (seconds) the first time.

    Raises:
        UnknownNameError: `part` is not train or validation.
    """
    if part not in PARTS:
        raise UnknownNameError("part of the corpus", part, PARTS)
    return _parts()[part]


def held_out(name: str) -> bool:
    """Whether the document of this name belongs to the validation part."""
    return zlib.crc32(name.encode()) % VALIDATION_SHARE == 0


@cache
def _parts() -> dict[Part, Corpus]:
    documents = dict(sorted((*_modules(), *_topics())))
    train = {name: texts for name, texts in documents.items() if not held_out(name)}
    seen = {text for texts in train.values() for text in texts}
    validation = {
        name: [text for text in texts if text not in seen] for name, texts in documents.items() if held_out(name)
    }
    return {"train": _corpus(train), "validation": _corpus(validation)}


def _corpus(documents: dict[str, list[str]]) -> Corpus:
    joined = {name: "\n\n".join(texts).encode() for name, texts in documents.items() if texts}
    digest = hashlib.sha256()
    for name, text in joined.items():
        digest.update(name.encode() + b"\0" + text + b"\0")
    return Corpus(tuple(joined), tuple(joined.values()), digest.hexdigest())


def _modules() -> Iterator[tuple[str, list[str]]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0] == "pydoc_data":
            continue
        texts = _docstrings(path)
        if texts:
            yield ".".join(parts), texts


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a source file in the order in which they stand there, each once."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # templates and the like, which are no Python
        return []
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= SHORTEST_DOCSTRING:
                found.setdefault(text, getattr(node, "lineno", 0))
    return sorted(found, key=lambda text: (found[text], text))


def _topics() -> Iterator[tuple[str, list[str]]]:
    from pydoc_data.topics import topics  # a module of plain data

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", [text]
