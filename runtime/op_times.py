"""Where does the time of a run go? Sums over the nodes of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

TOP_NODES = 10
# The time of these nodes is that of the nodes in their bodies, which are listed themselves.
_CONTAINERS = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True)
class OpTime:
    """All nodes of one op type: how many, their milliseconds per run together, and their share of all kernels' time."""

    op: str
    count: int
    ms_per_run: float
    share: float


@dataclass(frozen=True)
class NodeTime:
    """One node of the optimized graph: milliseconds per run and share of all kernels' time."""

    name: str
    op: str
    ms_per_run: float
    share: float


def op_breakdown(
    entries: Sequence[Mapping[str, Any]], *, runs: int, skip: int
) -> tuple[tuple[OpTime, ...], tuple[NodeTime, ...]]:
    """Sum up node times by op type, and pick the costliest nodes.

    Averages over the middle half of the runs by total time: the figures of different nodes then belong together, and
    interruptions do not count. Control flow is left out, since the nodes of its body are entries themselves.

    Args:
        entries: what `op_times` returns; a node in a loop's body has several times per run.
        runs: how many runs the times stem from.
        skip: how many of them, at the start, do not count.
    """
    nodes = [entry for entry in entries if entry["op"] not in _CONTAINERS]
    if not nodes:
        return (), ()
    times = np.stack([_per_run(entry["microseconds"], runs)[skip:] for entry in nodes]) / 1000
    order = np.argsort(times.sum(axis=0), kind="stable")
    edge = len(order) // 4
    means = times[:, order[edge : len(order) - edge]].mean(axis=1)
    total = float(means.sum()) or 1.0
    by_op: dict[str, list[float]] = {}
    for node, mean in zip(nodes, means, strict=True):
        by_op.setdefault(node["op"], []).append(float(mean))
    op_times = [OpTime(op, len(each), sum(each), sum(each) / total) for op, each in by_op.items()]
    node_times = [
        NodeTime(node["name"], node["op"], float(mean), float(mean) / total)
        for node, mean in zip(nodes, means, strict=True)
    ]
    op_times.sort(key=lambda item: (-item.ms_per_run, item.op))
    node_times.sort(key=lambda item: (-item.ms_per_run, item.name))
    return tuple(op_times), tuple(node_times[:TOP_NODES])


def _per_run(microseconds: Sequence[float], runs: int) -> NDArray[np.float64]:
    """One time per run: a node in a loop is called as often in each run; where a branch makes that untrue, the mean."""
    calls = np.asarray(microseconds, dtype=np.float64)
    if len(calls) % runs:
        return np.full(runs, calls.sum() / runs)
    return np.asarray(calls.reshape(runs, -1).sum(axis=1))
