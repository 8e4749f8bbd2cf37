"""What is installed, what is missing, and the command that mends it. Nothing heavy is imported to find out."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgekit.errors import InputError
from edgekit.runtime.kernel_library import (
    BUILD_COMMAND,
    FOLDER_VARIABLE,
    OUTDATED,
    Found,
    Host,
    find_libraries,
    kernels_root,
    misfit,
    this_host,
)
from edgekit.runtime.system import Machine, cpu_frequency_mhz, load_average, this_machine

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Status = Literal["ok", "missing", "wrong"]
Group = Literal[
    "runtime", "command line", "export to onnx", "Hugging Face", "text", "training", "kernels", "export to coreml"
]


@dataclass(frozen=True)
class Part:
    """A package that edgekit uses: the module it provides and the extra that brings it (None: always installed).

    `alternatives` are other distributions of the same module; only one of them may be installed.
    """

    name: str
    module: str
    group: Group
    needed_for: str
    extra: str | None = None
    alternatives: tuple[str, ...] = ()


PARTS = (
    Part("edgekit", "edgekit", "runtime", "everything"),
    Part("numpy", "numpy", "runtime", "all arrays"),
    Part(
        "onnxruntime",
        "onnxruntime",
        "runtime",
        "running onnx bundles",
        alternatives=("onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    ),
    Part("pillow", "PIL", "command line", "reading image files", "cli"),
    Part("typer", "typer", "command line", "the edgekit command", "cli"),
    Part("rich", "rich", "command line", "tables and progress bars", "cli"),
    Part("torch", "torch", "export to onnx", "the models and their export", "export"),
    Part("onnx", "onnx", "export to onnx", "writing and checking graphs", "export"),
    Part("onnxscript", "onnxscript", "export to onnx", "PyTorch's ONNX exporter", "export"),
    Part("onnxsim", "onnxsim", "export to onnx", "simplifying graphs", "export"),
    Part("safetensors", "safetensors", "export to onnx", "weights files", "export"),
    Part("transformers", "transformers", "Hugging Face", "exporting Hugging Face directories", "huggingface"),
    Part("tokenizers", "tokenizers", "text", "prompts for bundles with a tokenizer.json", "text"),
    Part("scikit-learn", "sklearn", "training", "the data sets of the examples", "train"),
    Part("apache-tvm", "tvm", "kernels", "compiling kernels and whole models", "tvm"),
    Part("apache-tvm-ffi", "tvm_ffi", "kernels", "the same", "tvm"),
    Part("coremltools", "coremltools", "export to coreml", "writing, reading and checking packages", "coreml"),
)
NATIVE_KERNELS = "native kernels"
_FAST = "running custom ops fast"
# Versions that install and import but do not work, whatever range a package's metadata allows.
KNOWN_BAD = {("apache-tvm-ffi", "0.1.15"): "it crashes in Schedule.tensorize and meta_schedule"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        status: `ok`; `missing`: not installed; `wrong`: installed, but of a version out of range or broken.
        found: the installed version, or what is wrong with it.
        wanted: the range that edgekit's metadata asks for, such as `>=2.9,<2.14`; empty where it asks for none.
        mend: the command that mends it; None where nothing is to do.
    """

    name: str
    group: Group
    status: Status
    found: str
    wanted: str
    needed_for: str
    mend: str | None


