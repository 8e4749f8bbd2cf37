"""scikit-learn's handwritten digits: the small data set on which the shipped weights are trained and verified.

1,797 gray images of 8x8 pixels, values 0..16, bright ink on dark ground: the test part of the UCI set "Optical
Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, doi 10.24432/C50P49). It comes inside scikit-learn, so
nothing is downloaded. The split below is ours: one seeded permutation, the same on every machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.models.registry import ImageInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

Part = Literal["train", "validation", "test"]
SPLIT_SIZES: dict[str, int] = {"train": 1197, "validation": 240, "test": 360}
SPLIT_SEED = 20240610
DIGITS_LABELS = tuple("0123456789")

# mean and std: of all pixels of the enlarged training images.
DIGITS_INPUT = ImageInput(channels=1, size=32, mean=(0.305,), std=(0.323,), interpolation="bilinear", crop_pct=1.0)


def load_digits_split(part: Part) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One part of the fixed split: images uint8 `[n, 8, 8]` in 0..255, and labels int64 `[n]` in 0..9.

    Raises:
        UnknownNameError: `part` is not train, validation or test.
        MissingDependencyError: scikit-learn is not installed.
    """
    if part not in SPLIT_SIZES:
        raise UnknownNameError("part of the digits", part, SPLIT_SIZES)
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingDependencyError("scikit-learn", "train", "the digits data set") from error

    data = load_digits()
    order = np.random.Generator(np.random.PCG64(SPLIT_SEED)).permutation(len(data.target))
    ends = np.cumsum(list(SPLIT_SIZES.values()))
    chosen = np.split(order, ends[:-1])[list(SPLIT_SIZES).index(part)]
    images = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return images, data.target[chosen].astype(np.int64)


def enlarge(images: NDArray[np.uint8]) -> torch.Tensor:
    """Gray images uint8 `[n, H, W]` as float32 `[n, 1, 32, 32]` in 0..1: bilinear, half-pixel centres, not rounded.

    Raises:
        InputError: another dtype or number of dimensions.
    """
    if images.dtype != np.uint8 or images.ndim != 3:
        raise InputError(f"digits are uint8 images [n, H, W]; got {images.dtype} {images.shape}")
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float().unsqueeze(1)
    size = (DIGITS_INPUT.size, DIGITS_INPUT.size)
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False) / 255


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in 0..1 as the models take them: minus the mean, over the standard deviation. Any shape."""
    return (pixels - DIGITS_INPUT.mean[0]) / DIGITS_INPUT.std[0]


def digits_batch(images: NDArray[np.uint8]) -> torch.Tensor:
    """The model input for gray images uint8 `[n, 8, 8]`: float32 `[n, 1, 32, 32]`, prepared as `DIGITS_INPUT` states.

    Raises:
        InputError: another dtype or number of dimensions.
    """
    return normalise(enlarge(images))
