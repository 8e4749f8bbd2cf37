"""Compare what two runtimes answered: per output, figures and a verdict, as an object and never as a bare bool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import InputError, NothingToCompareError


@dataclass(frozen=True)
class OutputComparison:
    """One output of the bundle against the reference, over all inputs tried.

    `max_abs`: largest absolute difference. `rel_l2`: L2 norm of the difference over that of the reference.
    `cosine`: cosine of the angle between both. `psnr_db`: peak signal-to-noise ratio in decibels, the peak being the
    reference's largest magnitude; infinite for equal arrays. `top1_agreement`: share of rows whose first largest entry
    is a largest entry of the reference too, None where the output is no class score. `problem` says why nothing could
    be compared; the figures are NaN then. Truthy when `rel_l2` is within `tolerance`.
    """

    name: str
    max_abs: float
    rel_l2: float
    cosine: float
    psnr_db: float
    top1_agreement: float | None
    tolerance: float
    problem: str | None = None

    def __bool__(self) -> bool:
        return self.problem is None and self.rel_l2 <= self.tolerance


def compare_arrays(
    name: str, reference: ArrayLike, actual: ArrayLike, *, tolerance: float, top1: bool = False
) -> OutputComparison:
    """Compare one output. Figures are in float64 and do not overflow.

    Arrays of different shapes, NaN or infinity on one side only, and arrays without a finite value never pass. Where
    both sides hold the same NaN or infinity, the figures are those of the other values.

    Args:
        reference: what PyTorch answered, any shape; floats, integers or booleans.
        actual: what the bundle answered, the same shape.
        tolerance: the largest relative L2 error that passes.
        top1: the last axis holds class scores; count rows with the same best class.

    Raises:
        InputError: values of another kind, such as complex numbers or texts.
    """
    expected, got = _as_float64(name, reference), _as_float64(name, actual)
    if expected.shape != got.shape:
        problem = f"the shape is {list(got.shape)}, PyTorch gave {list(expected.shape)}"
        return failed_comparison(name, tolerance, problem)
    finite = np.isfinite(expected)
    odd = ~((expected == got) | (np.isnan(expected) & np.isnan(got))) & ~(finite & np.isfinite(got))
    if odd.any():
        problem = f"{int(np.count_nonzero(odd))} of {got.size} values are NaN or infinite on one side only"
        return failed_comparison(name, tolerance, problem)
    if not finite.any():
        problem = "there are no values to compare" if not got.size else "PyTorch gave no finite value to compare with"
        return failed_comparison(name, tolerance, problem)
    agreement = _top1_agreement(expected, got) if top1 and expected.ndim and expected.shape[-1] > 1 else None
    return _figures(name, expected[finite], got[finite], tolerance, agreement)


def _as_float64(name: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"output {name!r}: expected floats, integers or booleans to compare, got {array.dtype}")
    return array.astype(np.float64, copy=False)


def _figures(
    name: str, x: NDArray[np.float64], y: NDArray[np.float64], tolerance: float, agreement: float | None
) -> OutputComparison:
    """The figures of finite values, at least one: reference `x`, actual `y`, both flat."""
    # A common power of two, which changes no digit, brings the largest value near 1: nothing overflows from here.
    exponent = math.frexp(max(float(np.max(np.abs(x))), float(np.max(np.abs(y)))))[1]
    x, y = np.ldexp(x, -exponent), np.ldexp(y, -exponent)
    difference = y - x
    error, norm, other = _norm(difference), _norm(x), _norm(y)
    if error == 0:
        rel_l2, cosine, psnr = 0.0, 1.0, math.inf
    elif norm == 0 or other == 0:
        rel_l2, cosine, psnr = (math.inf, 0.0, -math.inf) if norm == 0 else (1.0, 0.0, _psnr(x, error))
    else:
        rel_l2, psnr = error / norm, _psnr(x, error)
        cosine = max(-1.0, min(1.0, float(np.dot(x / norm, y / other))))
    try:
        max_abs = math.ldexp(float(np.max(np.abs(difference))), exponent)
    except OverflowError:
        max_abs = math.inf
    return OutputComparison(name, max_abs, rel_l2, cosine, psnr, agreement, tolerance)


def _norm(values: NDArray[np.float64]) -> float:
    """The L2 norm, without the underflow of squaring small values."""
    peak = float(np.max(np.abs(values)))
    return peak * float(np.linalg.norm(values / peak)) if peak > 0 else 0.0


def _psnr(reference: NDArray[np.float64], error: float) -> float:
    """Decibels between the reference's largest magnitude and the root of the mean squared error; both above 0."""
    peak = float(np.max(np.abs(reference)))
    return 20 * (math.log10(peak) - math.log10(error)) + 10 * math.log10(reference.size)


def _top1_agreement(expected: NDArray[np.float64], got: NDArray[np.float64]) -> float:
    """The share of rows whose best class (the first of equal ones) is among the reference's best."""
    chosen = np.take_along_axis(expected, got.argmax(-1)[..., None], axis=-1)[..., 0]
    return float(np.mean((chosen == expected.max(-1)) | (got.argmax(-1) == expected.argmax(-1))))


def compare_outputs(
    reference: Mapping[str, NDArray[Any]],
    actual: Mapping[str, NDArray[Any]],
    *,
    tolerance: float,
    top1: bool | frozenset[str] = False,
) -> tuple[OutputComparison, ...]:
    """Compare all outputs by name; `top1` says which hold class scores.

    An output that only one side has fails; no output in common raises `NothingToCompareError`.
    """
    if not set(reference) & set(actual):
        raise NothingToCompareError(
            f"nothing to compare: the reference has the outputs {sorted(reference)}, the bundle has {sorted(actual)}"
        )
    results = []
    for name in [*reference, *(extra for extra in actual if extra not in reference)]:
        if name not in actual or name not in reference:
            side = "the bundle" if name not in actual else "the reference"
            results.append(failed_comparison(name, tolerance, f"{side} has no output of this name"))
            continue
        scores = top1 if isinstance(top1, bool) else name in top1
        results.append(compare_arrays(name, reference[name], actual[name], tolerance=tolerance, top1=scores))
    return tuple(results)


def failed_comparison(name: str, tolerance: float, problem: str) -> OutputComparison:
    """A comparison that could not be made, which never passes."""
    return OutputComparison(name, math.nan, math.nan, math.nan, math.nan, None, tolerance, problem)
