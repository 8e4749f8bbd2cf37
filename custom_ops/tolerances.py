"""How far an implementation of a custom op may lie from its reference: one table, read by every test.

The measure is `relative_l2`: ||actual - expected|| / ||expected||, where `expected` is the reference in float64 on the
same (rounded) inputs. Tolerances are never loosened to make a test pass. What the figures are made of:

float64   53 bits and sums of some thousand terms.
float32   24 bits: about 3e-7 for softmax and sums, more for a recurrence, whose errors add up over the tokens.
float16   computed in float32 and rounded once: at most 2^-11 per entry.
bfloat16  the same with 2^-8 per entry.
native    and tvm: the exponential is a polynomial, results below 2^-64 are 0.
coreml    float16 is a program in half precision, where every op rounds what it gives, scores and sums included; but
          SelectiveScan, which computes in float32 and rounds once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.errors import UnknownNameError

BACKENDS = ("reference", "eager", "portable", "native", "tvm", "coreml")

_EXACT = {"float64": 1e-12, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
_POLYNOMIAL = _EXACT | {"float32": 2e-6}
_RECURRENT = _EXACT | {"float64": 1e-11, "float32": 5e-6}
_ROUNDED = _EXACT | {"float16": 2e-3}

REL_L2: dict[str, dict[str, dict[str, float]]] = {
    "BlockSparseAttention": {
        "reference": _EXACT,
        "eager": _EXACT,
        "portable": _EXACT,
        "native": _POLYNOMIAL,
        "tvm": _POLYNOMIAL,
        "coreml": _ROUNDED,
    },
    "KernelLinearAttention": dict.fromkeys(BACKENDS, _EXACT) | {"coreml": _ROUNDED},
    "SelectiveScan": dict.fromkeys(BACKENDS, _RECURRENT),
}
"""op -> backend -> dtype -> the largest relative L2 error that passes."""


def tolerance(op: str, dtype: str, backend: str) -> float:
    """The largest relative L2 error of `op` in `dtype` on `backend`. Raises `UnknownNameError`."""
    if op not in REL_L2:
        raise UnknownNameError("custom op", op, REL_L2)
    if backend not in REL_L2[op]:
        raise UnknownNameError("backend", backend, REL_L2[op])
    if dtype not in REL_L2[op][backend]:
        raise UnknownNameError("dtype", dtype, REL_L2[op][backend])
    return REL_L2[op][backend][dtype]


def relative_l2(actual: Any, expected: Any) -> float:
    """||actual - expected|| / ||expected|| in float64, for arrays or tensors on the CPU.

    Infinite when either side has a NaN or an infinity, or when expected is all zeros and actual is not, so that a
    comparison with a tolerance fails.
    """
    got, want = _array(actual), _array(expected)
    if got.shape != want.shape:
        return float("inf")
    if not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    difference, norm = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def _array(value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if hasattr(value, "detach"):  # a tensor, possibly bfloat16, which numpy does not know
        value = value.detach().double().numpy()
    return np.asarray(value, np.float64)
