"""What a case of an op is, and short ways to write one. All draw from one generator: their order is part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

T = torch.Tensor
RNG = np.random.default_rng(20)


@dataclass(frozen=True)
class Case:
    """One use of an op: its tensors, its other parameters, what it should give, and with which opset.

    `coremltools` says why coremltools' value inference is no oracle for this use, although it gives a value.
    """

    op: str
    inputs: dict[str, Any]
    expected: Callable[..., Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    opset: str = "iOS17"
    label: str = ""
    coremltools: str = ""

    def __post_init__(self) -> None:
        """Make the floats numbers that fp16 holds: a case then serves both precisions."""
        for name, value in self.inputs.items():
            parts = [halves(v) if np.asarray(v).dtype == np.float32 else v for v in listed(value)]
            self.inputs[name] = parts if isinstance(value, list) else parts[0]

    @property
    def name(self) -> str:
        return f"{self.op}-{self.label}" if self.label else self.op

    @property
    def floats(self) -> bool:
        return any(np.asarray(part).dtype == np.float32 for v in self.inputs.values() for part in listed(v))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def halves(values: np.ndarray) -> np.ndarray:
    """Numbers that fp16 holds, in float32: the same case then serves fp32 and fp16."""
    return values.astype(np.float16).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return halves(RNG.standard_normal(shape))


def positive(*shape: int) -> np.ndarray:
    return halves(RNG.random(shape) + 0.125)


def unit(*shape: int) -> np.ndarray:
    return halves(1.8 * RNG.random(shape) - 0.9)


def whole(low: int, high: int, *shape: int) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.int32)


def truth(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


def unary(op: str, function: Callable[[T], T], x: np.ndarray | None = None, **parameters: Any) -> Case:
    return Case(op, {"x": normal(2, 3, 5) if x is None else x}, lambda x: function(x), parameters)


def binary(op: str, function: Callable[[T, T], T], x: Any = None, y: Any = None, label: str = "") -> Case:
    given = {"x": normal(3, 1, 5) if x is None else x, "y": normal(7, 1) if y is None else y}
    return Case(op, given, lambda x, y: function(x, y), label=label)


def reduction(op: str, function: Callable[..., T], x: np.ndarray | None = None) -> Iterator[Case]:
    x = normal(3, 5, 7) if x is None else x
    everything = partial(function, dim=[0, 1, 2], keepdim=False)
    yield Case(op, {"x": x}, lambda x: function(x, dim=[0, 2], keepdim=True), {"axes": [0, -1], "keep_dims": True})
    yield Case(
        op, {"x": x}, lambda x: function(x, dim=[1], keepdim=False), {"axes": [1], "keep_dims": False}, label="1"
    )
    yield Case(op, {"x": x}, lambda x: everything(x), {"keep_dims": False}, label="all")
