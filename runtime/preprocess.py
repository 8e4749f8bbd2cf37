"""The recipe that turns an image into a model's input. It travels in the bundle, so that no application guesses it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from edgekit.errors import BundleError, InputError
from edgekit.runtime.images import flatten_alpha, read_image
from edgekit.runtime.resize import INTERPOLATIONS, Interpolation, resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

ResizeMode = Literal["squash", "shortest", "letterbox"]
Color = Literal["rgb", "bgr", "gray"]
Layout = Literal["NCHW", "NHWC"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "resize": get_args(ResizeMode),
    "interpolation": INTERPOLATIONS,
    "color": get_args(Color),
    "layout": get_args(Layout),
}
_LEVELS = (0.0, 255.0)
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """From an image to a model's input: colour, resize, crop or pad, scale, normalise, lay out, in this order.

    Attributes:
        size: height and width of the model's input, in pixels.
        resize: "squash" goes straight to `size`, whatever the aspect. "shortest" keeps the aspect, brings the shorter
            side to `round(size / crop_pct)` and cuts `size` out of the centre. "letterbox" keeps the aspect, fits the
            image into `size` and pads what is left.
        crop_pct: the part of the shorter side that the crop keeps, in (0, 1]; only for "shortest".
        interpolation: see `edgekit.runtime.resize.resize`.
        color: the channels: "rgb", "bgr", or "gray" (one channel, ITU-R BT.601 luma, not rounded).
        scale: factor from levels (0 to 255) to the unit of `mean` and `std`.
        mean, std: one per channel, in the order of `color`; the input is `(level * scale - mean) / std`.
        layout: "NCHW" or "NHWC".
        pad_value: level (0 to 255) of the bars around a letterboxed image.
        pixels: the model takes levels, and does the arithmetic of `scale`, `mean` and `std` itself: the input is then
            uint8, rounded after resizing, in "NCHW".

    Raises:
        InputError: a field that is out of range, of the wrong type, or at odds with another.
    """

    size: tuple[int, int]
    resize: ResizeMode = "squash"
    crop_pct: float = 1.0
    interpolation: Interpolation = "bilinear"
    color: Color = "rgb"
    scale: float = 1 / 255
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Layout = "NCHW"
    pad_value: float = 0.0
    pixels: bool = False

    def __post_init__(self) -> None:
        is_size = isinstance(self.size, tuple) and len(self.size) == 2
        is_size = is_size and all(type(side) is int and side > 0 for side in self.size)
        self._require("size", is_size, "(height, width), two integers of at least 1")
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            self._require(field, isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")
        self._require("crop_pct", _is_number(self.crop_pct) and 0 < self.crop_pct <= 1, "a number in (0, 1]")
        crops = self.crop_pct == 1 or self.resize == "shortest"
        self._require("crop_pct", crops, f"1 with resize {self.resize!r}, which does not crop")
        scales = _is_number(self.scale) and np.float32(self.scale) != 0
        self._require("scale", bool(scales), "a finite number other than 0")
        for field in ("mean", "std"):
            values = getattr(self, field)
            fits = isinstance(values, tuple) and len(values) == self.channels and all(map(_is_number, values))
            self._require(field, fits, f"{self.channels} finite numbers, one per channel of {self.color!r}")
        divides = all(np.float32(value) != 0 for value in self.std)
        self._require("std", divides, "numbers other than 0, since the input is divided by them")
        is_level = _is_number(self.pad_value) and 0 <= self.pad_value <= 255
        self._require("pad_value", is_level, "a level from 0 to 255")
        self._require("pixels", isinstance(self.pixels, bool), "true or false")
        self._require("layout", not self.pixels or self.layout == "NCHW", "NCHW where the model takes pixels")

    def _require(self, field: str, condition: bool, expected: str) -> None:
        if not condition:
            raise InputError(f"preprocessing.{field}: expected {expected}; got {getattr(self, field)!r}")

    @property
    def channels(self) -> int:
        """The number of channels of the result: 1 for gray, else 3."""
        return 1 if self.color == "gray" else 3

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """The shape of the result, in the order of `layout`."""
        height, width = self.size
        return (1, self.channels, height, width) if self.layout == "NCHW" else (1, height, width, self.channels)

    @property
    def dtype(self) -> str:
        """The dtype of the result: float32, or uint8 where the model takes pixels."""
        return "uint8" if self.pixels else "float32"

    def __call__(self, image: NDArray[np.uint8] | str | os.PathLike[str]) -> NDArray[np.float32] | NDArray[np.uint8]:
        """Preprocess one image.

        Args:
            image: a path (read by `read_image`), or uint8 levels 0 to 255: `[H, W]` or `[H, W, 1]` gray, `[H, W, 3]`
                RGB, or `[H, W, 4]` RGB and alpha (transparent parts become white).

        Returns:
            `output_shape`, float32; uint8 levels where the model takes `pixels`.

        Raises:
            InputError: an image of another dtype or shape, or a file that cannot be read.
            MissingDependencyError: a path was given and Pillow is not installed.
        """
        pixels = _as_pixels(image)
        levels = self._fit(_luma(pixels) if self.color == "gray" else pixels)
        if self.color == "bgr":
            levels = levels[..., ::-1]
        if self.pixels:
            return np.ascontiguousarray(np.rint(levels).astype(np.uint8).transpose(2, 0, 1)[None])
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        result = (levels * np.float32(self.scale) - mean) / std  # a single gray channel spreads over three here
        if self.layout == "NCHW":
            result = result.transpose(2, 0, 1)
        return np.ascontiguousarray(result[None])

    def _fit(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Pixels `[H, W, C]` to levels `[h, w, C]` of `size`."""
        height, width = self.size
        if self.resize == "squash":
            return resize(pixels, self.size, self.interpolation, limits=_LEVELS)
        if self.resize == "shortest":
            full = self._cover(*pixels.shape[:2])
            # The offsets are rounded to even, as torchvision's CenterCrop does.
            window = (round((full[0] - height) / 2), round((full[1] - width) / 2), height, width)
            return resize(pixels, full, self.interpolation, window=window, limits=_LEVELS)
        ratio = min(height / pixels.shape[0], width / pixels.shape[1])
        inner = (max(1, round(pixels.shape[0] * ratio)), max(1, round(pixels.shape[1] * ratio)))
        top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
        padded = np.full((height, width, pixels.shape[2]), self.pad_value, np.float32)
        padded[top : top + inner[0], left : left + inner[1]] = resize(pixels, inner, self.interpolation, limits=_LEVELS)
        return padded

    def _cover(self, height: int, width: int) -> tuple[int, int]:
        """The smallest size of the image's aspect that covers `round(size / crop_pct)`; the longer side is cut to int,
        as torchvision's Resize does."""
        least = [round(side / self.crop_pct) for side in self.size]
        if least[0] * width >= least[1] * height:  # the height decides
            return least[0], max(least[1], least[0] * width // height)
        return max(least[0], least[1] * height // width), least[1]

    def describe(self) -> str:
        """The recipe in one line, for people."""
        size = _size_text(self.size)
        if self.resize == "shortest":
            least = _size_text((round(self.size[0] / self.crop_pct), round(self.size[1] / self.crop_pct)))
            steps = [f"resize shortest {least} {self.interpolation}", f"centre crop {size}"]
        elif self.resize == "letterbox":
            steps = [f"letterbox {size} {self.interpolation}, pad {self.pad_value:g}"]
        else:
            steps = [f"resize {size} {self.interpolation}"]
        steps += [self.color if self.color == "gray" else self.color.upper()]
        arithmetic = self._arithmetic()
        steps += [f"pixels (the model computes {arithmetic})" if self.pixels else arithmetic, self.layout]
        return ", ".join(steps)

    def _arithmetic(self) -> str:
        text = "x"
        if self.scale != 1:
            text = f"x/{1 / self.scale:g}" if abs(self.scale) < 1 else f"x*{self.scale:g}"
        if any(self.mean):
            text = f"({text} - mean)" if set(self.std) != {1} else f"{text} - mean"
        return text if set(self.std) == {1} else f"{text}/std"

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON: every field, tuples as lists; `pixels` where true. `from_json` gives an equal recipe."""
        fields = dataclasses.asdict(self)
        if not self.pixels:  # it came later than the other fields: older recipes are read and written as they were
            del fields["pixels"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, recipe: Mapping[str, Any]) -> ImagePreprocessing:
        """Read what `to_json` wrote. Every field must be there: a bundle does not depend on its reader's defaults.

        Raises:
            BundleError: a field is missing, unknown, of the wrong type or out of range; the message names it.
        """
        if not isinstance(recipe, Mapping):
            raise BundleError(f"preprocessing: expected an object with fields, got {recipe!r}")
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, recipe.keys() - set(fields))):
            raise BundleError(
                f"preprocessing: unknown field {', '.join(unknown)}; known: {', '.join(fields)}. "
                "A newer edgekit may have written this bundle"
            )
        if missing := [name for name in fields if name not in recipe and name != "pixels"]:
            raise BundleError(f"preprocessing: missing field {', '.join(missing)}; export the model again")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in recipe.items()
        }
        try:
            return cls(**values)
        except InputError as error:
            raise BundleError(str(error)) from error

    @classmethod
    def from_user(cls, recipe: Mapping[str, Any]) -> ImagePreprocessing:
        """Read what a user wrote for an export: `size`, `mean` and `std` must be there, the others have defaults.

        `pixels` is none of theirs: an export to a target that normalises in the graph sets it.

        Raises:
            InputError: a field is missing, unknown, of the wrong type or out of range; the message names it.
        """
        known = {field.name: field for field in dataclasses.fields(cls) if field.name != "pixels"}
        if unknown := sorted(map(str, recipe.keys() - set(known))):
            raise InputError(f"preprocessing: unknown field {', '.join(unknown)}; known: {', '.join(known)}")
        needed = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in recipe]:
            raise InputError(
                f"preprocessing: missing field {', '.join(missing)}; a recipe is at least "
                '{"size": [224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}'
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in recipe.items()
        }
        return cls(**values)


def _is_number(value: object) -> bool:
    """Whether `value` is a number that float32, in which the arithmetic is done, can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX


def _size_text(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _as_pixels(image: NDArray[np.uint8] | str | os.PathLike[str]) -> NDArray[np.uint8]:
    """An image of any accepted kind to uint8 `[H, W, 1]` or `[H, W, 3]`."""
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    wanted = "expected a path or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    if not isinstance(image, np.ndarray):
        raise InputError(f"{wanted}, got {type(image).__name__}; use numpy.asarray")
    if image.dtype != np.uint8:
        raise InputError(f"{wanted}, got {image.dtype}; bring its levels to 0..255 and use .astype(numpy.uint8)")
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise InputError(f"{wanted} with at least one pixel, got shape {list(image.shape)}")
    return flatten_alpha(pixels) if pixels.shape[2] == 4 else pixels


def _luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """ITU-R BT.601 luma, 0.299 R + 0.587 G + 0.114 B, of `[H, W, 1 or 3]` as `[H, W, 1]`.

    Written as green plus differences, so that gray pixels keep their level to the last bit.
    """
    levels = pixels.astype(np.float32)
    if levels.shape[2] == 1:
        return levels
    red, green, blue = levels[..., :1], levels[..., 1:2], levels[..., 2:]
    luma: NDArray[np.float32] = green + np.float32(0.299) * (red - green) + np.float32(0.114) * (blue - green)
    return luma
