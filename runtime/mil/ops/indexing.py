"""Slices: reading them and writing them."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.registry import Array, Call, op


def _slices(call: Call, shape: tuple[int, ...]) -> tuple[slice | int, ...]:
    """numpy's index for `begin`, `end`, `stride` and the masks of a call."""
    rank = len(shape)
    begin, end = call.ints("begin"), call.ints("end")
    stride = call.ints("stride", [1] * rank)
    begin_mask, end_mask, squeeze = (call.flags(f"{name}_mask", rank) for name in ("begin", "end", "squeeze"))
    if {len(begin), len(end), len(stride), len(begin_mask), len(end_mask), len(squeeze)} != {rank} or 0 in stride:
        raise InputError(f"begin {begin}, end {end} and stride {stride} do not fit a tensor of {rank} axes")
    index: list[slice | int] = []
    for axis in range(rank):
        if squeeze[axis]:
            place = 0 if begin_mask[axis] else begin[axis]
            if not -shape[axis] <= place < shape[axis]:
                raise InputError(f"the place {place} is outside of axis {axis} of {list(shape)}")
            index.append(place)
        else:
            start = None if begin_mask[axis] else begin[axis]
            stop = None if end_mask[axis] else end[axis]
            index.append(slice(start, stop, stride[axis]))
    return tuple(index)


@op("slice_by_index", exact=True)
def _slice_by_index(call: Call) -> Array:
    x = call.array("x")
    return np.asarray(x[_slices(call, x.shape)])


@op("slice_by_size", exact=True)
def _slice_by_size(call: Call) -> Array:
    x, begin, size = call.array("x"), call.ints("begin"), call.ints("size")
    if len(begin) != x.ndim or len(size) != x.ndim:
        raise InputError(f"begin {begin} and size {size} do not fit {list(x.shape)}")
    index = []
    for axis, (start, count) in enumerate(zip(begin, size, strict=True)):
        first = start + x.shape[axis] if start < 0 else start
        stop = x.shape[axis] if count == -1 else first + count
        if not 0 <= first <= stop <= x.shape[axis]:
            raise InputError(f"{count} elements from {start} on lie outside of axis {axis} of {list(x.shape)}")
        index.append(slice(first, stop))
    return x[tuple(index)]


@op("slice_update", exact=True)
def _slice_update(call: Call) -> Array:
    x, update = call.array("x"), call.array("update")
    if x.dtype != update.dtype:
        raise InputError(f"x is {x.dtype}, update is {update.dtype}; they must be of one type")
    result = np.array(x)
    index = _slices(call, x.shape)
    if result[index].shape != update.shape:
        raise InputError(f"the slice has shape {list(result[index].shape)}, the update {list(update.shape)}")
    result[index] = update
    return result
