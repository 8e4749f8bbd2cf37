"""Resizing images with numpy alone, in Pillow's convention and without its rounding.

The convention: pixel `i` covers `[i, i + 1)`, so its centre is `i + 0.5`; output pixel `o` of `n_out` looks at input
position `(o + 0.5) * n_in / n_out`. A filter weighs the input pixels around that position. When shrinking, the filter
is stretched by the shrink factor, which is what prevents aliasing; when growing it keeps its own width. Weights that
would fall outside the image are dropped and the rest scaled to sum to one.

An image is resized along its width, then along its height. Where values are held within limits after each direction
the order matters at sharp corners: Pillow used this one for every image until version 13, which takes the height first
if that shrinks far more. Each output pixel reads only a short run of input pixels,
so a direction is a handful of small matrix products, one per group of neighbouring outputs, instead of one large and
mostly zero product.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from edgekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

# Outputs per matrix product. More make better products and multiply more zeros; 8 was the fastest of 4 to 64 for a
# photo of 12 megapixels to 224x224.
_GROUP = 8


def resize(
    image: NDArray[Any],
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    *,
    window: tuple[int, int, int, int] | None = None,
    limits: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """Resize an image, smoothing while it shrinks, and keep the fractions of a level.

    Args:
        image: `[H, W, C]`, uint8 (levels 0 to 255) or float32 (any unit), H and W at least 1.
        size: height and width of the result, in pixels.
        interpolation: "nearest", "bilinear" (triangle), "bicubic" (a = -0.5) or "lanczos" (three lobes).
        window: `(top, left, height, width)`: compute only this part of the result, as if it had been cropped.
        limits: smallest and largest value allowed, held after each direction, since bicubic and lanczos overshoot at
            edges. Default: (0, 255) for uint8, as Pillow does; none for float32, as PyTorch does.

    Returns:
        float32 `[h, w, C]` in the unit of the input, `h, w` from `window` or else from `size`.

    Raises:
        InputError: a wrong dtype, rank or size, an unknown interpolation, or a window outside the result.
    """
    _check(image, size, interpolation)
    top, left, height, width = window or (0, 0, *size)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise InputError(f"expected a window (top, left, height, width) inside {size[0]}x{size[1]}, got {window}")
    if limits is None and image.dtype == np.uint8:
        limits = (0.0, 255.0)

    columns = image.transpose(1, 0, 2)
    columns = _resize_first_axis(columns, size[1], left, width, interpolation, limits)
    rows = columns.transpose(1, 0, 2)
    rows = _resize_first_axis(rows, size[0], top, height, interpolation, limits)
    return np.array(rows, np.float32, order="C")


def _check(image: NDArray[Any], size: tuple[int, int], interpolation: str) -> None:
    if image.ndim != 3 or image.size == 0:
        raise InputError(f"expected an image [H, W, C] with at least one pixel, got shape {list(image.shape)}")
    if image.dtype not in (np.uint8, np.float32):
        raise InputError(f"expected an image of uint8 or float32, got {image.dtype}; convert it with .astype")
    if min(size) < 1:
        raise InputError(f"expected a size (height, width) of at least 1x1, got {size[0]}x{size[1]}")
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"expected an interpolation of {', '.join(INTERPOLATIONS)}; got {interpolation!r}")


def _resize_first_axis(
    image: NDArray[Any],
    n_out: int,
    first: int,
    count: int,
    interpolation: Interpolation,
    limits: tuple[float, float] | None,
) -> NDArray[Any]:
    """Outputs `first` to `first + count` of `image [N, M, C]` resized to `[n_out, M, C]`."""
    n_in, *rest = image.shape
    if n_in == n_out:  # every filter is 1 on a pixel and 0 on its neighbours
        return image[first : first + count]
    if interpolation == "nearest":
        doubled = 2 * np.arange(first, first + count) + 1
        nearest: NDArray[Any] = image[doubled * n_in // (2 * n_out)]  # floor((o + 0.5) * n_in / n_out), in integers
        return nearest
    result = np.empty((count, *rest), np.float32)
    for group in _weights(n_in, n_out, first, count, interpolation):
        pixels = image[group.inputs].astype(np.float32, order="C").reshape(group.weights.shape[1], -1)
        np.matmul(group.weights, pixels, out=result[group.outputs].reshape(group.weights.shape[0], -1))
    if limits is not None:
        np.clip(result, *limits, out=result)
    return result


class _Group(NamedTuple):
    outputs: slice  # relative to the window
    inputs: slice
    weights: NDArray[np.float32]  # [outputs, inputs], read-only: every caller shares it


@lru_cache(maxsize=64)
def _weights(n_in: int, n_out: int, first: int, count: int, interpolation: Interpolation) -> tuple[_Group, ...]:
    """The weights of outputs `first` to `first + count`, in groups of neighbours."""
    kernel, support = _KERNELS[interpolation]
    step = n_in / n_out
    stretch = max(step, 1.0)
    groups = []
    for start in range(0, count, _GROUP):
        stop = min(start + _GROUP, count)
        centres = (np.arange(first + start, first + stop) + 0.5) * step
        low = max(math.floor(centres[0] - support * stretch), 0)
        high = min(math.ceil(centres[-1] + support * stretch), n_in)
        distances = np.abs(np.arange(low, high) + 0.5 - centres[:, None]) / stretch
        weights = np.where(distances < support, kernel(distances), 0.0)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        weights.flags.writeable = False
        groups.append(_Group(slice(start, stop), slice(low, high), weights))
    return tuple(groups)


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 - x


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys, "Cubic convolution interpolation for digital image processing" (1981), with a = -0.5."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, far)


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sinc(x) * np.sinc(x / 3.0)


# Each kernel takes distances >= 0 below its support, in input pixels (when growing) or output pixels (when shrinking).
_KERNELS: dict[str, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], int]] = {
    "bilinear": (_triangle, 1),
    "bicubic": (_cubic, 2),
    "lanczos": (_lanczos, 3),
}
