"""Statistics against numpy, policies and verdicts on invented series: no clock is read here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgekit.errors import InputError
from edgekit.runtime import timing
from edgekit.runtime.timing import Policy, Ratio, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MS = 1_000_000


def replay(durations_ms: Sequence[float]) -> Callable[[], int]:
    """A timer that plays a list of durations over and over."""
    position = -1

    def run() -> int:
        nonlocal position
        position += 1
        return round(durations_ms[position % len(durations_ms)] * MS)

    return run


def steady(count: int = 200, *, median: float = 10.0, spread: float = 0.01, seed: int = 0) -> Series:
    return median * (1 + spread * np.random.default_rng(seed).standard_normal(count))


def test_summary_agrees_with_numpy() -> None:
    values = steady(101, spread=0.2)
    latency = timing.summarize(values)
    assert latency.p50 == np.median(values)
    assert (latency.p90, latency.p99) == (np.percentile(values, 90), np.percentile(values, 99))
    assert latency.std == np.std(values, ddof=1)
    assert (latency.min, latency.mean, latency.max) == (values.min(), values.mean(), values.max())


def test_summary_of_a_single_run_has_no_deviation() -> None:
    assert timing.summarize(np.array([3.0])) == timing.Latency(3.0, 3.0, 0.0, 3.0, 3.0, 3.0, 3.0)


def test_robust_variation_is_that_of_normal_data() -> None:
    values = steady(20_000, spread=0.04)
    assert timing.robust_variation(values) == pytest.approx(np.std(values) / np.mean(values), rel=0.05)


def test_variation_of_few_runs_counts_all_of_them() -> None:
    values = np.array([1.0, 1.0, 1.0, 2.0])
    assert timing.coefficient_of_variation(values) == np.std(values) / 1.25


def test_drift_compares_the_quarters() -> None:
    assert timing.drift(np.repeat([10.0, 10.5, 10.7, 11.0], 5)) == pytest.approx(0.1)
    assert timing.drift(np.arange(1.0, 7.0)) == 0.0


@pytest.mark.parametrize("count", [5, 31, 100, 1000])
def test_median_interval_covers_the_true_median_about_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(count)
    hits = [
        low <= 0 <= high
        for low, high in (timing.median_interval(generator.standard_normal(count)) for _ in range(2000))
    ]
    assert np.mean(hits) > 0.92


class TestJudge:
    def test_steady_series_is_stable(self) -> None:
        stability = timing.judge(steady(), load_average=0.4, cores=4)
        assert (stability.verdict, stability.reasons) == ("stable", ())
        assert stability.load_average_per_core == 0.1

    def test_rising_latency_names_throttling(self) -> None:
        stability = timing.judge(steady() * np.linspace(1, 1.12, 200))
        assert stability.verdict == "noisy"
        assert any("latency rose by" in reason and "throttling" in reason for reason in stability.reasons)

    def test_strongly_rising_latency_is_unstable(self) -> None:
        assert timing.judge(steady() * np.linspace(1, 1.4, 200)).verdict == "unstable"

    def test_falling_latency_blames_the_warm_up(self) -> None:
        stability = timing.judge(steady() * np.linspace(1.1, 1, 200))
        assert "the warm-up was short" in stability.reasons[-1]

    @pytest.mark.parametrize("slow_share", [0.2, 0.5, 0.8])
    def test_two_speeds_are_unstable(self, slow_share: float) -> None:
        slow = np.random.default_rng(1).random(200) < slow_share
        values = np.where(slow, 1.3, 1.0) * steady()
        assert timing.two_speeds(values) == pytest.approx((10.0, 13.0), rel=0.01)
        stability = timing.judge(values)
        assert stability.verdict == "unstable"
        assert stability.reasons[0].startswith("two speeds, 10")

    def test_interrupted_runs_are_noise(self) -> None:
        values = steady()
        values[::40] *= 4
        stability = timing.judge(values)
        assert stability.verdict == "noisy"
        assert stability.reasons == (
            "coefficient of variation 40 % (> 5.0 %): single runs were interrupted, the typical run is steady",
        )

    def test_rare_interruptions_among_thousands_do_not_count(self) -> None:
        values = steady(4000)
        values[::400] *= 20
        assert timing.judge(values).verdict == "stable"

    def test_wide_spread_is_unstable(self) -> None:
        stability = timing.judge(steady(spread=0.15))
        assert stability.verdict == "unstable"
        assert stability.reasons[0].endswith("(> 5.0 %)")

    def test_load_is_a_reason(self) -> None:
        stability = timing.judge(steady(), load_average=1.9, cores=2)
        assert stability.verdict == "noisy"
        assert stability.reasons == ("load average 1.9 on 2 cores before the run: other work is running",)

    def test_unknown_load_and_few_runs(self) -> None:
        stability = timing.judge(np.array([1.0, 1.0]), load_average=None, cores=None)
        assert stability.load_average_per_core is None
        assert (stability.verdict, stability.reasons[0][:17]) == ("noisy", "only 2 timed runs")


class TestPolicy:
    @pytest.mark.parametrize("field", ["runs", "warmup"])
    def test_counts_below_one_are_refused(self, field: str) -> None:
        with pytest.raises(InputError, match=f"{field} must be at least 1, got 0"):
            Policy(**{field: 0})

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
    def test_times_must_be_positive(self, seconds: float) -> None:
        with pytest.raises(InputError, match="max_seconds must be a positive number"):
            Policy(max_seconds=seconds)

    def test_explicit_counts_are_exact(self) -> None:
        policy = Policy(runs=7, warmup=2)
        assert len(timing.warm_up(replay([5.0]), policy)) == 2
        assert len(timing.measure(replay([5.0]), policy)) == 7

    def test_warm_up_ends_when_two_windows_agree(self) -> None:
        assert len(timing.warm_up(replay([20.0]), Policy())) == 6

    def test_warm_up_goes_on_while_the_latency_falls(self) -> None:
        assert len(timing.warm_up(replay([40.0] * 3 + [30.0] * 3 + [20.0] * 100), Policy())) == 12

    def test_warm_up_of_a_slow_model_stops_at_a_quarter_of_the_time(self) -> None:
        assert len(timing.warm_up(replay([700.0]), Policy())) == 2

    def test_a_steady_model_gets_as_many_runs_as_the_least_time_holds(self) -> None:
        latencies = timing.measure(replay([10.0]), Policy(min_seconds=0.5))
        assert 50 <= len(latencies) <= 63
        assert latencies.dtype == np.float64
        assert set(latencies) == {10.0}

    def test_a_noisy_model_runs_until_its_median_is_precise(self) -> None:
        noise = steady(5000, spread=0.1)
        latencies = timing.measure(replay(noise.tolist()), Policy(max_seconds=60))
        assert 100 < len(latencies) < 1000
        assert timing.is_precise(latencies)
        assert not timing.is_precise(latencies[:50])

    def test_a_slow_model_gets_five_runs(self) -> None:
        assert len(timing.measure(replay([2000.0]), Policy())) == 5

    def test_a_tiny_model_stops_at_the_most_runs(self) -> None:
        assert len(timing.measure(replay([0.001]), Policy())) == timing.MAX_RUNS


class TestTurns:
    def test_rounds_hold_the_same_number_of_runs_for_both(self) -> None:
        a, b = timing.measure_in_turns(
            (replay([1.0]), replay([2.0])), Policy(runs=25), runs_per_turn=3, settle_ms=0, seed=0
        )
        assert [len(turn) for turn in a] == [len(turn) for turn in b] == [3] * 8 + [1]
        assert (set(np.concatenate(a)), set(np.concatenate(b))) == ({1.0}, {2.0})

    def test_order_is_drawn_from_the_seed(self) -> None:
        def order(seed: int) -> str:
            log: list[str] = []

            def timer(name: str) -> Callable[[], int]:
                def run() -> int:
                    log.append(name)
                    return MS

                return run

            timing.measure_in_turns((timer("a"), timer("b")), Policy(runs=40), runs_per_turn=1, settle_ms=0, seed=seed)
            return "".join(log)

        assert order(1) == order(1) != order(2)
        assert "aaaa" in order(1)
        assert "bbbb" in order(1)

    def test_settling_runs_are_not_timed(self) -> None:
        a, _ = timing.measure_in_turns(
            (replay([50.0, 50.0, 7.0]), replay([60.0, 60.0, 8.0])),
            Policy(runs=8),
            runs_per_turn=1,
            settle_ms=100,
            seed=0,
        )
        assert set(np.concatenate(a)) == {7.0}

    def test_slow_models_get_the_fewest_rounds(self) -> None:
        a, b = timing.measure_in_turns(
            (replay([3000.0]), replay([4000.0])), Policy(), runs_per_turn=1, settle_ms=100, seed=0
        )
        assert len(a) == len(b) == timing.MIN_ROUNDS

    @pytest.mark.parametrize(
        ("slower_ms", "runs", "expected"), [(10, None, 5), (200, None, 1), (0.001, None, 1000), (1, 80, 10), (1, 9, 1)]
    )
    def test_runs_per_turn(self, slower_ms: float, runs: int | None, expected: int) -> None:
        assert timing.runs_per_turn(slower_ms, Policy(runs=runs)) == expected


class TestRatio:
    def test_known_ratio_is_found_with_its_interval(self) -> None:
        a = np.split(steady(400, median=10, spread=0.03), 40)
        b = np.split(steady(400, median=18, spread=0.03, seed=1), 40)
        ratio = timing.ratio_of_medians(a, b, seed=3)
        assert ratio.low < 1.8 < ratio.high
        assert ratio.high - ratio.low < 0.05
        assert ratio == timing.ratio_of_medians(a, b, seed=3)

    def test_shared_drift_cancels(self) -> None:
        slope = np.linspace(1, 2, 400)
        a = np.split(steady(400) * slope, 40)
        b = np.split(1.2 * steady(400, seed=1) * slope, 40)
        ratio = timing.ratio_of_medians(a, b)
        assert 1.18 < ratio.low < ratio.high < 1.22

    def test_unequal_rounds_are_a_mistake(self) -> None:
        with pytest.raises(ValueError, match="same number of rounds"):
            timing.ratio_of_medians([np.ones(2)], [])

    @pytest.mark.parametrize(
        ("ratio", "text"),
        [
            (Ratio(1.83, 1.79, 1.88), "A is 1.83x faster than B (1.79-1.88)"),
            (Ratio(0.5, 0.4, 0.625), "B is 2.00x faster than A (1.60-2.50)"),
            (Ratio(1.05, 0.99, 1.1), "A and B are level within noise (ratio 1.050, 0.990-1.100)"),
            (Ratio(1.005, 1.004, 1.006), "A and B are level within noise (ratio 1.005, 1.004-1.006)"),
        ],
        ids=["a-faster", "b-faster", "interval-holds-1", "below-one-percent"],
    )
    def test_verdict_text(self, ratio: Ratio, text: str) -> None:
        assert timing.compare_medians("A", "B", ratio) == text
