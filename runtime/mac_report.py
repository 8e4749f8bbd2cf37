"""What `check_on_mac.py` measured on a Mac, read back from the section `mac` of a bundle's report and shown as text.

The section was written on another machine: every field is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.runtime.coreml_info import PACKAGE
from edgekit.runtime.json_fields import Fields, parse_object
from edgekit.runtime.manifest import REPORT
from edgekit.runtime.report import bytes_, ms, percent, table

if TYPE_CHECKING:
    from edgekit.runtime.bundle import Bundle

SECTION = "mac"
SCHEMA = 1
# Rows of the table of ops that run elsewhere than most of the cost.
_OPS = 8


@dataclass(frozen=True)
class MacMachine:
    """The Mac: `translated` says that Python ran under Rosetta, where there is no Neural Engine."""

    chip: str
    model: str
    memory_bytes: int | None
    macos: str
    arch: str
    translated: bool
    python: str
    coremltools: str
    numpy: str


@dataclass(frozen=True)
class MacOutput:
    """One output on one compute unit, the worst of all samples; the figures are None where `problem` says why."""

    name: str
    rel_l2: float | None
    max_abs: float | None
    passed: bool
    problem: str | None


@dataclass(frozen=True)
class MacLatency:
    """Milliseconds of one prediction through coremltools, the conversion of its inputs included."""

    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class MacUnit:
    """One compute unit (`CPU_ONLY`, `CPU_AND_GPU`, `CPU_AND_NE`, `ALL`); `problem` where Core ML failed there."""

    units: str
    passed: bool
    problem: str | None
    load_ms: float | None
    first_run_ms: float | None
    runs: int
    latency_ms: MacLatency | None
    outputs: tuple[MacOutput, ...]


@dataclass(frozen=True)
class MacOp:
    """An op in the compute plan: where Core ML prefers to run it (`CPU`, `GPU`, `NE`), and its share of the cost."""

    op: str
    name: str
    device: str | None
    supported: tuple[str, ...]
    cost: float | None


@dataclass(frozen=True)
class MacGraph:
    """One function of the package. `ops` is empty where there was no compute plan; `plan_problem` may say why."""

    name: str
    function: str
    units: tuple[MacUnit, ...]
    ops: tuple[MacOp, ...]
    plan_problem: str | None


@dataclass(frozen=True)
class MacReport:
    """The whole section. `current` says whether it was measured on this very export."""

    edgekit: str
    measured: str
    current: bool
    machine: MacMachine
    tolerance: float
    graphs: tuple[MacGraph, ...]
    passed: bool


def read_mac_report(bundle: Bundle) -> MacReport | None:
    """What was measured on a Mac; None where nothing was.

    Raises:
        BundleError: the section is not what `check_on_mac.py` writes; the message names the field.
    """
    report = bundle.report()
    if SECTION not in report:
        return None
    where = f"{bundle.path.name}/{REPORT}"
    # Written and parsed again: what a terminal must not show, and numbers that are none, come out there.
    data = parse_object(json.dumps({SECTION: report[SECTION]}), where)[SECTION]
    return _Reader(where).report(data, _package_sha256(bundle))


def _package_sha256(bundle: Bundle) -> str:
    """As the script computes it: the names and hashes of the package's files, hashed."""
    files = sorted(bundle.manifest.files.items())
    lines = (f"{name} {entry.sha256}\n" for name, entry in files if name.startswith(PACKAGE))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Reader(Fields):
    """Reads the section and names the field in every complaint."""

    def report(self, value: Any, digest: str) -> MacReport:
        keys = ("schema", "edgekit", "measured", "package_sha256", "machine", "tolerance", "graphs", "passed")
        data = self._object(value, f"{SECTION}.", keys)
        if data["schema"] != SCHEMA:
            raise self.bad(f"{SECTION}.schema", f"{SCHEMA}, or a newer edgekit is needed to read it", data["schema"])
        graphs = self._list(data, "graphs", f"{SECTION}.")
        return MacReport(
            edgekit=self.text(data["edgekit"], f"{SECTION}.edgekit"),
            measured=self.text(data["measured"], f"{SECTION}.measured"),
            current=self.text(data["package_sha256"], f"{SECTION}.package_sha256") == digest,
            machine=self._machine(data["machine"]),
            tolerance=self._number(data["tolerance"], f"{SECTION}.tolerance"),
            graphs=tuple(self._graph(item, f"{SECTION}.graphs[{index}].") for index, item in enumerate(graphs)),
            passed=self.flag(data["passed"], f"{SECTION}.passed"),
        )

    def _machine(self, value: Any) -> MacMachine:
        prefix = f"{SECTION}.machine."
        data = self.record(value, MacMachine, prefix)
        texts = ("chip", "model", "macos", "arch", "python", "coremltools", "numpy")
        return MacMachine(
            **{key: self.text(data[key], prefix + key) for key in texts},
            memory_bytes=self.optional(data, "memory_bytes", self.count, prefix),
            translated=self.flag(data["translated"], f"{prefix}translated"),
        )

    def _graph(self, value: Any, prefix: str) -> MacGraph:
        data = self._object(value, prefix, ("name", "function", "units", "plan"))
        units = self._list(data, "units", prefix)
        ops: list[Any] = []
        problem = None
        if data["plan"] is not None:
            plan = self._object(data["plan"], f"{prefix}plan.", ("problem", "devices", "ops"))
            ops = self._list(plan, "ops", f"{prefix}plan.")
            problem = self.optional(plan, "problem", self.text, f"{prefix}plan.")
        return MacGraph(
            name=self.text(data["name"], f"{prefix}name"),
            function=self.text(data["function"], f"{prefix}function"),
            units=tuple(self._unit(item, f"{prefix}units[{index}].") for index, item in enumerate(units)),
            ops=tuple(self._op(item, f"{prefix}plan.ops[{index}].") for index, item in enumerate(ops)),
            plan_problem=problem,
        )

    def _unit(self, value: Any, prefix: str) -> MacUnit:
        data = self.record(value, MacUnit, prefix)
        outputs = self._list(data, "outputs", prefix)
        return MacUnit(
            units=self.text(data["units"], f"{prefix}units"),
            passed=self.flag(data["passed"], f"{prefix}passed"),
            problem=self.optional(data, "problem", self.text, prefix),
            load_ms=self.optional(data, "load_ms", self._number, prefix),
            first_run_ms=self.optional(data, "first_run_ms", self._number, prefix),
            runs=self.count(data["runs"], f"{prefix}runs"),
            latency_ms=self.optional(data, "latency_ms", self._latency, prefix),
            outputs=tuple(self._output(item, f"{prefix}outputs[{index}].") for index, item in enumerate(outputs)),
        )

    def _latency(self, value: Any, path: str) -> MacLatency:
        data = self.record(value, MacLatency, f"{path}.")
        return MacLatency(**{key: self._number(item, f"{path}.{key}") for key, item in data.items()})

    def _output(self, value: Any, prefix: str) -> MacOutput:
        data = self.record(value, MacOutput, prefix)
        return MacOutput(
            name=self.text(data["name"], f"{prefix}name"),
            rel_l2=self.optional(data, "rel_l2", self._number, prefix),
            max_abs=self.optional(data, "max_abs", self._number, prefix),
            passed=self.flag(data["passed"], f"{prefix}passed"),
            problem=self.optional(data, "problem", self.text, prefix),
        )

    def _op(self, value: Any, prefix: str) -> MacOp:
        data = self.record(value, MacOp, prefix)
        return MacOp(
            op=self.text(data["op"], f"{prefix}op"),
            name=self.text(data["name"], f"{prefix}name"),
            device=self.optional(data, "device", self.text, prefix),
            supported=self.strings(data["supported"], f"{prefix}supported"),
            cost=self.optional(data, "cost", self._number, prefix),
        )

    def _object(self, value: Any, prefix: str, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict) or value.keys() != set(keys):
            raise self.bad(prefix.removesuffix("."), f"an object with the fields {', '.join(keys)}", value)
        return value

    def _list(self, data: dict[str, Any], key: str, prefix: str) -> list[Any]:
        found: list[Any] = self.get(data, key, list, prefix)
        return found

    def _number(self, value: Any, path: str) -> float:
        """A finite number of at least 0: all that is measured here is one."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < 0:
            raise self.bad(path, "a number of at least 0", value)
        return float(value)


def mac_lines(report: MacReport) -> list[str]:
    """The section as lines of text: the Mac, each compute unit, and where the compute plan puts the ops."""
    machine = report.machine
    memory = "" if machine.memory_bytes is None else f", {bytes_(machine.memory_bytes)}"
    verdict = "PASSED" if report.passed else "FAILED"
    lines = [
        f"on a Mac: {verdict}, {machine.chip} ({machine.model}{memory}), macOS {machine.macos}, coremltools "
        f"{machine.coremltools}, {report.measured}"
    ]
    if not report.current:
        lines.append("note: this was measured on another export; run check_on_mac.py again")
    if machine.translated:
        lines.append("note: Python ran under Rosetta, where Core ML does not reach the Neural Engine")
    rows = [_unit_row(graph, unit, report.tolerance) for graph in report.graphs for unit in graph.units]
    columns = ("graph", "compute units", "p50", "p90", "p99", "loading", "rel L2", "tolerance", "")
    lines += table(rows, columns, "llrrrrrr").splitlines()
    for graph in report.graphs:
        lines += _plan_lines(graph)
    return lines


def _unit_row(graph: MacGraph, unit: MacUnit, tolerance: float) -> tuple[str, ...]:
    figures = unit.latency_ms
    times = ("", "", "") if figures is None else (ms(figures.p50), ms(figures.p90), ms(figures.p99))
    load = "" if unit.load_ms is None else ms(unit.load_ms)
    errors = [output.rel_l2 for output in unit.outputs if output.rel_l2 is not None]
    problems = [f"{output.name}: {output.problem}" for output in unit.outputs if output.problem]
    mark = unit.problem or ("ok" if unit.passed else problems[0] if problems else "differs")
    error = f"{max(errors):.2e}" if errors else ""
    return (graph.name, unit.units, *times, load, error, f"{tolerance:.2g}", mark)


def _plan_lines(graph: MacGraph) -> list[str]:
    """How many ops each device gets and what they cost, then the costliest ones that leave the first device."""
    if not graph.ops:
        return [f"compute plan of {graph.function}: {graph.plan_problem}"] if graph.plan_problem else []
    counts = Counter(op.device or "unknown" for op in graph.ops)
    costs = {device: sum(op.cost or 0.0 for op in graph.ops if (op.device or "unknown") == device) for device in counts}
    whole = sum(costs.values())
    shares = {device: f", {percent(cost / whole)} of the cost" if whole > 0 else "" for device, cost in costs.items()}
    ranked = sorted(counts, key=lambda device: (-costs[device], -counts[device], device))
    parts = [f"{device} {counts[device]} ops{shares[device]}" for device in ranked]
    lines = [f"compute plan of {graph.function}, as Core ML estimates it: {'; '.join(parts)}"]
    elsewhere = [op for op in graph.ops if (op.device or "unknown") != ranked[0]]
    kinds = Counter((op.op, op.device or "unknown", "/".join(op.supported)) for op in elsewhere)
    rows = [(op, str(count), device, supported) for (op, device, supported), count in kinds.most_common(_OPS)]
    if rows:
        heads = (f"not on {ranked[0]}", "ops", "on", "could run on")
        lines += table(rows, heads, "lr").splitlines()
    return lines
