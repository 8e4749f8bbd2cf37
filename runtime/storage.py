"""Where a bundle's bytes lie: in a folder or in one zip. Both are read in bounded pieces and never leave their place.

Nothing is unpacked to disk. Whatever is wrong with a file (missing, a link to elsewhere, damaged, encrypted, larger
than promised) is a `BundleError` that names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from edgekit.errors import BundleError
from edgekit.runtime.manifest import safe_name

BLOCK = 2**20
# Python unfolds these in pieces of bounded size; bzip2 and LZMA would turn one small piece into gigabytes.
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What `zipfile` raises on files that are damaged, encrypted or compressed by another method.
_READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, LookupError, struct.error, zipfile.BadZipFile, zlib.error)


class Storage(ABC):
    """The files of one bundle, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def blocks(self, name: str, limit: int) -> Iterator[bytes]:
        """The content of a file in pieces of at most 1 MiB, ending with the piece that goes beyond `limit` bytes."""
        try:
            with self._open(name) as stream:
                size = 0
                while size <= limit and (block := stream.read(BLOCK)):
                    size += len(block)
                    yield block
        except BundleError:
            raise
        except _READ_ERRORS as error:
            raise BundleError(f"{self.path.name}/{name} cannot be read ({error}); copy or export it again") from error

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes."""
        content = b"".join(self.blocks(name, limit))
        if len(content) > limit:
            raise BundleError(f"{self.path.name}/{name} is larger than {limit} bytes; refusing to read it")
        return content

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    @abstractmethod
    def _open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open a file for reading."""

    def _missing(self, name: str) -> BundleError:
        return BundleError(f"{self.path.name} has no {name}; copy it whole, or export it again")


class FolderStorage(Storage):
    """A folder. Links are followed as long as they stay inside it."""

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def _open(self, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(f"{self.path.name}/{name} is a link that leaves the bundle's folder; refusing to read it")
        if not path.is_file():  # a pipe or a device would block
            raise self._missing(name)
        return path.open("rb")


class ZipStorage(Storage):
    """One zip file. Raises `BundleError` where it is none, or where its list of entries is not to be trusted."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except _READ_ERRORS as error:
            raise BundleError(
                f"{path} is neither a bundle folder nor a readable packed bundle ({error}); copy or export it again"
            ) from error
        self._names = {entry.filename for entry in entries}
        if len(self._names) < len(entries):
            raise BundleError(f"{path} holds several entries of one name; refusing to choose, pack it again")
        for entry in entries:
            if not safe_name(entry.filename.removesuffix("/")):
                raise BundleError(f"{path} holds an entry {entry.filename[:80]!r} that leaves it; refusing to read it")
            if entry.flag_bits & 0x1 or entry.compress_type not in COMPRESSIONS:
                raise BundleError(
                    f"{path}: the entry {entry.filename[:80]!r} is encrypted or compressed by a method other than "
                    "deflate; pack the bundle again with: edgekit export --pack"
                )

    def has(self, name: str) -> bool:
        return name in self._names

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if name not in self._names:
            raise self._missing(name)
        with zipfile.ZipFile(self.path) as archive, archive.open(name) as stream:
            yield stream


def storage_of(path: Path) -> Storage:
    """The storage at a path. Raises `BundleError` where there is nothing, or nothing that could hold a bundle."""
    try:
        exists, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, or a parent that may not be searched
        raise BundleError(f"cannot open {path}: {error.strerror or error}") from error
    if is_folder:
        return FolderStorage(path)
    if is_file:
        return ZipStorage(path)
    if exists:
        raise BundleError(
            f"{path} is neither a folder nor a file; a bundle is a .edge folder or a packed .edge.zip file"
        )
    raise BundleError(f"no bundle at {path}; make one with: edgekit export MODEL --target onnx -o {path.parent}")


def measure(blocks: Iterable[bytes], *, digest: bool = True) -> tuple[int, str]:
    """Size and SHA-256 (empty without `digest`) of a content in pieces."""
    sha, size = hashlib.sha256(), 0
    for block in blocks:
        size += len(block)
        if digest:
            sha.update(block)
    return size, sha.hexdigest() if digest else ""


def write_zip(path: Path, contents: Iterable[tuple[str, Iterable[bytes]]]) -> None:
    """Write a zip of these names and contents. The same ones give the same bytes: the date and the mode are fixed."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, blocks in contents:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system, info.external_attr = 3, 0o644 << 16  # as written on Unix, wherever it is written
            with archive.open(info, "w", force_zip64=True) as target:
                for block in blocks:
                    target.write(block)


def sibling(path: Path) -> Path:
    """A hidden name beside `path` for a file in the making, of this thread of this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = sibling(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
