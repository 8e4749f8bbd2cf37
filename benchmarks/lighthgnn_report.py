"""The rows that the benchmark of LightHGNN measures, and what they say: every sentence is computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

STUDENT, AUTHORS, ZOO = "student ort", "Laplacian torch COO", "zoo ort"
CLAIM = 100.0  # the paper's speed-up
AXES = {"vertices": "vertices", "size": "vertices a hyperedge", "features": "features"}
RIVALS = {
    "authors": "the authors' form",
    "laplacian": "the best Laplacian",
    "zoo": "our export",
    "teacher": "the best teacher",
    "kept": "the best teacher with kept results",
}
KEPT = ("theta cached", "kept sums")

Ratio = tuple[float, float, float]


@dataclass
class Row:
    """One case: medians in ms, and each form's median over each student's with its 95 % interval.

    `batch` is the number of vertices that arrive at once, 0 outside of streams. `sizes` are the average numbers of
    vertices near the asked ones, and of hyperedges and vertices that their answer depends on.
    """

    part: str
    regime: str
    vertices: int
    size: int
    features: int
    batch: int
    threads: int
    p50_ms: dict[str, float] = field(default_factory=dict)
    over: dict[str, dict[str, Ratio]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    wrong_runs: dict[str, tuple[int, int, float]] = field(default_factory=dict)  # of how many, and the worst error

    @property
    def key(self) -> tuple[object, ...]:
        return self.part, self.regime, self.batch, self.vertices, self.size, self.features, self.threads

    @property
    def what(self) -> str:
        if self.regime == "all":
            return "all vertices"
        if self.regime == "one":
            return "one vertex"
        return "vertices arriving one by one" if self.batch == 1 else f"vertices arriving {self.batch} at a time"

    @property
    def name(self) -> str:
        setting = f"V={self.vertices}, hyperedges of {self.size}, {self.features} features"
        return f"{self.what}, {setting}, {_threads(self.threads)}"

    def rivals(self) -> dict[str, str]:
        """The form that stands for each of `RIVALS`, where one was timed: the fastest of its kind, look-ups counted."""
        teachers = {
            name: ms for name, ms in self.p50_ms.items() if not name.startswith(STUDENT) and "prepared" not in name
        }
        plain = {name: ms for name, ms in teachers.items() if not any(kept in name for kept in KEPT)}
        laplacian = {name: ms for name, ms in plain.items() if name.startswith("Laplacian")}
        kinds = {
            "authors": [AUTHORS] if AUTHORS in teachers else [],
            "laplacian": laplacian,
            "zoo": [ZOO],
            "teacher": plain,
            "kept": teachers if len(teachers) > len(plain) else [],
        }
        return {kind: min(names, key=teachers.__getitem__) for kind, names in kinds.items() if names}

    def ratio(self, form: str, student: str = STUDENT) -> Ratio:
        value, low, high = self.over[student][form]
        return value, low, high


def row_line(row: Row) -> str:
    """One row for the terminal."""
    if row.wrong_runs:
        return f"{row.part}: {row.name}: " + "; ".join(_race(row))
    figures = [f"{STUDENT} {row.p50_ms[STUDENT]:.4g} ms"]
    figures += [f"{RIVALS[kind]} ({form}) {_times(row.ratio(form))}" for kind, form in row.rivals().items()]
    figures += [f"{name} left out: {reason}" for name, reason in row.unavailable.items()]
    return f"{row.part}: {row.name}: " + "; ".join(figures)


def markdown(rows: Sequence[Row], title: str, text: str) -> str:
    lines = ["# LightHGNN's student against its teacher", "", title, ""]
    lines += ["## What the figures say", "", *_conclusions(rows), ""]
    lines += ["## How it was measured", "", "```", *text.split("\n\n", 2)[2].strip().splitlines(), "```", ""]
    for row in rows:
        if row.wrong_runs:
            lines += [f"## {row.part}", "", f"{row.name}:", "", *(f"- {line}" for line in _race(row)), ""]
    for part in ("all", "one", "stream"):
        chosen = [row for row in rows if row.part == part]
        if chosen:
            lines += [f"## {part}", "", *_reference_tables(chosen)]
    for part in AXES:
        chosen = [row for row in rows if row.part == part]
        if chosen:
            lines += [f"## {part}", "", *_sweep_tables(part, chosen)]
    return "\n".join(lines).rstrip() + "\n"


def _conclusions(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.part in AXES:
            continue
        if row.wrong_runs:
            yield f"- {row.name}: {'; '.join(_race(row))}."
        else:
            yield f"- {row.name}: {_student(row)} {' '.join(_verdicts(row))}{_prepared(row)}"
    for part in AXES:
        if any(row.part == part for row in rows):
            yield ""
            yield from _reached(part, rows)


def _student(row: Row) -> str:
    ours = row.p50_ms.get(f"{STUDENT}, edgekit")
    also = f", through edgekit.load {_ms(ours)}" if ours is not None else ""
    return f"the student takes {_ms(row.p50_ms[STUDENT])}{also}."


def _verdicts(row: Row) -> Iterator[str]:
    rivals = row.rivals()
    said: set[str] = set()
    for kind, form in rivals.items():
        if form in said:
            continue
        said.add(form)
        others = [RIVALS[other] for other, same in rivals.items() if same == form and other != kind]
        also = f", which is also {' and '.join(others)}" if others else ""
        name, ratio = RIVALS[kind], row.ratio(form)
        yield f"{name[0].upper()}{name[1:]} ({form}{also}) takes {_times(ratio)} as long{_slower(ratio)}."


def _slower(ratio: Ratio) -> str:
    """Says so where the teacher is the faster one, or where it cannot be told."""
    _, low, high = ratio
    if high < 1:
        return ": less than the student"
    return "" if low > 1 else ": level within noise"


def _prepared(row: Row) -> str:
    """The best ratios where look-ups are not counted."""
    ready = {name.removesuffix(", prepared"): ms for name, ms in row.p50_ms.items() if name.endswith(", prepared")}
    plain = {name: ms for name, ms in ready.items() if not any(kept in name for kept in KEPT)}
    parts = []
    chosen = {"authors": [AUTHORS], "zoo": [ZOO], "teacher": plain, "kept": ready}
    for kind, names in chosen.items():
        timed = [name for name in names if name in ready]
        if timed:
            form = min(timed, key=ready.__getitem__)
            parts.append(f"{RIVALS[kind]} ({form}) {_times(row.ratio(f'{form}, prepared'))}")
    return f" With look-ups done beforehand: {', '.join(parts)}." if parts else ""


def _reached(part: str, rows: Sequence[Row]) -> Iterator[str]:
    """For each regime and rival, at which settings of a sweep the claim holds."""
    yield f"Where {CLAIM:.0f}x begins, by {AXES[part]}, on one thread: settings whose interval lies above it."
    yield ""
    yield "| | over " + " | over ".join(RIVALS.values()) + " |"
    yield "|---" * (len(RIVALS) + 1) + "|"
    for _, group in _regimes(part, rows):
        yield f"| {group[0].what} | " + " | ".join(_where(part, group, kind) for kind in RIVALS) + " |"


def _where(part: str, group: Sequence[Row], kind: str) -> str:
    points = [(getattr(row, part), row.ratio(row.rivals()[kind])) for row in group if kind in row.rivals()]
    if not points:
        return ""
    there = [f"{value:,} ({ratio[0]:.0f}x)" for value, ratio in points if ratio[1] >= CLAIM]
    most_value, most = max(points, key=lambda point: point[1][0])
    verdict = ", ".join(there) if there else f"nowhere; at most {most[0]:.3g}x, at {most_value:,}"
    untimed = [f"{getattr(row, part):,}" for row in group if kind not in row.rivals()]
    return f"{verdict}; not timed at {', '.join(untimed)}" if untimed else verdict


def _regimes(part: str, rows: Sequence[Row]) -> Iterator[tuple[tuple[str, int], list[Row]]]:
    chosen = [row for row in rows if row.part == part]
    for key in dict.fromkeys((row.regime, row.batch) for row in chosen):
        group = [row for row in chosen if (row.regime, row.batch) == key]
        yield key, sorted(group, key=lambda row: int(getattr(row, part)))


def _reference_tables(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        students = list(row.over)
        yield f"### {row.name}"
        yield ""
        if row.sizes:
            yield _sizes_text(row)
            yield ""
        yield "| form | ms | " + " | ".join(f"over {student}" for student in students) + " | error |"
        yield "|---" * (len(students) + 3) + "|"
        for name, ms in sorted(row.p50_ms.items(), key=lambda item: item[1]):
            cells = [_times(row.ratio(name, student)) for student in students]
            yield f"| {name} | {ms:.4g} | " + " | ".join(cells) + f" | {row.errors[name]:.1e} |"
        yield ""
        yield from _left_out(row)


def _sweep_tables(part: str, rows: Sequence[Row]) -> Iterator[str]:
    for _, group in _regimes(part, rows):
        kinds = [kind for kind in RIVALS if any(kind in row.rivals() for row in group)]
        yield f"### {group[0].what}"
        yield ""
        sizes = " vertices it depends on |" if group[0].sizes else ""
        yield f"| {AXES[part]} |{sizes} student, ms | " + " | ".join(f"over {RIVALS[kind]}" for kind in kinds) + " |"
        yield "|---" * (2 + bool(sizes) + len(kinds)) + "|"
        for row in group:
            rivals = row.rivals()
            cells = [
                f"{_times(row.ratio(rivals[kind]))}, {rivals[kind]}" if kind in rivals else "not timed"
                for kind in kinds
            ]
            depends = f" {row.sizes['vertices']:.0f} |" if sizes else ""
            yield f"| {getattr(row, part):,} |{depends} {row.p50_ms[STUDENT]:.4g} | " + " | ".join(cells) + " |"
        yield ""
        for row in group:
            yield from _left_out(row)


def _left_out(row: Row) -> Iterator[str]:
    for name, reason in row.unavailable.items():
        yield f"{row.name}: {name} was left out: {reason}."
        yield ""


def _sizes_text(row: Row) -> str:
    return (
        f"On average the answer depends on {row.sizes['vertices']:,.0f} vertices in {row.sizes['hyperedges']:,.0f} "
        f"hyperedges; {row.sizes['near']:,.0f} of them need the first layer."
    )


def _race(row: Row) -> Iterator[str]:
    for name, (wrong, runs, worst) in row.wrong_runs.items():
        yield f"{name}: {wrong} of {runs} runs wrong, the worst by {worst:.1e} (relative L2)"


def _times(ratio: Ratio) -> str:
    value, low, high = ratio
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}x ({low:.{digits}f}-{high:.{digits}f})"


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value >= 0.1 else f"{1000 * value:.3g} µs"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
