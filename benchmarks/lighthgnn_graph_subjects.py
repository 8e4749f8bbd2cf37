"""Look-ups in the benchmark's hypergraphs: what the answers for some vertices depend on, and vertices that arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.lighthgnn_subjects import Array, Problem, random_members
from edgekit.models.sum_tables import SumTables

SLACK = 32  # hyperedges that a vertex may gain above four times the average before a stream starts again


class Graph:
    """A problem's hypergraph for look-ups, and with vertices to come: each with one hyperedge of itself and old ones.

    Attributes:
        features, members: of all vertices and hyperedges, those to come included.
        count: how many of both there are now.
        degree: int64, the hyperedges of each vertex; `incident`: their ids, in a row of fixed width.
    """

    def __init__(self, problem: Problem, arrivals: int = 0, seed: int = 1) -> None:
        setting, generator = problem.setting, np.random.default_rng(seed)
        self.problem, self.first, self.count = problem, setting.vertices, setting.vertices
        own = setting.vertices + np.arange(arrivals)
        come = random_members(own, setting.size, setting.vertices, generator)
        self.members = np.concatenate([problem.members, come])
        drawn = generator.standard_normal((arrivals, setting.features), dtype=np.float32)
        self.features = np.concatenate([problem.features, drawn]) if arrivals else problem.features
        starts, hyperedges = problem.hyperedges_by_vertex
        self._degree = np.concatenate([np.diff(starts), np.zeros(arrivals, np.int64)])
        self.degree = self._degree.copy()
        gain = 4 * arrivals * setting.size // setting.vertices + SLACK
        self.incident = np.zeros((len(self.degree), self.degree.max() + gain), np.int64)
        self.incident[: self.first][np.arange(self.incident.shape[1]) < np.diff(starts)[:, None]] = hyperedges
        self._seen, self._place = np.zeros(len(self.members), np.bool_), np.zeros(len(self.members), np.int64)

    def sharing(self) -> Graph:
        """Another one that grows by itself; what never changes is shared."""
        other = object.__new__(Graph)
        other.__dict__.update(self.__dict__)
        for name in ("degree", "incident", "_seen", "_place"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def add(self, count: int) -> Array:
        """Let the next vertices in, with their hyperedges; their ids."""
        new = np.arange(self.count, self.count + count)
        vertices, hyperedges = self.members[new].reshape(-1), np.repeat(new, self.members.shape[1])
        place = self.degree[vertices]
        if count > 1:  # a vertex may gain several
            order = np.argsort(vertices, kind="stable")
            ordered = vertices[order]
            run = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            place[order] += np.arange(len(order)) - np.repeat(run, np.diff(np.append(run, len(order))))
        self.incident[vertices, place] = hyperedges
        np.add.at(self.degree, vertices, 1)
        self.count += count
        return new

    def reset(self) -> None:
        """As before the first arrival."""
        self.count = self.first
        self.degree[:] = self._degree

    def distinct(self, ids: Array) -> tuple[Array, Array]:
        """The ids, each once and sorted, and where each of the given ones stands there."""
        self._seen[ids] = True
        found = np.flatnonzero(self._seen)
        self._seen[found] = False
        self._place[found] = np.arange(len(found))
        return found, self._place[ids]

    def hyperedges_of(self, vertices: Array) -> tuple[Array, Array]:
        """Starts int64 `[n + 1]` and ids of the hyperedges of some vertices."""
        counts = self.degree[vertices]
        starts = np.zeros(len(vertices) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        return starts, self.incident[vertices][np.arange(self.incident.shape[1]) < counts[:, None]]

    def scale(self, vertices: Array) -> Array:
        """Dv^-1/2, float32."""
        scale: Array = (1 / np.sqrt(self.degree[vertices])).astype(np.float32)
        return scale


@dataclass(frozen=True)
class Blocks:
    """What two layers need for some vertices, from the asked ones outwards.

    Attributes:
        asked_starts, asked_edges: for each asked vertex its hyperedges, as places in `last_members`.
        last_members: of those hyperedges `[m0, k]`, as places in `near`.
        near: ids of the vertices whose first layer is needed `[n1]`.
        near_starts, near_edges: their hyperedges, as places in `first_members`.
        first_members: of those hyperedges `[m1, k]`, as ids.
        asked_scale, near_scale, first_scale: Dv^-1/2 of the asked, of `near`, and of `first_members`.
    """

    asked_starts: Array
    asked_edges: Array
    last_members: Array
    near: Array
    near_starts: Array
    near_edges: Array
    first_members: Array
    asked_scale: Array
    near_scale: Array
    first_scale: Array


def find_blocks(graph: Graph, asked: Array) -> Blocks:
    """The blocks of some vertices."""
    asked_starts, edges = graph.hyperedges_of(asked)
    last, asked_edges = graph.distinct(edges)
    members = graph.members[last]
    near, places = graph.distinct(members.reshape(-1))
    near_starts, edges = graph.hyperedges_of(near)
    first, near_edges = graph.distinct(edges)
    first_members = graph.members[first]
    return Blocks(
        asked_starts,
        asked_edges,
        places.reshape(members.shape),
        near,
        near_starts,
        near_edges,
        first_members,
        graph.scale(asked),
        graph.scale(near),
        graph.scale(first_members),
    )


def neighbourhood(graph: Graph, asked: Array) -> tuple[Array, Array, Array]:
    """What the answers for some vertices depend on: the ids of the vertices, the hyperedges' members as rows of these
    `[E, size]`, and the rows of the asked ones."""
    _, edges = graph.hyperedges_of(asked)
    near, _ = graph.distinct(graph.members[graph.distinct(edges)[0]].reshape(-1))
    members = graph.members[graph.distinct(graph.hyperedges_of(near)[1])[0]]
    found, places = graph.distinct(members.reshape(-1))
    return found, places.reshape(members.shape), np.searchsorted(found, asked)


def zoo_inputs(graph: Graph, found: Array, places: Array) -> dict[str, Array]:
    """The zoo teacher's inputs for a neighbourhood."""
    count, size = places.shape
    pairs = places.reshape(-1)
    starts = np.concatenate([[0], np.cumsum(np.bincount(pairs, minlength=len(found)))])
    members = SumTables.of(np.arange(0, len(pairs) + 1, size), pairs, len(found))
    memberships = SumTables.of(starts, np.argsort(pairs, kind="stable") // size, count)
    return {
        "features": graph.features[found],
        "members": members.rows,
        "member_chunks": members.chunks,
        "memberships": memberships.rows,
        "membership_chunks": memberships.chunks,
        "vertex_degree": graph.degree[found].astype(np.float32),
        "member_weight": np.full(count, 1 / size, np.float32),
    }
