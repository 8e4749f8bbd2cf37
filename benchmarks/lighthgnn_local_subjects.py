"""What the benchmark of LightHGNN runs for single vertices: the teacher over what its answer depends on, and no more.

A form gets the ids of some vertices and answers with their logits float32 `[n, K]`, equal to the teacher's on the whole
hypergraph. `prepare` finds the neighbourhood, `answer` computes; a stream also extends the hypergraph before. `Pruned`
computes the first layer only for the vertices that share a hyperedge with an asked one, and the second only for the
asked ones; the zoo's model and the authors' form compute both layers for the whole neighbourhood.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from scipy import sparse  # type: ignore[import-untyped]

from benchmarks.lighthgnn_graph_subjects import Blocks, Graph, find_blocks, neighbourhood, zoo_inputs
from benchmarks.lighthgnn_subjects import (
    SCATTER_THREADS,
    Answer,
    Array,
    bag,
    bare,
    make_session,
)

Theta = Literal["first", "last", "cached"]


class Form(Protocol):
    """One way to answer for some vertices; `graph` is its own where it is to grow."""

    graph: Graph

    def prepare(self, asked: Array) -> Any: ...

    def answer(self, prepared: Any) -> Array: ...


class Pruned:
    """The two-block form in PyTorch.

    The linear map of the first layer runs before the sums, or after them, which is the same since it is linear, or not
    at all: its results for all vertices are kept.
    """

    def __init__(self, graph: Graph, theta: Theta) -> None:
        self.graph, self.theta = graph, theta
        weights = graph.problem.weights
        self.w1, self.b1, self.w2, self.b2 = map(torch.from_numpy, vars(weights).values())
        table = first_layer_table(graph) if theta == "cached" else graph.features
        self.table = torch.from_numpy(table)

    def prepare(self, asked: Array) -> Blocks:
        if self.theta == "cached":
            _complete(self.graph, self.table.numpy(), asked)
        return find_blocks(self.graph, asked)

    @torch.inference_mode()
    def answer(self, prepared: Blocks) -> Array:
        members, width = prepared.first_members, prepared.first_members.shape[1]
        table, scale = self.table, torch.from_numpy(prepared.first_scale)
        if self.theta == "first":
            found, places = self.graph.distinct(members.reshape(-1))
            table = F.linear(table[torch.from_numpy(found)], self.w1, self.b1)
            members = places.reshape(members.shape)
        sums = F.embedding_bag(torch.from_numpy(members), table, mode="sum", per_sample_weights=scale)
        near = hyperedges_to_vertices(sums, prepared.near_starts, prepared.near_edges, prepared.near_scale, width)
        if self.theta == "last":
            ones = hyperedges_to_vertices(
                scale.sum(1, True), prepared.near_starts, prepared.near_edges, prepared.near_scale, width
            )
            near = torch.addmm(ones * self.b1, near, self.w1.t())
        near = F.linear(near.relu_(), self.w2, self.b2).mul_(torch.from_numpy(prepared.near_scale)[:, None])
        sums = F.embedding_bag(torch.from_numpy(prepared.last_members), near, mode="sum")
        logits = hyperedges_to_vertices(sums, prepared.asked_starts, prepared.asked_edges, prepared.asked_scale, width)
        return np.asarray(logits.numpy())


def hyperedges_to_vertices(sums: torch.Tensor, starts: Array, edges: Array, scale: Array, size: int) -> torch.Tensor:
    """From sums over the vertices of hyperedges to vertices: the mean's factor, the sum, the vertices' scale."""
    back = bag(sums, torch.from_numpy(edges), torch.from_numpy(starts))
    return back.mul_(torch.from_numpy(scale * np.float32(1 / size))[:, None])


class WholeGraph:
    """Both layers for all vertices in PyTorch, factored: the better way where nearly all matter.

    `theta` is first or cached, as for `Pruned`.
    """

    def __init__(self, graph: Graph, theta: Theta) -> None:
        self.graph, self.theta = graph, theta
        self.w1, self.b1, self.w2, self.b2 = map(torch.from_numpy, vars(graph.problem.weights).values())
        self.table = torch.from_numpy(first_layer_table(graph) if theta == "cached" else graph.features)
        self.by_vertex = graph.problem.hyperedges_by_vertex

    def prepare(self, asked: Array) -> tuple[Array, Array, Array, Array]:
        graph = self.graph
        if self.theta == "cached":
            _complete(graph, self.table.numpy(), asked)
        everything = np.arange(graph.count)
        grown = graph.count > graph.first
        starts, edges = graph.hyperedges_of(everything) if grown else self.by_vertex
        return starts, edges, graph.scale(everything), asked

    @torch.inference_mode()
    def answer(self, prepared: tuple[Array, Array, Array, Array]) -> Array:
        starts, edges, scale, asked = prepared
        members = torch.from_numpy(self.graph.members[: len(scale)])
        table, column = self.table[: len(scale)], torch.from_numpy(scale)[:, None]
        x = table * column if self.theta == "cached" else F.linear(table, self.w1, self.b1).mul_(column)
        sums = F.embedding_bag(members, x, mode="sum")
        hidden = hyperedges_to_vertices(sums, starts, edges, scale, members.shape[1]).relu_()
        x = F.linear(hidden, self.w2, self.b2).mul_(column)
        own_starts, own_edges = self.graph.hyperedges_of(asked)
        last, places = self.graph.distinct(own_edges)
        sums = F.embedding_bag(members[torch.from_numpy(last)], x, mode="sum")
        return np.asarray(hyperedges_to_vertices(sums, own_starts, places, scale[asked], members.shape[1]).numpy())


def first_layer_table(graph: Graph) -> Array:
    """The linear map of the first layer on all vertices; rows of vertices to come are left empty."""
    weights, table = graph.problem.weights, np.full((len(graph.features), len(graph.problem.weights.b1)), np.nan)
    table[: graph.first] = graph.features[: graph.first] @ weights.w1.T + weights.b1
    return table.astype(np.float32)


def _complete(graph: Graph, table: Array, new: Array) -> None:
    """Fill in the rows of vertices that have just come."""
    if new[0] >= graph.first:
        weights = graph.problem.weights
        table[new] = graph.features[new] @ weights.w1.T + weights.b1


class PrunedOnnx:
    """`Pruned` as an ONNX graph in onnxruntime, for hyperedges of one size."""

    def __init__(self, graph: Graph, theta: Theta) -> None:
        self.graph, self.theta = graph, theta
        self.table = first_layer_table(graph) if theta == "cached" else graph.features
        weights, names = graph.problem.weights, ("members", "last_members", "near_edges", "asked_edges", "found")
        rows = ("near_rows", "asked_rows")
        floats = {"table": 2, "first_scale": 3, "near_scale": 2, "asked_scale": 2}
        dims = {**{name: 2 if "members" in name else 1 for name in names}, **dict.fromkeys(rows, 2)}
        if theta != "first":
            del dims["found"]
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [None] * rank) for name, rank in dims.items()]
        inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n, rank in floats.items()]
        constants = {**vars(weights), "axis": np.array([1]), "mean": np.float32(1 / graph.members.shape[1])}
        constants |= {f"width_{width}": np.array([width]) for width in {*weights.w1.shape, len(weights.b2), 1}}
        self.session = make_session(self._nodes(), inputs, constants, SCATTER_THREADS)

    def _nodes(self) -> list[Any]:
        node, weights = helper.make_node, self.graph.problem.weights
        hidden, features = weights.w1.shape

        def back(sums: str, out: str, width: int, where: str) -> list[Any]:
            return [
                node("Gather", [sums, f"{where}_edges"], [f"{out}_taken"], axis=0),
                node("Shape", [f"{where}_scale"], [f"{out}_count"], end=1),
                node("Concat", [f"{out}_count", f"width_{width}"], [f"{out}_shape"], axis=0),
                node("ConstantOfShape", [f"{out}_shape"], [f"{out}_zeros"]),
                node("ScatterND", [f"{out}_zeros", f"{where}_rows", f"{out}_taken"], [f"{out}_sum"], reduction="add"),
                node("Mul", [f"{where}_scale", "mean"], [f"{out}_factor"]),
                node("Mul", [f"{out}_sum", f"{out}_factor"], [out]),
            ]

        def sums(table: str, members: str, out: str, scale: str | None = None) -> list[Any]:
            taken = [node("Gather", [table, members], [f"{out}_parts"], axis=0)]
            if scale:
                taken.append(node("Mul", [f"{out}_parts", scale], [f"{out}_scaled"]))
            last = f"{out}_scaled" if scale else f"{out}_parts"
            return [*taken, node("ReduceSum", [last, "axis"], [out], keepdims=0)]

        before, width, near = [], hidden, [node("Relu", ["near"], ["h"])]
        table = "table"
        if self.theta == "first":
            before = [
                node("Gather", ["table", "found"], ["x"], axis=0),
                node("Gemm", ["x", "w1", "b1"], ["t"], transB=1),
            ]
            table = "t"
        if self.theta == "last":
            width = features
            near = [
                node("ReduceSum", ["first_scale", "axis"], ["ones"], keepdims=0),
                *back("ones", "ones_near", 1, "near"),
                node("Mul", ["ones_near", "b1"], ["bias"]),
                node("Gemm", ["near", "w1", "bias"], ["linear"], transB=1),
                node("Relu", ["linear"], ["h"]),
            ]
        return [
            *before,
            *sums(table, "members", "first", "first_scale"),
            *back("first", "near", width, "near"),
            *near,
            node("Gemm", ["h", "w2", "b2"], ["z"], transB=1),
            node("Mul", ["z", "near_scale"], ["z_scaled"]),
            *sums("z_scaled", "last_members", "last"),
            *back("last", "logits", len(weights.b2), "asked"),
        ]

    def prepare(self, asked: Array) -> dict[str, Array]:
        if self.theta == "cached":
            _complete(self.graph, self.table, asked)
        blocks = find_blocks(self.graph, asked)
        members = blocks.first_members
        feeds = {}
        if self.theta == "first":
            feeds["found"], places = self.graph.distinct(members.reshape(-1))
            members = places.reshape(members.shape)
        near_rows, asked_rows = (
            np.repeat(np.arange(len(starts) - 1), np.diff(starts))[:, None]
            for starts in (blocks.near_starts, blocks.asked_starts)
        )
        return feeds | {
            "table": self.table,
            "members": members,
            "first_scale": blocks.first_scale[:, :, None],
            "near_edges": blocks.near_edges,
            "near_rows": near_rows,
            "near_scale": blocks.near_scale[:, None],
            "last_members": blocks.last_members,
            "asked_edges": blocks.asked_edges,
            "asked_rows": asked_rows,
            "asked_scale": blocks.asked_scale[:, None],
        }

    def answer(self, prepared: dict[str, Array]) -> Array:
        return np.asarray(self.session.run(None, prepared)[0])


class Zoo:
    """The zoo's export on the neighbourhood."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.session = bare("hgnn", graph.problem.setting.features, torch.get_num_threads())

    def prepare(self, asked: Array) -> tuple[dict[str, Array], Array]:
        found, places, rows = neighbourhood(self.graph, asked)
        return zoo_inputs(self.graph, found, places), rows

    def answer(self, prepared: tuple[dict[str, Array], Array]) -> Array:
        inputs, rows = prepared
        return np.asarray(self.session.run(None, inputs)[0])[rows]


