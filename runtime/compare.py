"""Compare what two runtimes answered: per output, figures and a verdict, as an object and never as a bare bool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import NothingToCompareError


@dataclass(frozen=True)
class OutputComparison:
    """One output of the bundle against the reference, over all inputs tried.

    `max_abs`: largest absolute difference. `rel_l2`: L2 norm of the difference over that of the reference.
    `cosine`: cosine of the angle between both. `psnr_db`: peak signal-to-noise ratio in decibels, the peak being the
    reference's largest magnitude; infinite for equal arrays. `top1_agreement`: share of rows with the same largest
    entry, None where the output is no class score. Truthy when `rel_l2` is within `tolerance`.
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
    """Compare one output. Arrays of different shapes, or NaN or infinity on one side only, never pass.

    Args:
        reference: what PyTorch answered, any shape.
        actual: what the bundle answered, the same shape.
        tolerance: the largest relative L2 error that passes.
        top1: the last axis holds class scores; count equal argmax.
    """
    expected, got = np.asarray(reference, np.float64), np.asarray(actual, np.float64)
    if expected.shape != got.shape:
        problem = f"the shape is {list(got.shape)}, PyTorch gave {list(expected.shape)}"
        return _failed(name, tolerance, problem)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(
        expected[~finite], got[~finite], equal_nan=True
    ):
        bad = int(np.count_nonzero(finite & ~np.isfinite(got)))
        lost = int(np.count_nonzero(~finite)) if not bad else bad
        return _failed(name, tolerance, f"{lost} of {got.size} values are NaN or infinite on one side only")
    agreement = None
    if top1 and expected.ndim >= 1 and expected.shape[-1] > 1 and expected.size:
        agreement = float(np.mean(expected.argmax(-1) == got.argmax(-1)))
    x, y = expected[finite], got[finite]
    difference = y - x
    error, norm = float(np.linalg.norm(difference)), float(np.linalg.norm(x))
    rel_l2 = error / norm if norm > 0 else (0.0 if error == 0 else math.inf)
    denominator = norm * float(np.linalg.norm(y))
    cosine = float(np.dot(x, y)) / denominator if denominator > 0 else (1.0 if error == 0 else 0.0)
    peak = float(np.max(np.abs(x), initial=0.0))
    mse = float(np.mean(difference**2)) if x.size else 0.0
    if mse == 0:
        psnr = math.inf
    else:
        psnr = 10 * math.log10(peak**2 / mse) if peak > 0 else -math.inf
    return OutputComparison(
        name, float(np.max(np.abs(difference), initial=0.0)), rel_l2, min(cosine, 1.0), psnr, agreement, tolerance
    )


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
            results.append(_failed(name, tolerance, f"{side} has no output of this name"))
            continue
        scores = top1 if isinstance(top1, bool) else name in top1
        results.append(compare_arrays(name, reference[name], actual[name], tolerance=tolerance, top1=scores))
    return tuple(results)


def _failed(name: str, tolerance: float, problem: str) -> OutputComparison:
    return OutputComparison(name, math.nan, math.nan, math.nan, math.nan, None, tolerance, problem)
