"""Matrix products: linear, matmul, einsum."""

from __future__ import annotations

import math

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import matmul_half
from edgekit.runtime.mil.registry import Array, Call, op


def product(x: Array, y: Array, *, half_sums: bool) -> Array:
    """`x @ y` with numpy's broadcasting of the axes before the last two."""
    if x.dtype.kind == "f" and half_sums:
        return matmul_half(x, y)
    # BLAS serves two matrices much faster than a stack of small ones.
    if y.ndim == 2 and x.ndim > 2 and x.flags.c_contiguous:
        return (x.reshape(-1, x.shape[-1]) @ y).reshape(*x.shape[:-1], y.shape[-1])
    result: Array = np.matmul(x, y)
    return result


@op("linear")
def _linear(call: Call) -> Array:
    x, weight, bias = call.array("x"), call.array("weight"), call.optional("bias")
    if x.shape[-1] != weight.shape[-1]:
        raise InputError(f"x has {x.shape[-1]} features, its weight {weight.shape[-1]}")
    result = product(x.reshape(-1, x.shape[-1]), weight.T, half_sums=call.half_sums)
    if bias is not None:
        result += bias
    return result.reshape(*x.shape[:-1], weight.shape[0])


@op("matmul")
def _matmul(call: Call) -> Array:
    x, y = call.array("x"), call.array("y")
    left, right = x.ndim == 1, y.ndim == 1
    x, y = (x[None] if left else x), (y[:, None] if right else y)
    if call.flag("transpose_x") and not left:
        x = np.swapaxes(x, -1, -2)
    if call.flag("transpose_y") and not right:
        y = np.swapaxes(y, -1, -2)
    if x.shape[-1] != y.shape[-2]:
        raise InputError(f"matrices of shapes {list(x.shape)} and {list(y.shape)} cannot be multiplied")
    result = product(x, y, half_sums=call.half_sums)
    if right:
        result = result[..., 0]
    return result[..., 0] if left and right else result[..., 0, :] if left else result


@op("einsum")
def _einsum(call: Call) -> Array:
    """The sum over one shared axis, which is all that MIL has, and any other equation of two tensors."""
    values = call.arrays("values")
    equation = call.text("equation", "").replace(" ", "")
    terms, arrow, output = equation.partition("->")
    first, comma, second = terms.partition(",")
    letters = (first, second, output)
    if len(values) != 2 or not arrow or not comma or any(len(set(term)) < len(term) for term in letters):
        raise InputError(f"the equation {equation!r} for {len(values)} tensors is none that MIL has")
    x, y = values
    if (x.ndim, y.ndim) != (len(first), len(second)) or not set(output) <= set(first + second):
        raise InputError(f"the equation {equation!r} does not fit shapes {list(x.shape)} and {list(y.shape)}")
    batch = [letter for letter in output if letter in first and letter in second]
    summed = [letter for letter in first if letter in second and letter not in output]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    if not {*rows, *columns} <= set(output):
        raise InputError(f"the equation {equation!r} sums over an axis of one tensor alone, which MIL has not")
    # Each letter as an axis of its own, of size 1 where only the other tensor has it, so that batch axes broadcast.
    left = x.transpose([first.index(letter) for letter in batch + rows + summed])
    right = y.transpose([second.index(letter) for letter in batch + summed + columns])
    n, m = len(batch), len(summed)
    left_matrix = left.reshape(*left.shape[:n], math.prod(left.shape[n : n + len(rows)]), -1)
    right_matrix = right.reshape(*right.shape[:n], math.prod(right.shape[n : n + m]), -1)
    result = product(left_matrix, right_matrix, half_sums=call.half_sums)
    result = result.reshape(*result.shape[:n], *left.shape[n : n + len(rows)], *right.shape[n + m :])
    order = batch + rows + columns
    return result.transpose([order.index(letter) for letter in output])