class Library:
    """The zoo's export on the neighbourhood that `Hypergraph.neighbourhood` finds; does not grow."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.session = bare("hgnn", graph.problem.setting.features, torch.get_num_threads())

    def prepare(self, asked: Array) -> tuple[dict[str, Array], Array]:
        found = self.graph.problem.hypergraph.neighbourhood(asked)
        return found.inputs(self.graph.problem.features), found.positions

    def answer(self, prepared: tuple[dict[str, Array], Array]) -> Array:
        inputs, rows = prepared
        return np.asarray(self.session.run(None, inputs)[0])[rows]


class Authors:
    """The authors' form on the neighbourhood: its Laplacian, with the degrees of the whole, as torch's sparse COO."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.w1, self.b1, self.w2, self.b2 = map(torch.from_numpy, vars(graph.problem.weights).values())

    def prepare(self, asked: Array) -> tuple[torch.Tensor, torch.Tensor, Array]:
        found, places, rows = neighbourhood(self.graph, asked)
        scale = self.graph.degree[found].astype(np.float32) ** -0.5
        count, size = places.shape
        pairs = places.reshape(-1)
        starts = np.arange(0, len(pairs) + 1, size)
        incidence = sparse.csr_array((scale[pairs], pairs, starts), shape=(count, len(found)))
        matrix = (incidence.T @ incidence).tocoo()
        indices = torch.from_numpy(np.stack([matrix.row, matrix.col]).astype(np.int64))
        data = torch.from_numpy(matrix.data * np.float32(1 / size))
        laplacian = torch.sparse_coo_tensor(indices, data, matrix.shape, is_coalesced=True, check_invariants=False)
        return torch.from_numpy(self.graph.features[found]), laplacian, rows

    @torch.inference_mode()
    def answer(self, prepared: tuple[torch.Tensor, torch.Tensor, Array]) -> Array:
        x, laplacian, rows = prepared
        hidden = torch.sparse.mm(laplacian, F.linear(x, self.w1, self.b1)).relu_()
        return np.asarray(torch.sparse.mm(laplacian, F.linear(hidden, self.w2, self.b2)).numpy()[rows])


