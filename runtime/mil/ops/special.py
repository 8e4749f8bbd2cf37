"""Functions that numpy lacks."""

from __future__ import annotations

import numpy as np

from edgekit.runtime.mil.registry import Array

# erf(x) = x P(x^2) / Q(x^2) on [-4, 4], beyond which it is 1 to the last bit of float32; the rational minimax
# approximation of Eigen (unsupported/SpecialFunctions, generic_fast_erf_float), highest power first.
_BLOCK = 16384  # elements at a time: what is computed in between stays in the cache
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def erf(x: Array) -> Array:
    """The error function of float32, within 1e-7: computed in float64, since float32 would lose two bits here."""
    flat = np.ascontiguousarray(x, dtype=np.float32).reshape(-1)
    result = np.empty_like(flat)
    for start in range(0, flat.size, _BLOCK):
        part = np.clip(flat[start : start + _BLOCK].astype(np.float64), -4, 4)
        square = part * part
        result[start : start + _BLOCK] = part * np.polyval(_ERF_P, square) / np.polyval(_ERF_Q, square)
    return result.reshape(np.shape(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), without overflow."""
    result = np.negative(x)
    np.exp(result, out=result)
    result += np.float32(1)
    return np.divide(np.float32(1), result)


def softplus(x: Array) -> Array:
    """log(1 + e^x), without overflow."""
    result: Array = np.log1p(np.exp(-np.abs(x))) + np.maximum(x, np.float32(0))
    return result