@dataclass(frozen=True)
class Diagnosis:
    """All checks, the machine, and what the machine means for inference, as sentences."""

    checks: tuple[Check, ...]
    machine: Machine
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether bundles run here: the runtime is complete and nothing installed is wrong. Extras may be missing."""
        return all(
            check.status == "ok" or (check.status == "missing" and check.group != "runtime") for check in self.checks
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def diagnose(tools: Sequence[Check] = ()) -> Diagnosis:
    """Look at the installed packages, the native kernels and the machine.

    Raises nothing: what cannot be found out is said so.

    Args:
        tools: further checks, for what this part of edgekit may not import: the tools that build kernels. One called
            "native kernels" stands in place of the check of that name, which cannot tell whether they are outdated.
    """
    requirements, wanted_python = _edgekit_metadata()
    checks = [check_python(platform.python_version(), wanted_python)]
    for part in PARTS:
        versions = {name: version for name in (part.name, *part.alternatives) if (version := _version(name))}
        checks.append(
            check_part(
                part, versions, importable=_is_importable(part.module), wanted=wanted_range(part.name, requirements)
            )
        )
    checks += tools
    if all(check.name != NATIVE_KERNELS for check in tools):
        checks.append(built_kernels())
    machine = this_machine()
    return Diagnosis(tuple(checks), machine, machine_notes(machine, load_average(), cpu_frequency_mhz()))


def check_python(version: str, wanted: str) -> Check:
    """Compare the interpreter's version with the range that edgekit's metadata asks for."""
    fits = in_range(version, wanted)
    mend = f"install a Python {wanted} and edgekit into it" if fits is False else None
    status: Status = "wrong" if fits is False else "ok"
    return Check("Python", "runtime", status, version, wanted, "everything", mend)


def check_part(part: Part, versions: dict[str, str], *, importable: bool, wanted: str) -> Check:
    """Judge one package.

    Args:
        versions: the installed versions of the part's distribution and its alternatives, by name.
        importable: whether Python finds the module.
        wanted: the version range; empty for any.
    """

    def result(status: Status, found: str, mend: str | None = None) -> Check:
        return Check(part.name, part.group, status, found, wanted, part.needed_for, mend)

    install = f"pip install '{part.name}{wanted}'"
    if not versions and not importable:
        brings = "edgekit" if part.extra is None else f"'edgekit[{part.extra}]'"
        return result("missing", "not installed", f"pip install {brings}")
    if not versions:
        return result("ok", "version unknown (no metadata)")
    if len(versions) > 1:
        names = " ".join(versions)
        both = " and ".join(f"{name} {version}" for name, version in versions.items())
        return result("wrong", f"{both} overwrite each other", f"pip uninstall -y {names} && {install}")
    name, version = next(iter(versions.items()))
    if not importable:
        broken = f"pip install --force-reinstall '{name}{wanted}'"
        return result("wrong", f"{version}, but its module {part.module} is not there", broken)
    for (bad_name, bad_version), problem in KNOWN_BAD.items():
        if name == bad_name and re.match(rf"{re.escape(bad_version)}(?![0-9])", version):
            return result("wrong", f"{version}: {problem}", f"pip install '{name}{wanted or f'!={bad_version}'}'")
    fits = in_range(version, wanted)
    if fits is False:
        return result("wrong", f"{version}, outside the range", f"pip install '{name}{wanted}'")
    remarks = [name] if name != part.name else []
    if fits is None:
        remarks.append("range not checked: packaging is not installed")
    return result("ok", f"{version} ({'; '.join(remarks)})" if remarks else version)


def built_kernels(sources: str | None = None) -> Check:
    """`check_kernels` of the libraries that `edgekit.load` finds on this machine."""
    try:
        root = kernels_root()
    except InputError as error:
        return Check(
            NATIVE_KERNELS, "kernels", "missing", str(error), "", _FAST, f"{FOLDER_VARIABLE}=FOLDER {BUILD_COMMAND}"
        )
    return check_kernels(root, find_libraries(root), this_host(), sources)


def check_kernels(root: Path, libraries: Sequence[Found], host: Host, sources: str | None = None) -> Check:
    """Say which of the kernel libraries in `root` serve this machine. None at all is no fault: function bodies run.

    Args:
        sources: the hash of the kernels' sources, see `edgekit.kernels.build.sources_digest`; None: not compared.
    """
    fitting: list[str] = []
    outdated: list[str] = []
    others: list[str] = []
    for found in libraries:
        reason = found.problem if found.library is None else misfit(found.library, host)
        if reason:
            others.append(f"{found.arch}: {reason}")
        else:
            fitting.append(found.arch)
            if sources is not None and found.library is not None and found.library.sources != sources:
                outdated.append(found.arch)

    def result(status: Status, found: str, mend: str | None = None) -> Check:
        return Check(NATIVE_KERNELS, "kernels", status, found, "", _FAST, mend)

    if outdated:
        return result("wrong", f"{', '.join(outdated)} in {root}: {OUTDATED.split(';')[0]}", BUILD_COMMAND)
    if fitting:
        more = f" ({len(others)} more for others)" if others else ""
        return result("ok", f"{', '.join(fitting)} in {root}{more}")
    return result("missing", "; ".join(others) or f"none built in {root}", BUILD_COMMAND)


def wanted_range(name: str, requirements: Sequence[str]) -> str:
    """The version range that a list of requirement lines (`torch<2.14,>=2.9; extra == 'export'`) gives for a package.

    The lower bound comes first; empty where the list does not name the package.
    """
    for line in requirements:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)", line)
        if match and _normal(match[1]) == _normal(name):
            bounds = [bound.strip() for bound in match[2].strip(" ()").split(",") if bound.strip()]
            return ",".join(sorted(bounds, key=lambda bound: bound.startswith("<")))
    return ""


def in_range(version: str, wanted: str) -> bool | None:
    """Whether a version lies in a range; None where that cannot be told, because `packaging` is not installed."""
    if not wanted:
        return True
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion
    except ImportError:
        return None
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return None


def machine_notes(machine: Machine, load: float | None, frequency_mhz: float | None) -> tuple[str, ...]:
    """What a machine's features, limits and load (one-minute average) mean for inference, one sentence each."""
    notes = [_int8_note(machine)]
    if machine.cores_usable and machine.cores_logical and machine.cores_usable < machine.cores_logical:
        notes.append(
            f"this process may use {machine.cores_usable} of {machine.cores_logical} logical cores; set threads to at "
            f"most {machine.cores_usable}, since a backend may count them all"
        )
    if load is not None and machine.cores_logical and load > 0.75 * machine.cores_logical:
        notes.append(f"load average {load:.1f} on {machine.cores_logical} cores: latencies measured now are too high")
    if frequency_mhz is not None:
        notes.append(f"the processor runs at {frequency_mhz:.0f} MHz now")
    return tuple(notes)


