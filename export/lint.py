"""`edgekit.lint`: what of a Core ML bundle likely runs on the Neural Engine, and which changes would matter most.

Static, on any machine: it reads the program, applies the facts of `edgekit.export.lint_facts`, and runs the samples
through the reference runtime for the range of their values. Nothing of it ran on an Apple device; where each op really
runs, `MLComputePlan` says on one (`check_on_mac.py` in the bundle asks it). The score: `edgekit.export.lint_score`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import InputError, UnknownNameError
from edgekit.export import lint_score
from edgekit.export.coreml_tools import import_coremltools, quiet_tools
from edgekit.export.lint_facts import COMPUTE_PLAN, FACTS, FP16_MAX, Fact
from edgekit.export.lint_peaks import Peaks, measure_peaks
from edgekit.export.lint_rules import findings, is_free, macs, out_bytes
from edgekit.export.lint_score import Advice, OpLint, Segment
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import PACKAGE, mac_command
from edgekit.runtime.mil import MilFunction, MilProgram, load_program
from edgekit.runtime.mil.program import BITS

TOP = 3
NOT_ON_DEVICE = "likely, not measured: nothing here ran on an Apple device"


@dataclass(frozen=True)
class LintReport:
    """The answer of `edgekit.lint`; see the module's text for the score."""

    bundle: str
    path: str
    function: str
    functions: tuple[str, ...]
    deployment_target: str
    layout: str
    ops: tuple[OpLint, ...]
    weights: dict[str, int]
    peaks: Peaks | None

    @property
    def _choice(self) -> str:
        """The layout as advice takes it: a language model, which has several functions, comes in one alone."""
        return self.layout if len(self.functions) == 1 else ""

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.ops)

    @property
    def macs_on_engine(self) -> float:
        """The share of the MACs (of the ops where there are none) that likely run on the Neural Engine."""
        weights = lint_score.weights(self.ops)
        return sum(weight for op, weight in zip(self.ops, weights, strict=True) if op.on_engine) / (sum(weights) or 1)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return lint_score.segments(self.ops)

    @property
    def switches(self) -> int:
        """How often the device likely changes."""
        return max(0, len(self.segments) - 1)

    @property
    def weighted_switches(self) -> float:
        return lint_score.weighted_switches(self.ops)

    @property
    def moved(self) -> float:
        """The share of the bytes that ops write which reshapes, transposes and the like do."""
        return lint_score.moved(self.ops)

    @property
    def score(self) -> float:
        return lint_score.score(self.ops)

    @property
    def advice(self) -> tuple[Advice, ...]:
        """Every rule that was met, by what mending it would free: first fp16 overflow, then points, MACs, switches."""
        return lint_score.advise(self.ops, self.peaks, layout=self._choice)

    @property
    def check(self) -> str:
        """The command that tells the truth, on a Mac."""
        return mac_command(Path(self.path))

    def facts(self) -> tuple[Fact, ...]:
        """The facts behind the findings, each once."""
        met = {finding.rule for op in self.ops for finding in op.findings}
        return tuple(fact for rule, fact in FACTS.items() if rule in met)

    def to_json(self) -> dict[str, Any]:
        """Plain data; infinities are None."""
        peaks = self.peaks
        return {
            "bundle": self.bundle,
            "path": self.path,
            "function": self.function,
            "functions": list(self.functions),
            "deployment_target": self.deployment_target,
            "layout": self.layout,
            "score": round(self.score, 1),
            "basis": NOT_ON_DEVICE,
            "check": {"command": self.check, "source": COMPUTE_PLAN.address},
            "macs": self.macs,
            "macs_on_engine": self.macs_on_engine,
            "switches": self.switches,
            "weighted_switches": self.weighted_switches,
            "moved_bytes": self.moved,
            "segments": [
                {**vars(segment), "device": "neural engine" if segment.on_engine else "cpu or gpu"}
                for segment in self.segments
            ],
            "weights_bytes": self.weights,
            "changes": [vars(item) for item in self.advice[:TOP]],
            "findings": [vars(item) for item in self.advice],
            "fp16": None
            if peaks is None
            else {
                "samples": peaks.samples,
                "limit": FP16_MAX,
                "peak": _finite(peaks.worst.peak),
                "peak_op": peaks.worst.name,
                "headroom_bits": _finite(peaks.worst.headroom_bits),
                "overflowing": [{"op": o.name, "type": o.op_type, "peak": _finite(o.peak)} for o in peaks.overflowing],
                "small": [{"op": o.name, "type": o.op_type, "share": o.small} for o in peaks.small],
            },
            "facts": [
                {
                    "rule": fact.rule,
                    "effect": fact.effect,
                    "standing": fact.standing,
                    "says": fact.says,
                    "remedy": fact.advice(self._choice),
                    "sources": [vars(source) for source in fact.sources],
                }
                for fact in self.facts()
            ],
            "ops": [
                {
                    "name": op.name,
                    "type": op.op_type,
                    "shape": list(op.shape),
                    "macs": op.macs,
                    "likely": "neural engine" if op.on_engine else "cpu or gpu",
                    "findings": [{"rule": f.rule, "detail": f.detail} for f in op.findings],
                }
                for op in self.ops
            ],
        }


