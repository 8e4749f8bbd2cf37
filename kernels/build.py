"""Building the library with which onnxruntime runs edgekit's ops natively.

    >>> from edgekit.kernels.build import build
    >>> build(["x86-64-v4"], Path("built"))[0].library

For each arch: TVM compiles the kernels to objects, a C and a C++ compiler build the layer around them, and
`libedgekit_onnxruntime.so` and `kernels.json` go into a folder of their own. `edgekit.load` looks for such folders
where `edgekit.runtime.kernel_library.kernels_root` says. The same sources and tools give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import edgekit
from edgekit.errors import UnknownNameError
from edgekit.kernels.headers import Headers, find_headers
from edgekit.kernels.native.objects import (
    KERNELS,
    SOURCES,
    OpObject,
    digest,
    op_objects,
    scratch_folder,
    tvm_versions,
)
from edgekit.kernels.native.table import Entry, table_header
from edgekit.kernels.native.toolchain import KernelBuildError, Toolchain, find_toolchain, run

__all__ = ["ARCH_NAMES", "BuiltLibrary", "KernelBuildError", "build", "sources_digest"]

LIBRARY = "libedgekit_onnxruntime.so"
MANIFEST = "kernels.json"
SCHEMA = 1
ARCH_NAMES = ("x86-64-v3", "x86-64-v4", "aarch64")

_WARNINGS = ("-Wall", "-Wextra")
_COMMON = ("-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections", "-DEDGEKIT_KERNELS_SHARED")
_LINK = (
    "-shared",
    "-Wl,--gc-sections",
    "-Wl,-z,defs",  # a symbol that nothing supplies is an error now, not when the library is loaded
    "-Wl,-z,noexecstack",
    "-Wl,-z,relro",
    "-Wl,--build-id=none",
    "-Wl,-s",
    f"-Wl,-soname,{LIBRARY}",
)
_EXPORTED = "{ global: RegisterCustomOps; edgekit_*; local: *; };\n"


@dataclass(frozen=True)
class BuiltLibrary:
    """One library that was built, or found unchanged."""

    arch: str
    folder: Path
    library: Path
    manifest: Path
    kernels: tuple[Entry, ...]
    seconds: float
    """What the build took; about 0 when nothing had changed."""
    reused: bool
    """Whether the folder already held this very library."""


def sources_digest() -> str:
    """A hash of all that the kernels are made from, except the tools. Cheap: TVM is not loaded."""
    return digest(_sources())


def build(archs: Sequence[str], out: Path, *, force: bool = False) -> list[BuiltLibrary]:
    """Build the library for each arch and install it.

    Args:
        archs: names out of `ARCH_NAMES`.
        out: parent of one folder per arch.
        force: build even if the folder holds the very library that would come out.

    Raises:
        UnknownNameError: an arch that does not exist.
        MissingDependencyError: TVM is not installed.
        KernelBuildError: a compiler or onnxruntime's headers are missing, a compiler failed, or `out` cannot be
            written. What was installed before is left as it was.
    """
    for name in archs:
        if name not in ARCH_NAMES:
            raise UnknownNameError("kernel arch", name, ARCH_NAMES)
    tvm_versions()
    headers = find_headers()
    return [_build_one(name, out / name, headers, force) for name in archs]


def _build_one(name: str, folder: Path, headers: Headers, force: bool) -> BuiltLibrary:
    from edgekit.kernels.tvm.targets import get_arch

    started = time.perf_counter()
    arch = get_arch(name)
    tools = find_toolchain(arch.machine)
    compilers = {"cc": tools.c_version(), "c++": tools.version()}
    sources = sources_digest()
    fingerprint = digest(
        (), sources, *tvm_versions(), *compilers.values(), repr(tools), str(headers.api), edgekit.__version__
    )
    library, manifest = folder / LIBRARY, folder / MANIFEST
    before = None if force else _installed(folder, fingerprint)
    if before is not None:
        return BuiltLibrary(name, folder, library, manifest, before, time.perf_counter() - started, True)
    objects = op_objects(name)
    entries = tuple(entry for item in objects for entry in item.entries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KernelBuildError(
            f"cannot write kernels to {folder}: {error.strerror}; set EDGEKIT_KERNELS to a folder for them"
        ) from error
    with scratch_folder(folder) as work:
        _link(work, tools, arch.march, headers, objects)
        document = {
            "schema": SCHEMA,
            "edgekit": edgekit.__version__,
            "arch": name,
            "machine": arch.machine,
            "system": "linux",
            "features": list(arch.features),
            "library": LIBRARY,
            "sha256": hashlib.sha256((work / LIBRARY).read_bytes()).hexdigest(),
            "ort_api": headers.api,
            "kernels": [entry.to_json() for entry in entries],
            "tools": dict(zip(("apache-tvm", "apache-tvm-ffi"), tvm_versions(), strict=True)) | compilers,
            "sources": sources,
            "fingerprint": fingerprint,
        }
        (work / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        # The library first: a reader in between finds a hash that does not match, and does not load it.
        (work / LIBRARY).replace(library)
        (work / MANIFEST).replace(manifest)
    return BuiltLibrary(name, folder, library, manifest, entries, time.perf_counter() - started, False)


def _link(work: Path, tools: Toolchain, march: str, headers: Headers, objects: Iterable[OpObject]) -> None:
    """Compile the layer and link everything to `work / LIBRARY`."""
    items = list(objects)
    c_source, cc_source = SOURCES / "edgekit_kernels.c", KERNELS / "ort" / "custom_ops.cc"
    (work / "edgekit_kernels_table.h").write_text(table_header(entry for item in items for entry in item.entries))
    (work / "exported.map").write_text(_EXPORTED)
    # Last, so that it wins over a -march=native of the user's: kernels.json promises that the arch's features suffice.
    last = ["-I", str(work), "-I", str(SOURCES), f"-march={march}"]
    run(
        [*tools.cc, "-std=c11", *_WARNINGS, *_COMMON, *tools.cflags, *last, "-c", str(c_source), "-o", "c.o"],
        "compiling the C layer",
        work,
    )
    system = ["-isystem", str(headers.folder)]
    run(
        [
            *tools.cxx,
            "-std=c++17",
            *_WARNINGS,
            *_COMMON,
            *tools.cxxflags,
            *system,
            *last,
            "-c",
            str(cc_source),
            "-o",
            "cc.o",
        ],
        "compiling the onnxruntime layer",
        work,
    )
    inputs = ["cc.o", "c.o", *(str(item.path) for item in items)]
    run(
        [*tools.cxx, *_LINK, "-Wl,--version-script=exported.map", *inputs, "-o", LIBRARY, *tools.ldflags, "-lm"],
        f"linking {LIBRARY}",
        work,
    )


def _installed(folder: Path, fingerprint: str) -> tuple[Entry, ...] | None:
    """The kernels of the library in `folder`, if that is what these sources and tools give; else None."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sound = hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest() == document["sha256"]
        if not sound or document["fingerprint"] != fingerprint:
            return None
        return tuple(
            Entry(item["op"], item["dtype"], item["symbol"], tuple(item["parameters"].items()))
            for item in document["kernels"]
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _sources() -> list[Path]:
    return [
        path
        for path in KERNELS.rglob("*")
        if path.suffix in {".py", ".c", ".h", ".cc"} and "__pycache__" not in path.parts and path.is_file()
    ]
