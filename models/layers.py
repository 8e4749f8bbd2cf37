"""What the model families share: checks whose errors a person can act on."""

from __future__ import annotations

import torch

from edgekit.errors import ShapeError


def check_images(images: torch.Tensor, *, model: str, channels: int, min_size: int) -> None:
    """Refuse a batch that is not `[B, channels, H, W]` with H and W of at least `min_size` pixels.

    Does nothing while torch.export or torch.compile trace: their shapes may be symbols, and an exported program
    states its shapes itself.

    Raises:
        ShapeError: the batch does not fit.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if images.ndim == 4 and images.shape[1] == channels and min(images.shape[2:]) >= min_size:
        return
    hint = "; add the batch dimension with image.unsqueeze(0)" if images.ndim == 3 else ""
    raise ShapeError(
        f"{model} takes images [B, {channels}, H, W], H and W at least {min_size}; got {tuple(images.shape)}{hint}"
    )


def check_sizes(**sizes: int) -> None:
    """Refuse sizes below one, such as `num_classes=0`.

    Raises:
        ShapeError: names the size and its value.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ShapeError(f"{name} must be at least 1; got {value}")
