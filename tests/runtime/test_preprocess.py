"""The image recipe: what it computes, and that it survives the trip through a bundle."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import BundleError, InputError
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.resize import INTERPOLATIONS, resize

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

IMAGENET = ImagePreprocessing(
    size=(224, 224),
    resize="shortest",
    crop_pct=0.875,
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
DIGITS = ImagePreprocessing(size=(32, 32), color="gray", mean=(0.3,), std=(0.35,))
# Levels come out as they are: what is left to see is the geometry.
PLAIN = ImagePreprocessing(size=(4, 6), scale=1, mean=(0, 0, 0), std=(1, 1, 1), layout="NHWC")


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_an_8x8_gray_digit_equals_torch() -> None:
    image = noise(8, 8)
    grown = torch.nn.functional.interpolate(
        torch.from_numpy(image).float()[None, None], size=(32, 32), mode="bilinear", align_corners=False
    )
    expected = (grown / 255 - 0.3) / 0.35
    result = DIGITS(image)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@given(image=st.builds(noise, st.integers(1, 20), st.integers(1, 20), seed=st.integers(0, 99)))
@settings(max_examples=25, deadline=None)
def test_gray_is_preserved_in_every_form(interpolation: Any, image: NDArray[np.uint8]) -> None:
    recipe = dataclasses.replace(DIGITS, interpolation=interpolation)
    expected = recipe(image)
    np.testing.assert_array_equal(recipe(image[..., None]), expected)
    np.testing.assert_array_equal(recipe(np.repeat(image[..., None], 3, axis=2)), expected)


def test_every_gray_level_survives_to_the_last_bit() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    recipe = ImagePreprocessing(size=(16, 16), color="gray", scale=1, mean=(0,), std=(1,))
    np.testing.assert_array_equal(recipe(np.stack([levels] * 3, axis=-1))[0, 0], levels)


def test_luma_is_pillows_without_its_rounding() -> None:
    image = noise(16, 16, 3)
    recipe = ImagePreprocessing(size=(16, 16), color="gray", scale=1, mean=(0,), std=(1,))
    pillow = np.asarray(Image.fromarray(image).convert("L"), np.float32)
    np.testing.assert_allclose(recipe(image)[0, 0], pillow, atol=0.51)
    np.testing.assert_allclose(recipe(image)[0, 0], image @ np.array([0.299, 0.587, 0.114]), atol=1e-4)


def test_a_gray_image_fills_three_channels() -> None:
    image = noise(9, 7)
    result = PLAIN(image)
    assert result.shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(result, PLAIN(np.repeat(image[..., None], 3, axis=2)))


def test_bgr_is_rgb_reversed_and_mean_and_std_follow_its_order() -> None:
    image = noise(4, 6, 3)
    recipe = dataclasses.replace(PLAIN, color="bgr", mean=(1, 2, 3), std=(1, 2, 4))
    np.testing.assert_allclose(recipe(image)[0], (image[..., ::-1] - np.array([1, 2, 3])) / [1, 2, 4])


def test_layouts_hold_the_same_numbers() -> None:
    image = noise(30, 40, 3)
    last, first = PLAIN(image), dataclasses.replace(PLAIN, layout="NCHW")(image)
    assert PLAIN.output_shape == last.shape == (1, 4, 6, 3)
    assert first.shape == (1, 3, 4, 6)
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))


def test_transparent_parts_are_white() -> None:
    image = np.zeros((4, 6, 4), np.uint8)
    np.testing.assert_array_equal(PLAIN(image), np.full((1, 4, 6, 3), 255, np.float32))


def test_squash_ignores_the_aspect() -> None:
    image = noise(50, 20, 3)
    np.testing.assert_array_equal(PLAIN(image)[0], resize(image, (4, 6)))


def test_shortest_is_resize_then_centre_crop_as_imagenet_recipes_have_it() -> None:
    image = noise(300, 401, 3)
    recipe = dataclasses.replace(IMAGENET, scale=1, mean=(0, 0, 0), std=(1, 1, 1), layout="NHWC")
    whole = resize(image, (256, 342), "bicubic")  # 256 * 401 / 300 = 342.2, cut to int
    np.testing.assert_allclose(recipe(image)[0], whole[16:240, 59:283], atol=1e-3)


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_pct=st.floats(0.3, 1),
)
def test_shortest_always_covers_the_crop(height: int, width: int, size: tuple[int, int], crop_pct: float) -> None:
    recipe = dataclasses.replace(PLAIN, size=size, resize="shortest", crop_pct=crop_pct)
    np.testing.assert_allclose(recipe(np.full((height, width), 99, np.uint8)), np.full((1, *size, 3), 99), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        pytest.param((2, 6), (slice(1, 3), slice(0, 6)), id="wide-image-bars-above-and-below"),
        pytest.param((8, 2), (slice(0, 4), slice(2, 3)), id="tall-image-bars-left-and-right"),
        pytest.param((40, 60), (slice(0, 4), slice(0, 6)), id="same-aspect-no-bars"),
        pytest.param((1, 600), (slice(1, 2), slice(0, 6)), id="one-pixel-line-stays-visible"),
    ],
)
def test_letterbox_keeps_the_aspect_and_pads(shape: tuple[int, int], inside: tuple[slice, slice]) -> None:
    recipe = dataclasses.replace(PLAIN, resize="letterbox", pad_value=114)
    expected = np.full((4, 6, 3), 114.0)
    expected[inside] = 30
    np.testing.assert_allclose(recipe(np.full(shape, 30, np.uint8))[0], expected, rtol=1e-6)


def test_a_path_equals_its_pixels(tmp_path: Path) -> None:
    image = noise(20, 30, 3)
    Image.fromarray(image).save(tmp_path / "photo.png")
    np.testing.assert_array_equal(IMAGENET(tmp_path / "photo.png"), IMAGENET(image))
    np.testing.assert_array_equal(IMAGENET(str(tmp_path / "photo.png")), IMAGENET(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param([[1, 2]], "got list; use numpy.asarray", id="list"),
        pytest.param(np.zeros((4, 4, 3), np.float32), "got float32; bring its levels to 0..255", id="float"),
        pytest.param(np.zeros((3, 224, 224), np.uint8), r"got shape \[3, 224, 224\]", id="channels-first"),
        pytest.param(np.zeros((1, 4, 4, 3), np.uint8), r"got shape \[1, 4, 4, 3\]", id="batched"),
        pytest.param(np.zeros((0, 4), np.uint8), r"at least one pixel, got shape \[0, 4\]", id="empty"),
        pytest.param(np.zeros(5, np.uint8), r"got shape \[5\]", id="one-axis"),
    ],
)
def test_what_is_no_image_is_named(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"expected a path or a uint8 array \[H, W\].*{message}"):
        IMAGENET(image)


RECIPES = [
    pytest.param(
        IMAGENET, "resize shortest 256 bicubic, centre crop 224, RGB, (x/255 - mean)/std, NCHW", id="imagenet"
    ),
    pytest.param(DIGITS, "resize 32 bilinear, gray, (x/255 - mean)/std, NCHW", id="digits"),
    pytest.param(PLAIN, "resize 4x6 bilinear, RGB, x, NHWC", id="plain"),
    pytest.param(
        dataclasses.replace(PLAIN, resize="letterbox", pad_value=114, color="bgr", scale=1 / 255),
        "letterbox 4x6 bilinear, pad 114, BGR, x/255, NHWC",
        id="letterbox",
    ),
    pytest.param(
        dataclasses.replace(PLAIN, scale=1 / 127.5, mean=(1, 1, 1)),
        "resize 4x6 bilinear, RGB, x/127.5 - mean, NHWC",
        id="minus-one-to-one",
    ),
    pytest.param(
        dataclasses.replace(PLAIN, scale=2, std=(3, 3, 3)), "resize 4x6 bilinear, RGB, x*2/std, NHWC", id="std"
    ),
]


@pytest.mark.parametrize(("recipe", "line"), RECIPES)
def test_describe_says_it_in_one_line(recipe: ImagePreprocessing, line: str) -> None:
    assert recipe.describe() == line


@pytest.mark.parametrize(("recipe", "line"), RECIPES)
def test_json_brings_back_an_equal_recipe(recipe: ImagePreprocessing, line: str) -> None:
    again = ImagePreprocessing.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again == recipe
    assert again.describe() == line


WRONG_FIELDS = [
    ("size", [224], "two integers of at least 1; got"),
    ("size", 224, "two integers of at least 1; got 224"),
    ("size", [224, 0], "two integers of at least 1; got"),
    ("size", [224.0, 224], "two integers of at least 1; got"),
    ("size", [True, 224], "two integers of at least 1; got"),
    ("resize", "stretch", "one of squash, shortest, letterbox; got 'stretch'"),
    ("resize", ["squash"], "one of squash, shortest, letterbox; got"),
    ("crop_pct", 0, "a number in (0, 1]; got 0"),
    ("crop_pct", 1.5, "a number in (0, 1]; got 1.5"),
    ("crop_pct", "0.9", "a number in (0, 1]; got '0.9'"),
    ("interpolation", "cubic", "one of nearest, bilinear, bicubic, lanczos; got 'cubic'"),
    ("color", "RGB", "one of rgb, bgr, gray; got 'RGB'"),
    ("color", None, "one of rgb, bgr, gray; got None"),
    ("scale", 0, "a finite number other than 0; got 0"),
    ("scale", float("inf"), "a finite number other than 0; got inf"),
    ("scale", True, "a finite number other than 0; got True"),
    ("mean", [0.5], "3 finite numbers, one per channel of 'rgb'; got (0.5,)"),
    ("mean", 0.5, "3 finite numbers, one per channel of 'rgb'; got 0.5"),
    ("mean", [0, 0, float("nan")], "3 finite numbers, one per channel of 'rgb'; got (0, 0, nan)"),
    ("std", [1, 1, "1"], "3 finite numbers, one per channel of 'rgb'; got (1, 1, '1')"),
    ("std", [1, 0, 1], "numbers other than 0, since the input is divided by them; got (1, 0, 1)"),
    ("std", [1, 1e-60, 1], "numbers other than 0, since the input is divided by them; got"),
    ("mean", [0, 0, 10**400], "3 finite numbers, one per channel of 'rgb'; got"),
    ("layout", "CHW", "one of NCHW, NHWC; got 'CHW'"),
    ("pad_value", 256, "a level from 0 to 255; got 256"),
    ("pad_value", None, "a level from 0 to 255; got None"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG_FIELDS, ids=[f"{f}={v}"[:30] for f, v, _ in WRONG_FIELDS])
def test_a_wrong_field_is_named(field: str, value: Any, message: str) -> None:
    expected = re.escape(f"preprocessing.{field}: expected ") + ".*" + re.escape(message)
    changed: dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value}
    with pytest.raises(BundleError, match=expected):
        ImagePreprocessing.from_json({**IMAGENET.to_json(), field: value})
    with pytest.raises(InputError, match=expected):
        dataclasses.replace(IMAGENET, **changed)


def test_a_crop_without_a_cropping_resize_is_refused() -> None:
    with pytest.raises(InputError, match=r"crop_pct: expected 1 with resize 'squash', which does not crop; got 0\.9"):
        dataclasses.replace(PLAIN, crop_pct=0.9)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(BundleError, match=r"unknown field gamma; known: size, .*newer edgekit"):
        ImagePreprocessing.from_json({**DIGITS.to_json(), "gamma": 2.2})


def test_a_missing_field_is_named() -> None:
    recipe = DIGITS.to_json()
    del recipe["std"], recipe["layout"]
    with pytest.raises(BundleError, match=r"missing field std, layout; export the model again"):
        ImagePreprocessing.from_json(recipe)


@pytest.mark.parametrize("recipe", [None, [], "imagenet", 3], ids=["null", "list", "text", "number"])
def test_a_recipe_that_is_no_object_is_refused(recipe: Any) -> None:
    with pytest.raises(BundleError, match="expected an object with fields, got"):
        ImagePreprocessing.from_json(recipe)


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_a_model_that_takes_pixels_gets_rounded_levels(color: str) -> None:
    """Normalising the levels gives what the recipe gives, but for the rounding of levels after resizing."""
    channels = 1 if color == "gray" else 3
    mean, std = (0.2, 0.4, 0.6)[:channels], (0.5, 0.25, 0.125)[:channels]
    recipe = ImagePreprocessing(size=(5, 7), color=color, mean=mean, std=std)  # type: ignore[arg-type]
    image = noise(9, 11, 3)
    levels = dataclasses.replace(recipe, pixels=True)(image)
    assert (levels.dtype, levels.shape, levels.flags.c_contiguous) == (np.uint8, recipe.output_shape, True)
    per_channel = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (mean, std))
    normalised = (lambda m, s: (levels / np.float32(255) - m) / s)(*per_channel)
    assert np.abs(normalised - recipe(image)).max() <= 0.5 / 255 / min(std) * 1.0001
    same_size = dataclasses.replace(recipe, size=(9, 11))
    assert color == "gray" or np.array_equal(
        dataclasses.replace(same_size, pixels=True)(image)[0, 0], image[..., 0 if color == "rgb" else 2]
    )


def test_pixels_travel_in_the_recipe_and_older_recipes_have_none() -> None:
    assert "pixels" not in DIGITS.to_json()
    taking = dataclasses.replace(DIGITS, pixels=True)
    assert ImagePreprocessing.from_json(json.loads(json.dumps(taking.to_json()))) == taking
    assert "pixels (the model computes (x/255 - mean)/std)" in taking.describe()
    with pytest.raises(InputError, match=r"preprocessing\.pixels: expected true or false"):
        dataclasses.replace(DIGITS, pixels=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="NCHW where the model takes pixels"):
        dataclasses.replace(PLAIN, pixels=True)


class TestFromUser:
    """A recipe that somebody writes for an export."""

    def test_what_is_left_out_has_its_default(self) -> None:
        given = {"size": [18, 14], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
        assert ImagePreprocessing.from_user(given) == ImagePreprocessing(
            size=(18, 14), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
        )

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"fit": "cover"}, "unknown field fit; known: size, resize, .*pad_value$"),
            ({"pixels": True}, "unknown field pixels"),
            ({"color": "cmyk"}, "color"),
            ({"size": 18}, "size"),
        ],
        ids=["unknown", "pixels", "color", "size"],
    )
    def test_faults_are_the_users(self, change: dict[str, object], words: str) -> None:
        with pytest.raises(InputError, match=words):
            ImagePreprocessing.from_user({"size": [18, 14], "mean": [0.5] * 3, "std": [0.25] * 3, **change})

    def test_missing_fields_are_named_with_a_whole_recipe(self) -> None:
        with pytest.raises(InputError, match=r"missing field mean, std; a recipe is at least \{\"size\": \[224, 224\]"):
            ImagePreprocessing.from_user({"size": [18, 14]})
