"""Plain text for terminals without colours: aligned tables, human figures, and the profiler's results as lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekit.runtime.kernel_library import kernel_kinds, kernel_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgekit.runtime.profiler import Profile, ProfileComparison
    from edgekit.runtime.system import Machine


def table(rows: Sequence[Sequence[str]], headers: Sequence[str] = (), align: str = "") -> str:
    """Columns aligned with spaces, two between neighbours.

    Args:
        rows: the cells, as text; every row as long as the headers.
        headers: the first line; empty for none.
        align: one letter per column, `l` or `r`; columns beyond it are left-aligned.
    """
    lines = [list(map(str, row)) for row in ([headers] if headers else []) + list(rows)]
    if not lines:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = align.ljust(len(widths), "l")

    def pad(cell: str, width: int, side: str) -> str:
        return cell.rjust(width) if side == "r" else cell.ljust(width)

    return "\n".join("  ".join(map(pad, line, widths, sides)).rstrip() for line in lines)


def ms(milliseconds: float) -> str:
    """Milliseconds with three significant digits: `0.0123 ms`, `2.81 ms`, `1240 ms`."""
    return f"{_three_digits(milliseconds)} ms"


def bytes_(count: int | None) -> str:
    """A number of bytes in binary units: `512 B`, `25.2 MiB`; `unknown` for None."""
    if count is None:
        return "unknown"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def percent(share: float) -> str:
    """A share of one in percent: `0.4 %` below ten, `12 %` from there."""
    value = 100 * share
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"


def rate(per_second: float) -> str:
    """A rate with three significant digits, or all digits before the point: `0.25`, `31.6`, `91308`."""
    return _three_digits(per_second)


def plural(count: int, noun: str) -> str:
    """A count with its noun: `1 thread`, `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def machine_line(machine: Machine) -> str:
    """The machine in one line: processor, cores, memory, system, Python."""
    cores = "unknown cores" if machine.cores_physical is None else plural(machine.cores_physical, "core")
    if machine.cores_usable is not None and machine.cores_usable != machine.cores_physical:
        cores += f" ({machine.cores_usable} usable)"
    return f"{machine.cpu}, {cores}, {bytes_(machine.memory_bytes)}, {machine.os}, Python {machine.python}"


def profile_lines(profile: Profile) -> list[str]:
    """A profile as lines of text: latency, throughput, memory, stability, machine, and the costliest ops."""
    latency, stability = profile.latency_ms, profile.stability
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in profile.inputs.items() if _shown(name))
    threads = "unknown threads" if profile.threads is None else plural(profile.threads, "thread")
    kernels = kernel_lines(profile.kernels)
    figures = ("p50", "p90", "p99", "mean", "std", "min", "max")
    rates = f"{rate(profile.inferences_per_second)} inferences/s, {rate(profile.items_per_second)} items/s"
    if "input_ids" in profile.inputs:
        tokens = math.prod(profile.inputs["input_ids"])
        rates = f"{rate(tokens * profile.inferences_per_second)} tokens/s"
    facts = [
        ("latency", ", ".join(f"{figure} {ms(getattr(latency, figure))}" for figure in figures)),
        ("throughput", rates),
        ("loading", f"{ms(profile.load_ms)}, then {ms(profile.first_run_ms)} for the first run"),
        ("memory", f"{bytes_(profile.memory.bytes)} added ({profile.memory.method})"),
        ("model", bytes_(profile.model_bytes)),
        ("timing", f"{stability.verdict} over {plural(profile.runs, 'run')} after {profile.warmup_runs} to warm up"),
        *(("", f"- {reason}") for reason in stability.reasons),
        *(("" if index else "kernels", line) for index, line in enumerate(kernels)),
        ("machine", machine_line(profile.machine)),
        ("versions", ", ".join(f"{name} {version}" for name, version in profile.versions.items())),
    ]
    setting = ", ".join(filter(None, (profile.backend, kernel_kinds(profile.kernels), threads, shapes)))
    lines = [f"{profile.bundle}: {setting} ({profile.input_source})"]
    lines += table(facts).splitlines()
    if profile.ops:
        rows = [(op.op, str(op.count), ms(op.ms_per_run), percent(op.share)) for op in profile.ops]
        lines += ["", *table(rows, ("op", "nodes", "time per run", "share"), "lrrr").splitlines()]
    if profile.overhead_share is not None:
        lines.append(f"outside the kernels: {percent(profile.overhead_share)} of a run")
    return lines if profile.decode is None else [*lines, "", *profile_lines(profile.decode)]


def _shown(name: str) -> bool:
    """Whether an input's shape is worth a word: a cache has the same for every layer, and its mask tells its length."""
    return not name.startswith("past_")


def comparison_lines(comparison: ProfileComparison) -> list[str]:
    """An interleaved comparison as lines of text: both latencies side by side, then the verdict."""
    sides = (comparison.a, comparison.b)
    names = [" on ".join(filter(None, (side.bundle, kernel_kinds(side.kernels)))) for side in sides]
    rows = [
        (name, *(ms(getattr(side.latency_ms, figure)) for figure in ("p50", "p90", "p99")), side.stability.verdict)
        for name, side in zip(names, sides, strict=True)
    ]
    lines = table(rows, ("bundle", "p50", "p90", "p99", "timing"), "lrrrl").splitlines()
    for name, side in zip(names, sides, strict=True):
        lines += [f"- {name}: {reason}" for reason in side.stability.reasons]
    lines.append(comparison.verdict)
    return lines if comparison.decode is None else [*lines, "", *comparison_lines(comparison.decode)]


def _three_digits(value: float) -> str:
    size = abs(value)
    if size >= 100 or value == 0:
        return f"{value:.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return f"{value:.3g}"