class LaplacianRows:
    """The rows of a stored Laplacian that one vertex needs: its own, and those of its neighbours. Does not grow."""

    def __init__(self, graph: Graph, theta: Literal["last", "cached"]) -> None:
        self.graph, self.theta = graph, theta
        rows, self.columns, self.values = graph.problem.laplacian
        counts = np.bincount(rows, minlength=graph.first)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.sums = np.bincount(rows, self.values, minlength=graph.first).astype(np.float32)
        self.w1, self.b1, self.w2, self.b2 = map(torch.from_numpy, vars(graph.problem.weights).values())
        self.table = torch.from_numpy(first_layer_table(graph) if theta == "cached" else graph.features)

    def prepare(self, asked: Array) -> tuple[torch.Tensor, ...]:
        (vertex,) = asked
        own = slice(self.starts[vertex], self.starts[vertex + 1])
        near = self.columns[own]
        counts = self.starts[near + 1] - self.starts[near]
        starts = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(starts[-1]) + np.repeat(self.starts[near] - starts[:-1], counts)
        arrays = (starts, self.columns[places], self.values[places], self.sums[near], self.values[own])
        return tuple(map(torch.from_numpy, arrays))

    @torch.inference_mode()
    def answer(self, prepared: tuple[torch.Tensor, ...]) -> Array:
        starts, columns, values, sums, own = prepared
        near = bag(self.table, columns, starts, values)
        if self.theta == "last":
            near = torch.addmm(sums[:, None] * self.b1, near, self.w1.t())
        return np.asarray((own[None] @ F.linear(near.relu_(), self.w2, self.b2)).numpy())


def asking(form: Form, asked: list[Array], *, prepared: bool) -> Answer:
    """Answers for one of the vertices after the other; with `prepared`, their neighbourhoods are found beforehand."""
    if prepared:
        ready = cycle([form.prepare(vertices) for vertices in asked])
        return lambda: form.answer(next(ready))
    vertices = cycle(asked)
    return lambda: form.answer(form.prepare(next(vertices)))
