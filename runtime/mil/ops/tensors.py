"""Making tensors: fill, ranges, one-hot, padding, tiling, bands, running sums, shapes; and a classifier's answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.convolution import padded
from edgekit.runtime.mil.program import STORAGE
from edgekit.runtime.mil.registry import Array, Call, Result, axis_of, op

_LARGEST = 2**28  # elements of a tensor that a graph may ask for: 1 GiB in fp32


def _storage(call: Call) -> np.dtype[Any]:
    """What the interpreter keeps the first output in."""
    return np.dtype(np.float32) if call.outputs[0].startswith("float") else STORAGE[call.outputs[0]]


def _checked(shape: list[int]) -> list[int]:
    if min(shape, default=0) < 0 or math.prod(shape) > _LARGEST:
        raise InputError(f"it makes a tensor of shape {shape}; the reference runtime makes none above 2^28 elements")
    return shape


@op("shape", exact=True)
def _shape(call: Call) -> Array:
    return np.array(call.array("x").shape, dtype=STORAGE[call.outputs[0]])


@op("fill", exact=True)
def _fill(call: Call) -> Array:
    return np.full(_checked(call.ints("shape")), call.get("value", 0.0), dtype=_storage(call))


@op("fill_like", exact=True)
def _fill_like(call: Call) -> Array:
    return np.full(call.array("ref_tensor").shape, call.get("value", 0.0), dtype=_storage(call))


@op("range_1d")
def _range_1d(call: Call) -> Array:
    start, end, step = (call.array(name) for name in ("start", "end", "step"))
    if not step:
        raise InputError("its step is 0")
    count = max(0, math.ceil((float(end) - float(start)) / float(step)))
    _checked([count])
    result: Array = start + np.arange(count, dtype=start.dtype) * step
    return result


@op("one_hot", exact=True)
def _one_hot(call: Call) -> Array:
    """An index outside 0..size-1 gives a vector of `off_value` alone."""
    indices, size = call.array("indices"), call.integer("one_hot_vector_size")
    axis = axis_of(call.integer("axis", -1), indices.ndim + 1)
    places = np.arange(size).reshape([-1 if index == axis else 1 for index in range(indices.ndim + 1)])
    hit = np.expand_dims(indices, axis) == places
    return np.asarray(np.where(hit, call.get("on_value", 1), call.get("off_value", 0)), dtype=_storage(call))


@op("pad", exact=True)
def _pad(call: Call) -> Array:
    x, flat = call.array("x"), call.ints("pad")
    if len(flat) % 2 or len(flat) // 2 > x.ndim or min(flat, default=0) < 0:
        raise InputError(f"pad {flat} does not fit {list(x.shape)}")
    pads = [(flat[index], flat[index + 1]) for index in range(0, len(flat), 2)]
    mode = call.text("mode", "constant")
    if mode == "constant":
        return padded(x, pads, call.get("constant_val", 0.0))
    if mode not in ("reflect", "replicate"):
        raise InputError(f"its mode {mode!r} is none of constant, reflect, replicate")
    largest = [
        size - 1 if mode == "reflect" else max(a, b) for size, (a, b) in zip(x.shape[-len(pads) :], pads, strict=True)
    ]
    if any(max(pair) > limit for pair, limit in zip(pads, largest, strict=True)):
        raise InputError(f"pad {flat} reflects more than {list(x.shape)} has")
    whole = [(0, 0)] * (x.ndim - len(pads)) + pads
    return np.pad(x, whole, mode="edge") if mode == "replicate" else np.pad(x, whole, mode="reflect")


@op("tile", exact=True)
def _tile(call: Call) -> Array:
    x, reps = call.array("x"), call.ints("reps")
    if len(reps) != x.ndim:
        raise InputError(f"reps {reps} does not fit {list(x.shape)}")
    _checked([size * count for size, count in zip(x.shape, reps, strict=True)])
    return np.tile(x, reps)


@op("band_part", exact=True)
def _band_part(call: Call) -> Array:
    x, lower, upper = call.array("x"), call.integer("lower", -1), call.integer("upper", -1)
    rows, columns = (np.arange(size) for size in x.shape[-2:])
    below = rows[:, None] - columns
    keep = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return np.where(keep, x, np.zeros((), x.dtype))


@op("cumsum")
def _cumsum(call: Call) -> Array:
    x = call.array("x")
    axis = axis_of(call.integer("axis", 0), x.ndim)
    terms = np.flip(x, axis) if call.flag("reverse") else x
    if call.half_sums and x.dtype.kind == "f":
        moved = np.moveaxis(terms, axis, 0)
        sums = np.empty_like(moved)
        running = np.zeros(moved.shape[1:], np.float32)
        for index, term in enumerate(moved):
            running = round_half(np.asarray(running + term))
            sums[index] = running
        result = np.moveaxis(sums, 0, axis)
    else:
        result = np.cumsum(terms, axis=axis, dtype=x.dtype)
    if call.flag("exclusive"):
        lead = (slice(None),) * axis
        result = np.concatenate([np.zeros_like(result[(*lead, slice(0, 1))]), result[(*lead, slice(0, -1))]], axis=axis)
    return np.flip(result, axis) if call.flag("reverse") else result


@op("non_zero", exact=True)
def _non_zero(call: Call) -> Array:
    return np.argwhere(call.array("x")).astype(STORAGE[call.outputs[0]])


@op("classify", exact=True)
def _classify(call: Call) -> Result:
    """The label of the largest probability, and all of them by label."""
    probabilities, classes = np.ravel(call.array("probabilities")), list(call["classes"])
    labels = [label.item() if isinstance(label, np.ndarray) else label for label in classes]
    if len(labels) != probabilities.size:
        raise InputError(f"it has {len(labels)} classes for {probabilities.size} probabilities")
    table = {label: float(value) for label, value in zip(labels, probabilities, strict=True)}
    return labels[int(np.argmax(probabilities))], table
