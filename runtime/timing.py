"""How long does a run take, and can the figure be trusted? Policies and statistics, apart from any model or clock.

A *timer* is a callable that makes one run and returns its duration in nanoseconds. Everything here is a deterministic
function of the durations, so tests feed it invented ones.

Warm-up: windows of at least 3 runs and 50 ms, until the medians of two successive ones agree within 3 %, or until the
warm-up has taken a quarter of `max_seconds`. Measurement: at least 30 runs and `min_seconds`, until the 95 % interval
of the median is within 1 % of it to either side; at most `max_seconds` (then at least 5 runs) and 20,000 runs.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.runtime.report import ms, percent, plural

Timer = Callable[[], int]
Series = NDArray[np.float64]
Verdict = Literal["stable", "noisy", "unstable"]

_MS = 1_000_000
MIN_RUNS, FEWEST_RUNS, MAX_RUNS = 30, 5, 20_000
PRECISION = 0.01
WARM_WINDOW_MS, WARM_AGREEMENT, WARM_SHARE = 50, 0.03, 0.25
TURN_MS, MOST_RUNS_PER_TURN, MIN_ROUNDS = 50, 1_000, 8

INTERRUPTED = 0.005
NOISY_VARIATION, UNSTABLE_VARIATION = 0.05, 0.10
NOISY_DRIFT, UNSTABLE_DRIFT = 0.05, 0.15
BUSY_LOAD_PER_CORE = 0.75
# Below this difference two medians count as level, however narrow the interval.
LEVEL = 0.01


@dataclass(frozen=True)
class Policy:
    """How many runs to make. Raises `InputError` for counts below 1 and times that are not positive.

    Attributes:
        runs: exactly so many timed runs; None: as many as the module's policy asks for.
        warmup: exactly so many untimed runs before; None: until the latency has settled.
        min_seconds, max_seconds: bounds on the time of the timed runs, without effect on explicit counts. The upper
            bound wins.
    """

    runs: int | None = None
    warmup: int | None = None
    min_seconds: float = 0.5
    max_seconds: float = 5.0

    def __post_init__(self) -> None:
        for name, count in (("runs", self.runs), ("warmup", self.warmup)):
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, got {count}; leave it out to let the profiler choose")
        for name, seconds in (("min_seconds", self.min_seconds), ("max_seconds", self.max_seconds)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise InputError(f"{name} must be a positive number of seconds, got {seconds}")


@dataclass(frozen=True)
class Latency:
    """Statistics of a series of latencies, in milliseconds. Percentiles are interpolated linearly."""

    min: float
    mean: float
    std: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Stability:
    """Whether a second measurement would say the same.

    Attributes:
        verdict: `stable`; `noisy`: a few percent mean nothing; `unstable`: the median itself is in doubt.
        coefficient_of_variation: standard deviation over mean, without the slowest 0.5 % of the runs.
        robust_variation: the same from the median absolute deviation, which single interruptions do not move.
        drift: median of the last quarter over that of the first, minus 1.
        load_average_per_core: of the machine before the run; None where it is unknown.
        reasons: what speaks against `stable`, each for people to read.
    """

    verdict: Verdict
    coefficient_of_variation: float
    robust_variation: float
    drift: float
    load_average_per_core: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


def warm_up(run: Timer, policy: Policy) -> list[int]:
    """Run until the latency has settled (see above) or `policy.warmup` times. Returns the durations, nanoseconds."""
    durations: list[int] = []
    if policy.warmup is not None:
        return [run() for _ in range(policy.warmup)]
    limit, spent = WARM_SHARE * policy.max_seconds * 1e9, 0
    previous: float | None = None
    while True:
        window: list[int] = []
        while len(window) < 3 or sum(window) < WARM_WINDOW_MS * _MS:
            window.append(run())
            spent += window[-1]
            if spent >= limit or len(durations) + len(window) >= MAX_RUNS:
                return durations + window
        durations += window
        median = float(np.median(window))
        if previous is not None and abs(median - previous) <= WARM_AGREEMENT * previous:
            return durations
        previous = median


def measure(run: Timer, policy: Policy) -> Series:
    """Run as often as the policy asks. Returns the latencies in milliseconds, in the order of the runs."""
    durations = array("q")
    spent, check_at = 0, MIN_RUNS
    while True:
        durations.append(run())
        spent += durations[-1]
        count = len(durations)
        if policy.runs is not None:
            done = count >= policy.runs
        elif count >= MAX_RUNS or (count >= FEWEST_RUNS and spent >= policy.max_seconds * 1e9):
            done = True
        elif count >= check_at:
            check_at = max(count + 10, count * 5 // 4)
            done = spent >= policy.min_seconds * 1e9 and is_precise(np.asarray(durations))
        else:
            done = False
        if done:
            return np.asarray(durations) / _MS


def measure_in_turns(
    timers: tuple[Timer, Timer], policy: Policy, *, runs_per_turn: int, settle_ms: float, seed: int
) -> tuple[list[Series], list[Series]]:
    """Run two models in turns, round after round, so that whatever the machine does happens to both.

    Each round gives either model one turn, in an order drawn from `seed`. A turn starts with untimed runs, at least
    one and at least `settle_ms` of them: the first finds the other model's data in the caches, and the other model's
    threads may still be spinning. Then come `runs_per_turn` timed runs. Rounds end as `measure` does, with both medians
    precise; the time limit counts the untimed runs too, and is twice that of one model, after at least 8 rounds.

    Returns, for either model, the latencies in milliseconds: one series per round.
    """
    order = random.Random(seed)
    rounds: tuple[list[Series], list[Series]] = ([], [])
    spent = count = 0
    while True:
        size = runs_per_turn if policy.runs is None else min(runs_per_turn, policy.runs - count)
        for side in order.sample((0, 1), 2):
            run, settling = timers[side], 0
            while True:
                settling += run()
                if settling >= settle_ms * _MS:
                    break
            turn = [run() for _ in range(size)]
            spent += settling + sum(turn)
            rounds[side].append(np.asarray(turn) / _MS)
        count += size
        if policy.runs is not None:
            done = count >= policy.runs
        elif len(rounds[0]) < MIN_ROUNDS:
            done = False
        elif count >= MAX_RUNS or spent >= 2 * policy.max_seconds * 1e9:
            done = True
        else:
            enough = count >= MIN_RUNS and spent >= 2 * policy.min_seconds * 1e9
            done = enough and all(is_precise(np.concatenate(side)) for side in rounds)
        if done:
            return rounds


def runs_per_turn(slower_ms: float, policy: Policy) -> int:
    """How many runs make one turn: about 50 ms of the slower model, and at most an eighth of `policy.runs`."""
    count = min(MOST_RUNS_PER_TURN, max(1, math.ceil(TURN_MS / slower_ms)))
    return count if policy.runs is None else min(count, max(1, policy.runs // MIN_ROUNDS))


def summarize(latencies: Series) -> Latency:
    """Statistics of latencies in milliseconds; the standard deviation is that of a sample (0 for a single run)."""
    p50, p90, p99 = (float(value) for value in np.percentile(latencies, (50, 90, 99)))
    std = float(np.std(latencies, ddof=1)) if len(latencies) > 1 else 0.0
    return Latency(float(latencies.min()), float(latencies.mean()), std, p50, p90, p99, float(latencies.max()))


def median_interval(values: NDArray[Any]) -> tuple[float, float]:
    """The 95 % confidence interval of the median from order statistics (the binomial's normal approximation)."""
    ordered, count = np.sort(values), len(values)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - half) - 1), min(count - 1, math.ceil(count / 2 + half))
    return float(ordered[low]), float(ordered[high])


