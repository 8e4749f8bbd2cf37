"""What machine is this, how busy is it, and how much memory does a call take?

Linux answers from /proc and /sys, macOS from `sysctl`; whatever a system does not tell is None, never an exception.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

# What the kernel (Linux) or sysctl (macOS) calls an instruction set -> the name we use on every system.
_FEATURES = {
    "avx2": "avx2",
    "hw.optional.avx2_0": "avx2",
    "fma": "fma",
    "hw.optional.fma": "fma",
    "f16c": "f16c",
    "hw.optional.f16c": "f16c",
    "avx512f": "avx512f",
    "hw.optional.avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "hw.optional.avx512vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "asimd": "neon",
    "hw.optional.neon": "neon",
    "hw.optional.advsimd": "neon",
    "asimddp": "dotprod",
    "hw.optional.arm.feat_dotprod": "dotprod",
    "asimdhp": "fp16",
    "hw.optional.arm.feat_fp16": "fp16",
    "i8mm": "i8mm",
    "hw.optional.arm.feat_i8mm": "i8mm",
    "bf16": "bf16",
    "hw.optional.arm.feat_bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
_RESET_SLACK = 2**20


@dataclass(frozen=True)
class Machine:
    """A machine, as far as it tells; None is unknown.

    Attributes:
        cpu: the processor's name, or the board's where the processor has none (many ARM boards).
        arch: the instruction set, such as `x86_64` or `aarch64`.
        cores_physical, cores_logical: of the whole machine; logical ones count hyper-threads.
        cores_usable: logical cores that this process may use: its affinity mask and its cgroup's quota, rounded up.
        features: instruction sets that matter to inference, such as `avx512_vnni` or `dotprod`, sorted.
        memory_bytes: physical memory, or the cgroup's limit where that is lower.
        os, python: names with versions.
    """

    cpu: str
    arch: str
    cores_physical: int | None
    cores_logical: int | None
    cores_usable: int | None
    features: tuple[str, ...]
    memory_bytes: int | None
    os: str
    python: str


@dataclass(frozen=True)
class Limits:
    """What the cgroup grants this process: bytes of memory, and processors (a fraction is possible); None: no limit."""

    memory_bytes: int | None
    cpus: float | None


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of resident memory that a call added at its peak (None: unknown), and how that was found."""

    bytes: int | None
    method: str


def this_machine() -> Machine:
    """Describe the machine this process runs on."""
    if sys.platform == "darwin":
        return _macos_machine(_sysctl())
    return linux_machine(Path("/")) if sys.platform == "linux" else _other_machine()


