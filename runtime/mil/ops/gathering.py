"""Gather and scatter.

Negative indices count from the end, as iOS15 and iOS16 document; for iOS17 on they are undefined, and so is every index
outside of the tensor: both raise `InputError` here rather than give some number, the negative ones excepted, which
coremltools' own frontends still write.
"""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.registry import Array, Call, axis_of, op


def _places(indices: Array, size: int) -> Array:
    """Indices as 0..size-1. Raises `InputError` for one outside of the tensor."""
    places = indices.astype(np.int64)
    if places.size and (places.min() < -size or places.max() >= size):
        worst = int(places.min() if places.min() < -size else places.max())
        raise InputError(f"the index {worst} is outside of an axis of {size} elements")
    return np.where(places < 0, places + size, places)


@op("gather", exact=True)
def _gather(call: Call) -> Array:
    x, indices = call.array("x"), call.array("indices")
    axis, batch = axis_of(call.integer("axis", 0), x.ndim), call.integer("batch_dims", 0)
    places = _places(indices, x.shape[axis])
    if not batch:
        return np.asarray(np.take(x, places, axis=axis))
    lead = x.shape[:batch]
    if not 0 <= batch <= min(axis, indices.ndim) or indices.shape[:batch] != lead:
        raise InputError(f"{batch} batch axes do not fit {list(x.shape)} and indices {list(indices.shape)}")
    flat = x.reshape(-1, *x.shape[batch:])
    rows = places.reshape(-1, *indices.shape[batch:])
    taken = [np.take(part, row, axis=axis - batch) for part, row in zip(flat, rows, strict=True)]
    shape = x.shape[:axis] + indices.shape[batch:] + x.shape[axis + 1 :]
    return np.stack(taken).reshape(shape) if taken else np.zeros(shape, x.dtype)


@op("gather_along_axis", exact=True)
def _gather_along_axis(call: Call) -> Array:
    x, indices = call.array("x"), call.array("indices")
    axis = axis_of(call.integer("axis", 0), x.ndim)
    if indices.ndim != x.ndim:
        raise InputError(f"indices {list(indices.shape)} and x {list(x.shape)} must have as many axes")
    return np.take_along_axis(x, _places(indices, x.shape[axis]), axis=axis)


def _columns(indices: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    return tuple(_places(indices[..., axis], shape[axis]) for axis in range(indices.shape[-1]))


@op("gather_nd", exact=True)
def _gather_nd(call: Call) -> Array:
    x, indices, batch = call.array("x"), call.array("indices"), call.integer("batch_dims", 0)
    if not 0 <= batch < indices.ndim or indices.shape[:batch] != x.shape[:batch]:
        raise InputError(f"{batch} batch axes do not fit {list(x.shape)} and indices {list(indices.shape)}")
    if indices.shape[-1] > x.ndim - batch:
        raise InputError(f"indices of {indices.shape[-1]} axes are too many for {list(x.shape)}")
    lead = tuple(
        np.arange(size).reshape([-1 if axis == place else 1 for place in range(indices.ndim - 1)])
        for axis, size in enumerate(x.shape[:batch])
    )
    return np.asarray(x[(*lead, *_columns(indices, x.shape[batch:]))])


_MODES = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum}


def _put(call: Call, data: Array, index: tuple[Array | slice, ...], updates: Array) -> Array:
    """`data` with `updates` combined at `index`, one after the other where a place comes twice."""
    mode = call.text("mode", "add")
    if data.dtype != updates.dtype:
        raise InputError(f"data is {data.dtype}, updates is {updates.dtype}; they must be of one type")
    result = np.array(data)
    if result[index].shape != updates.shape:
        raise InputError(f"updates has shape {list(updates.shape)}, the places {list(result[index].shape)}")
    if mode == "update":
        result[index] = updates
    elif mode == "div" and data.dtype.kind != "f":
        raise InputError("scatter by division of integers has no documented result")
    elif mode in _MODES:
        _MODES[mode].at(result, index, updates)  # type: ignore[arg-type]  # slices are taken, too
    else:
        raise InputError(f"its mode {mode!r} is none of update, {', '.join(_MODES)}")
    return round_half(result) if call.half_sums and data.dtype.kind == "f" else result


@op("scatter")
def _scatter(call: Call) -> Array:
    data, indices = call.array("data"), call.array("indices")
    axis = axis_of(call.integer("axis", 0), data.ndim)
    index = (slice(None),) * axis + (_places(indices, data.shape[axis]),)
    return _put(call, data, index, call.array("updates"))


@op("scatter_along_axis")
def _scatter_along_axis(call: Call) -> Array:
    data, indices = call.array("data"), call.array("indices")
    axis = axis_of(call.integer("axis", 0), data.ndim)
    if indices.ndim != data.ndim:
        raise InputError(f"indices {list(indices.shape)} and data {list(data.shape)} must have as many axes")
    places = [
        np.arange(size).reshape([-1 if place == other else 1 for other in range(data.ndim)])
        for place, size in enumerate(indices.shape)
    ]
    places[axis] = _places(indices, data.shape[axis])
    return _put(call, data, tuple(np.broadcast_arrays(*places)), call.array("updates"))


@op("scatter_nd")
def _scatter_nd(call: Call) -> Array:
    data, indices = call.array("data"), call.array("indices")
    if indices.shape[-1] > data.ndim:
        raise InputError(f"indices of {indices.shape[-1]} axes are too many for {list(data.shape)}")
    return _put(call, data, _columns(indices, data.shape), call.array("updates"))
