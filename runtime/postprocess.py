"""From a model's output to an answer: softmax and the likeliest classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """One class: its index, its label (None where the model has none), its probability (0 to 1), the model's score."""

    index: int
    label: str | None
    probability: float
    score: float


def softmax(x: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    """exp(x) scaled to sum to one along `axis`, safe for any finite size of score.

    Args:
        x: scores, any shape, float or int; minus infinity gives probability 0.

    Returns:
        The shape of `x`, float64 for float64 and float32 for everything else.

    Raises:
        InputError: a score is NaN or plus infinity, or all along `axis` are minus infinity, or there are none.
    """
    x = np.asarray(x)
    if x.ndim == 0 or x.shape[axis] == 0:
        raise InputError(f"expected at least one score along axis {axis}, got shape {list(x.shape)}")
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32, copy=False)
    peak = x.max(axis=axis, keepdims=True)
    if not np.isfinite(peak).all():
        raise InputError(
            "expected finite scores, got NaN or infinity; the model overflowed or its input held NaN, "
            "so check the input, then try precision fp32"
        )
    powers = np.exp(x - peak)
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def top_k(
    logits: NDArray[Any], k: int = 5, labels: Sequence[str] | None = None, *, probabilities: bool = False
) -> list[Prediction]:
    """The k likeliest classes, likeliest first; of equal ones the lower index comes first.

    Args:
        logits: scores of one sample, `[C]` or `[1, C]`, float or int.
        k: how many, at least 1; more than C gives C.
        labels: the C names; None leaves `Prediction.label` None.
        probabilities: the scores are probabilities already (the model ends in a softmax), so take them as they are.

    Raises:
        InputError: another shape, NaN or infinite scores, a k below 1, another number of labels than scores, or
            scores outside 0..1 with `probabilities=True`.
    """
    scores = np.asarray(logits)
    if scores.ndim == 2 and scores.shape[0] == 1:
        scores = scores[0]
    if scores.ndim != 1:
        raise InputError(f"expected the scores of one sample, [C] or [1, C], got shape {list(scores.shape)}")
    if k < 1:
        raise InputError(f"expected k of at least 1, got {k}")
    if labels is not None and len(labels) != len(scores):
        raise InputError(f"expected one label per class, got {len(labels)} labels for {len(scores)} scores")
    chances = softmax(scores)  # refuses what cannot be ranked
    if probabilities:
        if scores.min() < 0 or scores.max() > 1 + 1e-3:  # room for fp16 rounding
            raise InputError(
                f"expected probabilities in 0..1, got scores from {scores.min():g} to {scores.max():g}; "
                "leave out probabilities=True for logits"
            )
        chances = scores
    order = np.argsort(-scores.astype(np.float64), kind="stable")[:k]
    return [
        Prediction(
            index=int(index),
            label=None if labels is None else labels[index],
            probability=float(chances[index]),
            score=float(scores[index]),
        )
        for index in order
    ]
