"""Resizing along the last axes: nearest neighbour and linear, with Core ML's ways of placing the samples."""

from __future__ import annotations

import math

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.registry import Array, Call, op

_MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def grid(size: int, count: int, mode: str) -> Array:
    """Where the `count` samples along an axis of `size` elements lie: float64 from 0 to size - 1.

    The formulas are those of coremltools' `resize_bilinear`. Raises `InputError` for an unknown mode.
    """
    i = np.arange(count, dtype=np.float64)
    if mode == "ALIGN_CORNERS" and count == 1:
        points = np.array([(size - 1) / 2])
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        points = i * ((size - 1) / max(count - 1, 1))
    elif mode == "DEFAULT":
        points = i * (size / count)
    elif mode == "OFFSET_CORNERS":
        points = (i + 0.5) * (max(1, size - 1) / count)
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * (size / count) - 0.5
    else:
        raise InputError(f"its sampling mode {mode!r} is none of {', '.join(_MODES)}")
    return np.asarray(np.clip(points, 0, size - 1))


def linear(x: Array, axis: int, points: Array) -> Array:
    """`x` sampled at `points` along one axis, by linear interpolation."""
    low = np.floor(points).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    weight = (points - low).astype(np.float32).reshape([-1 if a == axis % x.ndim else 1 for a in range(x.ndim)])
    left, right = np.take(x, low, axis=axis), np.take(x, high, axis=axis)
    return np.asarray(left * (np.float32(1) - weight) + right * weight)


def _nearest(x: Array, axis: int, count: int) -> Array:
    """Sample i is element floor(i * size / count), computed without rounding."""
    return np.asarray(np.take(x, np.arange(count) * x.shape[axis] // count, axis=axis))


def _targets(call: Call, x: Array) -> tuple[int, int]:
    sizes = (call.integer("target_size_height", 1), call.integer("target_size_width", 1))
    if x.ndim < 3 or min(sizes) < 1:
        raise InputError(f"{list(x.shape)} cannot be resized to {list(sizes)}")
    return sizes


def _scaled(call: Call, x: Array) -> tuple[int, int]:
    factors = [call.number(f"scale_factor_{side}", 1) for side in ("height", "width")]
    # In float32, as coremltools infers the shape: 0.7 of 10 is 7 there, and a hair less in float64.
    sizes = tuple(math.floor(factor * np.float32(size)) for factor, size in zip(factors, x.shape[-2:], strict=True))
    if x.ndim < 3 or min(sizes) < 1:
        raise InputError(f"{list(x.shape)} cannot be scaled by {[float(factor) for factor in factors]}")
    return sizes[0], sizes[1]


@op("resize_nearest_neighbor", exact=True)
def _resize_nearest(call: Call) -> Array:
    x = call.array("x")
    height, width = _targets(call, x)
    return _nearest(_nearest(x, -2, height), -1, width)


@op("upsample_nearest_neighbor", exact=True)
def _upsample_nearest(call: Call) -> Array:
    x = call.array("x")
    height, width = _scaled(call, x)
    return _nearest(_nearest(x, -2, height), -1, width)


def _linear_both(x: Array, sizes: tuple[int, int], mode: str) -> Array:
    for axis, count in zip((-2, -1), sizes, strict=True):
        x = linear(x, axis, grid(x.shape[axis], count, mode))
    return x


@op("resize_bilinear")
def _resize_bilinear(call: Call) -> Array:
    x = call.array("x")
    return _linear_both(x, _targets(call, x), call.text("sampling_mode", "DEFAULT"))


@op("upsample_bilinear")
def _upsample_bilinear(call: Call) -> Array:
    """The factor is recomputed from the sizes; half-pixel centres unless the corners are aligned or iOS16 says no."""
    x = call.array("x")
    aligned = call.flag("align_corners", True)
    if aligned and call.flag("half_pixel_centers", False):
        raise InputError("align_corners and half_pixel_centers exclude each other")
    centres = call.flag("half_pixel_centers", not aligned)
    mode = "STRICT_ALIGN_CORNERS" if aligned else "UNALIGN_CORNERS" if centres else "DEFAULT"
    return _linear_both(x, _scaled(call, x), mode)


@op("resize")
def _resize(call: Call) -> Array:
    """iOS17: the last `resized_dims` sizes of `shape`, 0 for the input's own."""
    x, shape = call.array("x"), call.ints("shape")
    count = call.integer("resized_dims")
    mode, sampling = call.text("interpolation_mode", "LINEAR"), call.text("sampling_mode", "DEFAULT")
    if not 0 <= count <= len(shape) <= x.ndim:
        raise InputError(f"{count} sizes of {shape} do not fit {list(x.shape)}")
    if mode not in ("LINEAR", "NEAREST_NEIGHBOR") or (mode != "LINEAR" and sampling != "DEFAULT"):
        raise InputError(f"interpolation {mode!r} with sampling {sampling!r} has no documented result")
    if mode == "LINEAR" and x.dtype.kind != "f":
        raise InputError("linear interpolation of integers has no documented rounding")
    for index in range(count):
        axis = x.ndim - count + index
        size = shape[len(shape) - count + index] or x.shape[axis]
        x = _nearest(x, axis, size) if mode != "LINEAR" else linear(x, axis, grid(x.shape[axis], size, sampling))
    return x
