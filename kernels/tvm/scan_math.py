"""Vector arithmetic of SelectiveScan as TVM expressions: one step of the recurrence, softplus, silu, tests for NaN.

`kernels.tvm.exp2` has the exponential for arguments that cannot be positive; here they may have either sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from edgekit.kernels.tvm.compat import T
from edgekit.kernels.tvm.exp2 import LOG2_E

__all__ = ["all_easy", "easy_step", "exact_step", "flush", "larger", "nan_or_zero", "silu", "softplus"]

# (2**f - 1) / f on [-0.5, 0.5], minimax (3e-7), highest power first. With the constant 1 fixed, the error of a slow
# decay (f near 0) is relative to the decay itself, so it does not build up over a long sequence.
_EXP2 = (0.00134004361, 0.00966637302, 0.0555033311, 0.240223482, 0.693147182)
# log1p(w) = s * P(s**2) with s = w / (w + 2), w in [0, 1], minimax (4e-9), highest power first.
_LOG1P = (0.281915456, 0.279576659, 0.40025115, 0.66666311, 2.0)
# 1.5 * 2**23: added to a float32 it leaves the rounded integer in the low bits.
_ROUND = 12582912.0
# 2**f = 2**-4 * (((f + P0) * f + P1) * f + 16) on [-1/64, 1/64]; the error is at most 1.3e-6 times the decay's distance
# to 1 and 1.4e-8 (a quarter of float32's spacing). The cubic coefficient is fixed at a power of two, so that dividing
# by it, which saves a multiplication, is exact.
_CUBIC = (3.84366175, 11.0903415)
_TABLE = 32
"""2**(i / 32 - 4), the steps between the whole powers of two, as one lookup in two registers holds them."""
_EASY = 120.0
"""Below this |delta A2|, the exponent's bits cannot overflow, and the exponential needs no clamps."""
_FLUSH = 2.0**-100
"""A smaller state is set to 0 between chunks: the tail of a decay would otherwise end in slow denormals."""


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body(variable)` with `variable` bound to `value`, so that the expression tree holds `value` once."""
    variable = T.Var("value", value.ty)
    return T.Let(body(variable), {variable: value})


def _vector(value: float, lanes: int) -> Any:
    return T.float32(value) if lanes == 1 else T.Broadcast(T.float32(value), lanes)


def exp2_any(x: Any, lanes: int) -> Any:
    """2**x for any float32 `x` of `lanes` lanes: infinite from 128 on, 2**-126 below -126 (no denormals).

    NaN gives an arbitrary value or NaN: the caller multiplies it with something that is NaN as well. The integer part
    is added to the exponent's bits, which is exact up to the largest finite float32.
    """
    kind = f"x{lanes}" if lanes > 1 else ""

    def assemble(rounded: Any, fraction: Any) -> Any:
        value = _vector(_EXP2[0], lanes)
        for coefficient in (*_EXP2[1:], 1.0):
            value = value * fraction + _vector(coefficient, lanes)
        shift = T.int32(23) if lanes == 1 else T.Broadcast(T.int32(23), lanes)
        bits = T.reinterpret(f"int32{kind}", value) + T.shift_left(rounded, shift)
        return T.reinterpret(f"float32{kind}", bits)

    def split(x: Any) -> Any:
        # The detour over the bits hides the addition from TVM's simplifier, which would drop it as x + c - c.
        rounded = T.reinterpret(f"int32{kind}", x + _vector(_ROUND, lanes))
        return _let(
            rounded,
            lambda r: _let(x - (T.reinterpret(f"float32{kind}", r) - _vector(_ROUND, lanes)), partial(assemble, r)),
        )

    low, high = _vector(-126.0, lanes), _vector(128.0, lanes)
    return _let(x, lambda x: _let(T.Select(x < low, low, x), lambda x: _let(T.Select(x > high, high, x), split)))


def exact_step(x: Any, h: Any, drive: Any, lanes: int) -> Any:
    """2**x * h + drive for any `x`."""
    return exp2_any(x, lanes) * h + drive


def easy_step(x: Any, h: Any, drive: Any, lanes: int, table: bool) -> Any:
    """2**x * h + drive for |x| < `_EASY`: no clamps, and a shorter polynomial where a table helps.

    Without `_let`: TVM's common subexpression elimination fails on two of these in the branches of one condition.
    """
    magic = _vector(_ROUND / _TABLE if table else _ROUND, lanes)
    bits = T.reinterpret(f"int32x{lanes}", x + magic)
    fraction = x - (T.reinterpret(f"float32x{lanes}", bits) - magic)
    if table:
        value = fraction + _vector(_CUBIC[0], lanes)
        for constant in (_CUBIC[1], 16.0):
            value = value * fraction + _vector(constant, lanes)
        scaled = T.reinterpret(f"float32x{lanes}", _powers(bits, lanes)) * h
        # Written out, because a rounded `scaled * value` would lose precision of slow decays.
        return T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.fma", scaled, value, drive)
    value = _vector(_EXP2[0], lanes)
    for coefficient in (*_EXP2[1:], 1.0):
        value = value * fraction + _vector(coefficient, lanes)
    shifted = T.shift_left(bits, T.Broadcast(T.int32(23), lanes))
    return T.reinterpret(f"float32x{lanes}", T.reinterpret(f"int32x{lanes}", value) + shifted) * h + drive


def _powers(bits: Any, lanes: int) -> Any:
    """The bits of 2**(n / 32 - 4) for integers n in the low bits of `bits`: AVX-512's lookup in two registers.

    n's low bits would stay below the exponent when it is shifted there; the table's entries have them subtracted.
    """
    shift = 23 - (_TABLE.bit_length() - 1)
    entries = np.exp2(np.arange(_TABLE) / _TABLE - 4).astype(np.float32).view(np.int32) - (
        np.arange(_TABLE, dtype=np.int32) << shift
    )
    halves = [
        T.Shuffle([T.int32(int(entry)) for entry in entries[i : i + lanes]], list(range(lanes))) for i in (0, lanes)
    ]
    looked_up = T.call_llvm_pure_intrin(
        f"int32x{lanes}", "llvm.x86.avx512.vpermi2var.d.512", halves[0], bits, halves[1]
    )
    return looked_up + T.shift_left(bits, T.Broadcast(T.int32(shift), lanes))


def softplus(x: Any, lanes: int) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), accurate relative to the result; NaN for NaN."""

    def log1p(s: Any) -> Any:
        value = _vector(_LOG1P[0], lanes)
        for coefficient in _LOG1P[1:]:
            value = value * (s * s) + _vector(coefficient, lanes)
        return value * s

    zero, two = _vector(0.0, lanes), _vector(2.0, lanes)
    exp = exp2_any(T.fabs(x) * _vector(-LOG2_E, lanes), lanes)
    return T.Select(x < zero, zero, x) + _let(exp, lambda w: _let(w / (w + two), log1p))


def silu(x: Any, lanes: int) -> Any:
    """x / (1 + exp(-x)); NaN for NaN."""
    return x / (exp2_any(x * _vector(-LOG2_E, lanes), lanes) + _vector(1.0, lanes))


def flush(x: Any, lanes: int) -> Any:
    return T.Select(T.fabs(x) < _vector(_FLUSH, lanes), _vector(0.0, lanes), x)


def nan_or_zero(x: Any, lanes: int) -> Any:
    """x where it is NaN, else 0; on the bits, since TVM simplifies x != x to false."""
    magnitude = T.reinterpret(f"int32x{lanes}", x) & T.Broadcast(T.int32(0x7FFFFFFF), lanes)
    return T.Select(magnitude > T.Broadcast(T.int32(0x7F800000), lanes), x, _vector(0.0, lanes))


def larger(x: Any, y: Any) -> Any:
    """The larger of `x` and |y|; x where y is NaN."""
    return T.Select(T.fabs(y) > x, T.fabs(y), x)


def all_easy(x: Any, lanes: int) -> Any:
    """Whether no lane reaches `_EASY`. A NaN may pass: `easy_step` gives NaN for it, whatever the bits become.

    It has to pass: the steps differ in rounding, and a NaN must not change what the other channels get.
    """
    hard = T.Select(x >= _vector(_EASY, lanes), T.Broadcast(T.int32(1), lanes), T.Broadcast(T.int32(0), lanes))
    return T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.smax", hard) == 0
