"""Sorting: argsort, topk."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.program import STORAGE
from edgekit.runtime.mil.registry import Array, Call, Result, axis_of, op


def _order(x: Array, axis: int, *, ascending: bool) -> Array:
    """Indices that sort; equal values keep their order (Core ML promises none for ties), NaN comes last."""
    if ascending:
        return np.argsort(x, axis=axis, kind="stable")
    keys = -x if x.dtype.kind == "f" else -x.astype(np.int64)
    return np.argsort(keys, axis=axis, kind="stable")


@op("argsort", exact=True)
def _argsort(call: Call) -> Array:
    x = call.array("x")
    axis = axis_of(call.integer("axis", -1), x.ndim)
    return _order(x, axis, ascending=call.flag("ascending")).astype(STORAGE[call.outputs[0]])


@op("topk", exact=True)
def _topk(call: Call) -> Result:
    x, k = call.array("x"), call.integer("k", 1)
    axis = axis_of(call.integer("axis", -1), x.ndim)
    k = x.shape[axis] if k == -1 else k
    if not 0 <= k <= x.shape[axis]:
        raise InputError(f"k={k} of an axis of {x.shape[axis]} elements")
    lead = (slice(None),) * axis
    order = _order(x, axis, ascending=call.flag("ascending"))[(*lead, slice(0, k))]
    values = np.take_along_axis(x, order, axis=axis)
    if not call.flag("return_indices", True):
        return (values,)
    return values, order.astype(STORAGE[call.outputs[1]])
