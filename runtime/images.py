"""Reading image files as uint8 RGB, upright and opaque, whatever the file holds.

Pillow decodes and is imported by the call alone: a program that feeds arrays does not need it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray
    from PIL import Image

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Pillow knows formats that start other programs (EPS runs Ghostscript); only these decoders are ever tried.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
# How Pillow turns an image of each EXIF orientation upright; 1 is upright.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def is_image(path: str | os.PathLike[str]) -> bool:
    """Whether the name ends like an image that `read_image` reads (`IMAGE_SUFFIXES`, any case). Opens nothing."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read an image file as a person would see it.

    The EXIF orientation is applied. Transparent parts show white, as on a page. Gray, palette, 1-bit and CMYK images
    become RGB; 16-bit gray is scaled from 0..65535 to 0..255. An animation gives its first frame. Colour profiles are
    ignored, as training pipelines ignore them.

    Args:
        path: a file in one of the formats of `IMAGE_SUFFIXES`; the content decides, not the name.

    Returns:
        uint8 `[H, W, 3]`, RGB, levels 0 to 255.

    Raises:
        InputError: no such file, a directory, no image, a damaged image, more pixels than Pillow decodes safely
            (about 179 million), or levels that have no fixed white (32-bit and float images).
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError("Pillow", "cli", "reading image files") from error

    path = Path(path)
    if path.is_dir():
        raise InputError(f"expected an image file, got the directory {path}; name a file inside it")
    if not path.exists():
        raise InputError(f"no such image file: {path}")
    Image.init()  # Pillow learns TIFF and WebP only now
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is fine, a bomb raises
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                orientation = image.getexif().get(_ORIENTATION)  # after load, which turns some files by itself
    except Image.DecompressionBombError as error:
        raise InputError(f"{path} has more pixels than is safe to decode ({error}); scale it down first") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is no image of a known format; known: {', '.join(IMAGE_SUFFIXES)}") from error
    except Exception as error:  # on damaged files Pillow raises nearly anything, TypeError and struct.error included
        raise InputError(f"{path} cannot be read as an image, it may be damaged or cut short: {error}") from error
    if orientation in _UPRIGHT:
        return _to_rgb(image.transpose(Image.Transpose[_UPRIGHT[orientation]]), path)
    return _to_rgb(image, path)


def flatten_alpha(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put an image with transparency on white.

    Args:
        image: uint8 `[H, W, 4]`, RGB and alpha (0 transparent, 255 opaque), not premultiplied.

    Returns:
        uint8 `[H, W, 3]`, RGB.
    """
    alpha = image[..., 3:].astype(np.uint16)
    mixed = image[..., :3] * alpha + 255 * (255 - alpha)  # at most 255 * 255: fits uint16
    return ((mixed + 127) // 255).astype(np.uint8)


def _to_rgb(image: Image.Image, path: Path) -> NDArray[np.uint8]:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image), path)
    if image.mode == "F":
        raise InputError(f"{path} holds float levels, whose white is unknown; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        return flatten_alpha(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _from_16_bits(gray: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """Gray levels 0..65535 `[H, W]` to uint8 `[H, W, 3]`. Pillow gives some 16-bit files as int32."""
    if gray.min() < 0 or gray.max() > 65535:
        raise InputError(f"{path} holds 32-bit levels, whose white is unknown; save it with 8 or 16 bits per channel")
    levels = (gray.astype(np.uint32) + 128) // 257
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)
