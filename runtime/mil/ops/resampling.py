"""Sampling an image at given places: `resample` (PyTorch's grid_sample) and `affine`."""

from __future__ import annotations

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.registry import Array, Call, op


@op("resample")
def _resample(call: Call) -> Array:
    x, coordinates = call.array("x"), call.array("coordinates").astype(np.float32)
    if x.ndim != 4 or coordinates.ndim != 4 or coordinates.shape[-1] != 2 or coordinates.shape[0] != x.shape[0]:
        raise InputError(f"coordinates {list(coordinates.shape)} do not fit {list(x.shape)}")
    mode, align = call.text("coordinates_mode", ""), call.flag("align_corners")
    across, down = (_pixels(coordinates[..., index], x.shape[3 - index], mode, align=align) for index in range(2))
    return _sample(
        x,
        across,
        down,
        sampling=call.text("sampling_mode", ""),
        padding=call.text("padding_mode", ""),
        value=call.number("padding_value", 0.0),
    )


@op("affine")
def _affine(call: Call) -> Array:
    """Each output place, from -1 to 1, through the matrix [a0 a1 a2 b0 b1 b2]; zeros outside of the image."""
    x, matrix = call.array("x"), call.array("transform_matrix")
    height, width = call.integer("output_height"), call.integer("output_width")
    settings = tuple(call.text(name, "").lower() for name in ("sampling_mode", "padding_mode", "coordinates_mode"))
    known = ("bilinear", "constant", "normalized_minus_one_to_one")
    if settings != known or not call.flag("align_corners") or call.number("padding_value", 0.0) != 0:
        raise InputError(f"its modes {settings} are not those documented: {known}, aligned corners, padding 0")
    if matrix.ndim != 2 or matrix.shape[1] != 6 or matrix.shape[0] not in (1, x.shape[0]):
        raise InputError(f"a matrix of shape {list(matrix.shape)} does not fit {x.shape[0]} images")
    across = np.linspace(-1, 1, width, dtype=np.float32) if width > 1 else np.full(1, -1, np.float32)
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None] if height > 1 else np.full((1, 1), -1, np.float32)
    a0, a1, a2, b0, b1, b2 = (np.broadcast_to(matrix, (x.shape[0], 6))[:, i, None, None] for i in range(6))
    columns = _pixels(a0 * across + a1 * down + a2, x.shape[3], known[2], align=True)
    rows = _pixels(b0 * across + b1 * down + b2, x.shape[2], known[2], align=True)
    return _sample(x, columns, rows, sampling="bilinear", padding="constant", value=np.float32(0))


def _pixels(places: Array, size: int, mode: str, *, align: bool) -> Array:
    """Coordinates along an axis of `size` pixels, in pixels: 0 is the middle of the first."""
    if mode == "unnormalized":
        return places
    if mode == "normalized_minus_one_to_one":
        places = (places + np.float32(1)) / np.float32(2)
    elif mode != "normalized_zero_to_one":
        raise InputError(f"its coordinates_mode {mode!r} is not documented")
    scaled: Array = places * np.float32(size - 1) if align else places * np.float32(size) - np.float32(0.5)
    return scaled


def _sample(x: Array, across: Array, down: Array, *, sampling: str, padding: str, value: np.float32) -> Array:
    """`x` [B, C, H, W] at the pixel places `across` and `down` [B, h, w]."""
    if sampling == "nearest":
        return _tap(x, np.rint(across), np.rint(down), padding, value)
    if sampling != "bilinear":
        raise InputError(f"its sampling_mode {sampling!r} is neither bilinear nor nearest")
    if padding == "border":  # the place moves to the edge, and its weights with it
        across, down = np.clip(across, 0, x.shape[3] - 1), np.clip(down, 0, x.shape[2] - 1)
    left, top = np.floor(across), np.floor(down)
    right_weight, bottom_weight = (across - left)[:, None], (down - top)[:, None]
    left_weight, top_weight = np.float32(1) - right_weight, np.float32(1) - bottom_weight
    result: Array = _tap(x, left, top, padding, value) * (left_weight * top_weight)
    result += _tap(x, left + 1, top, padding, value) * (right_weight * top_weight)
    result += _tap(x, left, top + 1, padding, value) * (left_weight * bottom_weight)
    result += _tap(x, left + 1, top + 1, padding, value) * (right_weight * bottom_weight)
    return result


def _tap(x: Array, across: Array, down: Array, padding: str, value: np.float32) -> Array:
    """The pixels at whole places, `[B, C, h, w]`."""
    columns, in_row = _inside(across, x.shape[3], padding)
    rows, in_column = _inside(down, x.shape[2], padding)
    images = np.arange(x.shape[0]).reshape(-1, 1, 1)
    found: Array = np.moveaxis(x[images, :, rows, columns], -1, 1)
    if padding != "constant":
        return found
    return np.where((in_row & in_column)[:, None], found, value)


def _inside(places: Array, size: int, padding: str) -> tuple[Array, Array]:
    """Places that exist in an axis of `size` pixels, and whether each one was inside already."""
    good = (places >= 0) & (places <= size - 1)
    # A place that is no number, or far away, must not overflow as an integer.
    whole = np.clip(np.nan_to_num(places, nan=-1.0), -(2.0**30), 2.0**30).astype(np.int64)
    if padding in ("constant", "border"):
        return np.clip(whole, 0, size - 1), good
    if padding == "symmetric":
        folded = whole % (2 * size)
        return np.where(folded < size, folded, 2 * size - 1 - folded), good
    if padding == "reflection":
        period = max(2 * (size - 1), 1)
        folded = whole % period
        return np.where(folded < size, folded, period - folded) if size > 1 else np.zeros_like(whole), good
    raise InputError(f"its padding_mode {padding!r} is none of constant, border, reflection, symmetric")
