"""How much of fp16's range a program uses: the samples through the reference runtime in fp32, and what each op made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.export.lint_facts import FP16_MAX, FP16_SMALLEST_NORMAL
from edgekit.runtime.coreml_info import StateSpec
from edgekit.runtime.mil import MilInterpreter, MilProgram, OpCall

Array = np.ndarray[Any, Any]
# A share of values below the smallest normal that is worth a word.
NOTABLE_SHARE = 0.05


@dataclass(frozen=True)
class OpRange:
    """The magnitudes that one fp16 op made over all samples.

    Attributes:
        name, op_type: the op.
        peak: the largest magnitude; infinite where fp32 itself overflows or the op made a NaN.
        small: the share of its values that are not zero and lie below the smallest normal half, 6.1e-5: they lose
            digits, or become zero where subnormals are flushed.
    """

    name: str
    op_type: str
    peak: float
    small: float

    @property
    def overflows(self) -> bool:
        return not self.peak <= FP16_MAX

    @property
    def headroom_bits(self) -> float:
        """Doublings until fp16 overflows; negative where it does."""
        return math.log2(FP16_MAX / self.peak) if 0 < self.peak < math.inf else -math.inf if self.peak else math.inf


@dataclass(frozen=True)
class Peaks:
    """All fp16 ops of a function by the order of the program, over `samples` runs."""

    ops: tuple[OpRange, ...]
    samples: int

    @property
    def worst(self) -> OpRange:
        return max(self.ops, key=lambda item: item.peak)

    @property
    def overflowing(self) -> tuple[OpRange, ...]:
        return tuple(item for item in self.ops if item.overflows)

    @property
    def small(self) -> tuple[OpRange, ...]:
        """The ops that make notably many values below the smallest normal half, the most first."""
        return tuple(sorted((o for o in self.ops if o.small >= NOTABLE_SHARE), key=lambda item: -item.small))


def measure_peaks(
    program: MilProgram,
    function: str,
    samples: Iterable[Mapping[str, Array]],
    states: tuple[StateSpec, ...] = (),
) -> Peaks | None:
    """Run the samples without rounding and keep each fp16 op's largest magnitude; None without samples or fp16 ops.

    What is summed inside one op does not show: a product that overflows while it is being accumulated in fp16 may
    still end inside the range.
    """
    interpreter = MilInterpreter(program, function, numerics="fp32")
    declared = {
        value.name for op in program.functions[function].walk() for value in op.outputs if value.type.dtype == "float16"
    }
    found: dict[str, tuple[str, float, int, int]] = {}

    def trace(call: OpCall) -> None:
        if call.name not in declared:
            return
        for output in call.outputs:
            array = np.asarray(output)
            if array.dtype.kind != "f" or not array.size:
                continue
            magnitude = np.abs(array)
            peak = float(magnitude.max())
            small = int(((magnitude > 0) & (magnitude < FP16_SMALLEST_NORMAL)).sum())
            op_type, before, below, count = found.get(call.name, (call.op_type, 0.0, 0, 0))
            peak = max(before, math.inf if math.isnan(peak) else peak)
            found[call.name] = (op_type, peak, below + small, count + array.size)

    runs = 0
    for sample in samples:
        given = dict(sample)
        held = {state.name: given.pop(state.input) for state in states if state.input in given}
        interpreter.run(given, held or None, trace=trace)
        runs += 1
    if not found:
        return None
    return Peaks(tuple(OpRange(n, t, peak, below / count) for n, (t, peak, below, count) in found.items()), runs)
