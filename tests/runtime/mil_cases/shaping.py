"""Moving values, and making tensors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from .case import Case, T, normal, unary, whole


def layouts() -> Iterator[Case]:
    x = normal(2, 3, 4, 5)
    yield unary("reshape", lambda x: x.reshape(2, 12, 5), x, shape=[2, -1, 5])
    yield Case("reshape", {"x": x}, lambda x: x.reshape(8, 3, 5), {"shape": [-1, 3, 0]}, label="zero-from-the-end")
    like = lambda x: x.reshape(12, 10)  # noqa: E731
    yield Case(
        "reshape_like",
        {"x": x},
        like,
        {"ref_tensors": [normal(12, 3), normal(2, 10)], "begins": [0, 1], "ends": [1, 0], "end_masks": [False, True]},
    )
    yield unary("transpose", lambda x: x.permute(3, 0, 2, 1), x, perm=[-1, 0, 2, 1])
    yield unary("expand_dims", lambda x: x[:, None, ..., None], x, axes=[1, -1])
    narrow = normal(1, 3, 1, 5)
    yield Case("squeeze", {"x": narrow}, lambda x: x.squeeze(2), {"axes": [-2]})
    yield Case("squeeze", {"x": narrow}, lambda x: x.squeeze(), label="all")
    yield unary("flatten2d", lambda x: x.reshape(6, 20), x, axis=2)
    parts = [normal(2, 3), normal(2, 1), normal(2, 4)]
    yield Case("concat", {"values": parts}, lambda values: torch.cat(values, 1), {"axis": -1})
    mixed = [normal(2, 3), normal(2, 3)]
    woven = lambda values: torch.stack(values, 2).reshape(2, 6)  # noqa: E731
    yield Case(
        "concat",
        {"values": mixed},
        woven,
        {"axis": 1, "interleave": True},
        label="interleaved",
        coremltools="its value inference ignores interleave",
    )
    yield Case("stack", {"values": mixed}, lambda values: torch.stack(values, -1), {"axis": -1})
    yield unary("split", lambda x: x.split([1, 3, 1], 3), x, split_sizes=[1, 3, 1], axis=-1)
    yield Case("split", {"x": x}, lambda x: x.split(2, 2), {"num_splits": 2, "axis": 2}, label="even")
    yield unary("reverse", lambda x: x.flip(1, 3), x, axes=[1, -1])
    steps = np.array([2, 0, 3], np.int32)

    def reversed_steps(x: T) -> T:
        return torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(x, steps, strict=True)])

    yield unary("reverse_sequence", reversed_steps, normal(3, 4, 2), lengths=steps, seq_axis=1, batch_axis=0)
    yield unary("pixel_shuffle", partial(F.pixel_shuffle, upscale_factor=2), normal(1, 12, 3, 5), upscale_factor=2)
    yield unary(
        "pixel_unshuffle",
        partial(F.pixel_unshuffle, downscale_factor=2),
        normal(1, 3, 4, 6),
        downscale_factor=np.uint32(2),
    )

    def depth_to_space(x: T) -> T:  # TensorFlow's definition, pixel by pixel
        out = torch.zeros(1, 3, 6, 10, dtype=x.dtype)
        for i in range(6):
            for j in range(10):
                place = (i % 2 * 2 + j % 2) * 3
                out[0, :, i, j] = x[0, place : place + 3, i // 2, j // 2]
        return out

    yield unary("depth_to_space", depth_to_space, normal(1, 12, 3, 5), block_size=2)

    def space_to_depth(x: T) -> T:
        out = torch.zeros(1, 12, 2, 3, dtype=x.dtype)
        for i in range(4):
            for j in range(6):
                place = (i % 2 * 2 + j % 2) * 3
                out[0, place : place + 3, i // 2, j // 2] = x[0, :, i, j]
        return out

    yield unary("space_to_depth", space_to_depth, normal(1, 3, 4, 6), block_size=2)

    def space_to_batch(x: T) -> T:
        x = F.pad(x, (0, 1, 1, 0))
        return torch.cat([x[:, :, i::2, j::3] for i in range(2) for j in range(3)])

    block = {"block_shape": [2, 3]}
    yield unary("space_to_batch", space_to_batch, normal(2, 3, 5, 8), **block, paddings=[[1, 0], [0, 1]])

    def batch_to_space(x: T) -> T:
        out = torch.zeros(2, 3, 6, 9, dtype=x.dtype)
        for i in range(2):
            for j in range(3):
                out[:, :, i::2, j::3] = x[2 * (3 * i + j) : 2 * (3 * i + j) + 2]
        return out[:, :, 1:, :-1]

    yield unary("batch_to_space", batch_to_space, normal(12, 3, 3, 3), **block, crops=[[1, 0], [0, 1]])
    windows = lambda x: x.unfold(1, 3, 2).movedim(-1, 2)  # noqa: E731
    yield unary("sliding_windows", windows, normal(2, 8, 3), axis=1, size=3, stride=2)
    yield unary("crop", lambda x: x[:, :, 1:2, 0:3], x, crop_height=[1, 2], crop_width=[0, 2])


def makers() -> Iterator[Case]:
    yield unary("shape", lambda x: torch.tensor([2, 3, 5], dtype=torch.int32))
    yield Case(
        "fill", {"shape": np.array([2, 3], np.int32)}, lambda shape: torch.full((2, 3), 1.5), {"value": np.float32(1.5)}
    )
    yield Case(
        "fill_like",
        {"ref_tensor": normal(2, 3)},
        lambda ref_tensor: torch.full((2, 3), 7, dtype=torch.int32),
        {"value": np.int32(7)},
    )
    scalars = {"start": np.int32(2), "end": np.int32(11), "step": np.int32(3)}
    yield Case("range_1d", {}, lambda: torch.arange(2, 11, 3, dtype=torch.int32), scalars)
    indices = np.array([0, 3, 1], np.int32)
    hot = lambda indices: torch.where(F.one_hot(indices.long(), 4).T > 0, 2.0, -1.0)  # noqa: E731
    yield Case(
        "one_hot",
        {"indices": indices},
        hot,
        {"one_hot_vector_size": 4, "axis": 0, "on_value": np.float32(2), "off_value": np.float32(-1)},
    )
    image = normal(1, 2, 4, 5)
    for mode, name in (("constant", "constant"), ("reflect", "reflect"), ("replicate", "replicate")):
        extra = {"constant_val": np.float32(0.5)} if mode == "constant" else {}
        expected = lambda x, n=name: F.pad(x, (1, 2, 3, 0), n, *([0.5] if n == "constant" else []))  # noqa: E731
        yield Case("pad", {"x": image}, expected, {"pad": [3, 0, 1, 2], "mode": mode, **extra}, label=mode)
    yield unary("tile", lambda x: x.repeat(2, 1, 3), reps=[2, 1, 3])
    square = normal(2, 4, 5)
    yield unary("band_part", lambda x: x.triu(-1).tril(2), square, lower=1, upper=2)
    yield Case("band_part", {"x": square}, torch.tril, {"lower": -1, "upper": 0}, label="lower")
    yield unary("cumsum", lambda x: x.cumsum(1), square, axis=1)
    backward = lambda x: F.pad(x.flip(-1).cumsum(-1), (1, -1)).flip(-1)  # noqa: E731
    yield Case(
        "cumsum",
        {"x": square},
        backward,
        {"axis": -1, "exclusive": True, "reverse": True},
        label="exclusive",
        coremltools="its value inference fails on exclusive sums",
    )
    yield unary("non_zero", lambda x: x.nonzero().int(), whole(0, 2, 3, 4))
