"""The next token: the likeliest one, or a repeatable draw from the nucleus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.runtime.sampling import Sampler, Sampling, _nucleus

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)


def draws(count: int, logits: Any = LOGITS, **options: Any) -> list[int]:
    sampler = Sampler(Sampling(**options))
    return [sampler.choose(logits) for _ in range(count)]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_temperature_0_takes_the_likeliest_and_of_equals_the_first(dtype: str) -> None:
    sampler = Sampler(Sampling())
    assert sampler.choose(np.array([0, 3, 1], dtype)) == 1
    assert sampler.choose(np.array([2, 5, 5, 5], dtype)) == 1
    assert sampler.choose(np.array([-np.inf, -1, -np.inf], dtype)) == 1


def test_draws_follow_the_probabilities() -> None:
    counts = np.bincount(draws(20_000, temperature=1.0, seed=0), minlength=5) / 20_000
    # Five standard deviations of a count of 20000 draws.
    assert np.abs(counts - PROBABILITIES).max() < 5 * math.sqrt(0.25 / 20_000)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        wanted = PROBABILITIES ** (1 / temperature)
        wanted /= wanted.sum()
        counts = np.bincount(draws(20_000, temperature=temperature, seed=1), minlength=5) / 20_000
        assert np.abs(counts - wanted).max() < 5 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.001, {1}),
        (0.39, {1}),
        (0.45, {1, 3}),
        (0.69, {1, 3}),
        (0.75, {1, 3, 4}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, set(range(5))),
    ],
)
def test_top_p_keeps_the_fewest_likeliest_that_reach_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(3000, temperature=1.0, top_p=top_p, seed=2)) == kept


def test_top_p_prefers_the_lower_of_equal_tokens() -> None:
    assert set(draws(500, np.zeros(4, np.float32), temperature=1.0, top_p=0.5, seed=0)) == {0, 1}


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["peaked", "flat", "all equal"])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_sorting_it(kind: str, top_p: float) -> None:
    generator = np.random.default_rng(0)
    logits = {
        "peaked": generator.normal(0, 4, 5000),
        "flat": generator.normal(0, 0.1, 5000),
        "all equal": np.ones(5000),
    }
    weights = np.exp(np.round(logits[kind], 2))  # rounded: many equals
    order = sorted(range(5000), key=lambda token: (-weights[token], token))
    sums = np.cumsum(weights[order])
    wanted = top_p * weights.sum()
    kept = order[: int(np.argmax(sums >= wanted)) + 1]
    assert _nucleus(weights, wanted).tolist() == kept


def test_one_nucleus_draws_by_the_probabilities_inside_it() -> None:
    counts = np.bincount(draws(20_000, temperature=1.0, top_p=0.6, seed=3), minlength=5) / 20_000
    assert abs(counts[1] - 4 / 7) < 5 * math.sqrt(0.25 / 20_000)


def test_a_seed_repeats_the_draws_and_another_does_not() -> None:
    first = draws(50, temperature=1.0, seed=7)
    assert draws(50, temperature=1.0, seed=7) == first
    assert draws(50, temperature=1.0, seed=8) != first


def test_texts_drawn_together_differ_and_the_first_is_that_of_a_text_alone() -> None:
    sampling = Sampling(1.0, 1.0, 7)
    rows = [[sampler.choose(LOGITS) for _ in range(50)] for sampler in (Sampler(sampling, 0), Sampler(sampling, 1))]
    assert rows[0] == draws(50, temperature=1.0, seed=7)
    assert rows[1] != rows[0]


def test_a_seed_is_made_where_draws_need_one() -> None:
    fresh = Sampling(0.8).fixed()
    assert fresh.seed is not None
    assert fresh.temperature == 0.8
    assert Sampling(0.8).fixed().seed != fresh.seed
    assert Sampling(0.0).fixed().seed is None
    assert Sampling(0.8, seed=3).fixed().seed == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
def test_extreme_temperatures_draw_without_overflow(temperature: float) -> None:
    drawn = set(draws(200, np.array([1e30, -1e30, 1e30], np.float32), temperature=temperature, seed=0))
    assert drawn == ({0, 1, 2} if temperature == 1e300 else {0, 2})


def test_tokens_that_are_ruled_out_are_never_drawn() -> None:
    assert set(draws(300, np.array([-np.inf, 0, -np.inf, 0]), temperature=5.0, seed=0)) == {1, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[np.nan, 1], [1, np.inf], [-np.inf, -np.inf]], ids=["nan", "infinite", "nothing"])
def test_scores_that_are_no_numbers_are_refused(bad: list[float], temperature: float) -> None:
    with pytest.raises(InputError, match=r"scores for the next token are no numbers.*edgekit verify"):
        Sampler(Sampling(temperature, seed=0)).choose(np.array(bad, np.float32))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "hot", None, True])
def test_a_bad_temperature_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="temperature must be a number of at least 0, got"):
        Sampling(value)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, math.nan, "most", None])
def test_a_bad_top_p_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="top_p must be a number above 0 and at most 1, got"):
        Sampling(1.0, value)


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, "seed", True])
def test_a_bad_seed_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="seed must be an integer from 0"):
        Sampling(1.0, 1.0, value)
