"""What `edgekit.runtime.profiler` measures: of one bundle, and of two in turns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgekit.runtime.kernel_library import KernelUse
from edgekit.runtime.op_times import NodeTime, OpTime
from edgekit.runtime.system import Machine, PeakMemory
from edgekit.runtime.timing import Latency, Ratio, Stability

SCHEMA = 1

InputSource = Literal["stored sample", "random"]


@dataclass(frozen=True)
class Profile:
    """What was measured of one bundle.

    Attributes:
        bundle, file: the bundle's name and its file or folder name.
        started: UTC, ISO 8601.
        kernels: what served edgekit's own ops; the figures hold for these kernels alone. Empty where there are none.
        threads: how many one run uses; counted where the backend chose, None where the system does not count.
        inputs: the shapes that were run, by name; `input_source` says with which values.
        runs, warmup_runs: timed and untimed runs; the first run, in `first_run_ms`, is one of the untimed.
        latency_ms: statistics of the timed runs, milliseconds.
        inferences_per_second, items_per_second: from the mean latency; an item is one entry of the batch.
        load_ms, first_run_ms: milliseconds to load the model, and of the first run after.
        memory: resident bytes that loading and the warm-up added at their peak.
        model_bytes: the size of the model file, and of its weights where they lie apart.
        ops, top_nodes: per op type and the costliest nodes, both by falling time; empty where they were not measured.
        overhead_share: share of the median run outside the kernels; None where ops were not measured.
        decode: of a language model: its second graph, one token behind all that the first read; None otherwise.
    """

    bundle: str
    file: str
    started: str
    backend: str
    kernels: tuple[KernelUse, ...]
    threads: int | None
    inputs: dict[str, tuple[int, ...]]
    input_source: InputSource
    runs: int
    warmup_runs: int
    latency_ms: Latency
    inferences_per_second: float
    items_per_second: float
    load_ms: float
    first_run_ms: float
    memory: PeakMemory
    model_bytes: int
    ops: tuple[OpTime, ...]
    top_nodes: tuple[NodeTime, ...]
    overhead_share: float | None
    stability: Stability
    machine: Machine
    versions: dict[str, str]
    decode: Profile | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON. Every float is finite and has six significant digits."""
        return {"schema": SCHEMA, **_plain(self)}


@dataclass(frozen=True)
class ProfileComparison:
    """Two bundles measured in turns.

    Attributes:
        a, b: both profiles.
        ratio: the median latency of b over that of a: above 1, a is faster.
        rounds: how often both had a turn.
        verdict: the result in one sentence.
        decode: of language models: their second graphs; None otherwise.
    """

    a: Profile
    b: Profile
    ratio: Ratio
    rounds: int
    verdict: str
    decode: ProfileComparison | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON. Every float is finite and has six significant digits."""
        return {"schema": SCHEMA, **_plain(self)}


def _plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, floats to six digits (None where not finite)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: item for name, item in plain.items() if item is not None or name != "decode"}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
