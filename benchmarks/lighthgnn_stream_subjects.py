"""Streams in the benchmark of LightHGNN: vertices arrive, the hypergraph grows, the new ones are answered."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.lighthgnn_graph_subjects import Graph
from benchmarks.lighthgnn_local_subjects import Form, first_layer_table, hyperedges_to_vertices
from benchmarks.lighthgnn_subjects import Array, bare


class Incremental:
    """A stream's best case: the first layer's sums over each hyperedge are kept and corrected as vertices arrive."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.w1, self.b1, self.w2, self.b2 = map(torch.from_numpy, vars(graph.problem.weights).values())
        self.table = torch.from_numpy(first_layer_table(graph))
        scale = torch.from_numpy(graph.problem.scale)
        old = torch.from_numpy(graph.problem.members)
        self.start = F.embedding_bag(old, self.table, mode="sum", per_sample_weights=scale[old])
        self.sums = torch.empty(len(graph.members), self.start.shape[1])
        self.reset()

    def reset(self) -> None:
        self.graph.reset()
        self.sums[: len(self.start)] = self.start

    @torch.inference_mode()
    def arrive(self, count: int) -> Array:
        """Let vertices in and answer for them."""
        graph, size = self.graph, self.graph.members.shape[1]
        coming = slice(graph.count, graph.count + count)
        members = graph.members[coming]
        near, places = graph.distinct(members.reshape(-1))
        old = near[: np.searchsorted(near, graph.count)]
        starts, edges = graph.hyperedges_of(old)
        before = graph.scale(old)
        new = graph.add(count)
        self.table[coming] = F.linear(torch.from_numpy(graph.features[coming]), self.w1, self.b1)
        change = torch.from_numpy(graph.scale(old) - before)[:, None] * self.table[torch.from_numpy(old)]
        owner = torch.from_numpy(np.repeat(np.arange(len(old)), np.diff(starts)))
        self.sums.index_add_(0, torch.from_numpy(edges), change[owner])
        member_scale = torch.from_numpy(graph.scale(members))
        self.sums[coming] = F.embedding_bag(
            torch.from_numpy(members), self.table, mode="sum", per_sample_weights=member_scale
        )
        starts, edges = graph.hyperedges_of(near)
        scale = graph.scale(near)
        hidden = hyperedges_to_vertices(self.sums, starts, edges, scale, size).relu_()
        near_logits = F.linear(hidden, self.w2, self.b2).mul_(torch.from_numpy(scale)[:, None])
        sums = F.embedding_bag(torch.from_numpy(places.reshape(members.shape)), near_logits, mode="sum")
        return np.asarray((sums * torch.from_numpy(graph.scale(new) * np.float32(1 / size))[:, None]).numpy())


class Stream:
    """Arrivals in batches, one after the other; from the start again when there are no more."""

    def __init__(self, form: Form | Incremental, batch: int) -> None:
        self.form, self.batch = form, batch

    def __call__(self) -> Array:
        graph = self.form.graph
        if graph.count + self.batch > len(graph.members):
            self.reset()
        if isinstance(self.form, Incremental):
            return self.form.arrive(self.batch)
        return self.form.answer(self.form.prepare(graph.add(self.batch)))

    def reset(self) -> None:
        self.form.reset() if isinstance(self.form, Incremental) else self.form.graph.reset()


class LibraryStream:
    """One arrival after the other, each extending the first hypergraph with `Hypergraph.extended`."""

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch, self.next = graph, batch, graph.first
        self.features = graph.features[: graph.first + batch].copy()
        self.session = bare("hgnn", graph.problem.setting.features, torch.get_num_threads())

    def __call__(self) -> Array:
        if self.next + self.batch > len(self.graph.members):
            self.next = self.graph.first
        own = np.arange(self.next, self.next + self.batch)
        # The hypergraph is always the first one, so that the new vertices are numbered from its end.
        members = np.minimum(self.graph.members[own], self.graph.first)
        members[:, -1] += np.arange(self.batch)
        hypergraph = self.graph.problem.hypergraph.extended(members.tolist(), new_vertices=self.batch, merge=False)
        asked = self.graph.first + np.arange(self.batch)
        found = hypergraph.neighbourhood(asked)
        self.features[asked] = self.graph.features[own]
        self.next += self.batch
        return np.asarray(self.session.run(None, found.inputs(self.features))[0])[found.positions]
