"""Scaled dot-product attention (iOS18)."""

from __future__ import annotations

import numpy as np

from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.activation import softmax
from edgekit.runtime.mil.ops.matmul import product
from edgekit.runtime.mil.registry import Array, Call, op


@op("scaled_dot_product_attention")
def _attention(call: Call) -> Array:
    """softmax(q k^T / sqrt(E) + mask) v; a bool mask says what takes part.

    One op is rounded once, at its end: the scores are kept in fp32. With half sums the two products and the softmax's
    sum are accumulated in half, and the scaled query, the scores and the weights are rounded in between.
    """
    query, key, value = call.array("query"), call.array("key"), call.array("value")
    mask = call.optional("attn_mask")
    half = call.half_sums
    scale = np.float32(query.shape[-1] ** -0.5)
    scores = product(_stored(query * scale, half), np.swapaxes(key, -1, -2), half_sums=half)
    if mask is not None:
        scores = scores + (np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == bool else mask)
    weights = softmax(_stored(scores, half), scores.ndim - 1, half_sums=half)
    return product(_stored(weights, half), value, half_sums=half)


def _stored(x: Array, half: bool) -> Array:
    return round_half(x) if half else x
