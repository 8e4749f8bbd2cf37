"""`edgekit lint BUNDLE`: its options, and the report for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.cli.console import Output
from edgekit.runtime.report import bytes_, percent

if TYPE_CHECKING:
    from edgekit.export.lint import LintReport


def run(output: Output, bundle: Path, *, function: str | None, ops: bool) -> None:
    """Look at the bundle and show the report; `ops` adds every op."""
    from edgekit.export.lint import lint

    with output.steps(f"lint {bundle.name}", detail=False) as step:
        report = lint(bundle, function=function, progress=step)
    show(output, report, ops=ops)


def show(output: Output, report: LintReport, *, ops: bool) -> None:
    """The report: what was met, the devices, fp16's range, the three changes that matter most, where it is from."""
    from edgekit.export.lint import NOT_ON_DEVICE, TOP

    layout = f", layout {report.layout}" if report.layout != "standard" else ""
    others = [name for name in report.functions if name != report.function]
    output.line(f"{report.bundle}, function {report.function} ({report.deployment_target}{layout})", "bold")
    if others:
        output.line(f"other functions: {', '.join(others)}; look at one with --function NAME")
    if ops:
        _ops(output, report)
    _findings(output, report)
    _devices(output, report)
    _range(output, report)
    output.line(f"score: {report.score:.0f} of 100", "bold")
    if changes := report.advice[:TOP]:
        output.line("what matters most:" if len(changes) > 1 else "what matters:")
    for index, item in enumerate(changes, 1):
        gain = f"+{item.points:.0f} points" if item.points >= 0.5 else ""
        about = ", ".join(
            filter(None, (gain, _share(item.macs), f"{item.switches} switches fewer" if item.switches > 0 else ""))
        )
        output.line(f"  {index}. {item.rule}: {item.remedy}" + (f" ({about})" if about else ""))
    _sources(output, report)
    output.line(f"{NOT_ON_DEVICE}; on a Mac the truth is told by: {report.check}")
    output.json(report.to_json())


def _sources(output: Output, report: LintReport) -> None:
    """What each rule rests on, and where that is said."""
    sources = list(dict.fromkeys(source for fact in report.facts() for source in fact.sources))
    for fact in report.facts():
        numbers = "".join(f"[{sources.index(source) + 1}]" for source in fact.sources)
        output.line(f"{fact.rule}: {fact.says} ({fact.standing}) {numbers}")
    for number, source in enumerate(sources, 1):
        output.line(f"[{number}] {source.title}: {source.address}")


def _findings(output: Output, report: LintReport) -> None:
    met = [item for item in report.advice if item.rule != "fp16-overflow"]
    if not met:
        output.line("no finding")
        return
    rows = [
        (
            item.rule,
            str(item.ops),
            percent(item.macs),
            f"{item.points:+.1f}",
            item.standing,
            item.example,
        )
        for item in met
    ]
    columns = ("finding", "ops", "of the MACs", "points if mended", "standing", "largest")
    output.table(columns, rows, right=columns[1:4], whole=columns[:1])


def _ops(output: Output, report: LintReport) -> None:
    rows = [
        (
            op.name,
            op.op_type,
            "x".join("?" if size is None else str(size) for size in op.shape),
            f"{op.macs:,}",
            "Neural Engine" if op.on_engine else "CPU or GPU",
            "; ".join(f"{finding.rule}: {finding.detail}" for finding in op.findings),
        )
        for op in report.ops
    ]
    columns = ("op", "type", "shape", "MACs", "likely on", "why")
    output.table(columns, rows, right=("MACs",))


def _devices(output: Output, report: LintReport) -> None:
    away = [segment for segment in report.segments if not segment.on_engine]
    counted = "MACs" if report.macs else "ops"
    output.line(
        f"{percent(report.macs_on_engine)} of the {counted} likely on the Neural Engine; "
        f"changes of device: {report.switches} ({report.weighted_switches:.1f} weighted by the MACs around them); "
        f"{percent(report.moved)} of the bytes written are reshapes, transposes and the like"
    )
    largest = sorted(away, key=lambda segment: (-segment.macs, -segment.ops))[:3]
    for segment in largest:
        span = segment.first if segment.first == segment.last else f"{segment.first} .. {segment.last}"
        output.line(f"  likely on the CPU or GPU: {span} ({segment.ops} ops, {segment.macs:,} MACs)")
    if report.weights:
        stored = ", ".join(f"{bytes_(size)} {dtype}" for dtype, size in report.weights.items())
        output.line(f"weights: {stored}")


def _range(output: Output, report: LintReport) -> None:
    peaks = report.peaks
    if peaks is None:
        output.line("fp16's range was not measured: no stored sample for this function, or no fp16 op")
        return
    worst, runs = peaks.worst, f"{peaks.samples} sample{'s' if peaks.samples > 1 else ''}"
    if peaks.overflowing:
        output.line(
            f"fp16 OVERFLOWS on {runs}: {len(peaks.overflowing)} ops, first {peaks.overflowing[0].name} "
            f"({peaks.overflowing[0].op_type}), largest {worst.peak:.3g} at {worst.name}",
            "bold red",
        )
    else:
        output.line(
            f"fp16 peak on {runs}: {worst.peak:.4g} at {worst.name} ({worst.op_type}), {worst.headroom_bits:.1f} bits "
            "below its end"
        )
    for item in peaks.small[:3]:
        output.line(
            f"  {percent(item.small)} of the values of {item.name} ({item.op_type}) are below fp16's normal range"
        )


def _share(macs: float) -> str:
    return f"{percent(macs)} of the MACs" if macs else ""
