"""Where does the time of a run go? Sums over the nodes of a graph."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

TOP_NODES = 10
# The time of these nodes is that of the nodes in their bodies, which are listed themselves.
_CONTAINERS = frozenset({"If", "Loop", "Scan"})


# onnxruntime names the nodes of an inlined function after it.
_INLINED = "_inlfunc_"


class Event(NamedTuple):
    """One call of a node, from a runtime's trace: when it started and how long it took, both in microseconds."""

    name: str
    op: str
    start: float
    duration: float


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


def node_times(events: Iterable[Event], custom_ops: set[str], domain: str) -> list[dict[str, Any]]:
    """A trace's calls by node: `name`, `op`, and `microseconds`, one per call in order of time.

    A node of a custom op counts as `edgekit::Op`. Where onnxruntime expanded its function body instead, the nodes of
    the body count as `edgekit::Op (body)`, as far as they can be told: nodes that carry a name in the body, and all
    that run inside of one of these. A loop in a body counts with its own time, without that of the nodes inside.
    """
    names = "|".join(map(re.escape, sorted(custom_ops, key=len, reverse=True)))
    inlined = re.compile(f"{_INLINED}({names})_") if custom_ops else None
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    # The calls that are under way when the next starts: end, custom op, own entry.
    open_calls: list[tuple[float, str | None, dict[str, Any]]] = []
    for event in sorted(events, key=lambda each: (each.start, -each.duration)):
        while open_calls and open_calls[-1][0] <= event.start:
            open_calls.pop()
        parent = open_calls[-1] if open_calls else None
        match = inlined.search(event.name) if inlined else None
        body = match[1] if match else parent[1] if parent else None
        is_loop = event.op in _CONTAINERS
        op = event.op
        if body is not None:
            op = f"{domain}::{body} (body)"
        elif op in custom_ops:
            op = f"{domain}::{op}"
        # Nodes of two loops may have the same name.
        key = (event.name, parent[2]["name"] if parent else "")
        node = nodes.setdefault(key, {"name": event.name, "op": op, "microseconds": []})
        node["microseconds"].append(float(event.duration))
        if parent is not None and parent[1] is not None:
            parent[2]["microseconds"][-1] -= float(event.duration)
        if is_loop:
            open_calls.append((event.start + event.duration, body, node))
    return list(nodes.values())


def _per_run(microseconds: Sequence[float], runs: int) -> NDArray[np.float64]:
    """One time per run: a node in a loop is called as often in each run; where a branch makes that untrue, the mean."""
    calls = np.asarray(microseconds, dtype=np.float64)
    if len(calls) % runs:
        return np.full(runs, calls.sum() / runs)
    return np.asarray(calls.reshape(runs, -1).sum(axis=1))
