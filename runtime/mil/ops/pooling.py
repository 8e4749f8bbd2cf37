"""Maximum, average and L2 pooling in one, two or three dimensions."""

from __future__ import annotations

import math

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.convolution import padded, paddings, taps
from edgekit.runtime.mil.registry import Array, Call, op


class _Windows:
    """The geometry of one pooling call.

    Attributes:
        pads: elements before and after each spatial axis, the extra ones of `ceil_mode` at the end included.
        stated: the same without those of `ceil_mode`.
        sizes: the output's spatial sizes.
    """

    def __init__(self, call: Call) -> None:
        x = call.array("x")
        rank = x.ndim - 2
        self.kernel = call.ints("kernel_sizes")
        self.strides = call.ints("strides", [1] * rank)
        if len(self.kernel) != rank or len(self.strides) != rank or min(*self.kernel, *self.strides) < 1:
            raise InputError(f"kernel {self.kernel} and strides {self.strides} do not fit {rank} spatial axes")
        self.stated = paddings(call, x.shape[2:], self.kernel, self.strides, [1] * rank)
        ceil = call.flag("ceil_mode")
        self.sizes: list[int] = []
        self.pads: list[tuple[int, int]] = []
        for size, k, s, (before, after) in zip(x.shape[2:], self.kernel, self.strides, self.stated, strict=True):
            total = size + before + after
            count = (total - k) // s + 1
            if ceil:
                count = -(-(total - k) // s) + 1
                # As in PyTorch: no window may begin in the padding at the end. coremltools' own shape rule says so
                # only where there is padding; without any, such a window would lie outside of the input.
                if (count - 1) * s >= size + before:
                    count -= 1
            if count < 1:
                raise InputError(f"a window of {k} is larger than the padded input {total}")
            self.sizes.append(count)
            self.pads.append((before, after + max(0, (count - 1) * s + k - total)))
        self.ones = [1] * rank

    def fold(self, x: Array, combine: np.ufunc, start: float, *, half_sums: bool = False) -> Array:
        """`combine` all elements of each window of the padded `x`, from `start` on."""
        result = np.full((*x.shape[:2], *self.sizes), start, np.float32)
        for _, slices in taps(self.kernel, self.strides, self.ones, self.sizes):
            combine(result, x[(slice(None), slice(None), *slices)], out=result)
            if half_sums:
                round_half(result)
        return result


@op("max_pool", exact=True)
def _max_pool(call: Call) -> Array:
    windows = _Windows(call)
    return windows.fold(padded(call.array("x"), windows.pads, -np.inf), np.maximum, -np.inf)


@op("avg_pool")
def _avg_pool(call: Call) -> Array:
    """Padding counts unless `exclude_padding_from_average`; what `ceil_mode` adds never does, as in PyTorch."""
    x = call.array("x")
    windows = _Windows(call)
    total = windows.fold(padded(x, windows.pads), np.add, 0.0, half_sums=call.half_sums)
    if call.flag("exclude_padding_from_average"):
        inside = np.ones((1, 1, *x.shape[2:]), np.float32)
        return total / windows.fold(padded(inside, windows.pads), np.add, 0.0)
    if windows.pads == windows.stated:
        return total / np.float32(math.prod(windows.kernel))
    inside = padded(np.ones((1, 1, *x.shape[2:]), np.float32), windows.stated, 1.0)
    extra = [(0, b - a) for (_, a), (_, b) in zip(windows.stated, windows.pads, strict=True)]
    return total / windows.fold(padded(inside, extra), np.add, 0.0)


@op("l2_pool")
def _l2_pool(call: Call) -> Array:
    x = call.array("x")
    windows = _Windows(call)
    return np.sqrt(windows.fold(padded(x * x, windows.pads), np.add, 0.0, half_sums=call.half_sums))
