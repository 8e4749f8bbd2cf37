"""The rows that the benchmark of DynamicVis measures, and what they say: every sentence is computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NATIVE_OURS, LOOP = "dynamicvis, native kernels", "dynamicvis, reference token loop"
LIBRARY_LOOP = "dynamicvis, transformers token loop"
SPINNING = ", threads spin"  # of a loop with PyTorch's default for threads that wait
PLAIN, FUSED = "ViT plain", "ViT fused"
WANTED = 20.0  # times faster than the loop

# arXiv 2503.16426, on an NVIDIA L20: milliseconds by resolution, DynamicVis base and ViT-B; megabytes at 2048.
PAPER_MS = {512: (15.70, 9.15), 1024: (27.97, 109.61), 2048: (97.18, 1581.18)}
PAPER_MB = {2048: (833.21, 25253.80)}

Ratio = tuple[float, float, float]


@dataclass
class Row:
    """One part at one image size and thread count: medians in ms, ratios with 95 % intervals, MiB, relative L2 errors.

    `runs` is given where a latency is that of few runs in a process of its own, `range_ms` where these spread.
    """

    part: str
    size: int
    threads: int
    p50_ms: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    added_mib: dict[str, float] = field(default_factory=dict)
    added_no_arena_mib: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)
    range_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    limit_gib: float | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.part, self.size, self.threads

    @property
    def name(self) -> str:
        return f"{self.size} x {self.size}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def least_mib(self, subject: str) -> float | None:
        """Added memory with or without the arena, whichever is less."""
        return min(
            (table[subject] for table in (self.added_mib, self.added_no_arena_mib) if subject in table), default=None
        )


def row_line(row: Row) -> str:
    """One row for the terminal."""
    figures = [f"{name} {_ms(ms)} ms" for name, ms in row.p50_ms.items()]
    figures += [f"{name} {_interval(ratio)}" for name, ratio in row.ratios.items()]
    figures += [f"{name} adds {mib:.0f} MiB" for name, mib in row.added_mib.items()]
    figures += [f"{name} adds {mib:.0f} MiB without arena" for name, mib in row.added_no_arena_mib.items()]
    figures += [f"{name} failed: {reason}" for name, reason in row.failed.items()]
    return f"{row.part}, {row.name}: " + "; ".join(figures)


def markdown(rows: Sequence[Row], title: str, text: str) -> str:
    lines = ["# DynamicVis on this CPU", "", title, "", "## What the figures say", "", *_conclusions(rows), ""]
    lines += ["## How it was measured", "", "```", *text.split("\n\n", 2)[2].strip().splitlines(), "```", ""]
    for part in dict.fromkeys(row.part for row in rows):
        lines += [f"## {part}", ""]
        for row in rows:
            if row.part == part:
                lines += [f"### {row.name}", "", *(_memory(row) if part == "memory" else _latency(row)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _conclusions(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.part == "loop":
            for loop in (LOOP, LIBRARY_LOOP):
                ratio = row.ratios[f"{loop} over {NATIVE_OURS}"]
                verdict = "as wanted" if ratio[1] >= WANTED else "less than wanted"
                yield (
                    f"- {row.name}: with native kernels onnxruntime is {_interval(ratio)} times as fast as {loop} "
                    f"({_time(row.p50_ms[NATIVE_OURS])} against {_time(row.p50_ms[loop])}); at least {WANTED:.0f} were "
                    f"wanted: {verdict}."
                )
                yield from _spinning(row, f"{loop}{SPINNING}")
        elif row.part == "vit" or row.p50_ms:
            yield from _against_vit(row)
        if row.part == "memory":
            yield from _memory_against_vit(row)


def _spinning(row: Row, loop: str) -> Iterator[str]:
    if loop in row.range_ms:
        ours, middle, (least, most) = row.p50_ms[NATIVE_OURS], row.p50_ms[loop], row.range_ms[loop]
        yield (
            f"- {row.name}: {loop}, in a process of its own and not in turns: {_time(least)} to {_time(most)} in "
            f"{row.runs[loop]} runs, median {_time(middle)}; {least / ours:.1f} to {most / ours:.1f} times as long as "
            f"with native kernels, median {middle / ours:.1f}."
        )


def _against_vit(row: Row) -> Iterator[str]:
    shares = []
    for vit in (PLAIN, FUSED):
        if vit in row.p50_ms and NATIVE_OURS in row.p50_ms:
            ratio = row.ratios.get(f"{NATIVE_OURS} over {vit}")
            share = ratio[0] if ratio else row.p50_ms[NATIVE_OURS] / row.p50_ms[vit]
            spread = f" ({100 * ratio[1]:.0f}-{100 * ratio[2]:.0f})" if ratio else ""
            shares.append(f"{100 * share:.0f} %{spread} of {vit}'s {_time(row.p50_ms[vit])}")
    if shares:
        yield (
            f"- {row.name}: DynamicVis takes {_time(row.p50_ms[NATIVE_OURS])}, {' and '.join(shares)}."
            f"{_paper(PAPER_MS, row.size)}"
        )


def _memory_against_vit(row: Row) -> Iterator[str]:
    ours = row.least_mib(NATIVE_OURS)
    if ours is None:
        return
    shares = []
    for vit in (PLAIN, FUSED):
        theirs = row.least_mib(vit)
        if theirs is not None:
            shares.append(f"{100 * ours / theirs:.0f} % of {vit}'s {theirs:.0f} MiB")
        elif vit in row.failed:
            shares.append(f"{vit} did not run in the {row.limit_gib:g} GiB that a process may map here")
        if NATIVE_OURS in row.peak_mib and vit in row.peak_mib:
            peaks = row.peak_mib[NATIVE_OURS], row.peak_mib[vit]
            shares[-1] += f" (whole process, with weights: {100 * peaks[0] / peaks[1]:.0f} % of {peaks[1]:.0f} MiB)"
    yield (
        f"- {row.name}, memory that a run adds, the less of with and without arena: DynamicVis {ours:.0f} MiB, "
        f"{'; '.join(shares)}.{_paper(PAPER_MB, row.size)}"
    )


def _paper(figures: dict[int, tuple[float, float]], size: int) -> str:
    if size not in figures:
        return ""
    ours, vit = figures[size]
    return f" The paper, on a GPU: {100 * ours / vit:.0f} %."


def _latency(row: Row) -> Iterator[str]:
    yield "| subject | ms | error |"
    yield "|---|---|---|"
    for name, ms in sorted(row.p50_ms.items(), key=lambda item: item[1]):
        yield f"| {name} | {_ms(ms)} | {_cell(row.errors.get(name), '.1e')} |"
    for name, reason in row.failed.items():
        yield f"| {name} | failed | {reason} |"
    yield ""
    yield "| ratio of times | value |"
    yield "|---|---|"
    for name, ratio in row.ratios.items():
        yield f"| {name} | {_interval(ratio)} |"


def _memory(row: Row) -> Iterator[str]:
    yield "| subject | adds, MiB | without arena, MiB | peak of the process, MiB | ms | of runs | error |"
    yield "|---|---|---|---|---|---|---|"
    names = dict.fromkeys((*row.added_mib, *row.added_no_arena_mib))
    for name in names:
        cells = [_cell(each.get(name), ".0f") for each in (row.added_mib, row.added_no_arena_mib, row.peak_mib)]
        cells += [_ms(row.p50_ms[name]) if name in row.p50_ms else "", _cell(row.runs.get(name), "d")]
        yield f"| {name} | " + " | ".join((*cells, _cell(row.errors.get(name), ".1e"))) + " |"
    for name, reason in row.failed.items():
        yield ""
        yield f"{name} did not run in {row.limit_gib:g} GiB: {reason}"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _interval(ratio: Ratio) -> str:
    value, low, high = ratio
    digits = 2 if value < 10 else 1
    return f"{value:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _ms(ms: float) -> str:
    return f"{ms:.4g}" if ms < 1e4 else f"{ms:.0f}"


def _time(ms: float) -> str:
    return f"{ms / 1e3:.3g} s" if ms >= 1e3 else f"{ms:.3g} ms"