def is_precise(values: NDArray[Any]) -> bool:
    """Whether the half-width of the median's 95 % interval is within 1 % of the median."""
    low, high = median_interval(values)
    return (high - low) / 2 <= PRECISION * float(np.median(values))


def coefficient_of_variation(values: Series) -> float:
    """Standard deviation over mean, without the slowest 0.5 % of the values: among thousands some are interrupted."""
    kept = np.sort(values)[: len(values) - int(len(values) * INTERRUPTED)]
    return float(np.std(kept) / kept.mean())


def robust_variation(values: Series) -> float:
    """1.4826 times the median absolute deviation, over the median: the coefficient of variation of normal data."""
    median = float(np.median(values))
    return 1.4826 * float(np.median(np.abs(values - median))) / median


def drift(values: Series) -> float:
    """The median of the last quarter of a series over that of the first, minus 1; 0 for fewer than 8 values."""
    if len(values) < 8:
        return 0.0
    quarter = len(values) // 4
    return float(np.median(values[-quarter:]) / np.median(values[:quarter])) - 1


def two_speeds(values: Series) -> tuple[float, float] | None:
    """The medians of two separate groups of values, where the series has two; None where it has one.

    Two groups means: among the middle 80 % one gap takes more than half the range, and the groups' medians are more
    than 10 % apart. Fewer than 20 values tell nothing.
    """
    ordered = np.sort(values)
    edge = len(ordered) // 10
    middle = ordered[edge : len(ordered) - edge]
    if len(values) < 20:
        return None
    gaps = np.diff(middle)
    split = int(np.argmax(gaps))
    if gaps[split] <= (middle[-1] - middle[0]) / 2:
        return None
    fast, slow = float(np.median(middle[: split + 1])), float(np.median(middle[split + 1 :]))
    return (fast, slow) if slow > 1.1 * fast else None


