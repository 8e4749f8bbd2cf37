"""Native kernels for edgekit's own ops: what is built, does it fit this machine, and which node does it serve?

`edgekit kernels build` writes a folder per instruction set: a library for onnxruntime and `kernels.json`, which says
what the library needs and what it holds. A library is used only where everything fits: this machine and its processor's
features, edgekit's version, onnxruntime's, the library's hash, and every op and dtype that a model uses. Otherwise the
model's own function bodies run, which give the same answers more slowly, and the reason is told.

Nothing here loads a library; finding and judging reads JSON and hashes files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgekit import __version__
from edgekit.errors import BundleError, InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.onnx_files import CustomNode, custom_nodes, mapped

T = TypeVar("T")

DOMAIN = "edgekit"
DESCRIPTION = "kernels.json"
SCHEMA = 1
FOLDER_VARIABLE = "EDGEKIT_KERNELS"
PORTABLE = "portable function body"
BUILD_COMMAND = "edgekit kernels build"
OUTDATED = f"older than the sources; build again: {BUILD_COMMAND}"
KERNELS_HELP = "for edgekit's own ops: native kernels where they fit, portable function bodies, or a built library"

_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class NodeKernel:
    """What serves one node of an op of ours.

    Attributes:
        node: its name in the model.
        op: with its domain, such as `edgekit::BlockSparseAttention`.
        kernel: `native ARCH`, such as `native x86-64-v4`, or `portable function body`.
        reason: the library's path, or why no native kernel serves it.
    """

    node: str
    op: str
    kernel: str
    reason: str

    @property
    def native(self) -> bool:
        """Whether a native kernel serves it."""
        return self.kernel != PORTABLE


@dataclass(frozen=True)
class KernelUse:
    """How many nodes of an op a kernel serves; the fields are those of `NodeKernel`."""

    op: str
    kernel: str
    reason: str
    nodes: int


@dataclass(frozen=True)
class Host:
    """What a library is judged by.

    Attributes:
        machine, system: such as `x86_64` or `aarch64`, and `linux`.
        features: the processor's, as Linux names them in /proc/cpuinfo.
        edgekit: its version.
        ort_api: the newest C API of the installed onnxruntime, its minor version; None where that is unknown.
    """

    machine: str
    system: str
    features: frozenset[str]
    edgekit: str
    ort_api: int | None


@dataclass(frozen=True)
class LibraryKernel:
    """One kernel: what it computes, and the sizes it is made for; one without any serves all other sizes."""

    op: str
    dtype: str
    symbol: str
    parameters: dict[str, int]


@dataclass(frozen=True)
class KernelLibrary:
    """A built library, as its `kernels.json` describes it.

    Attributes:
        arch: the instruction set it was built for, such as `x86-64-v4`.
        machine, system, features, edgekit: what it needs, each as in `Host`.
        path, sha256: the library's file, and its hash in hex.
        ort_api: the oldest C API of onnxruntime that it runs with.
        kernels: the kernels in it.
        tools: the versions of what built it.
        sources: a hash of what it was built from; only who has those sources can tell what it means.
    """

    arch: str
    machine: str
    system: str
    features: tuple[str, ...]
    edgekit: str
    path: Path
    sha256: str
    ort_api: int
    kernels: tuple[LibraryKernel, ...]
    tools: dict[str, str]
    sources: str = ""

    def ops(self) -> dict[str, tuple[str, ...]]:
        """The dtypes it serves per op, such as `{"SelectiveScan": ("float16", "float32")}`."""
        return {
            op: tuple(sorted({kernel.dtype for kernel in self.kernels if kernel.op == op}))
            for op in dict.fromkeys(kernel.op for kernel in self.kernels)
        }


@dataclass(frozen=True)
class Found:
    """A folder with a `kernels.json`: the library, or what is wrong with its description."""

    folder: Path
    library: KernelLibrary | None
    problem: str = ""

    @property
    def arch(self) -> str:
        """What it was built for; the folder's name where the description does not tell."""
        return self.folder.name if self.library is None else self.library.arch


@dataclass(frozen=True)
class Choice:
    """The library that serves a model's nodes, or None; and the reason for that in words."""

    library: KernelLibrary | None
    reason: str

    def kernels(self, nodes: Iterable[CustomNode]) -> tuple[NodeKernel, ...]:
        """What serves each of `nodes`."""
        if self.library is None:
            return tuple(NodeKernel(node.name, f"{DOMAIN}::{node.op}", PORTABLE, self.reason) for node in nodes)
        kernel, path = f"native {self.library.arch}", str(self.library.path)
        return tuple(NodeKernel(node.name, f"{DOMAIN}::{node.op}", kernel, path) for node in nodes)


def this_host(onnxruntime_version: str | None = None) -> Host:
    """This machine and what is installed on it; None takes onnxruntime's version from its package."""
    version = onnxruntime_version or _onnxruntime_version()
    match = re.match(r"1\.(\d+)", version or "")
    machine = platform.machine().lower()
    machine = _MACHINES.get(machine, machine)
    features = _processor_features(Path("/proc/cpuinfo"))
    # Every 64-bit Arm processor that runs Linux has these, also where an emulator shows another machine's list.
    implied = {"asimd", "fp"} if machine == "aarch64" else set()
    return Host(machine, sys.platform, features | implied, __version__, int(match[1]) if match else None)


