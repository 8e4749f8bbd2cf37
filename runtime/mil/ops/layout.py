"""Reshaping, transposing, splitting, joining: what moves values and changes none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.registry import Array, Call, Result, axes_of, axis_of, op


@op("reshape", exact=True)
def _reshape(call: Call) -> Array:
    """-1 takes what remains, 0 the size of the input's axis, counted from the end (as iOS17 has it)."""
    x, wanted = call.array("x"), call.ints("shape")
    shape = [
        size if size else (x.shape[axis - len(wanted) + x.ndim] if axis - len(wanted) + x.ndim >= 0 else 1)
        for axis, size in enumerate(wanted)
    ]
    if min(shape, default=0) < -1 or shape.count(-1) > 1:
        raise InputError(f"{list(x.shape)} cannot be reshaped to {wanted}")
    return x.reshape(shape)


@op("reshape_like", exact=True)
def _reshape_like(call: Call) -> Array:
    x = call.array("x")
    shape: list[int] = []
    parts = zip(
        call.arrays("ref_tensors"), call.arrays("begins"), call.arrays("ends"), call.arrays("end_masks"), strict=True
    )
    for reference, begin, end, mask in parts:
        shape += reference.shape[int(begin) : None if bool(mask) else int(end)]
    return x.reshape(shape)


@op("transpose", exact=True)
def _transpose(call: Call) -> Array:
    x, perm = call.array("x"), call.ints("perm")
    if sorted(axis_of(axis, x.ndim) for axis in perm) != list(range(x.ndim)):
        raise InputError(f"its perm {perm} is no order of {x.ndim} axes")
    return x.transpose(perm)


@op("expand_dims", exact=True)
def _expand_dims(call: Call) -> Array:
    return np.expand_dims(call.array("x"), tuple(call.ints("axes")))


@op("squeeze", exact=True)
def _squeeze(call: Call) -> Array:
    """Axes of other sizes than 1 are left alone, as in PyTorch."""
    x = call.array("x")
    return x.squeeze(tuple(axis for axis in axes_of(call, x.ndim) if x.shape[axis] == 1))


