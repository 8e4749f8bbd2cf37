"""Comparisons: the figures against plain formulas, and every way in which nothing was really compared."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.errors import InputError, NothingToCompareError
from edgekit.runtime.compare import compare_arrays, compare_outputs

NAN, INF = math.nan, math.inf
MODERATE = st.floats(-1e3, 1e3).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
SHAPES = hnp.array_shapes(max_dims=3, max_side=5)


def close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)


@given(data=st.data(), shape=SHAPES)
@settings(max_examples=200, deadline=None)
def test_figures_are_the_plain_formulas(data: st.DataObject, shape: tuple[int, ...]) -> None:
    x = data.draw(hnp.arrays(np.float64, shape, elements=MODERATE))
    y = data.draw(hnp.arrays(np.float64, shape, elements=MODERATE))
    result = compare_arrays("y", x, y, tolerance=0.5)
    error, norm = np.sqrt(np.sum((y - x) ** 2)), np.sqrt(np.sum(x**2))
    assert close(result.max_abs, np.max(np.abs(y - x)))
    assert close(result.rel_l2, error / norm if norm else (0.0 if error == 0 else INF))
    if norm and np.any(y):
        assert abs(result.cosine - np.sum(x * y) / (norm * np.sqrt(np.sum(y**2)))) < 1e-9
    if norm and error:
        assert abs(result.psnr_db - 10 * np.log10(np.max(np.abs(x)) ** 2 / np.mean((y - x) ** 2))) < 1e-9
    assert bool(result) == (result.rel_l2 <= 0.5)
    assert result.problem is None


@given(data=st.data(), shape=SHAPES, exponent=st.integers(-1000, 1000))
@settings(max_examples=100, deadline=None)
def test_scale_does_not_matter(data: st.DataObject, shape: tuple[int, ...], exponent: int) -> None:
    x = data.draw(hnp.arrays(np.float64, shape, elements=MODERATE))
    y = data.draw(hnp.arrays(np.float64, shape, elements=MODERATE))
    plain = compare_arrays("y", x, y, tolerance=0.1)
    scaled = compare_arrays("y", np.ldexp(x, exponent), np.ldexp(y, exponent), tolerance=0.1)
    assert close(plain.rel_l2, scaled.rel_l2)
    assert close(plain.psnr_db, scaled.psnr_db)
    assert close(plain.cosine, scaled.cosine)


@given(shape=SHAPES, data=st.data(), dtype=st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.bool_]))
@settings(max_examples=100, deadline=None)
def test_an_array_equals_itself_where_it_is_finite(shape: tuple[int, ...], data: st.DataObject, dtype: Any) -> None:
    x = data.draw(hnp.arrays(dtype, shape))
    result = compare_arrays("y", x, x.copy(), tolerance=0.0, top1=True)
    assert bool(result) == bool(np.isfinite(x.astype(np.float64)).any())
    if result:
        assert (result.max_abs, result.rel_l2, result.cosine, result.psnr_db) == (0.0, 0.0, 1.0, INF)
        assert result.top1_agreement in (None, 1.0)


def test_psnr_by_a_known_value() -> None:
    # The peak is 255 and every value is off by 1: 20 log10(255) = 48.1308 dB.
    x = np.array([255.0, 0.0, 100.0, 31.0])
    assert compare_arrays("y", x, x + 1, tolerance=1).psnr_db == pytest.approx(48.1308, abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "actual", "words"),
    [
        ([1.0, 2.0], [1.0, NAN], "1 of 2 values are NaN or infinite on one side"),
        ([1.0, NAN], [1.0, 2.0], "1 of 2 values"),
        ([1.0, INF], [1.0, -INF], "1 of 2 values"),
        ([1.0, INF], [1.0, NAN], "1 of 2 values"),
        ([1.0, INF, NAN, INF], [1.0, INF, NAN, 0.0], "1 of 4 values"),
        ([1.0, 2.0], [[1.0, 2.0]], r"the shape is \[1, 2\], PyTorch gave \[2\]"),
        ([], [], "no values to compare"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "no values to compare"),
        ([NAN, INF], [NAN, INF], "no finite value"),
    ],
)
def test_what_cannot_be_compared_never_passes(reference: Any, actual: Any, words: str) -> None:
    result = compare_arrays("y", reference, actual, tolerance=INF)
    assert not result
    assert result.problem is not None
    np.testing.assert_equal(np.array([result.max_abs, result.rel_l2, result.cosine, result.psnr_db]), NAN)
    assert re.search(words, result.problem)


def test_equal_infinities_count_as_equal_and_the_rest_is_measured() -> None:
    result = compare_arrays("y", [-INF, NAN, 3.0, 4.0], [-INF, NAN, 3.0, 4.5], tolerance=0.2)
    assert result
    assert result.rel_l2 == pytest.approx(0.1)


def test_zero_reference() -> None:
    assert compare_arrays("y", [0.0, 0.0], [0.0, 0.0], tolerance=0)
    result = compare_arrays("y", [0.0, 0.0], [0.0, 1e-30], tolerance=1)
    assert not result
    assert (result.rel_l2, result.cosine, result.psnr_db) == (INF, 0.0, -INF)


def test_zero_answer() -> None:
    result = compare_arrays("y", [3.0, 4.0], [0.0, 0.0], tolerance=0.5)
    assert not result
    assert (result.max_abs, result.rel_l2, result.cosine) == (4.0, 1.0, 0.0)


@pytest.mark.parametrize("value", [1.7e308, 1e308, 1e-308, 5e-324])
def test_extreme_magnitudes(value: float) -> None:
    x = np.array([value, -value])
    assert compare_arrays("y", x, x, tolerance=0).rel_l2 == 0
    result = compare_arrays("y", x, -x, tolerance=1)
    assert result.rel_l2 == pytest.approx(2)
    assert result.cosine == pytest.approx(-1)
    assert result.psnr_db == pytest.approx(-20 * math.log10(2))
    assert result.max_abs == 2 * value  # infinite where float64 ends


def test_small_differences_do_not_vanish_by_squaring() -> None:
    result = compare_arrays("y", [1.0, 1e-200], [1.0, 2e-200], tolerance=0)
    assert not result
    assert result.rel_l2 == pytest.approx(1e-200)
    assert result.psnr_db == pytest.approx(4000 + 10 * math.log10(2))


def test_float16_and_scalars() -> None:
    assert compare_arrays("y", np.float16(60000), np.float16(60000), tolerance=0)
    assert compare_arrays("y", np.full(9, 60000, np.float16), np.full(9, 60000, np.float16), tolerance=0).rel_l2 == 0
    assert compare_arrays("y", 2.0, 3.0, tolerance=1, top1=True).top1_agreement is None


def test_integers_of_unlike_types() -> None:
    result = compare_arrays("y", np.array([250, 3], np.uint8), np.array([-6, 3], np.int8), tolerance=0.1)
    assert result.max_abs == 256


@pytest.mark.parametrize("bad", [np.array([1j]), np.array(["a"]), np.array([None]), np.zeros(1, "f4,i4")], ids=str)
def test_other_kinds_of_values_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="'y': expected floats, integers or booleans"):
        compare_arrays("y", bad, bad, tolerance=1)
    with pytest.raises(InputError, match="'y': expected floats"):
        compare_arrays("y", np.ones(1), bad, tolerance=1)


def test_top1() -> None:
    reference = np.array([[0.0, 1.0, 2.0], [5.0, 1.0, 2.0], [1.0, 2.0, 3.0], [0.0, 9.0, 0.0]])
    actual = np.array([[0.0, 1.0, 2.1], [5.0, 6.0, 2.0], [1.0, 2.0, 3.0], [0.0, 9.0, 0.0]])
    assert compare_arrays("y", reference, actual, tolerance=1, top1=True).top1_agreement == 0.75


@pytest.mark.parametrize(
    ("reference", "actual", "agreement"),
    [
        ([1.0, 1.0, 0.0], [0.9, 1.0, 0.0], 1.0),  # both classes were PyTorch's best
        ([1.0, 1.0, 0.0], [1.0, 1.0, 0.0], 1.0),
        ([0.9, 1.0, 0.0], [1.0, 1.0, 0.0], 0.0),  # the bundle's user would see class 0
        ([NAN, 1.0, 0.0], [NAN, 1.0, 0.0], 1.0),
        ([-INF, 1.0, 0.0], [-INF, 1.0, 0.0], 1.0),
    ],
)
def test_top1_with_ties(reference: list[float], actual: list[float], agreement: float) -> None:
    assert compare_arrays("y", [reference], [actual], tolerance=1, top1=True).top1_agreement == agreement


def test_outputs_by_name() -> None:
    x = np.ones((1, 3))
    results = compare_outputs({"a": x, "b": x}, {"a": x, "c": x}, tolerance=1, top1=frozenset({"a"}))
    assert [(item.name, bool(item)) for item in results] == [("a", True), ("b", False), ("c", False)]
    assert [item.problem for item in results[1:]] == [
        "the bundle has no output of this name",
        "the reference has no output of this name",
    ]
    assert results[0].top1_agreement == 1.0


@pytest.mark.parametrize(("reference", "actual"), [({}, {}), ({"a": np.ones(1)}, {}), ({"a": np.ones(1)}, {"b": 1})])
def test_nothing_in_common_is_an_error(reference: Any, actual: Any) -> None:
    with pytest.raises(NothingToCompareError, match="nothing to compare"):
        compare_outputs(reference, actual, tolerance=1)
