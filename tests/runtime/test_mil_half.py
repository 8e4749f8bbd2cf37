"""Half precision kept in float32: the rounding is numpy's own, and sums add one term after the other."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.runtime.mil.half import matmul_half, round_half, sum_half

EDGES = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    65504.0,
    65519.99,
    65520.0,
    -65520.0,
    2.0**-14,
    2.0**-24,
    2.0**-25,
    -(2.0**-25),
    1.5 * 2.0**-24,
    2.0**-25 * 1.0001,
    1 + 2.0**-11,
    1 + 3 * 2.0**-11,
    2.0**15,
    3.0e38,
    1.0e-40,
]


def reference(x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return x.astype(np.float16).astype(np.float32)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), ~numbers)
    np.testing.assert_array_equal(got.view(np.uint32)[numbers], want.view(np.uint32)[numbers])


class TestRounding:
    def test_edges(self):
        x = np.array(EDGES, np.float32)
        with np.errstate(all="ignore"):
            assert_same_bits(round_half(x.copy()), reference(x))

    @pytest.mark.parametrize(("low", "high"), [(-30, -20), (-16, -12), (-3, 3), (12, 18), (-149, 127)])
    def test_any_bits(self, low, high):
        rng = np.random.default_rng(high - low)
        x = np.ldexp(rng.standard_normal(100_001), rng.integers(low, high, 100_001)).astype(np.float32)
        with np.errstate(all="ignore"):
            assert_same_bits(round_half(x.copy()), reference(x))

    def test_ties_go_to_even(self):
        halves = np.arange(1, 4096, 2, dtype=np.float32) / 2 + np.float32(2048)  # odd quarters of the last place
        assert_same_bits(round_half(halves.copy()), reference(halves))

    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (7, 5)])
    def test_shapes(self, shape):
        x = np.full(shape, 1 / 3, np.float32)
        assert_same_bits(round_half(x.copy()), reference(x))

    def test_what_must_not_change_does_not(self):
        x = np.full((4, 3), 1 / 3, np.float32)
        x.flags.writeable = False
        assert round_half(x) is not x
        assert (x == np.float32(1 / 3)).all()
        turned = np.full((4, 3), 1 / 3, np.float32).T
        assert_same_bits(round_half(turned), reference(turned))


class TestSums:
    def test_product_adds_one_term_after_the_other(self):
        rng = np.random.default_rng(0)
        x, y = (reference(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 3, 37), (37, 5)))
        want = np.zeros((2, 3, 5), np.float16)
        for k in range(37):  # a product of two halves is exact in float32
            want = (want.astype(np.float32) + x[..., k, None] * y[k]).astype(np.float16)
        assert_same_bits(matmul_half(x, y), want.astype(np.float32))

    def test_many_rows_are_computed_in_blocks(self):
        rng = np.random.default_rng(1)
        x, y = (reference(rng.standard_normal(shape).astype(np.float32)) for shape in ((700, 3), (3, 100)))
        parts = [matmul_half(x[i : i + 1], y) for i in range(700)]
        assert_same_bits(matmul_half(x, y), np.concatenate(parts))

    def test_a_long_sum_stalls(self):
        """Ones add up to 2048 and no further: the next one is lost."""
        assert sum_half(np.ones((5000, 2), np.float32), (0,)).tolist() == [2048, 2048]
        assert matmul_half(np.ones((1, 5000), np.float32), np.ones((5000, 1), np.float32)).item() == 2048

    def test_axes(self):
        x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        np.testing.assert_array_equal(sum_half(x, (0, -1), keep=True), x.sum((0, 2), keepdims=True))
        np.testing.assert_array_equal(sum_half(x, (1,)), x.sum(1))