@op("flatten2d", exact=True)
def _flatten2d(call: Call) -> Array:
    x, axis = call.array("x"), call.integer("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("concat", exact=True)
def _concat(call: Call) -> Array:
    values = [np.atleast_1d(value) for value in call.arrays("values")]
    axis = axis_of(call.integer("axis"), values[0].ndim)
    _one_type(values)
    if not call.flag("interleave"):
        return np.concatenate(values, axis=axis)
    if len({value.shape for value in values}) > 1:
        raise InputError("interleaved tensors must be of one shape")
    shape = list(values[0].shape)
    shape[axis] *= len(values)
    return np.stack(values, axis=axis + 1).reshape(shape)


@op("stack", exact=True)
def _stack(call: Call) -> Array:
    values = call.arrays("values")
    _one_type(values)
    return np.stack(values, axis=call.integer("axis"))


def _one_type(values: Sequence[Array]) -> None:
    if len({value.dtype for value in values}) > 1:
        raise InputError(f"its tensors are of several types: {', '.join(str(value.dtype) for value in values)}")


@op("split", exact=True)
def _split(call: Call) -> Result:
    x = call.array("x")
    axis = axis_of(call.integer("axis"), x.ndim)
    if call.get("split_sizes") is not None:
        sizes = call.ints("split_sizes")
    else:
        count = call.integer("num_splits")
        if count < 1 or x.shape[axis] % count:
            raise InputError(f"{x.shape[axis]} elements cannot be split into {count} equal parts")
        sizes = [x.shape[axis] // count] * count
    if sum(sizes) != x.shape[axis] or min(sizes, default=0) < 0:
        raise InputError(f"{x.shape[axis]} elements cannot be split into {sizes}")
    ends = np.cumsum(sizes)
    lead = (slice(None),) * axis
    return tuple(x[(*lead, slice(int(end) - size, int(end)))] for end, size in zip(ends, sizes, strict=True))


@op("reverse", exact=True)
def _reverse(call: Call) -> Array:
    x = call.array("x")
    return np.flip(x, axes_of(call, x.ndim))


@op("reverse_sequence", exact=True)
def _reverse_sequence(call: Call) -> Array:
    x, lengths = call.array("x"), call.ints("lengths")
    sequence, batch = (axis_of(call.integer(name, 0), x.ndim) for name in ("seq_axis", "batch_axis"))
    if sequence == batch or len(lengths) != x.shape[batch] or not all(0 <= n <= x.shape[sequence] for n in lengths):
        raise InputError(f"lengths {lengths} along axis {sequence} do not fit {list(x.shape)}, batch axis {batch}")
    places = np.tile(np.arange(x.shape[sequence]), (len(lengths), 1))
    for row, length in zip(places, lengths, strict=True):
        row[:length] = row[:length][::-1]
    shape = [1] * x.ndim
    shape[batch], shape[sequence] = places.shape
    order = places if batch < sequence else places.T
    return np.take_along_axis(x, np.broadcast_to(order.reshape(shape), x.shape), axis=sequence)


@op("depth_to_space", exact=True)
def _depth_to_space(call: Call) -> Array:
    """The block's place is the slower part of the channel (TensorFlow's order)."""
    x, b = call.array("x"), call.integer("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, b, b, c // (b * b), h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, c // (b * b), h * b, w * b)


@op("space_to_depth", exact=True)
def _space_to_depth(call: Call) -> Array:
    x, b = call.array("x"), call.integer("block_size")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@op("pixel_shuffle", exact=True)
def _pixel_shuffle(call: Call) -> Array:
    """The block's place is the faster part of the channel (PyTorch's order)."""
    x, f = call.array("x"), call.integer("upscale_factor")
    n, c, h, w = x.shape
    return x.reshape(n, c // (f * f), f, f, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (f * f), h * f, w * f)


@op("pixel_unshuffle", exact=True)
def _pixel_unshuffle(call: Call) -> Array:
    x, f = call.array("x"), call.integer("downscale_factor")
    n, c, h, w = x.shape
    return x.reshape(n, c, h // f, f, w // f, f).transpose(0, 1, 3, 5, 2, 4).reshape(n, c * f * f, h // f, w // f)


@op("space_to_batch", exact=True)
def _space_to_batch(call: Call) -> Array:
    """As tf.space_to_batch with the channels first."""
    x, (p, q) = call.array("x"), call.ints("block_shape")
    top, bottom, left, right = call.ints("paddings")
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // p, p, w // q, q).transpose(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * p * q, c, h // p, w // q)


@op("batch_to_space", exact=True)
def _batch_to_space(call: Call) -> Array:
    """As tf.batch_to_space with the channels first."""
    x, (p, q) = call.array("x"), call.ints("block_shape")
    top, bottom, left, right = call.ints("crops")
    n, c, h, w = x.shape
    whole = x.reshape(p, q, n // (p * q), c, h, w).transpose(2, 3, 4, 0, 5, 1).reshape(n // (p * q), c, h * p, w * q)
    return whole[:, :, top : h * p - bottom, left : w * q - right]


@op("sliding_windows", exact=True)
def _sliding_windows(call: Call) -> Array:
    x, size, stride = call.array("x"), call.integer("size"), call.integer("stride", 1)
    axis = axis_of(call.integer("axis"), x.ndim)
    windows = np.lib.stride_tricks.sliding_window_view(x, size, axis=axis)
    windows = windows[(slice(None),) * axis + (slice(None, None, stride),)]
    return np.moveaxis(windows, -1, axis + 1)


@op("crop", exact=True)
def _crop(call: Call) -> Array:
    x = call.array("x")
    (top, bottom), (left, right) = call.ints("crop_height"), call.ints("crop_width")
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