def lint(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    function: str | None = None,
    samples: bool = True,
    progress: Callable[[str], None] | None = None,
) -> LintReport:
    """Say what of a `coreml` bundle likely runs on the Neural Engine, and what would matter most.

    Args:
        bundle: an opened bundle or its path, packed or not.
        function: the function of the package to look at. Default: the one that the bundle runs.
        samples: whether to run the stored samples through the reference runtime for the range of their values.
        progress: called with each step in words.

    Raises:
        BundleError: the bundle or its package is damaged.
        InputError: the bundle is for another target.
        UnknownNameError: the package has no such function.
    """
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    info = manifest.coreml
    if manifest.target != "coreml" or info is None:
        raise InputError(
            f"edgekit lint reads bundles for Core ML; {opened.path.name} is for {manifest.target}. Export one with: "
            f"edgekit export {manifest.name} --target coreml"
        )
    name = function or info.function
    step = progress or (lambda _: None)
    import_coremltools()  # which reads packages, and would say things of its own when it is loaded
    with package_of(opened) as package:
        step("read the program")
        program = load_program(package)
        if name not in program.functions:
            raise UnknownNameError(f"function of {opened.path.name}", name, program.functions)
        peaks = None
        for part in opened.parts().values() if samples else ():
            if part.manifest.coreml is not None and part.manifest.coreml.function == name:
                step("run the samples in fp32")
                inputs = (given for given, _ in part.samples())
                peaks = measure_peaks(program, name, inputs, part.manifest.coreml.states)
        return lint_function(
            program,
            name,
            bundle=opened.name,
            path=str(opened.path),
            deployment_target=info.deployment_target,
            layout=info.layout,
            peaks=peaks,
        )


def lint_function(
    program: MilProgram,
    name: str,
    *,
    bundle: str = "",
    path: str = "",
    deployment_target: str = "",
    layout: str = "standard",
    peaks: Peaks | None = None,
) -> LintReport:
    """The report on one function of a program; `bundle` to `layout` are for display."""
    function = program.functions[name]
    return LintReport(
        bundle=bundle,
        path=path,
        function=name,
        functions=tuple(program.functions),
        deployment_target=deployment_target,
        layout=layout,
        ops=look_at(function),
        weights=_weight_bytes(function),
        peaks=peaks,
    )


def lint_model(model: Any) -> LintReport:
    """The report on the default function of a model in memory, as Core ML Tools' `ct.convert` gives it."""
    with tempfile.TemporaryDirectory(prefix="edgekit-lint-") as folder, quiet_tools():
        place = Path(folder) / PACKAGE
        # Without the program that it was made from: of one with loops, saving fails over its debugging data.
        bare = import_coremltools().models.MLModel(
            model.get_spec(), weights_dir=model.weights_dir, skip_model_load=True
        )
        bare.save(str(place))
        program = load_program(place)
        return lint_function(program, program.default_function)


def layout_scores(before: Bundle | LintReport, after: Bundle | LintReport) -> str:
    """One line on what `--layout ane` changed, for the export's output: the scores, and what lies behind them."""
    first, second = (item if isinstance(item, LintReport) else lint(item, samples=False) for item in (before, after))
    if second.score <= first.score + 0.05:
        verdict = "the layout gains nothing here; the standard one is as good"
    else:
        met = {item.rule: item.ops for item in first.advice}
        now = {item.rule: item.ops for item in second.advice}
        gone = [f"{rule} {count} -> {now.get(rule, 0)}" for rule, count in met.items() if now.get(rule, 0) < count]
        verdict = f"fewer findings: {', '.join(gone)}" if gone else "fewer moves and switches"
    scores = f"{first.score:.0f} -> {second.score:.0f} of 100"
    return f"Neural Engine lint {scores} with --layout ane ({verdict}); likely, not measured"


def look_at(function: MilFunction) -> tuple[OpLint, ...]:
    """The ops of the outermost block that do something at run time, with their findings. A loop or branch is one op,
    with the MACs of one pass through its blocks."""
    found = []
    for op in function.operations:
        if is_free(op, function):
            continue
        inner = sum(macs(nested, function) for block in op.blocks for nested in block.operations)
        shape = op.outputs[0].type.shape if op.outputs else ()
        entry = OpLint(op.output, op.op_type, shape, macs(op, function) + inner, out_bytes(op), findings(op, function))
        found.append(entry)
    return tuple(found)


@contextlib.contextmanager
def package_of(bundle: Bundle) -> Iterator[Path]:
    """The package's folder: in the bundle, or in a temporary folder that a packed bundle is unpacked into."""
    place = bundle.file(bundle.manifest.model_file)
    if place is not None:
        yield bundle.path / PACKAGE
        return
    with tempfile.TemporaryDirectory(prefix="edgekit-lint-") as folder:
        for name in bundle.manifest.files:
            if name.startswith(f"{PACKAGE}/"):
                file = Path(folder) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(bundle.read(name))
        yield Path(folder) / PACKAGE


def _weight_bytes(function: MilFunction) -> dict[str, int]:
    """Bytes of the stored weights by type: `float16`, or what compressed ones are stored as."""
    stored: Counter[str] = Counter()
    for op in function.walk():
        constants = [op.attributes["val"]] if op.op_type == "const" and "val" in op.attributes else []
        if op.op_type.startswith("constexpr_"):
            constants = list(op.attributes.values())
        for constant in constants:
            if constant.file is not None:
                stored[constant.type.dtype] += -(-constant.type.elements * BITS.get(constant.type.dtype, 8) // 8)
    return dict(stored.most_common())


def _finite(number: float) -> float | None:
    return number if abs(number) != float("inf") else None
