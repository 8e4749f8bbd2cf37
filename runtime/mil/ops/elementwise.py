"""Elementwise arithmetic, comparisons, logic, rounding, casts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.ops.special import erf
from edgekit.runtime.mil.program import STORAGE
from edgekit.runtime.mil.registry import Array, Call, op

# What `cast` calls its types, and what this interpreter keeps their values in.
_CAST = {"fp16": "float32", "fp32": "float32", "fp64": "float32"}


def _binary(name: str, compute: Callable[[Array, Array], Array], *, exact: bool = False) -> None:
    def kernel(call: Call) -> Array:
        x, y = call.array("x"), call.array("y")
        if x.dtype != y.dtype:
            raise InputError(f"x is {x.dtype}, y is {y.dtype}; they must be of one type")
        return compute(x, y)

    op(name, exact=exact)(kernel)


def _unary(name: str, compute: Callable[[Array], Array], *, exact: bool = False) -> None:
    op(name, exact=exact)(lambda call: compute(call.array("x")))


def _divide(x: Array, y: Array) -> Array:
    """Floats as ever. Core ML documents no rule for integers that do not divide: those are refused, not guessed."""
    if x.dtype.kind == "f":
        return np.true_divide(x, y)
    if np.any(y == 0) or np.any(np.remainder(x, y)):
        raise InputError("real_div of integers that do not divide has no documented result; cast them to floats")
    return np.floor_divide(x, y)


def _floor_divide(x: Array, y: Array) -> Array:
    return np.floor_divide(x, y) if x.dtype.kind == "f" else _nonzero(np.floor_divide, x, y)


def _modulo(x: Array, y: Array) -> Array:
    """The remainder has the sign of `y`."""
    return np.remainder(x, y) if x.dtype.kind == "f" else _nonzero(np.remainder, x, y)


def _nonzero(compute: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    if not np.all(y):
        raise InputError("an integer is divided by zero")
    return compute(x, y)


def _power(x: Array, y: Array) -> Array:
    if x.dtype.kind != "f" and np.any(y < 0):
        raise InputError("an integer is raised to a negative power")
    return np.power(x, y)


_binary("add", np.add)
_binary("sub", np.subtract)
_binary("mul", np.multiply)
_binary("real_div", _divide)
_binary("floor_div", _floor_divide)
_binary("mod", _modulo)
_binary("pow", _power)
_binary("maximum", np.maximum, exact=True)
_binary("minimum", np.minimum, exact=True)
_binary("equal", np.equal, exact=True)
_binary("not_equal", np.not_equal, exact=True)
_binary("greater", np.greater, exact=True)
_binary("greater_equal", np.greater_equal, exact=True)
_binary("less", np.less, exact=True)
_binary("less_equal", np.less_equal, exact=True)
_binary("logical_and", np.logical_and, exact=True)
_binary("logical_or", np.logical_or, exact=True)
_binary("logical_xor", np.logical_xor, exact=True)

_unary("logical_not", np.logical_not, exact=True)
_unary("abs", np.abs, exact=True)
_unary("sign", np.sign, exact=True)
_unary("ceil", np.ceil, exact=True)
_unary("floor", np.floor, exact=True)
_unary("round", np.round, exact=True)  # halves to even
_unary("sqrt", np.sqrt)
_unary("square", np.square)
_unary("exp", np.exp)
_unary("sin", np.sin)
_unary("cos", np.cos)
_unary("tan", np.tan)
_unary("asin", np.arcsin)
_unary("acos", np.arccos)
_unary("atan", np.arctan)
_unary("sinh", np.sinh)
_unary("cosh", np.cosh)
_unary("tanh", np.tanh)
_unary("atanh", np.arctanh)
_unary("erf", erf)


@op("exp2")
def _exp2(call: Call) -> Array:
    x = call.array("x")
    return np.exp2(x).astype(x.dtype)


@op("rsqrt")
def _rsqrt(call: Call) -> Array:
    result: Array = np.float32(1) / np.sqrt(call.array("x") + call.number("epsilon", 1e-12))
    return result


@op("inverse")
def _inverse(call: Call) -> Array:
    result: Array = np.float32(1) / (call.array("x") + call.number("epsilon", 1e-4))
    return result


@op("log")
def _log(call: Call) -> Array:
    return np.log(call.array("x") + call.number("epsilon", 1e-45))


@op("clip")
def _clip(call: Call) -> Array:
    x = call.array("x")
    result: Array = np.minimum(np.maximum(x, call.array("alpha").astype(x.dtype)), call.array("beta").astype(x.dtype))
    return result


@op("threshold", exact=True)
def _threshold(call: Call) -> Array:
    x = call.array("x")
    result: Array = np.maximum(x, call.array("alpha").astype(x.dtype))
    return result


@op("cast")
def _cast(call: Call) -> Array:
    """To integers towards zero, as numpy and PyTorch do; what the integer cannot hold has no documented result."""
    x = call.array("x")
    wanted = call.text("dtype", "").lower()
    name = _CAST.get(wanted, wanted)
    if name not in STORAGE:
        raise InputError(f"it casts to {wanted!r}, which is no type known here")
    declared = call.outputs[0]
    if ("float32" if declared.startswith("float") else declared) != name or (wanted == "fp16") != (
        declared == "float16"
    ):
        raise InputError(f"it casts to {wanted}, its output is declared {declared}")
    return x.astype(STORAGE[name])


@op("select", exact=True)
def _select(call: Call) -> Array:
    condition, a, b = call.array("cond"), call.array("a"), call.array("b")
    if a.dtype != b.dtype:
        raise InputError(f"a is {a.dtype}, b is {b.dtype}; they must be of one type")
    return np.where(condition.astype(bool), a, b)


@op("identity", exact=True)
def _identity(call: Call) -> Array:
    return call.array("x")
