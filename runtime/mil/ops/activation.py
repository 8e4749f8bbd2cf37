"""Activations."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import sum_half
from edgekit.runtime.mil.ops.special import erf, sigmoid, softplus
from edgekit.runtime.mil.registry import Array, Call, axis_of, op

_ZERO = np.float32(0)
_ONE = np.float32(1)


@op("relu", exact=True)
def _relu(call: Call) -> Array:
    return np.maximum(call.array("x"), _ZERO)


@op("relu6", exact=True)
def _relu6(call: Call) -> Array:
    return np.minimum(np.maximum(call.array("x"), _ZERO), np.float32(6))


@op("sigmoid")
def _sigmoid(call: Call) -> Array:
    return sigmoid(call.array("x"))


@op("silu")
def _silu(call: Call) -> Array:
    x = call.array("x")
    return sigmoid(x) * x


@op("softplus")
def _softplus(call: Call) -> Array:
    return softplus(call.array("x"))


@op("softplus_parametric")
def _softplus_parametric(call: Call) -> Array:
    x = call.array("x")
    alpha, beta = (_per_channel(call.array(name), x.ndim) for name in ("alpha", "beta"))
    return alpha * softplus(x * beta)


@op("softsign")
def _softsign(call: Call) -> Array:
    x = call.array("x")
    return x / (_ONE + np.abs(x))


@op("elu")
def _elu(call: Call) -> Array:
    x = call.array("x")
    return np.where(x > 0, x, call.number("alpha", 1.0) * np.expm1(np.minimum(x, _ZERO)))


@op("leaky_relu")
def _leaky_relu(call: Call) -> Array:
    x = call.array("x")
    return np.where(x >= 0, x, call.number("alpha", 0.01) * x)


@op("prelu")
def _prelu(call: Call) -> Array:
    x = call.array("x")
    return np.where(x >= 0, x, _per_channel(call.array("alpha"), x.ndim) * x)


@op("clamped_relu")
def _clamped_relu(call: Call) -> Array:
    x, beta = call.array("x"), call.number("beta")
    return np.minimum(beta, np.where(x >= 0, x, call.number("alpha") * x))


@op("linear_activation")
def _linear_activation(call: Call) -> Array:
    result: Array = call.array("x") * call.number("alpha") + call.number("beta")
    return result


@op("scaled_tanh")
def _scaled_tanh(call: Call) -> Array:
    result: Array = call.number("alpha") * np.tanh(call.array("x") * call.number("beta"))
    return result


@op("sigmoid_hard")
def _sigmoid_hard(call: Call) -> Array:
    line = call.array("x") * call.number("alpha", 0.2) + call.number("beta", 0.5)
    return np.asarray(np.clip(line, _ZERO, _ONE))


@op("thresholded_relu", exact=True)
def _thresholded_relu(call: Call) -> Array:
    x = call.array("x")
    return np.where(x >= call.number("alpha", 1.0), x, _ZERO)


@op("gelu")
def _gelu(call: Call) -> Array:
    x = call.array("x")
    mode = call.text("mode", "EXACT")
    if mode == "EXACT":
        result = erf(x * np.float32(0.5**0.5))
    elif mode == "TANH_APPROXIMATION":
        result = np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x))
    elif mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    else:
        raise InputError(f"its mode {mode!r} is none of EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")
    result = np.asarray(result)
    result += _ONE
    result *= x
    result *= np.float32(0.5)
    return result


@op("softmax")
def _softmax(call: Call) -> Array:
    x = call.array("x")
    return softmax(x, axis_of(call.integer("axis", -1), x.ndim), half_sums=call.half_sums)


def softmax(x: Array, axis: int, *, half_sums: bool) -> Array:
    """exp(x - max) / sum, as every implementation shifts it; a row of -inf gives NaN, as in PyTorch."""
    result: Array = x - np.max(x, axis=axis, keepdims=True)
    np.exp(result, out=result)
    result /= sum_half(result, (axis,), keep=True) if half_sums else result.sum(axis=axis, keepdims=True)
    return result


def _per_channel(values: Array, rank: int) -> Array:
    """A vector along axis 1 of a tensor of `rank` axes."""
    return values.reshape([-1 if axis == 1 else 1 for axis in range(rank)])
