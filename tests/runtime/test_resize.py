"""Resizing against two implementations that are not ours, Pillow and PyTorch, and against what resizing means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import InputError
from edgekit.runtime.resize import INTERPOLATIONS, Interpolation, _weights, resize

if TYPE_CHECKING:
    from numpy.typing import NDArray

PILLOW = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SMOOTH: tuple[Interpolation, ...] = ("bilinear", "bicubic", "lanczos")

SIZES = [
    pytest.param((8, 8), (32, 32), id="8x8-up-to-32x32"),
    pytest.param((97, 61), (32, 32), id="97x61-down-to-32x32"),
    pytest.param((63, 65), (64, 64), id="63x65-nearly-64x64"),
    pytest.param((40, 200), (80, 50), id="40x200-up-and-down-to-80x50"),
    pytest.param((1, 1), (7, 5), id="1x1-to-7x5"),
    pytest.param((13, 17), (1, 1), id="13x17-to-1x1"),
    pytest.param((1, 50), (20, 1), id="1x50-to-20x1"),
    pytest.param((300, 3), (3, 300), id="300x3-to-3x300"),
    pytest.param((24, 24), (24, 24), id="24x24-unchanged"),
    pytest.param((24, 30), (24, 10), id="24x30-width-only"),
]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pillow_resize(image: NDArray[np.uint8], size: tuple[int, int], interpolation: str) -> NDArray[np.float32]:
    """Width, then height, in two calls: from version 13 on, Pillow's order within one call depends on the sizes."""
    height, width = size
    narrowed = Image.fromarray(image).resize((width, image.shape[0]), PILLOW[interpolation])
    return np.asarray(narrowed.resize((width, height), PILLOW[interpolation]), np.float32)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_resize_is_within_one_level_of_pillow(
    before: tuple[int, int], after: tuple[int, int], interpolation: Interpolation
) -> None:
    image = noise(*before)
    ours = resize(image, after, interpolation)
    assert ours.dtype == np.float32
    assert ours.shape == (*after, 3)
    assert np.abs(ours.round() - pillow_resize(image, after, interpolation)).max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    before=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    after=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    interpolation=st.sampled_from(SMOOTH),
    seed=st.integers(0, 999),
)
def test_any_size_is_within_one_level_of_pillow(
    before: tuple[int, int], after: tuple[int, int], interpolation: Interpolation, seed: int
) -> None:
    image = noise(*before, seed=seed)
    ours = resize(image, after, interpolation)
    assert np.abs(ours.round() - pillow_resize(image, after, interpolation)).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_resize_of_floats_equals_torch(
    before: tuple[int, int], after: tuple[int, int], interpolation: Interpolation
) -> None:
    image = noise(*before).astype(np.float32)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(
        tensor, size=after, mode=interpolation, align_corners=False, antialias=True
    )
    np.testing.assert_allclose(resize(image, after, interpolation), expected[0].permute(1, 2, 0).numpy(), atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    before=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    after=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    interpolation=st.sampled_from(INTERPOLATIONS),
    level=st.integers(0, 255),
)
def test_a_constant_image_stays_constant(
    before: tuple[int, int], after: tuple[int, int], interpolation: Interpolation, level: int
) -> None:
    image = np.full((*before, 2), level, np.uint8)
    np.testing.assert_allclose(resize(image, after, interpolation), level, rtol=1e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_same_size_changes_no_bit(interpolation: Interpolation) -> None:
    image = noise(19, 23)
    np.testing.assert_array_equal(resize(image, (19, 23), interpolation), image)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("after", [(30, 70), (120, 20)], ids=["down-and-up", "up-and-down"])
def test_a_window_is_a_crop_of_the_whole(interpolation: Interpolation, after: tuple[int, int]) -> None:
    image = noise(50, 40)
    whole = resize(image, after, interpolation)
    part = resize(image, after, interpolation, window=(3, 5, 21, 11))
    np.testing.assert_allclose(part, whole[3:24, 5:16], atol=1e-4)


def test_a_window_of_an_extreme_panorama_needs_no_room_for_the_rest() -> None:
    image = noise(2, 60_000)
    part = resize(image, (224, 6_720_000), window=(0, 3_000_000, 224, 224))
    assert part.shape == (224, 224, 3)


def test_limits_hold_overshoot_for_bytes_and_not_for_floats() -> None:
    edge = np.zeros((1, 8, 1), np.uint8)
    edge[:, 4:] = 255
    held = resize(edge, (1, 32), "bicubic")
    free = resize(edge.astype(np.float32), (1, 32), "bicubic")
    assert (held.min(), held.max()) == (0, 255)
    assert free.min() < 0
    assert free.max() > 255
    np.testing.assert_array_equal(resize(edge.astype(np.float32), (1, 32), "bicubic", limits=(0, 255)), held)


def test_shrinking_averages_instead_of_dropping_pixels() -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    small = resize(stripes, (8, 8))
    assert small.min() > 110
    assert small.max() < 145


def test_views_and_flipped_images_are_read_right() -> None:
    image = noise(20, 30)
    flipped = image[::-1, ::-1]
    np.testing.assert_array_equal(resize(flipped, (11, 7)), resize(flipped.copy(), (11, 7)))


def test_the_result_is_fresh_and_the_weights_cannot_be_written() -> None:
    image = noise(5, 5).astype(np.float32)
    result = resize(image, (5, 5))
    result[:] = -1
    assert image.min() >= 0
    with pytest.raises(ValueError, match="read-only"):
        _weights(5, 9, 0, 9, "bilinear")[0].weights[:] = 0


@pytest.mark.parametrize(
    ("image", "size", "options", "message"),
    [
        pytest.param(np.zeros((4, 4), np.uint8), (2, 2), {}, r"\[H, W, C\].*got shape \[4, 4\]", id="rank"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), (2, 2), {}, "at least one pixel", id="empty"),
        pytest.param(np.zeros((4, 4, 3)), (2, 2), {}, "uint8 or float32, got float64", id="dtype"),
        pytest.param(np.zeros((4, 4, 3), np.uint8), (0, 2), {}, "at least 1x1, got 0x2", id="size"),
        pytest.param(
            np.zeros((4, 4, 3), np.uint8),
            (2, 2),
            {"interpolation": "cubic"},
            "bicubic.*got 'cubic'",
            id="interpolation",
        ),
        pytest.param(
            np.zeros((4, 4, 3), np.uint8), (8, 8), {"window": (0, 4, 8, 5)}, "inside 8x8, got", id="window-too-wide"
        ),
        pytest.param(
            np.zeros((4, 4, 3), np.uint8), (8, 8), {"window": (-1, 0, 2, 2)}, "inside 8x8, got", id="window-negative"
        ),
    ],
)
def test_wrong_arguments_are_named(
    image: NDArray[Any], size: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resize(image, size, **options)
