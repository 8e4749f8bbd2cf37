"""Compressed weights: the `constexpr_*` ops of iOS16 and iOS18, decoded once when a program is prepared.

Definitions: coremltools' `ops/defs/iOS16/constexpr_ops.py` and `iOS18/compression.py`. Ops of the same name differ
between the two: those of iOS16 hold packed bytes and the shape of what they decode to.
"""

from __future__ import annotations

import math

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.ops.quantization import per_axis
from edgekit.runtime.mil.registry import Array, Call, Result, axis_of, op
from edgekit.runtime.mil.weights import unpack_bits


@op("constexpr_cast")
def _cast(call: Call) -> Array:
    return call.array("source_val").astype(np.float32)


@op("constexpr_affine_dequantize")
def _affine_dequantize(call: Call) -> Array:
    """scale * (data - zero point), both scalars or vectors along `axis`."""
    data, axis = call.array("quantized_data"), call.integer("axis", 0)
    values = data.astype(np.float32)
    values -= per_axis(call.array("zero_point"), axis, data.ndim)
    values *= per_axis(call.array("scale"), axis, data.ndim)
    return values


@op("constexpr_lut_to_dense")
def _lut_to_dense(call: Call) -> Array:
    lut, indices = call.array("lut"), call.array("indices")
    if call.get("shape") is None:
        axis = call.get("vector_axis")
        return _look_up(indices, lut, None if axis is None else int(axis))
    shape, bits = call.ints("shape"), int(math.log2(lut.size))
    if bits not in (1, 2, 4, 6, 8) or lut.ndim != 1 or lut.size != 2**bits:
        raise InputError(f"its table has {lut.size} entries; it takes 2, 4, 16, 64 or 256")
    places = unpack_bits(indices, f"uint{bits}", math.prod(shape))
    return np.asarray(lut[places].reshape(shape))


@op("constexpr_sparse_to_dense")
def _sparse_to_dense(call: Call) -> Array:
    data, mask = call.array("nonzero_data"), call.array("mask")
    if call.get("shape") is not None:
        shape = call.ints("shape")
        mask = unpack_bits(mask, "uint1", math.prod(shape)).reshape(shape)
    return _spread(data, mask)


@op("constexpr_blockwise_shift_scale")
def _blockwise(call: Call) -> Array:
    return _shift_scale(call.array("data"), call.array("scale"), call.optional("offset"))


@op("constexpr_lut_to_sparse")
def _lut_to_sparse(call: Call) -> Result:
    mask, lut, axis = call.array("indices_mask"), call.array("lut"), call.get("vector_axis")
    indices = _spread(call.array("indices_nonzero_data"), mask)
    dense = _look_up(indices, lut, None if axis is None else int(axis))
    if axis is not None:
        mask = np.repeat(mask, lut.shape[-1], axis=int(axis))
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale")
def _sparse_blockwise(call: Call) -> Result:
    mask = call.array("data_mask")
    dense = _shift_scale(_spread(call.array("nonzero_data"), mask), call.array("scale"), call.optional("offset"))
    return mask, dense[mask != 0]


def _spread(data: Array, mask: Array) -> Array:
    """`data` in order at the places where `mask` is not 0, and 0 elsewhere."""
    if int(np.count_nonzero(mask)) != data.size:
        raise InputError(f"its mask has {np.count_nonzero(mask)} places for {data.size} values")
    dense = np.zeros(mask.shape, data.dtype)
    dense[mask != 0] = data
    return dense


def _shift_scale(data: Array, scale: Array, offset: Array | None) -> Array:
    """scale * (data - offset), one of each to a block; the blocks divide every axis evenly."""
    if scale.ndim != data.ndim or (offset is not None and offset.shape != scale.shape):
        raise InputError(f"scale {list(scale.shape)} does not fit data {list(data.shape)}")
    if any(size % count for size, count in zip(data.shape, scale.shape, strict=True)):
        raise InputError(f"{list(scale.shape)} blocks do not divide data {list(data.shape)}")
    split = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    each = [part for count in scale.shape for part in (count, 1)]
    values = data.astype(np.float32).reshape(split)
    if offset is not None:
        values -= offset.astype(np.float32).reshape(each)
    values *= scale.astype(np.float32).reshape(each)
    return values.reshape(data.shape)


def _look_up(indices: Array, lut: Array, vector_axis: int | None) -> Array:
    """Entries of the tables `lut` [groups.., entries, vector] at `indices`; the groups divide every axis evenly.

    A vector of several numbers fills as many neighbours along `vector_axis`.
    """
    if lut.ndim != indices.ndim + 2 or any(n % g for n, g in zip(indices.shape, lut.shape, strict=False)):
        raise InputError(f"tables of shape {list(lut.shape)} do not fit indices {list(indices.shape)}")
    if indices.size and int(indices.max()) >= lut.shape[-2]:
        raise InputError(f"an index is {int(indices.max())}, its table has {lut.shape[-2]} entries")
    groups = [
        (np.arange(size) // (size // count)).reshape([-1 if axis == place else 1 for place in range(indices.ndim)])
        for axis, (size, count) in enumerate(zip(indices.shape, lut.shape[:-2], strict=True))
    ]
    found: Array = lut[(*groups, indices)]
    width = lut.shape[-1]
    if width == 1:
        return found[..., 0]
    if vector_axis is None:
        raise InputError("its tables hold vectors, but it names no vector_axis")
    axis = axis_of(vector_axis, indices.ndim)
    shape = list(indices.shape)
    shape[axis] *= width
    return np.moveaxis(found, -1, axis + 1).reshape(shape)
