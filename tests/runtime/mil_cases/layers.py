"""Convolutions, pooling, normalisations, reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .case import Case, T, normal, positive, reduction


def convolutions() -> Iterator[Case]:
    def conv(label: str, x: np.ndarray, weight: np.ndarray, **settings: Any) -> Case:
        rank = x.ndim - 2
        function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        bias = normal(weight.shape[0])
        stride, dilation = settings.get("strides", [1] * rank), settings.get("dilations", [1] * rank)
        pad = settings.get("pad", [0] * 2 * rank)

        def expected(x: T) -> T:
            flat = [p for axis in reversed(range(rank)) for p in pad[2 * axis : 2 * axis + 2]]
            tensors = torch.tensor(weight).to(x.dtype), torch.tensor(bias).to(x.dtype)
            return function(F.pad(x, flat), *tensors, stride, 0, dilation, settings.get("groups", 1))

        kind = {"pad_type": "custom"} if "pad" in settings else {"pad_type": "valid"}
        return Case("conv", {"x": x}, expected, {"weight": weight, "bias": bias, **kind, **settings}, label=label)

    yield conv("1x1", normal(2, 6, 5, 7), normal(4, 6, 1, 1))
    yield conv("3x3", normal(1, 3, 7, 9), normal(5, 3, 3, 3), pad=[1, 1, 2, 0], strides=[2, 1])
    yield conv("depthwise", normal(2, 6, 8, 7), normal(6, 1, 3, 3), groups=6, pad=[1, 1, 1, 1], strides=[2, 2])
    yield conv("multiplier", normal(1, 3, 6, 6), normal(6, 1, 2, 3), groups=3)
    yield conv("groups", normal(1, 6, 6, 5), normal(4, 3, 3, 2), groups=2, dilations=[2, 1])
    yield conv("1d", normal(2, 4, 11), normal(3, 4, 4), strides=[3], pad=[2, 1])
    yield conv("3d", normal(1, 2, 4, 5, 6), normal(3, 2, 2, 3, 2))
    yield conv("strided-1x1", normal(1, 3, 7, 7), normal(4, 3, 1, 1), strides=[2, 2])
    weight = normal(4, 3, 3, 2)
    for kind, pads in (("same", (0, 1, 1, 1)), ("same_lower", (1, 0, 1, 1))):
        # 9x9 at stride 2: 5x5 outputs of 3x2 take 2 rows and 1 column more; the odd one goes to the end, or the start.
        expected = lambda x, p=pads: F.conv2d(F.pad(x, p), torch.tensor(weight).to(x.dtype), stride=2)  # noqa: E731
        yield Case(
            "conv",
            {"x": normal(1, 3, 9, 9)},
            expected,
            {"weight": weight, "pad_type": kind, "strides": [2, 2]},
            label=kind,
        )

    def transposed(
        label: str, x: np.ndarray, weight: np.ndarray, torch_settings: dict[str, Any], **settings: Any
    ) -> Case:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.ndim - 3]

        def expected(x: T) -> T:
            return function(x, torch.tensor(weight).to(x.dtype), **torch_settings)

        return Case("conv_transpose", {"x": x}, expected, {"weight": weight, **settings}, label=label)

    yield transposed("valid", normal(2, 4, 5, 6), normal(4, 3, 3, 2), {"stride": (2, 3)}, strides=[2, 3])
    yield transposed(
        "custom",
        normal(1, 4, 5, 6),
        normal(4, 2, 3, 3),
        {"stride": 2, "padding": 1, "groups": 2},
        strides=[2, 2],
        pad=[1, 1, 1, 1],
        pad_type="custom",
        groups=2,
    )
    yield transposed(
        "output-padding",
        normal(1, 2, 5, 5),
        normal(2, 3, 3, 3),
        {"stride": 2, "padding": 1, "output_padding": 1},
        strides=[2, 2],
        pad=[1, 0, 1, 0],
        pad_type="custom",
    )
    yield transposed("1d-dilated", normal(1, 3, 7), normal(3, 2, 3), {"dilation": 2}, dilations=[2])


def pools() -> Iterator[Case]:
    image, line = normal(2, 3, 9, 8), normal(2, 3, 11)
    settings = {"kernel_sizes": [3, 2], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
    window = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 1)}
    yield Case("max_pool", {"x": image}, partial(_call, F.max_pool2d, window), settings)
    yield Case("avg_pool", {"x": image}, partial(_call, F.avg_pool2d, window), settings, label="padding-counts")
    excluded = {**window, "count_include_pad": False}
    yield Case(
        "avg_pool",
        {"x": image},
        partial(_call, F.avg_pool2d, excluded),
        {**settings, "exclude_padding_from_average": True},
        label="padding-excluded",
    )
    for op, function in (("max_pool", F.max_pool2d), ("avg_pool", F.avg_pool2d)):
        yield Case(
            op,
            {"x": normal(1, 2, 8, 10)},
            partial(_call, function, {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
            {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "valid", "ceil_mode": True},
            label="ceil",
        )
    padded_ceil = {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
    for op, function in (("max_pool", F.max_pool1d), ("avg_pool", F.avg_pool1d)):
        yield Case(
            op,
            {"x": normal(1, 2, 10)},
            partial(_call, function, padded_ceil),
            {"kernel_sizes": [3], "strides": [2], "pad_type": "custom", "pad": [1, 1], "ceil_mode": True},
            label="ceil-1d",
        )
    yield Case(
        "max_pool",
        {"x": normal(1, 2, 4, 5, 6)},
        partial(_call, F.max_pool3d, {"kernel_size": 2}),
        {"kernel_sizes": [2, 2, 2], "strides": [2, 2, 2], "pad_type": "valid"},
        label="3d",
    )
    yield Case(
        "l2_pool",
        {"x": line},
        partial(_call, F.lp_pool1d, {"norm_type": 2, "kernel_size": 3, "stride": 2}),
        {"kernel_sizes": [3], "strides": [2], "pad_type": "valid"},
    )


def _call(function: Callable[..., T], settings: dict[str, Any], x: T) -> T:
    return function(x, **settings)


def norms() -> Iterator[Case]:
    image = normal(2, 3, 4, 5) * 3 + 1
    c = [normal(3), positive(3), normal(3), normal(3)]
    mean, variance, gamma, beta = c
    t = [torch.tensor(v) for v in c]
    yield Case(
        "batch_norm",
        {"x": image},
        lambda x: F.batch_norm(x, *(v.to(x.dtype) for v in t), False, 0.0, 2**-10),
        {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta, "epsilon": np.float32(2**-10)},
    )
    yield Case(
        "instance_norm",
        {"x": image},
        lambda x: F.instance_norm(x, weight=t[2].to(x.dtype), bias=t[3].to(x.dtype), eps=2**-10),
        {"gamma": gamma, "beta": beta, "epsilon": np.float32(2**-10)},
    )
    scale, shift = normal(4, 5), normal(4, 5)
    yield Case(
        "layer_norm",
        {"x": image},
        lambda x: F.layer_norm(x, (4, 5), torch.tensor(scale).to(x.dtype), torch.tensor(shift).to(x.dtype), 2**-10),
        {"axes": [-2, -1], "gamma": scale, "beta": shift, "epsilon": np.float32(2**-10)},
    )
    first = lambda x: F.layer_norm(x.transpose(1, 3), (3,), eps=2**-10).transpose(1, 3)  # noqa: E731
    yield Case("layer_norm", {"x": image}, first, {"axes": [1], "epsilon": np.float32(2**-10)}, label="channels")
    l2 = lambda x: x / (x.square().sum((1, 2, 3), keepdim=True) + 0.5).sqrt()  # noqa: E731
    yield Case("l2_norm", {"x": image}, l2, {"epsilon": np.float32(0.5)})
    lrn = partial(F.local_response_norm, size=3, alpha=0.5, beta=0.75, k=2.0)
    yield Case(
        "local_response_norm",
        {"x": normal(2, 7, 3, 4)},
        lambda x: lrn(x),
        {"size": 3, "alpha": np.float32(0.5), "beta": np.float32(0.75), "k": np.float32(2)},
    )


def reductions() -> Iterator[Case]:
    yield from reduction("reduce_sum", torch.sum)
    yield from reduction("reduce_mean", torch.mean)
    yield from reduction("reduce_max", torch.amax)
    yield from reduction("reduce_min", torch.amin)
    yield from reduction("reduce_l1_norm", lambda x, dim, keepdim: x.abs().sum(dim, keepdim=keepdim))
    yield from reduction("reduce_l2_norm", lambda x, dim, keepdim: x.square().sum(dim, keepdim=keepdim).sqrt())
    yield from reduction("reduce_sum_square", lambda x, dim, keepdim: x.square().sum(dim, keepdim=keepdim))
    yield from reduction("reduce_log_sum", lambda x, dim, keepdim: x.sum(dim, keepdim=keepdim).log(), positive(3, 5, 7))
    yield from reduction("reduce_log_sum_exp", torch.logsumexp, normal(3, 5, 7) * 20)

    def prod(x: T, dim: list[int], keepdim: bool) -> T:
        for axis in sorted(dim, reverse=True):
            x = x.prod(axis, keepdim=keepdim)
        return x

    yield from reduction("reduce_prod", prod, (positive(3, 5, 7) + 0.5))
    for op, function in (("reduce_argmax", torch.argmax), ("reduce_argmin", torch.argmin)):
        for axis, keep in ((-1, False), (1, True)):
            expected = lambda x, f=function, a=axis, k=keep: f(x, dim=a, keepdim=k).int()  # noqa: E731
            yield Case(op, {"x": normal(3, 5, 7)}, expected, {"axis": axis, "keep_dims": keep}, label=str(axis))
