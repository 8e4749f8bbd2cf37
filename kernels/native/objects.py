"""Objects compiled by TVM, one per op and arch, kept between builds: bundles and libraries need the same ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.kernels.native.table import Entry

KERNELS = Path(str(resources.files("edgekit.kernels")))
SOURCES = KERNELS / "native"
OP_NAMES = ("BlockSparseAttention", "KernelLinearAttention", "SelectiveScan")


@dataclass(frozen=True)
class OpObject:
    """The compiled kernels of one op."""

    op: str
    path: Path
    entries: tuple[Entry, ...]


def cache_root() -> Path:
    """Where edgekit keeps what it can make again: `$XDG_CACHE_HOME/edgekit`, `~/.cache/edgekit` by default.

    Where there is no home folder, a hidden folder of `$EDGEKIT_KERNELS`.

    Raises:
        InputError: none of these is set.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "edgekit"
    try:
        return Path.home() / ".cache" / "edgekit"
    except RuntimeError as error:
        if chosen := os.environ.get("EDGEKIT_KERNELS"):
            return Path(chosen) / ".cache"
        raise InputError(
            "there is no home folder to keep compiled kernels in; set EDGEKIT_KERNELS to a folder for them"
        ) from error


def digest(paths: Iterable[Path], *more: str) -> str:
    """SHA-256 over the names and contents of files, and over other text."""
    state = hashlib.sha256()
    for path in sorted(paths):
        state.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    for text in more:
        state.update(f"{text}\0".encode())
    return state.hexdigest()


def tvm_versions() -> tuple[str, str]:
    """Versions of TVM and its FFI, without importing them.

    Raises:
        MissingDependencyError: TVM is not installed.
    """
    try:
        return metadata.version("apache-tvm"), metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError("apache-tvm", "tvm", "compiling the CPU kernels") from error


def op_objects(arch: str, ops: Iterable[str] = OP_NAMES) -> tuple[OpObject, ...]:
    """The compiled kernels of `ops` for `arch`, in the order of `OP_NAMES`, from the cache where nothing changed.

    Raises:
        UnknownNameError: an op or arch that does not exist.
        InputError: no op, or no folder for the cache.
        MissingDependencyError: TVM is not installed.
    """
    chosen = set(ops)
    for op in sorted(chosen - set(OP_NAMES)):
        raise UnknownNameError("custom op", op, OP_NAMES)
    if not chosen:
        raise InputError(f"expected one or more of {', '.join(OP_NAMES)}, got none")
    from edgekit.kernels.tvm import catalog
    from edgekit.kernels.tvm.targets import get_arch

    target = get_arch(arch)
    by_op: dict[str, list[catalog.Kernel]] = {op: [] for op in OP_NAMES if op in chosen}
    for kernel in catalog.kernels(target):
        if kernel.op in by_op:
            by_op[kernel.op].append(kernel)
    objects = []
    for op, kernels in by_op.items():
        if not kernels:
            continue
        path = cache_root() / "objects" / arch / f"{op}-{_fingerprint(op)[:20]}.o"
        if not path.is_file():
            _make(path.parent)
            with scratch_folder(path.parent) as folder:
                catalog.compile_object(kernels, target, folder / "kernels.o")
                (folder / "kernels.o").replace(path)
        entries = tuple(Entry(kernel.op, kernel.dtype, kernel.symbol, tuple(kernel.parameters)) for kernel in kernels)
        objects.append(OpObject(op, path, entries))
    return tuple(objects)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep compiled kernels in {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder for them"
        ) from error


def _fingerprint(op: str) -> str:
    """Changes whenever the compiled kernels of `op` may: TVM, the op's own module, the modules that all ops share."""
    others = {f"{snake_case(name)}.py" for name in OP_NAMES if name != op}
    return digest((path for path in (KERNELS / "tvm").glob("*.py") if path.name not in others), *tvm_versions())


def snake_case(op: str) -> str:
    """ "BlockSparseAttention" -> "block_sparse_attention"."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in op).lstrip("_")


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent`, so that a finished file can be renamed into place; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=".building-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
