"""Time several callables in turns, so that whatever the machine does happens to all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping

import numpy as np

from edgekit.runtime.timing import Series, ratio_of_medians

Subject = Callable[[], object]
PAUSE_SECONDS = 0.1  # onnxruntime's and OpenMP's idle threads spin on for about so long


def take_turns(
    subjects: Mapping[str, Subject],
    *,
    rounds: int,
    turn_ms: float = 60.0,
    settling_runs: int = 1,
    most_runs: int = 200,
    seed: int = 0,
) -> dict[str, list[Series]]:
    """Run each subject once a round, in random order with a pause before each; a turn lasts about `turn_ms`.

    Returns the latencies in milliseconds: for each subject, one series per round.
    """
    counts = {}
    for name, run in subjects.items():
        run()
        counts[name] = min(most_runs, max(1, round(turn_ms / milliseconds(run))))
    series: dict[str, list[Series]] = {name: [] for name in subjects}
    order, generator = list(subjects), random.Random(seed)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            time.sleep(PAUSE_SECONDS)
            for _ in range(settling_runs):
                subjects[name]()
            series[name].append(np.asarray([milliseconds(subjects[name]) for _ in range(counts[name])]))
    return series


def milliseconds(run: Subject) -> float:
    """How long one call takes."""
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def median(series: list[Series]) -> float:
    """The median over all turns, in milliseconds."""
    return float(np.median(np.concatenate(series)))


def speedup(rival: list[Series], ours: list[Series]) -> tuple[float, float, float]:
    """How many times faster `ours` is than `rival`: ratio of medians with its 95 % interval."""
    ratio = ratio_of_medians(ours, rival)
    return round(ratio.value, 3), round(ratio.low, 3), round(ratio.high, 3)