def linux_machine(root: Path) -> Machine:
    """Describe the Linux machine whose /proc and /sys lie under `root` (`Path("/")` for this one)."""
    cpuinfo = _fields(_read(root / "proc/cpuinfo"))
    limits = cgroup_limits(root)
    board = (_read(root / "proc/device-tree/model") or "").strip("\0\n ")
    flags = (cpuinfo.get("flags") or cpuinfo.get("Features") or "").split()
    memory = _kilobytes(_fields(_read(root / "proc/meminfo")).get("MemTotal"))
    siblings = {text for text in map(_read, _glob(root, "cpu[0-9]*/topology/thread_siblings_list")) if text}
    logical = os.cpu_count()
    return Machine(
        cpu=cpuinfo.get("model name") or board or cpuinfo.get("Hardware") or platform.machine() or "unknown",
        arch=platform.machine(),
        cores_physical=len(siblings) or None,
        cores_logical=logical,
        cores_usable=_usable_cores(logical, limits.cpus),
        features=_canonical(flags),
        memory_bytes=min((size for size in (memory, limits.memory_bytes) if size is not None), default=None),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def cgroup_limits(root: Path) -> Limits:
    """The tightest limits of this process's cgroup and its parents, versions 1 and 2, read under `root`."""
    memory: list[int] = []
    cpus: list[float] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = controllers.split(",")
        if not controllers:
            for folder in _upwards(root / "sys/fs/cgroup", path):
                memory += _integers(_read(folder / "memory.max"))
                quota = _integers(_read(folder / "cpu.max"))
                cpus += [quota[0] / quota[1]] if len(quota) == 2 and quota[1] else []
        if "memory" in names:
            for folder in _upwards(root / "sys/fs/cgroup/memory", path):
                memory += _integers(_read(folder / "memory.limit_in_bytes"))
        if "cpu" in names:
            for folder in _upwards(root / "sys/fs/cgroup/cpu", path):
                quota = _integers(_read(folder / "cpu.cfs_quota_us")) + _integers(_read(folder / "cpu.cfs_period_us"))
                cpus += [quota[0] / quota[1]] if len(quota) == 2 and quota[0] > 0 and quota[1] else []
    # Version 1 writes "no limit" as the largest multiple of a page that fits 63 bits.
    return Limits(min((size for size in memory if size < 2**62), default=None), min(cpus, default=None))


def load_average() -> float | None:
    """How many tasks wanted a processor, on average over the last minute; None where the system does not count."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None


def cpu_frequency_mhz() -> float | None:
    """The first core's present clock in MHz, where Linux tells it."""
    kilohertz = _integers(_read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")))
    if kilohertz:
        return kilohertz[0] / 1000
    try:
        return float(_fields(_read(Path("/proc/cpuinfo")))["cpu MHz"])
    except (KeyError, ValueError):
        return None


def current_memory_bytes() -> int | None:
    """Resident memory of this process in bytes, where Linux tells it."""
    return _kilobytes(_status().get("VmRSS"))


def peak_memory_bytes() -> int | None:
    """The largest resident memory of this process so far, in bytes."""
    peak = _kilobytes(_status().get("VmHWM"))
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def thread_count() -> int | None:
    """Threads of this process, those of native libraries included, where Linux tells it."""
    return next(iter(_integers(_status().get("Threads"))), None)


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """How many bytes of memory this process may still take; None where the system does not tell (macOS, Windows).

    The least of what Linux has available, what the process's cgroup and its parents leave (files kept in memory that
    are not in use count as free), and what the limit of the address space (`ulimit -v`) leaves. All but the last are
    read from /proc and /sys under `root`.
    """
    available = _kilobytes(_fields(_read(root / "proc/meminfo")).get("MemAvailable"))
    left = [] if available is None else [available]
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            for folder in _upwards(root / "sys/fs/cgroup", path):
                left += _left_in(folder, "memory.max", "memory.current", "inactive_file")
        if "memory" in controllers.split(","):
            for folder in _upwards(root / "sys/fs/cgroup/memory", path):
                left += _left_in(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    left += _left_of_address_space()
    return max(0, min(left)) if left else None


def _left_in(folder: Path, limit: str, used: str, unused_files: str) -> list[int]:
    """What a cgroup leaves, where it has a limit."""
    limits, now = _integers(_read(folder / limit)), _integers(_read(folder / used))
    if not limits or not now:
        return []
    files = re.search(rf"^{unused_files} (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
    return [limits[0] - now[0] + (int(files[1]) if files else 0)]


def _left_of_address_space() -> list[int]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    limit, size = resource.getrlimit(resource.RLIMIT_AS)[0], _kilobytes(_status().get("VmSize"))
    return [] if limit == resource.RLIM_INFINITY or size is None else [limit - size]


def measure_peak(call: Callable[[], T]) -> tuple[T, PeakMemory]:
    """Call, and say how much resident memory that added at its peak: allocations freed again before the end count too.

    Linux can reset the process's peak counter, which makes the figure exact; elsewhere `PeakMemory.method` says what
    the figure is worth. Freed memory that the process still holds is given back first (with glibc), since the call
    would reuse it unseen.
    """
    _give_back_freed_memory()
    was_reset = _reset_peak()
    before, peak_before = current_memory_bytes(), peak_memory_bytes()
    result = call()
    return result, peak_added(before, peak_before, current_memory_bytes(), peak_memory_bytes(), was_reset=was_reset)


def peak_added(
    before: int | None, peak_before: int | None, after: int | None, peak_after: int | None, *, was_reset: bool
) -> PeakMemory:
    """What four readings in bytes (resident memory and its peak, before and after a call) tell of the call."""
    if peak_before is None or peak_after is None:
        return PeakMemory(None, "this system does not tell")
    if before is not None and was_reset:
        return PeakMemory(max(0, peak_after - before), "peak resident memory, counter reset before")
    if before is not None and peak_after > peak_before:
        return PeakMemory(max(0, peak_after - before), "peak resident memory, a new peak of the process")
    if before is not None and after is not None:
        return PeakMemory(max(0, after - before), "at least: growth of resident memory, below an earlier peak")
    return PeakMemory(max(0, peak_after - peak_before), "at least: growth of the process's peak")


def installed_version(distribution: str, module: str | None = None) -> str:
    """The version of an installed distribution; without metadata, that of the module if it is loaded; or `unknown`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        loaded = sys.modules.get(module or distribution)
        return str(getattr(loaded, "__version__", "unknown"))


def _macos_machine(sysctl: dict[str, str]) -> Machine:
    physical = _integers(sysctl.get("hw.physicalcpu"))
    memory = _integers(sysctl.get("hw.memsize"))
    return Machine(
        cpu=sysctl.get("machdep.cpu.brand_string") or platform.machine(),
        arch=platform.machine(),
        cores_physical=physical[0] if physical else None,
        cores_logical=os.cpu_count(),
        cores_usable=os.cpu_count(),
        features=_canonical(name.lower() for name, value in sysctl.items() if value == "1"),
        memory_bytes=memory[0] if memory else None,
        os=f"macOS {platform.mac_ver()[0]}",
        python=platform.python_version(),
    )


def _other_machine() -> Machine:
    return Machine(
        cpu=platform.processor() or platform.machine() or "unknown",
        arch=platform.machine(),
        cores_physical=None,
        cores_logical=os.cpu_count(),
        cores_usable=_usable_cores(os.cpu_count(), None),
        features=(),
        memory_bytes=None,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _sysctl() -> dict[str, str]:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "hw", "machdep.cpu"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return _fields(done.stdout)


def _usable_cores(logical: int | None, quota: float | None) -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = [len(affinity(0))] if affinity else [logical] if logical else []
    if quota is not None:
        allowed.append(max(1, math.ceil(quota)))
    return min(allowed, default=None)


def _canonical(flags: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({_FEATURES[flag] for flag in flags if flag in _FEATURES}))


def _give_back_freed_memory() -> None:
    """Return freed heap pages to the system where the C library is glibc."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    """Ask Linux to forget the process's peak resident memory; True where it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    now, peak = current_memory_bytes(), peak_memory_bytes()
    return now is not None and peak is not None and peak - now <= _RESET_SLACK


def _status() -> dict[str, str]:
    return _fields(_read(Path("/proc/self/status")))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _fields(text: str | None) -> dict[str, str]:
    """`key: value` lines; of a repeated key the first counts (a processor's fields repeat per core)."""
    fields: dict[str, str] = {}
    for line in (text or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    return fields


def _integers(text: str | None) -> list[int]:
    return [int(word) for word in (text or "").split() if word.lstrip("-").isdigit()]


def _kilobytes(text: str | None) -> int | None:
    return next((size * 1024 for size in _integers(text)), None)


def _glob(root: Path, pattern: str) -> Iterable[Path]:
    return (root / "sys/devices/system/cpu").glob(pattern)


def _upwards(mount: Path, path: str) -> list[Path]:
    """The folder of a cgroup and of all its parents. A container may see its own group at the mount point itself."""
    folder = mount / path.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(mount))]
