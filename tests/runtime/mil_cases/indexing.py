"""Slices, gather and scatter, sorting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .case import RNG, Case, T, normal, positive, unary, whole


def indexing() -> Iterator[Case]:
    x = normal(4, 5, 6)
    yield unary(
        "slice_by_index",
        lambda x: x[1:, -3:-1, ::2],
        x,
        begin=[1, -3, 0],
        end=[0, -1, 0],
        stride=[1, 1, 2],
        begin_mask=[False, False, True],
        end_mask=[True, False, True],
    )
    squeezed = {"begin": [1, 0, -2], "end": [0, 2, 0], "squeeze_mask": [True, False, True]}
    yield Case(
        "slice_by_index",
        {"x": x},
        lambda x: x[1, 0:2, -2],
        squeezed,
        label="squeezed",
        coremltools="gives float64 for scalars",
    )
    back = {
        "begin": [0, 4, 0],
        "end": [0, 1, 0],
        "stride": [1, -1, 1],
        "begin_mask": [True, False, True],
        "end_mask": [True, False, True],
    }
    yield Case("slice_by_index", {"x": x}, lambda x: x.flip(1)[:, 0:3], back, label="backward")
    yield unary("slice_by_size", lambda x: x[1:3, 2:, 0:4], x, begin=[1, 2, 0], size=[2, -1, 4])

    def updated(x: T, update: T) -> T:
        x = x.clone()
        x[1:3, :, ::2] = update
        return x

    yield Case(
        "slice_update",
        {"x": x, "update": normal(2, 5, 3)},
        updated,
        {
            "begin": [1, 0, 0],
            "end": [3, 0, 0],
            "stride": [1, 1, 2],
            "begin_mask": [False, True, True],
            "end_mask": [False, True, True],
        },
        opset="iOS18",
    )
    places = np.array([[0, 3], [2, 2]], np.int32)
    yield Case("gather", {"x": x, "indices": places}, lambda x, indices: x[:, indices], {"axis": 1})
    rows = whole(0, 6, 4, 2)

    def batched(x: T, indices: T) -> T:
        return torch.stack([part[:, row] for part, row in zip(x, indices, strict=True)])

    yield Case("gather", {"x": x, "indices": rows}, batched, {"axis": 2, "batch_dims": 1}, label="batched")
    negative = np.array([-1, 0, -4], np.int32)
    yield Case(
        "gather",
        {"x": x, "indices": negative},
        lambda x, indices: x[indices],
        {"axis": 0},
        opset="iOS16",
        label="negative",
    )
    along = whole(0, 5, 4, 3, 6)
    taken = lambda x, indices: torch.gather(x, 1, indices.long())  # noqa: E731
    yield Case("gather_along_axis", {"x": x, "indices": along}, taken, {"axis": 1})
    pairs = np.stack([whole(0, 4, 3), whole(0, 5, 3)], -1)
    yield Case("gather_nd", {"x": x, "indices": pairs}, lambda x, indices: x[indices[:, 0], indices[:, 1]])
    inner = whole(0, 5, 4, 3, 1)

    def batched_nd(x: T, indices: T) -> T:
        return torch.stack([part[row[:, 0]] for part, row in zip(x, indices, strict=True)])

    yield Case("gather_nd", {"x": x, "indices": inner}, batched_nd, {"batch_dims": 1}, label="batched")
    targets, updates = np.array([1, 3, 1], np.int32), positive(4, 3, 6)
    combined = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}
    for mode, combine in (combined | {"max": torch.maximum, "min": torch.minimum}).items():

        def scattered(data: T, indices: T, updates: T, f: Any = combine) -> T:
            data = data.clone()
            for place, index in enumerate(indices.tolist()):
                data[:, index] = f(data[:, index], updates[:, place])
            return data

        tensors = {"data": x, "indices": targets, "updates": updates}
        yield Case("scatter", tensors, scattered, {"axis": 1, "mode": mode}, label=mode)
    spread = whole(0, 5, 4, 3, 6)
    added = lambda data, indices, updates: data.scatter_add(1, indices.long(), updates)  # noqa: E731
    yield Case(
        "scatter_along_axis",
        {"data": x, "indices": spread, "updates": updates},
        added,
        {"axis": 1, "mode": "add"},
        coremltools="its value inference ignores the mode",
    )
    distinct = np.broadcast_to(np.array([4, 0, 2], np.int32)[None, :, None], (4, 3, 6)).copy()
    put = lambda data, indices, updates: data.scatter(1, indices.long(), updates)  # noqa: E731
    yield Case(
        "scatter_along_axis",
        {"data": x, "indices": distinct, "updates": updates},
        put,
        {"axis": 1, "mode": "update"},
        label="update",
    )
    for mode, accumulate in (("add", True), ("update", False)):
        corners = np.array([[0, 1], [3, 4]], np.int32)
        placed = lambda data, indices, updates, a=accumulate: data.index_put(  # noqa: E731
            (indices[:, 0].long(), indices[:, 1].long()), updates, accumulate=a
        )
        yield Case(
            "scatter_nd", {"data": x, "indices": corners, "updates": normal(2, 6)}, placed, {"mode": mode}, label=mode
        )
    ranks = RNG.permutation(60).reshape(3, 20).astype(np.float32)
    yield unary("argsort", lambda x: x.argsort(1).int(), ranks, axis=1, ascending=True)
    yield Case("argsort", {"x": ranks}, lambda x: x.argsort(0, descending=True).int(), {"axis": 0}, label="descending")
    for ascending in (False, True):
        best = lambda x, a=ascending: (lambda r: (r.values, r.indices.int()))(x.topk(4, 1, largest=not a))  # noqa: E731
        yield Case("topk", {"x": ranks}, best, {"k": 4, "axis": 1, "ascending": ascending}, label=str(ascending))
