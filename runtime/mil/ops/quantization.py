"""Affine quantization of activations (iOS17)."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.program import STORAGE
from edgekit.runtime.mil.registry import Array, Call, axis_of, op


def per_axis(values: Array, axis: int, rank: int) -> Array:
    """A scalar or vector of scales or zero points, shaped to meet a tensor of `rank` axes along `axis`, as float32."""
    values = values.astype(np.float32)
    if values.ndim == 0:
        return values
    place = axis_of(axis, rank)
    return values.reshape([-1 if index == place else 1 for index in range(rank)])


@op("quantize", exact=True)
def _quantize(call: Call) -> Array:
    """clip(round(x / scale) + zero point), halves to even."""
    x, name = call.array("input"), call.text("output_dtype", "")
    if name not in ("int8", "uint8") or call.outputs[0] != name:
        raise InputError(f"it quantizes to {name!r}, its output is declared {call.outputs[0]}; known: int8, uint8")
    axis = call.integer("axis", 0)
    steps = np.round(x / per_axis(call.array("scale"), axis, x.ndim))
    zero = call.optional("zero_point")
    if zero is not None:
        steps = steps + per_axis(zero, axis, x.ndim)
    limits = np.iinfo(name)
    return np.clip(steps, limits.min, limits.max).astype(STORAGE[name])


@op("dequantize")
def _dequantize(call: Call) -> Array:
    """scale * (x - zero point)."""
    x = call.array("input")
    axis, zero = call.integer("axis", 0), call.optional("zero_point")
    values = x.astype(np.float32)
    if zero is not None:
        values -= per_axis(zero, axis, x.ndim)
    values *= per_axis(call.array("scale"), axis, x.ndim)
    return values
