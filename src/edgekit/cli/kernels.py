"""`edgekit kernels`: build native kernels and show what is built; for `edgekit doctor`, the tools that it takes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.cli.console import Output
from edgekit.devices.doctor import Check, built_kernels
from edgekit.errors import EdgekitError, UnknownNameError
from edgekit.runtime.kernel_library import (
    BUILD_COMMAND,
    FOLDER_VARIABLE,
    OUTDATED,
    Found,
    Host,
    KernelLibrary,
    find_libraries,
    kernels_root,
    misfit,
    this_host,
)
from edgekit.runtime.report import bytes_

FITS = "fits"
FITS_OUTDATED = f"{FITS}, but {OUTDATED}"


def build(output: Output, archs: Sequence[str] | None, out: Path | None, *, force: bool) -> None:
    """`edgekit kernels build`.

    Raises:
        UnknownNameError: no such arch.
        MissingDependencyError: TVM is not installed.
        InputError: no arch was named and none fits this machine, or there is no folder to build into.
        KernelBuildError: a compiler or onnxruntime's headers are missing, or a compiler failed.
    """
    from edgekit.kernels import build as builder
    from edgekit.kernels.headers import find_headers
    from edgekit.kernels.native.objects import tvm_versions

    for arch in archs or ():  # all of them, and all that every build needs, before the first takes its time
        if arch not in builder.ARCH_NAMES:
            raise UnknownNameError("kernel arch", arch, builder.ARCH_NAMES)
    root, host = out or kernels_root(), this_host()
    tvm_versions()
    find_headers()
    sources = builder.sources_digest()
    rows, data = [], []
    with output.steps("build kernels") as step:
        for arch in dict.fromkeys(archs or [_best_arch(host)]):
            step(f"{arch}: compile with TVM, link for onnxruntime")
            [built] = builder.build([arch], root, force=force)
            step(f"{arch}: {'unchanged' if built.reused else f'done in {built.seconds:.0f} s'}")
            [found] = (each for each in find_libraries(built.folder) if each.folder == built.folder)
            verdict = _verdict(found, host, sources)
            size = bytes_(built.library.stat().st_size)
            rows.append((arch, str(len(built.kernels)), size, str(built.folder), verdict))
            data.append(_library_json(found, verdict) | {"seconds": round(built.seconds, 1), "reused": built.reused})
    output.table(("arch", "kernels", "size", "folder", "this machine"), rows, right=("kernels", "size"))
    output.line()
    if out is None:
        output.line("edgekit.load uses them by itself where they fit")
        output.line("next: edgekit inspect BUNDLE")
    else:
        output.line(f"to use them: --kernels {out}, or {FOLDER_VARIABLE}={out} for every command")
        output.line(f"next: edgekit kernels list {out}")
    output.json(data)


def list_libraries(output: Output, folder: Path | None) -> None:
    """`edgekit kernels list`: what is built, where, whether it fits this machine, and which ops it serves."""
    from edgekit.kernels.build import sources_digest

    root, host, sources = folder or kernels_root(), this_host(), sources_digest()
    libraries = find_libraries(root)
    verdicts = [_verdict(found, host, sources) for found in libraries]
    if not libraries:
        output.line(f"no kernels are built in {root}; models run on their portable function bodies")
        output.line(f"next: {BUILD_COMMAND}")
    else:
        columns = ("arch", "kernels", "edgekit", "onnxruntime", "folder", "this machine")
        output.table(columns, [_row(*pair) for pair in zip(libraries, verdicts, strict=True)], right=("kernels",))
        output.line()
        output.table(("op", "dtype", "made for", "in"), _variant_rows(libraries))
    output.json(
        {
            "folder": str(root),
            "libraries": [_library_json(*pair) for pair in zip(libraries, verdicts, strict=True)],
        }
    )


def toolchain_checks() -> list[Check]:
    """The compiler, onnxruntime's headers and what is built, as `edgekit doctor` shows them."""
    from edgekit.kernels.build import sources_digest
    from edgekit.kernels.headers import find_headers
    from edgekit.kernels.native.toolchain import find_toolchain

    def check(name: str, look: Any, purpose: str) -> Check:
        try:
            return Check(name, "kernels", "ok", look(), "", purpose, None)
        except EdgekitError as error:
            return Check(name, "kernels", "missing", "not found", "", purpose, str(error).replace("\n", "\n    "))

    def compiler() -> str:
        return find_toolchain(platform.machine()).version()

    def headers() -> str:
        found = find_headers()
        return f"API {found.api} in {found.folder}"

    return [
        check("C++ compiler", compiler, "building kernels"),
        check("onnxruntime headers", headers, "building kernels"),
        built_kernels(sources_digest()),
    ]


def _best_arch(host: Host) -> str:
    from edgekit.kernels.tvm.targets import best_arch

    return best_arch(host.machine, host.system, host.features).name


def _verdict(found: Found, host: Host, sources: str) -> str:
    """What the table says of a library. One that is outdated still fits: `edgekit.load` uses it."""
    if found.library is None:
        return found.problem
    return misfit(found.library, host) or (FITS if found.library.sources == sources else FITS_OUTDATED)


def _row(found: Found, verdict: str) -> tuple[str, ...]:
    library = found.library
    if library is None:
        return (found.arch, "", "", "", str(found.folder), verdict)
    count, needs = str(len(library.kernels)), f">=1.{library.ort_api}"
    return (library.arch, count, library.edgekit, needs, str(found.folder), verdict)


def _variant_rows(libraries: Sequence[Found]) -> list[tuple[str, str, str, str]]:
    """Per op and dtype the sizes that kernels are made for; libraries that agree share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for library in (found.library for found in libraries if found.library is not None):
        for op, dtypes in library.ops().items():
            for dtype in dtypes:
                rows.setdefault((f"edgekit::{op}", dtype, _variants(library, op, dtype)), []).append(library.arch)
    return [(*key, ", ".join(archs)) for key, archs in sorted(rows.items())]


def _variants(library: KernelLibrary, op: str, dtype: str) -> str:
    kernels = [kernel for kernel in library.kernels if (kernel.op, kernel.dtype) == (op, dtype)]
    sizes = [" ".join(f"{name}={size}" for name, size in kernel.parameters.items()) for kernel in kernels]
    special = ", ".join(size for size in sizes if size)
    if not special:
        return "any size"
    return f"{special}; any other size" if "" in sizes else special


def _library_json(found: Found, verdict: str) -> dict[str, Any]:
    library = found.library
    data: dict[str, Any] = {
        "arch": found.arch,
        "folder": str(found.folder),
        "fits": verdict in (FITS, FITS_OUTDATED),
        "outdated": verdict == FITS_OUTDATED,
        "reason": None if verdict == FITS else verdict,
    }
    if library is not None:
        data |= {
            "library": str(library.path),
            "edgekit": library.edgekit,
            "features": list(library.features),
            "ort_api": library.ort_api,
            "kernels": [vars(kernel) for kernel in library.kernels],
            "tools": library.tools,
        }
    return data
