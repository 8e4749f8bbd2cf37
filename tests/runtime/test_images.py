"""Image files of every kind that a user may have, whole and damaged."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import InputError, MissingDependencyError
from edgekit.runtime.images import IMAGE_SUFFIXES, flatten_alpha, is_image, read_image

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RED, WHITE = (255, 0, 0), (255, 255, 255)


def picture(height: int = 6, width: int = 9) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encode(image: NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


KINDS = {kind: encode(picture(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP")}


@pytest.mark.parametrize("suffix", [".bmp", ".png", ".ppm", ".tif", ".tiff"])
def test_lossless_rgb_is_read_exactly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(picture()).save(path)
    image = read_image(path)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, picture())


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".gif", ".webp"])
def test_lossy_formats_are_read_nearly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo{suffix}"
    Image.new("RGB", (9, 6), (200, 40, 90)).save(path)
    np.testing.assert_allclose(read_image(str(path)), np.full((6, 9, 3), (200, 40, 90)), atol=6)


def test_the_result_may_be_written(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    read_image(tmp_path / "photo.png")[:] = 0


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = picture()
    undo = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo[orientation])).save(tmp_path / f"photo{suffix}", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / f"photo{suffix}"), upright)


def test_an_unknown_orientation_is_left_alone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.fromarray(picture()).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), picture())


def test_a_phone_photo_of_several_pictures_gives_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), RED), Image.new("RGB", (16, 16), (0, 0, 255))
    first.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[second])
    np.testing.assert_allclose(read_image(tmp_path / "phone.jpg")[0, 0], RED, atol=3)


def test_gray_becomes_three_equal_channels(tmp_path: Path) -> None:
    gray = picture()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png"), np.repeat(gray[..., None], 3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = picture()[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[..., 1], np.where(bits, 255, 0))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_gray_is_scaled_not_cut(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 257], [32768, 65278, 65407, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / f"deep{suffix}")
    expected = np.round(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / f"deep{suffix}")[..., 0], expected)


def test_32_bit_integers_within_16_bits_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "deep.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif")[0, :, 0], [0, 255])


@pytest.mark.parametrize("transparency", [None, 0], ids=["opaque", "with-transparent-colour"])
def test_palettes_become_their_colours(tmp_path: Path, transparency: int | None) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 255, 0])
    image.putpixel((1, 0), 1)
    options: dict[str, Any] = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "palette.png", **options)
    expected = [WHITE if transparency == 0 else RED, (0, 255, 0)]
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png")[0], expected)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "logo.png")
    np.testing.assert_array_equal(read_image(tmp_path / "logo.png")[0], [RED, WHITE, (127, 127, 127)])


def test_gray_with_alpha_is_flattened(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1), (90, 255))
    image.putpixel((1, 0), (90, 0))
    image.save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png")[0], [(90, 90, 90), WHITE])


@given(st.integers(0, 255), st.integers(0, 255))
def test_flatten_alpha_rounds_the_exact_mix(level: int, alpha: int) -> None:
    mixed = flatten_alpha(np.array([[[level, level, level, alpha]]], np.uint8))
    exact = (level * alpha + 255 * (255 - alpha)) / 255
    assert np.abs(mixed.astype(float) - exact).max() <= 0.5


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "print.tif")[0, 0], RED)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(tmp_path / "moving.gif")[0, 0], RED)


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "photo", format="PNG")
    np.testing.assert_array_equal(read_image(tmp_path / "photo"), picture())


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "b.c.Png", "x/y.tiff", *(f"z{end}" for end in IMAGE_SUFFIXES)])
def test_is_image_goes_by_the_ending(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["a.txt", "jpg", "a.jpg.txt", "", "a.eps", ".png"])
def test_is_image_refuses_other_endings(name: str) -> None:
    assert not is_image(name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such image file: .*none\.png"):
        read_image(tmp_path / "none.png")


def test_a_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"got the directory {tmp_path}"):
        read_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 20, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
                         ids=["empty", "text", "postscript"])  # fmt: skip
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "notes.png").write_bytes(content)
    with pytest.raises(InputError, match=r"notes\.png is no image of a known format; known: \.bmp"):
        read_image(tmp_path / "notes.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF"])
def test_a_file_cut_short_is_named(tmp_path: Path, kind: str) -> None:
    content = encode(picture(64, 64), kind)
    (tmp_path / "half.img").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"half\.img"):
        read_image(tmp_path / "half.img")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(list(KINDS)), data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged metadata
def test_damage_never_raises_anything_but_input_errors(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 4), label="bytes changed")):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged").write_bytes(content[: data.draw(st.integers(0, len(content)), label="length")])
    try:
        image = read_image(tmp_path / "damaged")
    except InputError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2:] == (3,)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(InputError, match=r"bomb\.png has more pixels than is safe"):
        read_image(tmp_path / "bomb.png")


def test_a_large_photo_passes_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 54 pixels: Pillow warns up to twice its limit
    np.testing.assert_array_equal(read_image(tmp_path / "large.png"), picture())


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        pytest.param(np.array([[0.0, 1.0]], np.float32), "float levels", id="float"),
        pytest.param(np.array([[0, 70_000]], np.int32), "32-bit levels", id="32-bit"),
        pytest.param(np.array([[-1, 5]], np.int32), "32-bit levels", id="negative"),
    ],
)
def test_levels_without_a_known_white_are_refused(tmp_path: Path, levels: NDArray[np.generic], message: str) -> None:
    Image.fromarray(levels).save(tmp_path / "science.tif")
    with pytest.raises(InputError, match=rf"science\.tif holds {message}.*save it with 8 or 16 bits"):
        read_image(tmp_path / "science.tif")


def test_without_pillow_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"reading image files needs Pillow.*edgekit\[cli\]"):
        read_image(tmp_path / "photo.png")
