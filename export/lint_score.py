"""From findings to a score, to device changes, and to the changes that matter most.

The score, 0 to 100:

    score = 100 * pace / (1 + switches / 10) * (1 - moved / 4)

- `pace`: over all ops, the share of the multiply-accumulates (MACs) times the pace that the op likely keeps: 0 off the
  Neural Engine, else the product of the `pace` of its findings. A program without MACs counts ops instead.
- `switches`: changes of device between consecutive ops, each weighted 4 p (1 - p), where p is the share of the MACs
  before it: 1 in the middle of the work, 0 at its ends, where a transfer happens anyway.
- `moved`: the share of the bytes that all ops write which reshapes, transposes and the like do.

Mending what slows an op never lowers it. Mending what keeps an op off the engine raises its pace, and lowers the score
only where the op stands between others that stay away: two more changes of device. Its weights are assumptions that
order advice; no latency follows from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgekit.export.lint_facts import FACTS, FP16_MAX, MOVING_OPS
from edgekit.export.lint_peaks import Peaks
from edgekit.export.lint_rules import Finding

_SWITCH_WEIGHT = 0.1
_MOVED_WEIGHT = 0.25


@dataclass(frozen=True)
class OpLint:
    """One op that computes or moves something.

    Attributes:
        name, op_type: the op; the name is that of its first output.
        shape: of its first output, None for a size known at run time.
        macs: its multiply-accumulates.
        bytes: what it writes, at two bytes per number.
        findings: the rules that it meets.
    """

    name: str
    op_type: str
    shape: tuple[int | None, ...]
    macs: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def on_engine(self) -> bool:
        """Whether it likely runs on the Neural Engine."""
        return not any(finding.fact.effect == "off" for finding in self.findings)

    def pace(self, without: str | None = None) -> float:
        """The share of its pace that it likely keeps; `without` leaves the findings of one rule out."""
        pace = 1.0
        for finding in self.findings:
            if finding.rule != without:
                pace *= finding.fact.pace
        return pace


@dataclass(frozen=True)
class Segment:
    """Consecutive ops that likely run on the same device."""

    on_engine: bool
    ops: int
    macs: int
    first: str
    last: str


@dataclass(frozen=True)
class Advice:
    """What mending all findings of one rule would likely do.

    Attributes:
        rule: the rule; `fp16-overflow` for values beyond fp16's range, which the score does not know.
        ops: how many ops meet it.
        macs: the share of the MACs in those ops.
        switches: how many changes of device it would save.
        points: how much the score would rise.
        example: one of the ops, with its figures.
        remedy: what to change.
        standing: whether the rule is `documented` or `community-observed`.
    """

    rule: str
    ops: int
    macs: float
    switches: int
    points: float
    example: str
    remedy: str
    standing: str


def segments(ops: Sequence[OpLint], without: str | None = None) -> tuple[Segment, ...]:
    """Runs of consecutive ops with the same likely device; `without` takes the findings of one rule as mended."""
    runs: list[list[OpLint]] = []
    for op in ops:
        if runs and _on_engine(runs[-1][-1], without) == _on_engine(op, without):
            runs[-1].append(op)
        else:
            runs.append([op])
    return tuple(
        Segment(_on_engine(run[0], without), len(run), sum(op.macs for op in run), run[0].name, run[-1].name)
        for run in runs
    )


def weighted_switches(ops: Sequence[OpLint], without: str | None = None) -> float:
    """Changes of device, each weighted 4 p (1 - p) for the share p of the MACs before it."""
    counts = weights(ops)
    total, done, changes = sum(counts) or 1, 0.0, 0.0
    for index, op in enumerate(ops):
        if index and _on_engine(ops[index - 1], without) != _on_engine(op, without):
            share = done / total
            changes += 4 * share * (1 - share)
        done += counts[index]
    return changes


def score(ops: Sequence[OpLint], without: str | None = None) -> float:
    """0 to 100, as the module's text says; `without` takes the findings of one rule as mended. Without ops: 100."""
    if not ops:
        return 100.0
    counts = weights(ops)
    pace = sum(count * op.pace(without) for op, count in zip(ops, counts, strict=True)) / (sum(counts) or 1)
    return 100 * pace / (1 + _SWITCH_WEIGHT * weighted_switches(ops, without)) * (1 - _MOVED_WEIGHT * moved(ops))


def advise(ops: Sequence[OpLint], peaks: Peaks | None = None, *, layout: str = "standard") -> tuple[Advice, ...]:
    """One `Advice` per rule that was met by a package of a layout, the most valuable first."""
    base, total = score(ops), sum(op.macs for op in ops) or 1
    switches = len(segments(ops))
    found = []
    for rule, count in Counter(finding.rule for op in ops for finding in op.findings).items():
        met = [op for op in ops if any(finding.rule == rule for finding in op.findings)]
        largest = max(met, key=lambda op: (op.macs, op.bytes))
        detail = next(finding.detail for finding in largest.findings if finding.rule == rule)
        found.append(
            Advice(
                rule=rule,
                ops=count,
                macs=sum(op.macs for op in met) / total,
                switches=switches - len(segments(ops, rule)),
                points=score(ops, rule) - base,
                example=f"{largest.name}: {detail}",
                remedy=FACTS[rule].advice(layout),
                standing=FACTS[rule].standing,
            )
        )
    found.sort(key=lambda item: (-item.points, -item.macs, -item.switches, item.rule))
    return (*_overflow(peaks), *found)


def _overflow(peaks: Peaks | None) -> Iterator[Advice]:
    """A model that overflows answers nonsense: no layout matters before that."""
    if peaks is None or not peaks.overflowing:
        return
    worst = peaks.worst
    yield Advice(
        rule="fp16-overflow",
        ops=len(peaks.overflowing),
        macs=0.0,
        switches=0,
        points=0.0,
        example=f"{worst.name}: {worst.op_type} reaches {worst.peak:.3g}, fp16 ends at {FP16_MAX:.0f}",
        remedy="scale the inputs of this op down, or export with --precision fp32 (off the Neural Engine)",
        standing="documented",
    )


def _on_engine(op: OpLint, without: str | None) -> bool:
    return not any(f.fact.effect == "off" and f.rule != without for f in op.findings)


def weights(ops: Sequence[OpLint]) -> list[int]:
    """What each op counts: its MACs, or 1 in a program that has none."""
    return [op.macs for op in ops] if any(op.macs for op in ops) else [1] * len(ops)


def moved(ops: Sequence[OpLint]) -> float:
    total = sum(op.bytes for op in ops)
    return sum(op.bytes for op in ops if op.op_type in MOVING_OPS) / total if total else 0.0
