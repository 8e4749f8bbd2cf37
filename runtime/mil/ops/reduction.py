"""Reductions over axes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.runtime.mil.half import round_half, sum_half
from edgekit.runtime.mil.program import STORAGE
from edgekit.runtime.mil.registry import Array, Call, axes_of, axis_of, op


def total(x: Array, axes: tuple[int, ...], *, half_sums: bool, keep: bool = True) -> Array:
    """The sum over `axes`, in the type of `x`."""
    if half_sums and x.dtype.kind == "f":
        return sum_half(x, axes, keep=keep)
    result: Array = np.asarray(np.sum(x, axis=axes, keepdims=keep, dtype=x.dtype))
    return result


def _reduction(name: str, *, exact: bool = False) -> Callable[[Callable[[Array, tuple[int, ...], bool], Array]], None]:
    """Register a reduction of (x, axes, half sums) that keeps its axes with size 1."""

    def register(compute: Callable[[Array, tuple[int, ...], bool], Array]) -> None:
        def kernel(call: Call) -> Array:
            x = call.array("x")
            axes = axes_of(call, x.ndim)
            result = np.asarray(compute(x, axes, call.half_sums))
            return result if call.flag("keep_dims") else result.squeeze(axes)

        op(name, exact=exact)(kernel)

    return register


@_reduction("reduce_sum")
def _sum(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return total(x, axes, half_sums=half)


@_reduction("reduce_mean")
def _mean(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return mean(x, axes, half_sums=half)


def mean(x: Array, axes: tuple[int, ...], *, half_sums: bool) -> Array:
    """The mean over `axes`, which are kept; of integers, rounded down."""
    count = int(np.prod([x.shape[axis] for axis in axes]))
    summed = total(x, axes, half_sums=half_sums)
    return summed / np.float32(count) if x.dtype.kind == "f" else (summed // count).astype(x.dtype)


@_reduction("reduce_max", exact=True)
def _max(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    result: Array = np.max(x, axis=axes, keepdims=True)
    return result


@_reduction("reduce_min", exact=True)
def _min(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    result: Array = np.min(x, axis=axes, keepdims=True)
    return result


@_reduction("reduce_prod")
def _prod(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    if not half or x.dtype.kind != "f":
        result: Array = np.prod(x, axis=axes, keepdims=True, dtype=x.dtype)
        return result
    others = [axis for axis in range(x.ndim) if axis not in axes]
    factors = x.transpose(*axes, *others).reshape(-1, *(x.shape[axis] for axis in others))
    product = np.ones(factors.shape[1:], np.float32)
    for factor in factors:
        product = round_half(np.asarray(product * factor))
    return product.reshape([1 if axis in axes else size for axis, size in enumerate(x.shape)])


@_reduction("reduce_l1_norm")
def _l1(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return total(np.abs(x), axes, half_sums=half)


@_reduction("reduce_l2_norm")
def _l2(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return np.sqrt(total(x * x, axes, half_sums=half)).astype(x.dtype)


@_reduction("reduce_sum_square")
def _sum_square(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return total(x * x, axes, half_sums=half)


@_reduction("reduce_log_sum")
def _log_sum(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    return np.log(total(x, axes, half_sums=half)).astype(x.dtype)


@_reduction("reduce_log_sum_exp")
def _log_sum_exp(x: Array, axes: tuple[int, ...], half: bool) -> Array:
    largest = np.max(x, axis=axes, keepdims=True)
    shift = np.where(np.isfinite(largest), largest, 0).astype(x.dtype)
    return np.asarray(np.log(total(np.exp(x - shift), axes, half_sums=half)) + shift, dtype=x.dtype)


def _arg(name: str, find: Callable[..., Array]) -> None:
    def kernel(call: Call) -> Array:
        """The first place of the extreme value; Core ML promises none in particular for ties."""
        x = call.array("x")
        axis = axis_of(call.integer("axis", -1), x.ndim)
        result = np.asarray(find(x, axis=axis, keepdims=call.flag("keep_dims")))
        return result.astype(STORAGE[call.outputs[0]])

    op(name, exact=True)(kernel)


_arg("reduce_argmax", np.argmax)
_arg("reduce_argmin", np.argmin)
