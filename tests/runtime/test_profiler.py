"""The profiler on a tiny bundle. Durations are whatever they are: no test judges wall time."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edgekit.errors import InputError, UnknownNameError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.profiler import Profile, ProfileComparison, choose_inputs, profile, profile_pair
from edgekit.runtime.report import comparison_lines, profile_lines
from edgekit.runtime.session import Session

MakeBundle = Callable[..., Bundle]
QUICK: dict[str, Any] = {"runs": 10, "warmup": 2, "threads": 1}


@pytest.fixture
def quick(tiny_bundle: Bundle) -> Profile:
    return profile(tiny_bundle, **QUICK)


def floats(value: Any) -> Iterator[float]:
    """All floats in parsed JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from floats(item)
    elif isinstance(value, float):
        yield value


def test_profile_says_what_was_run(quick: Profile, tiny_bundle: Bundle) -> None:
    assert (quick.bundle, quick.file) == ("tiny-onnx", "tiny-onnx.edge")
    assert (quick.backend, quick.threads) == ("onnxruntime-cpu", 1)
    assert (quick.runs, quick.warmup_runs) == (10, 2)
    assert quick.inputs == {"x": (1, 4)}
    assert quick.input_source == "stored sample"
    assert quick.model_bytes == tiny_bundle.manifest.files["model.onnx"].size
    assert quick.started.endswith("+00:00")
    assert quick.versions["numpy"] == np.__version__


def test_figures_are_consistent(quick: Profile) -> None:
    latency = quick.latency_ms
    assert 0 < latency.min <= latency.p50 <= latency.p90 <= latency.p99 <= latency.max
    assert quick.inferences_per_second == pytest.approx(1000 / latency.mean)
    assert quick.load_ms > 0
    assert quick.first_run_ms > 0
    assert sum(op.share for op in quick.ops) == pytest.approx(1.0)
    assert quick.overhead_share is not None
    assert 0 <= quick.overhead_share <= 1


def test_json_is_finite_and_round_trips(quick: Profile) -> None:
    data = quick.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert all(map(math.isfinite, floats(data)))
    assert data["latency_ms"]["p50"] == pytest.approx(quick.latency_ms.p50, rel=1e-5)


def test_text_holds_the_figures(quick: Profile) -> None:
    text = "\n".join(profile_lines(quick))
    assert text.startswith("tiny-onnx: onnxruntime-cpu, 1 thread, x [1, 4] (stored sample)")
    for word in ("p50", "inferences/s", "memory", quick.stability.verdict, quick.ops[0].op, "outside the kernels"):
        assert word in text


def test_without_ops(tiny_bundle: Bundle) -> None:
    result = profile(tiny_bundle, **QUICK, ops=False)
    assert (result.ops, result.top_nodes, result.overhead_share) == ((), (), None)
    assert "time per run" not in "\n".join(profile_lines(result))


def test_sizes_other_than_the_samples_get_random_inputs(tiny_bundle: Bundle) -> None:
    result = profile(tiny_bundle, **QUICK, sizes={"N": 4}, ops=False)
    assert result.inputs == {"x": (4, 4)}
    assert result.input_source == "random"
    assert result.items_per_second == pytest.approx(4 * result.inferences_per_second)


def test_the_backends_own_choice_of_threads_is_counted(tiny_bundle: Bundle) -> None:
    result = profile(tiny_bundle, runs=5, warmup=1, ops=False)
    assert result.threads is None or result.threads >= 1


def test_policy_chooses_the_runs(tiny_bundle: Bundle) -> None:
    result = profile(tiny_bundle, threads=1, min_seconds=0.01, max_seconds=0.05, ops=False)
    assert result.runs >= 5
    assert result.warmup_runs >= 3


