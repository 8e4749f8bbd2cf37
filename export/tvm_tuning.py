"""`--tune N`: search faster tiles for the functions of a model with TVM's meta_schedule, measuring on this machine.

The search space is that of `tvm_schedule`'s rule, and meta_schedule's sampling draws from it. Its own spaces for CPUs,
its builder and its cost model stay out: with TVM 0.27 and tvm-ffi 0.1.14.post1 the first takes minutes for a function
of a small network, the second starts a process that imports TVM for each candidate, and the third needs xgboost.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import time
from collections import Counter
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, tirx
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.schedule import ScheduleError

from edgekit.export.tvm_schedule import SCHEDULED, Registers, apply_rule, schedule_function

# Candidates per function: the fewest that are worth a search.
_LEAST = 4
_MOST = 16
_ROUNDS = 5
_MIN_MS = 4
# A candidate must beat the likeliest tile by this much: less is noise.
_WORTH = 0.97


class _Workbench:
    """Compiles and times candidates in this process: they all follow from one rule, so none can crash it."""

    def __init__(self, target: tvm.target.Target) -> None:
        self.target = target
        self.measured = 0
        self._built: list[Any] = []
        self._reference: Any = None
        self._arguments: list[Any] = []
        self.reference_seconds = 0.0

    def start(self, function: tirx.PrimFunc, reference: tirx.PrimFunc) -> float:
        """Make `reference`, a schedule of `function`, what candidates are measured against; its seconds for a run."""
        self._reference = self._compile(_alone(reference))
        self._arguments = _random_arguments(function)
        self.reference_seconds = min(self._time(self._reference) for _ in range(_ROUNDS))
        return self.reference_seconds

    def build(self, inputs: list[Any]) -> list[Any]:
        """meta_schedule's builder: an artifact is the place of a module in a list."""
        results = []
        for each in inputs:
            self._built.append(self._compile(each.mod))
            results.append(ms.builder.BuilderResult(str(len(self._built) - 1), None))
        return results

    def run(self, inputs: list[Any]) -> list[Any]:
        """meta_schedule's runner. A candidate and the reference take turns, since a busy machine slows down both."""
        futures = []
        for each in inputs:
            candidate = self._built[int(each.artifact_path)]
            turns = [(self._time(candidate), self._time(self._reference)) for _ in range(_ROUNDS)]
            ratio = min(turn[0] for turn in turns) / min(turn[1] for turn in turns)
            self.measured += 1
            result = ms.runner.RunnerResult([ratio * self.reference_seconds], None)
            futures.append(ms.runner.RunnerFuture(lambda: True, lambda result=result: result))
        return futures

    def _compile(self, module: tvm.IRModule) -> Any:
        return tvm.compile(module, target=self.target).mod

    def _time(self, library: Any) -> float:
        evaluate = library.time_evaluator("main", tvm.cpu(), number=1, repeat=1, min_repeat_ms=_MIN_MS)
        return float(evaluate(*self._arguments).mean)


