"""The CPUs that the kernels are compiled for: one entry per instruction set.

x86-64-v3 and x86-64-v4 are the levels of the x86-64 psABI (AVX2 with FMA and F16C; AVX-512 F/BW/CD/DQ/VL); aarch64 is
the ARMv8-A baseline, whose NEON unit every 64-bit ARM CPU has.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from edgekit.errors import InputError, UnknownNameError
from edgekit.kernels.tvm.compat import Target


@dataclass(frozen=True)
class Arch:
    """An instruction set that kernels are compiled for."""

    name: str
    """The name that users type, e.g. "x86-64-v4"."""
    machine: str
    """What `platform.machine()` says on such a device: "x86_64" or "aarch64"."""
    triple: str
    """The LLVM target triple; also the prefix of the matching GNU cross compiler."""
    mcpu: str
    """LLVM's name of the CPU, for -mcpu (x86) or -mcpu/-march (ARM)."""
    mattr: tuple[str, ...]
    """LLVM features on top of `mcpu`."""
    march: str
    """The same instruction set as -march of GCC and clang, for the C code around the kernels."""
    features: tuple[str, ...]
    """What the CPU must have, spelled as in the `flags` (x86) or `Features` (ARM) line of /proc/cpuinfo."""
    lanes: int
    """float32 values in one vector register."""
    registers: int
    """Vector registers of that width."""

    @property
    def target(self) -> Target:
        """The TVM target."""
        spec: dict[str, object] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.mcpu}
        if self.mattr:
            spec["mattr"] = list(self.mattr)
        return Target(spec)


_V3_FEATURES = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")

ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch(
            name="x86-64-v3",
            machine="x86_64",
            triple="x86_64-linux-gnu",
            mcpu="x86-64-v3",
            mattr=(),
            march="x86-64-v3",
            features=_V3_FEATURES,
            lanes=8,
            registers=16,
        ),
        Arch(
            name="x86-64-v4",
            machine="x86_64",
            triple="x86_64-linux-gnu",
            mcpu="x86-64-v4",
            mattr=("-prefer-256-bit",),  # LLVM tunes this level for CPUs that throttle; the kernels want 512 bits
            march="x86-64-v4",
            features=(*_V3_FEATURES, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
            lanes=16,
            registers=32,
        ),
        Arch(
            name="aarch64",
            machine="aarch64",
            triple="aarch64-linux-gnu",
            mcpu="generic",
            mattr=("+neon",),
            march="armv8-a",
            features=("asimd", "fp"),
            lanes=4,
            registers=32,
        ),
    )
}


def get_arch(name: str) -> Arch:
    """The arch called `name`.

    Raises:
        UnknownNameError: no arch has that name; the message lists the known ones.
    """
    try:
        return ARCHS[name]
    except KeyError:
        raise UnknownNameError("kernel arch", name, ARCHS) from None


def best_arch(machine: str, system: str, features: AbstractSet[str]) -> Arch:
    """The fastest arch that a computer runs: of those that fit, the one that needs most of the processor.

    Args:
        machine: "x86_64" or "aarch64".
        system: "linux".
        features: the processor's, spelled as in /proc/cpuinfo.

    Raises:
        InputError: none fits.
    """
    fitting = [arch for arch in ARCHS.values() if arch.machine == machine and features >= set(arch.features)]
    if system != "linux" or not fitting:
        raise InputError(
            f"name the processor to compile for with --arch: {', '.join(ARCHS)}; this machine ({machine} {system}) is "
            "none of them"
        )
    return max(fitting, key=lambda arch: len(arch.features))
