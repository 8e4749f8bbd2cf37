"""How fast is a bundle on this machine, and can the figures be trusted?

`profile` measures one bundle, `profile_pair` two in turns, which is the only fair way to compare: two separate runs
differ by what the machine did in between. `edgekit.runtime.timing` says how many runs are made and how they are judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime import timing
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generation_info import Generation
from edgekit.runtime.kernel_library import kernel_kinds, kernel_uses
from edgekit.runtime.language_inputs import token_inputs
from edgekit.runtime.op_times import NodeTime, OpTime, op_breakdown
from edgekit.runtime.profile_results import InputSource, Profile, ProfileComparison
from edgekit.runtime.session import Array, Session, backend_for, load, random_inputs, refuse_timing
from edgekit.runtime.system import (
    PeakMemory,
    installed_version,
    load_average,
    measure_peak,
    this_machine,
    thread_count,
)
from edgekit.runtime.timing import Policy, Series, Timer

if TYPE_CHECKING:
    import os

__all__ = ["Profile", "ProfileComparison", "choose_inputs", "profile", "profile_pair"]

# The threads of a session go on spinning for up to about 90 ms after its last run and slow down whatever comes next.
SPIN_MS = 100.0
_OP_RUNS, _OP_MS, _MOST_SETTLING_RUNS = (3, 50), 1_000.0, 200
# A loop in a function body can make thousands of calls per run, and a backend's trace takes about 1 KB for each.
_MOST_CALLS = 50_000


@runtime_checkable
class TimesOps(Protocol):
    """A session that can time its nodes; see `OnnxRuntimeSession.op_times`."""

    def op_times(self, inputs: Mapping[str, Array], *, runs: int) -> list[dict[str, Any]]:
        """One entry per node: `name`, `op`, `microseconds` (one per call of the node)."""


@dataclass(frozen=True)
class _Subject:
    """A bundle that was loaded and warmed up."""

    session: Session
    inputs: dict[str, Array]
    input_source: InputSource
    threads: int | None
    first_run_ms: float
    warm: Series
    memory: PeakMemory


def profile(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    sizes: Mapping[str, int] | None = None,
    runs: int | None = None,
    warmup: int | None = None,
    min_seconds: float = 0.5,
    max_seconds: float = 5.0,
    ops: bool = True,
) -> Profile:
    """Measure a bundle on this machine.

    Args:
        bundle: a bundle's folder or packed file, or an opened `Bundle`.
        backend: the name of a backend; None takes the first that fits the bundle's target.
        threads: threads for one run; None leaves it to the backend.
        kernels: as for `edgekit.load`.
        sizes: values of symbolic dimensions, such as `{"N": 4}`; of a language model `tokens`, `past` and `batch` (see
            `edgekit.runtime.language_inputs`). Another bundle's first stored sample is run where it has
            these sizes, else random values; dimensions not named here then take their smallest size.
        runs: exactly so many timed runs; None: as many as a precise median needs.
        warmup: exactly so many untimed runs, at least 1; None: until the latency has settled.
        min_seconds, max_seconds: bounds on the time of the timed runs.
        ops: also time every node, in a session of its own after the timed runs.

    Raises:
        InputError: counts or threads below 1, times that are not positive, or sizes that the bundle does not take.
        BundleError: the bundle is damaged, unsafe or newer than this edgekit.
        UnknownNameError: no such backend.
    """
    policy = Policy(runs, warmup, min_seconds, max_seconds)
    opened = Bundle.open(bundle)
    _check_sizes(opened, sizes)
    profiles = []
    for part in opened.parts().values():
        started, load_before = _now(), load_average()
        with _no_garbage_collection():
            subject = _prepare(part, policy, backend, threads, kernels, sizes, opened.manifest.generation)
            latencies = timing.measure(_timer(subject), policy)
        profiles.append(_report(subject, latencies, started, load_before, ops=ops))
        del subject  # the next graph's memory is measured without this one's
    return profiles[0] if len(profiles) == 1 else dataclasses.replace(profiles[0], decode=profiles[1])


def profile_pair(
    bundle_a: str | os.PathLike[str] | Bundle,
    bundle_b: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    vs_kernels: str | os.PathLike[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    runs: int | None = None,
    warmup: int | None = None,
    min_seconds: float = 0.5,
    max_seconds: float = 5.0,
    ops: bool = True,
    seed: int = 0,
) -> ProfileComparison:
    """Measure two bundles in turns, in one process, and compare their medians.

    Takes the arguments of `profile`, for both bundles; `runs` and the times are per bundle, `backend` is for the one
    whose target it runs. `vs_kernels` are the
    kernels of the second, None for the same: one bundle may so be measured against itself on other kernels. `seed`
    draws the order of the turns and the bootstrap's samples.

    Raises:
        InputError: as `profile`; also fewer than 8 runs (too few turns to compare), or bundles that take different
            batches at these sizes.
        BundleError, UnknownNameError: as `profile`.
    """
    policy = Policy(runs, warmup, min_seconds, max_seconds)
    if runs is not None and runs < timing.MIN_ROUNDS:
        raise InputError(f"runs must be at least {timing.MIN_ROUNDS} to compare two bundles, got {runs}")
    wholes = Bundle.open(bundle_a), Bundle.open(bundle_b)
    if wholes[0].parts().keys() != wholes[1].parts().keys():
        raise InputError(f"{wholes[0].name} and {wholes[1].name} do not compare: only one of them is a language model")
    for whole in wholes:
        _check_sizes(whole, sizes)
    pairs = [
        _measure_pair(
            wholes, name, policy, (backend, threads), (kernels, kernels if vs_kernels is None else vs_kernels), sizes,
            ops=ops, seed=seed,
        )
        for name in wholes[0].parts()
    ]  # fmt: skip
    return pairs[0] if len(pairs) == 1 else dataclasses.replace(pairs[0], decode=pairs[1])


def _measure_pair(
    wholes: tuple[Bundle, Bundle],
    part: str,
    policy: Policy,
    setting: tuple[str | None, int | None],
    kernels: tuple[str | os.PathLike[str], str | os.PathLike[str]],
    sizes: Mapping[str, int] | None,
    *,
    ops: bool,
    seed: int,
) -> ProfileComparison:
    """Measure one graph of two bundles in turns; `setting` is backend and threads."""
    backend, threads = setting
    opened = wholes[0].parts()[part], wholes[1].parts()[part]
    texts = wholes[0].manifest.generation, wholes[1].manifest.generation
    started, load_before = _now(), load_average()
    with _no_garbage_collection():
        a = _prepare(opened[0], policy, backend_for(opened[0], backend), threads, kernels[0], sizes, texts[0])
        time.sleep(SPIN_MS / 1000)
        b = _prepare(opened[1], policy, backend_for(opened[1], backend), threads, kernels[1], sizes, texts[1])
        if _batch(a) != _batch(b):
            raise InputError(
                f"{opened[0].name} runs batches of {_batch(a)} and {opened[1].name} of {_batch(b)}; choose sizes for "
                f"which both are equal, else the latencies do not compare"
            )
        slower = max(float(np.median(subject.warm[-5:])) for subject in (a, b))
        turns = timing.measure_in_turns(
            (_timer(a), _timer(b)),
            policy,
            runs_per_turn=timing.runs_per_turn(slower, policy),
            settle_ms=0.0 if a.threads == b.threads == 1 else SPIN_MS,
            seed=seed,
        )
    profiles = [
        _report(subject, np.concatenate(rounds), started, load_before, ops=ops)
        for subject, rounds in zip((a, b), turns, strict=True)
    ]
    ratio = timing.ratio_of_medians(*turns, seed=seed)
    verdict = timing.compare_medians(*_labels(*profiles), ratio)
    if any(side.stability.verdict == "unstable" for side in profiles):
        verdict += "; the timing is unstable: repeat on an idle machine"
    return ProfileComparison(profiles[0], profiles[1], ratio, len(turns[0]), verdict)


def _check_sizes(bundle: Bundle, sizes: Mapping[str, int] | None) -> None:
    """Raise `InputError` before the first graph takes its time, for sizes that a later one does not take."""
    generation = bundle.manifest.generation
    for part in bundle.parts().values() if generation is not None else ():
        if generation is not None:
            token_inputs(part.manifest, generation, sizes)


def choose_inputs(bundle: Bundle, sizes: Mapping[str, int] | None) -> tuple[dict[str, Array], InputSource]:
    """The first stored sample where it has the asked `sizes` of symbolic dimensions, else seeded random inputs.

    Raises `InputError` for an unknown dimension or a size outside its range.
    """
    wanted = dict(sizes or {})
    for inputs, _ in bundle.samples():
        found: dict[str, int] = {}
        for spec in bundle.manifest.inputs:
            shape = inputs[spec.name].shape if spec.name in inputs else ()
            found |= {dim: size for dim, size in zip(spec.shape, shape, strict=False) if isinstance(dim, str)}
        if wanted.items() <= found.items():
            return inputs, "stored sample"
        break
    return random_inputs(bundle.manifest.inputs, bundle.manifest.dims, sizes=wanted), "random"


def _prepare(
    bundle: Bundle,
    policy: Policy,
    backend: str | None,
    threads: int | None,
    kernels: str | os.PathLike[str],
    sizes: Mapping[str, int] | None,
    generation: Generation | None,
) -> _Subject:
    # A library's own memory and threads are no part of the session's: import it before anything is counted.
    import edgekit.runtime.onnxruntime_backend  # noqa: F401

    if backend == "tvm":
        from edgekit.runtime.tvm_backend import import_tvm

        import_tvm()

    inputs: dict[str, Array]
    source: InputSource
    if generation is None:
        inputs, source = choose_inputs(bundle, sizes)
    else:
        inputs, source = token_inputs(bundle.manifest, generation, sizes), "random"

    def start() -> tuple[Session, int | None, list[int]]:
        before = thread_count()
        session = load(bundle, backend=backend, threads=threads, kernels=kernels)
        refuse_timing(session)
        after = thread_count()
        counted = None if before is None or after is None else 1 + max(0, after - before)
        durations = timing.warm_up(_run_timer(session, inputs), policy)
        return session, session.threads if session.threads is not None else counted, durations

    (session, used, durations), memory = measure_peak(start)
    warm = np.asarray(durations) / 1e6
    return _Subject(session, inputs, source, used, float(warm[0]), warm, memory)


def _report(subject: _Subject, latencies: Series, started: str, load_before: float | None, *, ops: bool) -> Profile:
    latency, machine, bundle = timing.summarize(latencies), this_machine(), subject.session.bundle
    op_times, top_nodes = _time_ops(subject, latency.p50) if ops else ((), ())
    kernels = sum(item.ms_per_run for item in op_times)
    return Profile(
        bundle=bundle.name,
        file=bundle.path.name,
        started=started,
        backend=subject.session.backend,
        kernels=kernel_uses(subject.session.kernels),
        threads=subject.threads,
        inputs={name: tuple(array.shape) for name, array in subject.inputs.items()},
        input_source=subject.input_source,
        runs=len(latencies),
        warmup_runs=len(subject.warm),
        latency_ms=latency,
        inferences_per_second=1000 / latency.mean,
        items_per_second=1000 * _batch(subject) / latency.mean,
        load_ms=1000 * subject.session.load_seconds,
        first_run_ms=subject.first_run_ms,
        memory=subject.memory,
        model_bytes=bundle.size_of_model,
        ops=op_times,
        top_nodes=top_nodes,
        overhead_share=max(0.0, 1 - kernels / latency.p50) if op_times else None,
        stability=timing.judge(latencies, load_average=load_before, cores=machine.cores_logical),
        machine=machine,
        versions={
            "edgekit": installed_version("edgekit"),
            "numpy": installed_version("numpy"),
            "onnxruntime": installed_version("onnxruntime"),
            **({"apache-tvm": installed_version("apache-tvm")} if subject.session.backend == "tvm-cpu" else {}),
        },
    )


def _time_ops(subject: _Subject, typical_ms: float) -> tuple[tuple[OpTime, ...], tuple[NodeTime, ...]]:
    """Time the nodes for about a second, after enough runs for the threads of other sessions to fall asleep."""
    if not isinstance(subject.session, TimesOps):
        return (), ()
    skip = min(_MOST_SETTLING_RUNS, 1 + math.ceil(SPIN_MS / typical_ms))
    fewest, most = _OP_RUNS
    runs = skip + max(fewest, min(most, math.ceil(_OP_MS / typical_ms)))
    if any(not item.native for item in subject.session.kernels):
        calls = sum(len(node["microseconds"]) for node in subject.session.op_times(subject.inputs, runs=1))
        runs = max(1 + fewest, min(runs, _MOST_CALLS // max(1, calls)))
        skip = min(skip, runs - fewest)
    return op_breakdown(subject.session.op_times(subject.inputs, runs=runs), runs=runs, skip=skip)


def _timer(subject: _Subject) -> Timer:
    return _run_timer(subject.session, subject.inputs)


def _run_timer(session: Session, inputs: Mapping[str, Array]) -> Timer:
    def run() -> int:
        start = time.perf_counter_ns()
        session.run(inputs)
        return time.perf_counter_ns() - start

    return run


def _batch(subject: _Subject) -> int:
    """The size of the first input's batch axis: N in its layout, the first axis where it has no layout."""
    spec = subject.session.inputs[0]
    shape = subject.inputs[spec.name].shape
    axis = 0 if spec.layout is None else spec.layout.find("N")
    return shape[axis] if 0 <= axis < len(shape) else 1


def _labels(a: Profile, b: Profile) -> tuple[str, str]:
    if a.bundle != b.bundle:
        return a.bundle, b.bundle
    if a.file != b.file:
        return a.file, b.file
    first, second = kernel_kinds(a.kernels), kernel_kinds(b.kernels)
    return (f"{a.bundle} on {first}", f"{b.bundle} on {second}") if first != second else ("A", "B")


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect once, then keep Python's collector out of the timed runs; restores what was set."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