def kernels_root() -> Path:
    """Where libraries are built and looked for: $EDGEKIT_KERNELS, else a folder per version in the user's cache.

    Raises:
        InputError: the variable is not set and this user has no home folder.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "edgekit" / "kernels" / __version__
    except RuntimeError as error:
        raise InputError(
            f"there is no home folder to look for native kernels in; set {FOLDER_VARIABLE} to a folder for them"
        ) from error


def find_libraries(root: Path) -> tuple[Found, ...]:
    """Every library in `root` itself and in its folders, sorted by folder; none where there is no such folder."""
    try:
        inside = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
        folders = [root, *sorted(inside)]
    except OSError:
        return ()
    return tuple(_found(folder) for folder in folders if (folder / DESCRIPTION).is_file())


def choose(
    nodes: Sequence[CustomNode],
    kernels: str | os.PathLike[str],
    host: Host,
    *,
    bundle: Path | None = None,
) -> Choice:
    """The library to use for a model with `nodes`.

    Args:
        kernels: `auto`, `portable`, or the path of a library, of its folder, or of a folder of such folders.
        bundle: the bundle's path; nothing is loaded from inside of it.

    Raises:
        InputError: the path that was asked for holds no library that fits.
    """
    if kernels == "portable":
        return Choice(None, "portable bodies were asked for")
    if kernels == "auto":
        if not nodes:
            return Choice(None, "the model has no ops of edgekit's")
        try:
            root = kernels_root()
        except InputError as error:
            return Choice(None, str(error))
        found = find_libraries(root)
        if not found:
            return Choice(None, f"no native kernels are built in {root}; to build them: {BUILD_COMMAND}")
    else:
        root, found = _asked_for(kernels)
    misfits: dict[str, str] = {}
    fitting: list[KernelLibrary] = []
    for each in found:
        if each.library is None:
            misfits[each.arch] = each.problem
        elif reason := misfit(each.library, host, nodes, bundle=bundle):
            misfits[each.arch] = reason
        else:
            fitting.append(each.library)
    # The instruction set that needs more of the processor is the faster one.
    best = max(fitting, key=lambda library: len(library.features), default=None)
    if best is not None:
        return Choice(best, str(best.path))
    reasons = "; ".join(f"{arch}: {reason}" for arch, reason in misfits.items())
    if kernels == "auto":
        return Choice(None, f"no native kernels in {root} fit: {reasons}")
    raise InputError(f"the kernels in {root} cannot be used here: {reasons}")


def misfit(
    library: KernelLibrary, host: Host, nodes: Iterable[CustomNode] = (), *, bundle: Path | None = None
) -> str | None:
    """Why a library cannot serve `nodes` on a host; None where it can. Reads the library's file for its hash."""
    if (library.machine, library.system) != (host.machine, host.system):
        return f"built for {library.machine} {library.system}, this is {host.machine} {host.system}"
    if missing := [name for name in library.features if name not in host.features]:
        return f"this processor lacks {', '.join(missing)}"
    if library.edgekit != host.edgekit:
        return f"built by edgekit {library.edgekit}, this is {host.edgekit}; build again: {BUILD_COMMAND}"
    if host.ort_api is None:
        return "the version of the installed onnxruntime is unknown"
    if library.ort_api > host.ort_api:
        return f"needs onnxruntime 1.{library.ort_api} or newer, 1.{host.ort_api} is installed"
    if reason := _unserved(library, nodes):
        return reason
    if bundle is not None and library.path.resolve().is_relative_to(bundle.resolve()):
        return "it lies inside the bundle, and opening a bundle never runs code; copy it out if you trust it"
    return _damage(library)


def bundle_kernels(bundle: Bundle, kernels: str | os.PathLike[str] = "auto") -> tuple[NodeKernel, ...]:
    """What would serve the nodes of an `onnx` bundle here, found without loading anything; empty for other targets.

    Raises:
        BundleError: the bundle's model is damaged.
        InputError: as `choose`.
    """
    if bundle.manifest.target != "onnx":
        return ()
    try:
        with mapped(bundle, bundle.manifest.model_file) as content:
            nodes = custom_nodes(content, DOMAIN)
    except ValueError as error:  # BundleError is one too, and says its own
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"the model of {bundle.path.name} is no ONNX model: {error}; export it again") from error
    if not nodes and kernels in ("auto", "portable"):
        return ()
    return choose(nodes, kernels, this_host(), bundle=bundle.path).kernels(nodes)


def kernel_uses(kernels: Sequence[NodeKernel]) -> tuple[KernelUse, ...]:
    """The nodes counted by op and kernel."""
    counts = Counter((item.op, item.kernel, item.reason) for item in kernels)
    return tuple(KernelUse(*key, nodes) for key, nodes in counts.items())


