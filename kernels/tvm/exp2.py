"""Elementwise functions as TVMScript expressions: exp2 and tanh without library calls, so that they vectorize.

`select`, `max` and `min` of TVM are compare-and-select on every target: `a > b ? a : b`. Where one operand may be NaN,
its place therefore decides whether the NaN survives; the functions here keep it.
"""

from __future__ import annotations

from typing import Any

from edgekit.kernels.tvm.compat import T

LOG2_E = 1.4426950408889634

# 2**f on [-0.5, 0.5]: least relative error (1e-7) with 2**0 = 1 exactly, highest power first.
_EXP2 = (1.326472718e-3, 9.671512641e-3, 5.550733743e-2, 2.402224209e-1, 6.931469776e-1, 1.0)
# tanh(y) / y in powers of y**2 on |y| < 0.625 (relative error 4e-9), highest power first.
_TANH = (-5.659998365e-3, 2.059099840e-2, -5.372107197e-2, 1.333112760e-1, -3.333326053e-1, 1.0)
_TANH_SMALL = 0.625
# 1.5 * 2**23 rounds a float32 to an integer when added; 127 is float32's exponent bias.
_ROUND_AND_BIAS = 12582912.0 + 127.0


def exp2(x: Any) -> Any:
    """2**x for a float32 expression `x` <= 0: exactly 0 below -64, relative error 2e-7 above, NaN for NaN.

    The cut keeps denormals out of the products that follow: they cost a hundred cycles each on some CPUs. The result
    is a fraction's polynomial times a power of two that is assembled from its bits.
    """
    clamped = T.max(T.float32(-64.0), x)  # -64 > NaN is false, so NaN stays
    bits = T.reinterpret("int32", clamped + T.float32(_ROUND_AND_BIAS))
    # Through the integer and back, because TVM simplifies (x + c) - c to x, also for floats.
    fraction = clamped - (T.reinterpret("float32", bits) - T.float32(_ROUND_AND_BIAS))
    value = T.float32(_EXP2[0])
    for coefficient in _EXP2[1:]:
        value = value * fraction + T.float32(coefficient)
    power = T.reinterpret("float32", T.shift_left(bits, T.int32(23)))
    return T.Select(x < T.float32(-64.0), T.float32(0.0), value * power)


def tanh(y: Any) -> Any:
    """tanh(y) for a float32 expression `y` of any size: relative error 4e-7, NaN for NaN.

    (1 - e) / (1 + e) with e = exp(-2 |y|), and an odd polynomial where that difference would cancel.
    """
    size = T.Select(y < T.float32(0.0), T.float32(0.0) - y, y)
    decay = exp2(size * T.float32(-2.0 * LOG2_E))
    ratio = (T.float32(1.0) - decay) / (T.float32(1.0) + decay)
    square = y * y
    value = T.float32(_TANH[0])
    for coefficient in _TANH[1:]:
        value = value * square + T.float32(coefficient)
    return T.Select(
        size < T.float32(_TANH_SMALL), y * value, T.Select(y < T.float32(0.0), T.float32(0.0) - ratio, ratio)
    )
