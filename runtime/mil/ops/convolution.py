"""Convolutions and transposed convolutions in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.matmul import product
from edgekit.runtime.mil.registry import Array, Call, op

_COLUMNS = 16 * 2**20  # elements of unfolded input at a time: 64 MB


def paddings(
    call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """The elements to add before and after each spatial axis, from `pad_type` and `pad`.

    Raises `InputError` for an unknown type or a `pad` of the wrong length.
    """
    kind = call.text("pad_type", "valid").lower()
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        pad = call.ints("pad", [0] * (2 * len(sizes)))
        if len(pad) != 2 * len(sizes):
            raise InputError(f"pad has {len(pad)} numbers for {len(sizes)} spatial axes; it takes two for each")
        return [(pad[2 * axis], pad[2 * axis + 1]) for axis in range(len(sizes))]
    if kind not in ("same", "same_lower"):
        raise InputError(f"its pad_type {kind!r} is none of valid, custom, same, same_lower")
    found = []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        found.append((small, large) if kind == "same" else (large, small))
    return found


def padded(x: Array, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Array:
    """`x` with `value` around its last axes."""
    if not any(before or after for before, after in pads):
        return x
    lead = x.ndim - len(pads)
    shape = [*x.shape[:lead]] + [size + a + b for size, (a, b) in zip(x.shape[lead:], pads, strict=True)]
    result = np.full(shape, value, x.dtype) if value else np.zeros(shape, x.dtype)
    inner = tuple(slice(a, a + size) for size, (a, _) in zip(x.shape[lead:], pads, strict=True))
    result[(slice(None),) * lead + inner] = x
    return result


def taps(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], sizes: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """For each position of the kernel: its indices, and the slices of the padded input that it meets.

    `sizes` are those of the output.
    """
    return [
        (
            place,
            tuple(
                slice(p * d, p * d + (n - 1) * s + 1, s)
                for p, d, n, s in zip(place, dilations, sizes, strides, strict=True)
            ),
        )
        for place in np.ndindex(*kernel)
    ]


def _geometry(call: Call, rank: int) -> tuple[list[int], list[int], int]:
    strides, dilations = call.ints("strides", [1] * rank), call.ints("dilations", [1] * rank)
    groups = call.integer("groups", 1)
    if len(strides) != rank or len(dilations) != rank or min(*strides, *dilations, groups) < 1:
        raise InputError(f"strides {strides}, dilations {dilations} and groups {groups} do not fit {rank} spatial axes")
    return strides, dilations, groups


@op("conv")
def _conv(call: Call) -> Array:
    x, weight, bias = call.array("x"), call.array("weight"), call.optional("bias")
    spatial = x.ndim - 2
    strides, dilations, groups = _geometry(call, spatial)
    if weight.ndim != x.ndim or weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise InputError(
            f"a weight of shape {list(weight.shape)} in {groups} groups does not fit {x.shape[1]} channels"
        )
    kernel = weight.shape[2:]
    x = padded(x, paddings(call, x.shape[2:], kernel, strides, dilations))
    sizes = [
        (size - (k - 1) * d - 1) // s + 1 for size, k, d, s in zip(x.shape[2:], kernel, dilations, strides, strict=True)
    ]
    if min(sizes, default=1) < 1:
        raise InputError(f"a kernel of {list(kernel)} is larger than the padded input {list(x.shape[2:])}")
    places = taps(kernel, strides, dilations, sizes)
    if weight.shape[1] == 1 and groups > 1:
        result = _depthwise(x, weight, places, sizes, half_sums=call.half_sums)
    else:
        result = _grouped(x, weight, places, sizes, groups, half_sums=call.half_sums)
    if bias is not None:
        result += bias.reshape(-1, *[1] * spatial)
    return result


def _depthwise(
    x: Array,
    weight: Array,
    places: list[tuple[tuple[int, ...], tuple[slice, ...]]],
    sizes: list[int],
    *,
    half_sums: bool,
) -> Array:
    """One kernel per channel (or several): a sum of shifted inputs, which needs no unfolding."""
    multiple = weight.shape[0] // x.shape[1]
    if multiple > 1:
        x = np.repeat(x, multiple, axis=1)
    result = np.zeros((*x.shape[:2], *sizes), np.float32)
    term = np.empty_like(result[0])
    ones = [1] * len(sizes)
    for n in range(x.shape[0]):
        for place, slices in places:
            of_all: tuple[Any, ...] = (slice(None), 0, *place)
            met: tuple[Any, ...] = (n, slice(None), *slices)
            np.multiply(x[met], weight[of_all].reshape(-1, *ones), out=term)
            result[n] += term
            if half_sums:
                round_half(result[n])
    return result


def _grouped(
    x: Array,
    weight: Array,
    places: list[tuple[tuple[int, ...], tuple[slice, ...]]],
    sizes: list[int],
    groups: int,
    *,
    half_sums: bool,
) -> Array:
    """Unfold the input and multiply, image by image and group by group. `[N, C, *sizes]`.

    With half sums, the terms are added channel by channel, and position by position within one.
    """
    batch, outputs, inner = x.shape[0], weight.shape[0], weight.shape[1]
    count = math.prod(sizes)
    matrix = weight.reshape(groups, outputs // groups, -1)
    result = np.empty((batch, groups, outputs // groups, count), np.float32)
    plain = len(places) == 1 and x.shape[2:] == tuple(sizes)
    columns = None if plain else np.empty((inner, len(places), *sizes), np.float32)
    if columns is not None and columns.size > _COLUMNS * 64:
        raise InputError(f"it would unfold to {columns.size} numbers, which is beyond this interpreter")
    for n in range(batch):
        for group in range(groups):
            part = x[n, group * inner : (group + 1) * inner]
            if columns is None:
                unfolded = part.reshape(inner, count)
            else:
                for index, (_, slices) in enumerate(places):
                    columns[:, index] = part[(slice(None), *slices)]
                unfolded = columns.reshape(inner * len(places), count)
            if half_sums:
                result[n, group] = product(matrix[group], unfolded, half_sums=True)
            else:
                np.matmul(matrix[group], unfolded, out=result[n, group])
    return result.reshape(batch, outputs, *sizes)


@op("conv_transpose")
def _conv_transpose(call: Call) -> Array:
    """The gradient of `conv`: each input adds its multiple of the kernel; then the padding is cut away."""
    x, weight, bias = call.array("x"), call.array("weight"), call.optional("bias")
    spatial = x.ndim - 2
    strides, dilations, groups = _geometry(call, spatial)
    if weight.ndim != x.ndim or weight.shape[0] != x.shape[1] or x.shape[1] % groups:
        raise InputError(
            f"a weight of shape {list(weight.shape)} in {groups} groups does not fit {x.shape[1]} channels"
        )
    batch, channels = x.shape[:2]
    inner, per_group = channels // groups, weight.shape[1]
    kernel = weight.shape[2:]
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], strides, kernel, dilations, strict=True)]
    begin, sizes = _cut(call, x.shape, per_group * groups, strides, full)
    need = [max(size, b + out) for size, b, out in zip(full, begin, sizes, strict=True)]
    result = np.zeros((batch, groups, per_group, *need), np.float32)
    flat = x.reshape(batch, groups, inner, -1)
    for place, slices in taps(kernel, strides, dilations, x.shape[2:]):
        of_all: tuple[Any, ...] = (slice(None), slice(None), *place)
        matrix = weight[of_all].reshape(groups, inner, per_group)
        # taps() gives the places that an input meets: each is where this kernel position adds to.
        term = product(np.swapaxes(matrix, -1, -2), flat, half_sums=call.half_sums)
        target = (slice(None), slice(None), slice(None), *slices)
        result[target] += term.reshape(batch, groups, per_group, *x.shape[2:])
        if call.half_sums:
            result = round_half(result)
    inside = tuple(slice(b, b + size) for b, size in zip(begin, sizes, strict=True))
    result = np.ascontiguousarray(result.reshape(batch, groups * per_group, *need)[(slice(None), slice(None), *inside)])
    if bias is not None:
        result += bias.reshape(-1, *[1] * spatial)
    return result


def _cut(
    call: Call, shape: Sequence[int], channels: int, strides: list[int], full: list[int]
) -> tuple[list[int], list[int]]:
    """Where the output begins in the full result, and its sizes."""
    kind = call.text("pad_type", "valid").lower()
    pad = call.ints("pad", [0] * (2 * len(full))) if kind == "custom" else [0] * (2 * len(full))
    if len(pad) != 2 * len(full) or kind not in ("valid", "custom", "same"):
        raise InputError(f"pad_type {kind!r} with pad {pad} does not fit {len(full)} spatial axes")
    begin = [pad[2 * axis] for axis in range(len(full))]
    sizes = [size - pad[2 * axis] - pad[2 * axis + 1] for axis, size in enumerate(full)]
    if kind == "same":
        sizes = [stride * size for stride, size in zip(strides, shape[2:], strict=True)]
        begin = [max(size - out, 0) // 2 for size, out in zip(full, sizes, strict=True)]
    wanted = call.get("output_shape")
    if wanted is not None:
        given = call.ints("output_shape")
        if len(given) != len(shape) or given[:2] != [shape[0], channels]:
            raise InputError(f"its output_shape {given} does not fit {shape[0]} images of {channels} channels")
        sizes = given[2:]
        if kind == "same":
            begin = [max(size - out, 0) // 2 for size, out in zip(full, sizes, strict=True)]
    return begin, sizes