def _int8_note(machine: Machine) -> str:
    features, arch = set(machine.features), machine.arch.lower()
    if arch in ("x86_64", "amd64", "i386", "i686"):
        fast = sorted(features & {"avx512_vnni", "avx_vnni", "amx_int8"})
        if fast:
            return f"int8: {', '.join(fast)} present, so int8 is expected to be faster than fp32"
        if features:
            return "int8: no VNNI or AMX, so int8 may be no faster than fp32; measure both"
    elif arch in ("aarch64", "arm64"):
        fast = sorted(features & {"dotprod", "i8mm"})
        if fast:
            return f"int8: {', '.join(fast)} present, so int8 is expected to be faster than fp32"
        if features:
            return "int8: neither dotprod nor i8mm, so int8 may be no faster than fp32; measure both"
    return "int8: this system does not tell its processor's features; measure int8 against fp32"


def _edgekit_metadata() -> tuple[list[str], str]:
    """edgekit's requirement lines and its range of Python versions; nothing where it runs without being installed."""
    try:
        metadata = importlib.metadata.metadata("edgekit")
    except importlib.metadata.PackageNotFoundError:
        return [], ""
    python = str(metadata["Requires-Python"]) if "Requires-Python" in metadata else ""
    return list(importlib.metadata.requires("edgekit") or []), python


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_importable(module: str) -> bool:
    """Whether Python finds a top-level module, without importing it."""
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
