"""What the model families share: checks whose errors a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch

from edgekit.errors import ShapeError


def check_images(
    images: torch.Tensor, *, model: str, channels: int, min_size: int = 1, size: tuple[int, int] | None = None
) -> None:
    """Refuse a batch that is not `[B, channels, H, W]` with H and W of at least `min_size` pixels, or exactly `size`.

    Does nothing while torch.export or torch.compile trace: their shapes may be symbols, and an exported program
    states its shapes itself.

    Raises:
        ShapeError: the batch does not fit.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if images.ndim == 4 and images.shape[1] == channels:
        height, width = images.shape[2:]
        if min(height, width) >= min_size and size in (None, (height, width)):
            return
    if size is None:
        wanted, hint = f"images [B, {channels}, H, W], H and W at least {min_size}", ""
    else:
        wanted = f"images [B, {channels}, {size[0]}, {size[1]}]"
        other = images.ndim == 4 and tuple(images.shape[2:]) == size
        hint = (
            "; for other channels build it with in_chans=..."
            if other
            else "; for another size build it with img_size=..."
        )
    if images.ndim == 3:
        hint = "; add the batch dimension with image.unsqueeze(0)"
    raise ShapeError(f"{model} takes {wanted}; got {tuple(images.shape)}{hint}")


def check_image_grid(img_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width in pixels of `img_size`, one number for both or a pair, if `stride` divides them.

    Raises:
        ShapeError: it does not, or `img_size` is something else; names the nearest sizes that do.
    """
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size) if _is_sequence(img_size) else ()
    if len(pair) != 2 or not all(isinstance(size, int) and not isinstance(size, bool) for size in pair):
        raise ShapeError(f"img_size is a number of pixels or a pair (height, width); got {img_size!r}")
    for name, size in zip(("height", "width"), pair, strict=True):
        if size < stride or size % stride:
            below = max(0, size) // stride * stride
            nearest = (
                f"nearest that fit are {below} and {below + stride}" if below else f"smallest that fits is {stride}"
            )
            raise ShapeError(
                f"img_size must be a multiple of {stride}, the product of the strides; got a {name} of {size}, the "
                f"{nearest}"
            )
    return pair[0], pair[1]


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below one, such as `num_classes=0`, and what is no whole number.

    Raises:
        ShapeError: names the size and its value.
    """
    for name, value in sizes.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ShapeError(f"{name} must be a whole number of at least 1; got {value!r}")
        if value < 1:
            raise ShapeError(f"{name} must be at least 1; got {value}")
