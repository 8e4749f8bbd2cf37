"""IEEE half precision in arrays of float32: rounding, and sums that round after every addition.

Values of fp16 tensors are kept as float32 arrays that hold nothing but half-precision numbers: numpy computes with
float32 several times faster than with float16, and a product of two halves is exact in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_BLOCK = 32768  # elements rounded at a time: three arrays of that size fit a second-level cache
_EXPONENT = np.int32(0x7F800000)
_SIGN = np.int32(-0x80000000)
_SMALLEST_NORMAL = np.float32(2.0**-14)
_BEYOND = np.float32(2.0**15)  # the least power of two from which rounding may reach infinity
_STEPS = np.float32(1.5 * 2.0**13)  # half has 13 bits less than single; the 1.5 keeps sums within one binade


def round_half(x: NDArray[Any]) -> Floats:
    """`x` rounded to half precision (nearest, ties to even), as float32.

    Magnitudes from 65520 on become infinite, those below 2^-14 keep multiples of 2^-24, NaN stays NaN, zeros keep their
    sign: all as IEEE 754 says, and as `x.astype(float16)`, at a tenth of its time. A float32 array that may be written
    to and lies in one piece is rounded in place and returned; any other is copied.
    """
    if not (x.dtype == np.float32 and x.flags.writeable and x.flags.c_contiguous):
        x = np.array(x, dtype=np.float32, order="C")
    flat = x.reshape(-1)
    powers = np.empty(min(_BLOCK, flat.size), np.float32)
    signs = np.empty(powers.size, np.int32)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        power, sign = powers[: part.size], signs[: part.size]
        bits = part.view(np.int32)
        np.bitwise_and(bits, _EXPONENT, out=power.view(np.int32))  # 2^e, with e the exponent of x
        if power.max() >= _BEYOND:
            part[...] = part.astype(np.float16)
            continue
        np.bitwise_and(bits, _SIGN, out=sign)
        np.maximum(power, _SMALLEST_NORMAL, out=power)
        power *= _STEPS  # its last bit is worth as much as the last bit of a half near x
        part += power
        part -= power
        np.bitwise_or(bits, sign, out=bits)
    return x


def matmul_half(x: Floats, y: Floats) -> Floats:
    """`x @ y` (`[..., M, K]`, `[..., K, N]`): each product exact, each sum rounded to half, in the order of the terms.

    The order and the width are those of a lone fp16 accumulator with fused multiply-add: about the worst that hardware
    does.
    """
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = np.broadcast_to(x, batch + x.shape[-2:]), np.broadcast_to(y, batch + y.shape[-2:])
    rows, inner, columns = x.shape[-2], x.shape[-1], y.shape[-1]
    result = np.zeros((*batch, rows, columns), np.float32)
    step = max(1, _BLOCK // max(1, columns))
    for index in np.ndindex(*batch):
        left, right = np.ascontiguousarray(x[index].T), y[index]
        for start in range(0, rows, step):
            total = result[index][start : start + step]
            for k in range(inner):
                total += left[k, start : start + step, None] * right[k]
                round_half(total)
    return result


def sum_half(x: Floats, axes: tuple[int, ...], *, keep: bool = False) -> Floats:
    """The sum over `axes`, rounded to half after each addition, in the order of the elements."""
    axes = tuple(axis % x.ndim for axis in axes)
    others = [axis for axis in range(x.ndim) if axis not in axes]
    terms = x.transpose(*axes, *others).reshape(-1, *(x.shape[axis] for axis in others))
    total = np.zeros(terms.shape[1:], np.float32)
    for term in terms:
        total = round_half(np.asarray(total + term))
    if keep:
        total = total.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])
    return total