def tune_module(
    mod: tvm.IRModule, target: tvm.target.Target, registers: Registers, *, trials: int, seed: int = 0
) -> tuple[tvm.IRModule, dict[str, Any]]:
    """Replace functions of `mod` by faster schedules of them.

    Args:
        trials: how many candidates to measure: at least four per function, the functions that take most time first.

    Returns:
        The module, tuned functions marked as scheduled, and a record: per tuned function its microseconds with the
        likeliest tile and with the best one found, whether that was kept, and its trace.
    """
    started = time.perf_counter()
    bench, calls = _Workbench(target), _calls(mod)
    seconds: dict[str, float] = {}
    for variable, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and _is_tunable(function, registers):
            likeliest = schedule_function(function, registers)
            if likeliest is not None:
                seconds[variable.name_hint] = bench.start(function, likeliest)
    heaviest = sorted(seconds, key=lambda name: -seconds[name] * calls[name])
    records: list[dict[str, Any]] = []
    for index, name in enumerate(heaviest):
        left = trials - bench.measured
        if left < min(_LEAST, trials):
            break
        function = mod[name]
        likeliest = schedule_function(function, registers)
        before = bench.start(function, likeliest)
        # Each function gets half of what is left: the first ones take most of the time.
        found = _search(function, name, bench, registers, max(min(_LEAST, left), min(_MOST, left // 2)), seed + index)
        if found is None:
            continue
        best = float(found.run_secs[0])
        kept = best < _WORTH * before
        times = {"likeliest_us": round(1e6 * before, 2), "best_us": round(1e6 * best, 2)}
        trace = _plain(found.trace.as_json()) if kept else None
        records.append({"function": name, "calls": calls[name], **times, "kept": kept, "trace": trace})
        if kept:
            schedule = s_tir.Schedule(_alone(function))
            found.trace.apply_to_schedule(schedule, remove_postproc=False)
            tuned = schedule.mod["main"].without_attr("global_symbol").with_attr(SCHEDULED, True)
            mod.update_func(mod.get_global_var(name), tuned)
    saved = sum(item["calls"] * (item["likeliest_us"] - item["best_us"]) for item in records if item["kept"])
    summary = {
        "trials": trials,
        "measured": bench.measured,
        "seconds": round(time.perf_counter() - started, 1),
        "functions_ms_before": round(1e3 * sum(seconds[name] * calls[name] for name in seconds), 4),
        "functions_ms_saved": round(saved / 1e3, 4),
        "records": records,
    }
    return mod, summary


def _search(
    function: tirx.PrimFunc, name: str, bench: _Workbench, registers: Registers, trials: int, seed: int
) -> Any | None:
    """The best record that meta_schedule finds for a function in so many trials."""
    logger = logging.getLogger("edgekit.tvm_tuning")
    logger.setLevel(logging.ERROR)

    def space(schedule: s_tir.Schedule) -> list[s_tir.Schedule]:
        found = []
        for choice in range(1, apply_rule(schedule.copy(), registers)):
            candidate = schedule.copy()
            with contextlib.suppress(ScheduleError):
                apply_rule(candidate, registers, choice)
                found.append(candidate)
        return found or [schedule]

    builder = type("Builder", (ms.builder.PyBuilder,), {"build": lambda _, inputs: bench.build(inputs)})
    runner = type("Runner", (ms.runner.PyRunner,), {"run": lambda _, inputs: bench.run(inputs)})
    database = ms.database.MemoryDatabase()
    with tempfile.TemporaryDirectory(prefix="edgekit-tune-") as folder:
        context = ms.TuneContext(
            mod=_alone(function),
            target=bench.target,
            space_generator=ms.space_generator.ScheduleFn(space, sch_rules=[], postprocs=[], mutator_probs={}),
            search_strategy="replay-trace",
            task_name=name,
            rand_state=seed + 1,
            num_threads=1,
            logger=logger,
        )
        ms.tune_tasks(
            tasks=[context],
            task_weights=[1.0],
            work_dir=folder,
            max_trials_global=trials,
            num_trials_per_iter=trials,
            builder=derived_object(builder)(),
            runner=derived_object(runner)(),
            database=database,
            cost_model=ms.cost_model.RandomModel(),
            measure_callbacks=[ms.measure_callback.AddToDatabase()],
            task_scheduler="round-robin",
        )
    return database.query_tuning_record(_alone(function), bench.target, name)


def _is_tunable(function: tirx.PrimFunc, registers: Registers) -> bool:
    """Whether the rule has tiles to choose from for a function, and its sizes are known, so that it can be timed."""
    if function.attrs and SCHEDULED in function.attrs:
        return False
    if any(not isinstance(size, tirx.IntImm) for parameter in function.params for size in parameter.shape):
        return False
    try:
        return apply_rule(s_tir.Schedule(_alone(function), error_render_level="none"), registers) > 1
    except ScheduleError:
        return False


def _alone(function: tirx.PrimFunc) -> tvm.IRModule:
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def _calls(mod: tvm.IRModule) -> Counter[str]:
    """How often a run of the model calls each function."""
    counts: Counter[str] = Counter()

    def count(expression: Any) -> None:
        if isinstance(expression, relax.Call) and getattr(expression.op, "name", "") == "relax.call_tir":
            counts[expression.args[0].name_hint] += 1

    relax.analysis.post_order_visit(mod["main"], count)
    return counts


def _random_arguments(function: tirx.PrimFunc) -> list[Any]:
    generator = np.random.default_rng(0)
    arguments = []
    for parameter in function.params:
        shape = [int(size) for size in parameter.shape]
        values = generator.standard_normal(shape, dtype=np.float32).astype(str(parameter.dtype))
        arguments.append(tvm.runtime.tensor(values))
    return arguments


def _plain(value: Any) -> Any:
    """TVM's containers as JSON's."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return value.value
    return [_plain(item) for item in value]