def test_packed_bundle(tiny_bundle: Bundle) -> None:
    assert profile(tiny_bundle.pack(), **QUICK, ops=False).file == "tiny-onnx.edge.zip"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"runs": 0}, "runs must be at least 1"),
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_seconds": -1.0}, "max_seconds must be a positive"),
        ({"sizes": {"M": 2}}, "unknown dimension 'M'"),
        ({"sizes": {"N": 17}}, "outside 1..16"),
    ],
    ids=["runs", "warmup", "threads", "seconds", "dimension", "size"],
)
def test_bad_arguments(tiny_bundle: Bundle, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        profile(tiny_bundle, **arguments)


def test_unknown_backend(tiny_bundle: Bundle) -> None:
    with pytest.raises(UnknownNameError, match="unknown backend 'quantum'"):
        profile(tiny_bundle, backend="quantum")


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_in_the_timed_runs_and_restored(
    tiny_bundle: Bundle, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()
    original = Session.run

    def run(self: Session, inputs: Any) -> Any:
        seen.add(gc.isenabled())
        return original(self, inputs)

    monkeypatch.setattr(Session, "run", run)
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        profile(tiny_bundle, **QUICK, ops=False)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == {False}


class TestChooseInputs:
    @pytest.mark.parametrize(
        ("samples", "sizes", "source", "rows"),
        [
            (2, None, "stored sample", 1),
            (2, {"N": 1}, "stored sample", 1),
            (2, {"N": 3}, "random", 3),
            (0, None, "random", 1),
            (0, {"N": 16}, "random", 16),
        ],
    )
    def test_source(
        self, make_bundle: MakeBundle, samples: int, sizes: dict[str, int] | None, source: str, rows: int
    ) -> None:
        inputs, found = choose_inputs(make_bundle(samples=samples), sizes)
        assert found == source
        assert inputs["x"].shape == (rows, 4)


class TestPair:
    @pytest.fixture
    def comparison(self, make_bundle: MakeBundle) -> ProfileComparison:
        return profile_pair(make_bundle("left"), make_bundle("right"), runs=16, warmup=2, threads=1)

    def test_both_are_profiled_alike(self, comparison: ProfileComparison) -> None:
        assert (comparison.a.bundle, comparison.b.bundle) == ("left-onnx", "right-onnx")
        assert comparison.a.runs == comparison.b.runs == 16
        assert comparison.rounds == 8
        assert comparison.ratio.value == pytest.approx(comparison.b.latency_ms.p50 / comparison.a.latency_ms.p50)

    def test_verdict_names_both(self, comparison: ProfileComparison) -> None:
        assert "left-onnx" in comparison.verdict
        assert "right-onnx" in comparison.verdict
        assert comparison_lines(comparison)[-1] == comparison.verdict

    def test_json_is_finite(self, comparison: ProfileComparison) -> None:
        data = comparison.to_json()
        assert json.loads(json.dumps(data, allow_nan=False)) == data
        assert set(data["ratio"]) == {"value", "low", "high"}

    def test_slower_model_loses(self, make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a clock that each run of `left` moves by 2 ms and each run of `right` by 3 ms."""
        now = 0
        original = Session.run

        def run(self: Session, inputs: Any) -> Any:
            nonlocal now
            now += (2 if self.bundle.name == "left-onnx" else 3) * 1_000_000
            return original(self, inputs)

        monkeypatch.setattr(Session, "run", run)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: now)
        result = profile_pair(make_bundle("left"), make_bundle("right"), threads=1, max_seconds=0.5, ops=False)
        assert result.verdict == "left-onnx is 1.50x faster than right-onnx (1.50-1.50)"
        assert result.a.latency_ms.p99 == 2.0

    def test_a_bundle_against_itself(self, tiny_bundle: Bundle) -> None:
        result = profile_pair(tiny_bundle, tiny_bundle, runs=8, warmup=1, threads=1, ops=False)
        assert "A" in result.verdict
        assert "B" in result.verdict

    def test_too_few_runs(self, tiny_bundle: Bundle) -> None:
        with pytest.raises(InputError, match="at least 8 to compare"):
            profile_pair(tiny_bundle, tiny_bundle, runs=7)

    def test_different_batches_do_not_compare(self, make_bundle: MakeBundle) -> None:
        with pytest.raises(InputError, match="batches of 1 and b-onnx of 4"):
            profile_pair(make_bundle("a"), make_bundle("b", batch=4), runs=8, warmup=1, threads=1)