def judge(latencies: Series, *, load_average: float | None = None, cores: int | None = None) -> Stability:
    """Judge a series of latencies in milliseconds, in the order of the runs.

    Args:
        load_average: the machine's one-minute load before the run.
        cores: how many cores the machine has.
    """
    variation, robust = coefficient_of_variation(latencies), robust_variation(latencies)
    trend, speeds = drift(latencies), two_speeds(latencies)
    load_per_core = None if load_average is None or not cores else load_average / cores
    reasons = []
    if len(latencies) < FEWEST_RUNS:
        reasons.append(
            f"only {plural(len(latencies), 'timed run')}: fewer than {FEWEST_RUNS} tell nothing of stability"
        )
    if speeds is not None:
        fast, slow = map(ms, speeds)
        reasons.append(f"two speeds, {fast} and {slow}: the clock changes, or something shares the cores")
    if variation > NOISY_VARIATION:
        interrupted = robust <= NOISY_VARIATION and speeds is None
        cause = ": single runs were interrupted, the typical run is steady" if interrupted else ""
        reasons.append(f"coefficient of variation {percent(variation)} (> {percent(NOISY_VARIATION)}){cause}")
    elif robust > NOISY_VARIATION:
        reasons.append(f"robust coefficient of variation {percent(robust)} (> {percent(NOISY_VARIATION)})")
    if abs(trend) > NOISY_DRIFT:
        verb, cause = ("rose", "the processor may be throttling") if trend > 0 else ("fell", "the warm-up was short")
        reasons.append(f"latency {verb} by {percent(abs(trend))} from the first to the last quarter: {cause}")
    if load_per_core is not None and load_per_core > BUSY_LOAD_PER_CORE:
        reasons.append(f"load average {load_average:.1f} on {cores} cores before the run: other work is running")
    unstable = robust > UNSTABLE_VARIATION or abs(trend) > UNSTABLE_DRIFT or speeds is not None
    verdict: Verdict = "unstable" if unstable else "noisy" if reasons else "stable"
    return Stability(verdict, variation, robust, trend, load_per_core, tuple(reasons))


def ratio_of_medians(a: Sequence[Series], b: Sequence[Series], *, seed: int = 0, resamples: int = 1000) -> Ratio:
    """The median of `b` over the median of `a`, with a seeded bootstrap interval of 95 %.

    Args:
        a, b: one series per round, from `measure_in_turns`. Whole rounds are resampled, the same for both: runs of one
            turn resemble each other more than runs of different ones do.

    Raises:
        ValueError: different numbers of rounds, or none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"expected the same number of rounds, at least one, got {len(a)} and {len(b)}")
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for index in range(resamples):
        chosen = generator.integers(0, len(a), len(a))
        ratios[index] = _median(b, chosen) / _median(a, chosen)
    everything = range(len(a))
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(_median(b, everything) / _median(a, everything), float(low), float(high))


def compare_medians(a: str, b: str, ratio: Ratio) -> str:
    """Say which of two is faster, from the ratio of b's median latency to a's."""
    if ratio.low <= 1 <= ratio.high or abs(ratio.value - 1) < LEVEL:
        return f"{a} and {b} are level within noise (ratio {ratio.value:.3f}, {ratio.low:.3f}-{ratio.high:.3f})"
    if ratio.value > 1:
        return f"{a} is {ratio.value:.2f}x faster than {b} ({ratio.low:.2f}-{ratio.high:.2f})"
    return f"{b} is {1 / ratio.value:.2f}x faster than {a} ({1 / ratio.high:.2f}-{1 / ratio.low:.2f})"


def _median(rounds: Sequence[Series], chosen: Sequence[int] | NDArray[np.int64] | range) -> float:
    return float(np.median(np.concatenate([rounds[index] for index in chosen])))