def kernel_lines(uses: Sequence[KernelUse]) -> list[str]:
    """One line per op and kernel, such as `edgekit::SelectiveScan, 4 nodes: native x86-64-v4`."""
    return [
        f"{use.op}, {use.nodes} {'node' if use.nodes == 1 else 'nodes'}: {use.kernel}"
        + (f" ({use.reason})" if use.kernel == PORTABLE else "")
        for use in uses
    ]


def kernel_kinds(uses: Sequence[KernelUse]) -> str:
    """The kernels in a few words for a heading, such as `native x86-64-v4 kernels`; empty where there are none."""
    kinds = dict.fromkeys(use.kernel for use in uses)
    return " and ".join("portable function bodies" if kind == PORTABLE else f"{kind} kernels" for kind in kinds)


def _asked_for(kernels: str | os.PathLike[str]) -> tuple[Path, tuple[Found, ...]]:
    """The libraries at a path that the caller gave."""
    if not isinstance(kernels, str | os.PathLike):
        raise InputError(f"kernels must be 'auto', 'portable' or a path, got {type(kernels).__name__}")
    path = Path(kernels).expanduser()
    wanted = "expected 'auto', 'portable', or the path of a kernel library or its folder"
    if not path.exists():
        raise InputError(f"no kernels at {str(kernels)!r}; {wanted}. To build some: {BUILD_COMMAND} --out {path}")
    if path.is_dir():
        found = find_libraries(path)
    else:
        found = (_found(path.parent),) if (path.parent / DESCRIPTION).is_file() else ()
        if path.name != DESCRIPTION:
            found = tuple(each for each in found if each.library is None or each.library.path.name == path.name)
    if not found:
        raise InputError(f"there is no {DESCRIPTION} for {path}; {wanted}, as {BUILD_COMMAND} makes it")
    return path, found


def _unserved(library: KernelLibrary, nodes: Iterable[CustomNode]) -> str | None:
    served = library.ops()
    for node in nodes:
        if node.op not in served:
            return f"it has no kernel for {DOMAIN}::{node.op}"
        # Where the model does not tell a dtype, loading decides: onnxruntime refuses kernels of another type.
        if node.dtype is not None and node.dtype not in served[node.op]:
            return f"it has no kernel for {DOMAIN}::{node.op} in {node.dtype}, only {', '.join(served[node.op])}"
    return None


def _damage(library: KernelLibrary) -> str | None:
    try:
        digest = hashlib.sha256(library.path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot read {library.path.name}: {error.strerror or error}; build again: {BUILD_COMMAND}"
    if digest != library.sha256:
        return f"{library.path.name} was changed after it was built; build again: {BUILD_COMMAND}"
    return None


def _found(folder: Path) -> Found:
    path = folder / DESCRIPTION
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Found(folder, _library(folder, data))
    except (OSError, ValueError, RecursionError) as error:  # JSON's errors and ours are ValueErrors
        return Found(folder, None, f"{path} is damaged ({error}); build again: {BUILD_COMMAND}")


def _library(folder: Path, data: Any) -> KernelLibrary:
    """What a `kernels.json` says. Raises `ValueError` that names the field at fault."""
    if not isinstance(data, dict):
        raise ValueError("it holds no object")
    if (schema := _get(data, "schema", int)) != SCHEMA:
        raise ValueError(f"it has schema {schema}, this edgekit reads {SCHEMA}")
    name = _get(data, "library", str)
    if not name or Path(name).name != name or name in (".", ".."):
        raise ValueError(f"'library' must be the name of a file beside it, not {name[:80]!r}")
    kernels = _get(data, "kernels", list)
    if not all(isinstance(entry, dict) for entry in kernels):
        raise ValueError("field 'kernels' must list objects")
    features = _get(data, "features", list)
    tools = data.get("tools", {})
    return KernelLibrary(
        arch=_get(data, "arch", str),
        machine=_get(data, "machine", str),
        system=_get(data, "system", str),
        features=tuple(map(str, features)),
        edgekit=_get(data, "edgekit", str),
        path=folder / name,
        sha256=_get(data, "sha256", str),
        ort_api=_get(data, "ort_api", int),
        kernels=tuple(map(_kernel, kernels)),
        tools={str(key): str(value) for key, value in tools.items()} if isinstance(tools, dict) else {},
        sources=str(data.get("sources", "")),
    )


def _kernel(data: dict[str, Any]) -> LibraryKernel:
    parameters = data.get("parameters", {})
    if not isinstance(parameters, dict) or not all(isinstance(size, int) for size in parameters.values()):
        raise ValueError("field 'parameters' must map names to sizes")
    return LibraryKernel(_get(data, "op", str), _get(data, "dtype", str), _get(data, "symbol", str), parameters)


def _get(data: dict[str, Any], key: str, kind: type[T]) -> T:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):  # no field is a boolean
        raise ValueError(f"field {key!r} is missing or of the wrong type")
    return value


def _processor_features(cpuinfo: Path) -> frozenset[str]:
    """The features of the first processor, under the names of the Linux kernel; none where the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _onnxruntime_version() -> str | None:
    for name in _ONNXRUNTIMES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
