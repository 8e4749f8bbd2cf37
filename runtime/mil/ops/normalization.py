"""Normalisations. One op is rounded once: means and variances are kept in fp32, but for sums in half where asked."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.convolution import padded
from edgekit.runtime.mil.ops.reduction import mean, total
from edgekit.runtime.mil.registry import Array, Call, axes_of, op


def _along(values: Array, axis: int, rank: int) -> Array:
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])


@op("batch_norm")
def _batch_norm(call: Call) -> Array:
    x = call.array("x")
    centre, variance = call.array("mean"), call.array("variance")
    if centre.shape != (x.shape[1],) or variance.shape != centre.shape:
        raise InputError(
            f"mean {list(centre.shape)} and variance {list(variance.shape)} do not fit {x.shape[1]} channels"
        )
    scale = np.float32(1) / np.sqrt(variance + call.number("epsilon", 1e-5))
    gamma, beta = call.optional("gamma"), call.optional("beta")
    if gamma is not None:
        scale = scale * gamma
    result = x - _along(centre, 1, x.ndim)
    result *= _along(scale, 1, x.ndim)
    if beta is not None:
        result += _along(beta, 1, x.ndim)
    return result


def _normalised(x: Array, axes: tuple[int, ...], epsilon: np.float32, *, half_sums: bool) -> Array:
    result = x - mean(x, axes, half_sums=half_sums)
    variance = mean(result * result, axes, half_sums=half_sums)
    result /= np.sqrt(variance + epsilon)
    return result


@op("instance_norm")
def _instance_norm(call: Call) -> Array:
    x = call.array("x")
    axes = tuple(range(2, x.ndim))
    result = _normalised(x, axes, call.number("epsilon", 1e-5), half_sums=call.half_sums)
    gamma, beta = call.optional("gamma"), call.optional("beta")
    if gamma is not None:
        result *= _along(gamma, 1, x.ndim)
    if beta is not None:
        result += _along(beta, 1, x.ndim)
    return result


@op("layer_norm")
def _layer_norm(call: Call) -> Array:
    x = call.array("x")
    axes = axes_of(call, x.ndim)
    result = _normalised(x, axes, call.number("epsilon", 1e-5), half_sums=call.half_sums)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = call.optional("gamma"), call.optional("beta")
    if gamma is not None:
        result *= gamma.reshape(shape)
    if beta is not None:
        result += beta.reshape(shape)
    return result


@op("l2_norm")
def _l2_norm(call: Call) -> Array:
    """Over the last three axes together."""
    x = call.array("x")
    if x.ndim < 3:
        raise InputError(f"it takes a tensor of at least 3 axes, got {list(x.shape)}")
    axes = tuple(range(x.ndim - 3, x.ndim))
    return x / np.sqrt(total(x * x, axes, half_sums=call.half_sums) + call.number("epsilon", 1e-6))


@op("local_response_norm")
def _local_response_norm(call: Call) -> Array:
    """x / (k + alpha / size * (sum of squares of `size` neighbouring channels))^beta."""
    x, size = call.array("x"), call.integer("size")
    before = size // 2
    squares = padded(x * x, [(before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2))
    near = np.zeros_like(x)
    for shift in range(size):
        near += squares[:, shift : shift + x.shape[1]]
        if call.half_sums:
            near = round_half(near)
    scale = call.number("alpha", 1e-4) / np.float32(size)
    return np.asarray(x / np.power(call.number("k", 1.0) + scale * near, call.number("beta", 0.75)))
