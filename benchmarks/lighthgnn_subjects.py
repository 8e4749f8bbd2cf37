"""What the benchmark of LightHGNN runs on a whole hypergraph: one answer, the teacher's, in every form worth timing.

All forms take the weights of one teacher, HGNN with two layers (see `edgekit.models.lighthgnn`), and give its logits
float32 `[V, K]`. The Laplacian forms multiply with one sparse matrix `[V, V]`, as the authors' code does; the factored
forms sum over the vertices of each hyperedge and then over the hyperedges of each vertex.
"""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy import sparse  # type: ignore[import-untyped]

import edgekit
from edgekit.export.source import load_model
from edgekit.models.hypergraph import Hypergraph
from edgekit.runtime.onnxruntime_backend import session_options
from edgekit.runtime.session import Session

CLASSES, OPSET = 7, 20
# onnxruntime 1.31's ScatterND with reduction "add" loses sums where several threads add to one row (its issues 18048
# and 23396), so that graphs with one run on one thread here, whatever the others run on. See the part `race`.
SCATTER_THREADS = 1
Array = NDArray[Any]
Answer = Callable[[], Array]


@dataclass(frozen=True)
class Setting:
    """A synthetic hypergraph: as many hyperedges as vertices, each of its own vertex and `size - 1` random others."""

    vertices: int = 55_000
    size: int = 10
    features: int = 300

    def __str__(self) -> str:
        return f"V={self.vertices}, size {self.size}, F={self.features}"


@dataclass(frozen=True)
class Weights:
    """A teacher's parameters, float32: `w1 [H, F]`, `b1 [H]`, `w2 [K, H]`, `b2 [K]`."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """A hypergraph whose row e of `members` `[V, size]` is hyperedge e, features float32 `[V, F]`, and a teacher."""

    setting: Setting
    members: Array
    hypergraph: Hypergraph
    features: Array
    weights: Weights

    @cached_property
    def scale(self) -> Array:
        """Dv^-1/2, float32 `[V]`; no vertex is isolated here."""
        return self.hypergraph.vertex_degree**-0.5

    @cached_property
    def truth(self) -> Array:
        """The teacher's logits in float64."""
        return teacher_truth(self.members, self.features, self.weights)

    @property
    def laplacian_entries(self) -> int:
        """An upper bound on the entries of the Laplacian: every two members of a hyperedge."""
        return self.members.size * self.setting.size

    @cached_property
    def laplacian(self) -> tuple[Array, Array, Array]:
        """Rows, columns and values, sorted by row."""
        return self.hypergraph.laplacian("hgnn")

    @cached_property
    def hyperedges_by_vertex(self) -> tuple[Array, Array]:
        """Where each vertex begins, int64 `[V + 1]`, and the hyperedges by vertex, int64 `[P]`."""
        order = np.argsort(self.hypergraph.vertex, kind="stable")
        counts = np.bincount(self.hypergraph.vertex, minlength=self.setting.vertices)
        return np.concatenate([[0], np.cumsum(counts)]), self.hypergraph.hyperedge[order]


def make_problem(setting: Setting, seed: int = 0) -> Problem:
    """The hypergraph and features of a setting, and the zoo's teacher for it."""
    generator = np.random.default_rng(seed)
    members = random_members(np.arange(setting.vertices), setting.size, setting.vertices, generator)
    owner = np.repeat(np.arange(setting.vertices), setting.size)
    hypergraph = Hypergraph.from_incidence(members.reshape(-1), owner, num_vertices=setting.vertices, merge=False)
    features = generator.standard_normal((setting.vertices, setting.features), dtype=np.float32)
    return Problem(setting, members, hypergraph, features, teacher_weights(setting.features))


def random_members(own: Array, size: int, vertices: int, generator: np.random.Generator) -> Array:
    """Hyperedges int64 `[len(own), size]`, sorted rows: its own vertex and distinct others out of 0..vertices-1."""
    members = np.concatenate([own[:, None], generator.integers(vertices, size=(len(own), size - 1))], axis=1)
    while True:
        members.sort(axis=1)
        (again,) = np.nonzero((members[:, 1:] == members[:, :-1]).any(axis=1))
        if len(again) == 0:
            return members
        drawn = generator.integers(vertices, size=(len(again), size - 1))
        members[again] = np.concatenate([own[again, None], drawn], axis=1)


@cache
def teacher_weights(features: int) -> Weights:
    """Of the zoo's `hgnn`."""
    state = {key: tensor.numpy() for key, tensor in zoo_module("hgnn", features).state_dict().items()}
    first, second = sorted(key.removesuffix("weight") for key in state if key.endswith("weight"))
    return Weights(state[first + "weight"], state[first + "bias"], state[second + "weight"], state[second + "bias"])


def teacher_truth(members: Array, features: Array, weights: Weights, rows: Array | None = None) -> Array:
    """The teacher's logits in float64, from the definition; of some rows where asked."""
    vertices, pairs = len(features), np.ones(members.size)
    incidence = sparse.csr_array(
        (pairs, members.reshape(-1), np.arange(0, members.size + 1, members.shape[1])), shape=(len(members), vertices)
    )
    scale = np.bincount(members.reshape(-1), minlength=vertices)[:, None] ** -0.5

    def smooth(x: Array) -> Array:
        means = incidence @ (scale * x) / members.shape[1]
        return np.asarray(scale * (incidence.T @ means))

    hidden = np.maximum(smooth(features @ weights.w1.T.astype(np.float64) + weights.b1), 0)
    logits = smooth(hidden @ weights.w2.T.astype(np.float64) + weights.b2)
    return logits if rows is None else logits[rows]


@cache
def zoo_module(name: str, features: int) -> torch.nn.Module:
    """The zoo's model, with the weights that it is exported with."""
    return load_model(name, weights="random", overrides=_options(features)).module


@cache
def exported(name: str, features: int) -> Path:
    """The bundle of the zoo's model."""
    folder = tempfile.mkdtemp(prefix="edgekit-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return edgekit.export(name, "onnx", folder, overrides=_options(features), weights="random").path


def _options(features: int) -> dict[str, object]:
    return {"num_features": features, "num_classes": CLASSES}


def load(name: str, features: int, threads: int) -> Session:
    return edgekit.load(exported(name, features), threads=threads)


def bare(name: str, features: int, threads: int) -> onnxruntime.InferenceSession:
    """A bare session on the bundle's file."""
    bundle = load(name, features, threads).bundle
    file = bundle.path / bundle.manifest.model_file
    return onnxruntime.InferenceSession(str(file), session_options(threads), providers=["CPUExecutionProvider"])


def student_truth(features: Array) -> Array:
    """The student's logits in float64."""
    model = copy.deepcopy(zoo_module("lighthgnn", features.shape[1])).double()
    with torch.inference_mode():
        return np.asarray(model(torch.from_numpy(features).double()).numpy())


def torch_laplacian(problem: Problem) -> Answer:
    """The authors' form: torch's sparse COO matrix, coalesced, times the dense one."""
    rows, columns, values = problem.laplacian
    size = (problem.setting.vertices,) * 2
    indices = torch.from_numpy(np.stack([rows, columns]))
    matrix = torch.sparse_coo_tensor(indices, torch.from_numpy(values), size, is_coalesced=True, check_invariants=False)
    return torch_layers(problem, lambda x: torch.sparse.mm(matrix, x))


def torch_laplacian_csr(problem: Problem) -> Answer:
    """The Laplacian as torch's CSR matrix."""
    rows, columns, values = problem.laplacian
    vertices = problem.setting.vertices
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=vertices))])
    matrix = csr(starts, columns, values, (vertices, vertices))
    return torch_layers(problem, lambda x: matrix @ x)


def csr(starts: Array, columns: Array, values: Array, size: tuple[int, int]) -> torch.Tensor:
    """Torch's CSR matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        arrays = [torch.from_numpy(each) for each in (starts, columns, values)]
        return torch.sparse_csr_tensor(arrays[0], arrays[1], arrays[2], size=size, check_invariants=False)


def torch_csr(problem: Problem) -> Answer:
    """Factored: two CSR matrices, with the scalings in their values."""
    to_edges, to_vertices = (csr(*matrix) for matrix in _incidence(problem))
    return torch_layers(problem, lambda x: to_vertices @ (to_edges @ x))


def torch_bags(problem: Problem) -> Answer:
    """Factored: sums of table rows by embedding_bag, scaled in between."""
    (starts_e, members, _, _), (starts_v, hyperedges, _, _) = _incidence(problem)
    bags = [torch.from_numpy(each) for each in (starts_e, members, starts_v, hyperedges)]
    scale = torch.from_numpy(problem.scale)[:, None]
    mean = torch.from_numpy(problem.hypergraph.member_weight)[:, None]

    def smooth(x: torch.Tensor) -> torch.Tensor:
        sums = bag(x.mul_(scale), bags[1], bags[0])
        return bag(sums.mul_(mean), bags[3], bags[2]).mul_(scale)

    return torch_layers(problem, smooth)


def bag(
    table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of table rows: sum i is over `rows[starts[i] : starts[i + 1]]`, weighted where asked."""
    return F.embedding_bag(rows, table, starts, mode="sum", include_last_offset=True, per_sample_weights=weights)


def torch_layers(problem: Problem, smooth: Callable[[torch.Tensor], torch.Tensor]) -> Answer:
    x = torch.from_numpy(problem.features)
    w1, b1, w2, b2 = map(torch.from_numpy, vars(problem.weights).values())

    @torch.inference_mode()
    def run() -> Array:
        hidden = smooth(F.linear(x, w1, b1)).relu_()
        return np.asarray(smooth(F.linear(hidden, w2, b2)).numpy())

    return run


def zoo_teacher(problem: Problem, threads: int) -> Answer:
    """The zoo's export: Gather and ReduceSum on tables of who belongs to what."""
    session, inputs = bare("hgnn", problem.setting.features, threads), problem.hypergraph.inputs(problem.features)
    return lambda: np.asarray(session.run(None, inputs)[0])


def ort_sparse_laplacian(problem: Problem, threads: int) -> Answer:
    """The Laplacian as a sparse input of onnxruntime's SparseToDenseMatMul (it takes no sparse constants)."""
    rows, columns, values = problem.laplacian
    size = (problem.setting.vertices,) * 2
    return _sparse_session(problem, threads, [(size, rows, columns, values)])


def ort_sparse_factored(problem: Problem, threads: int) -> Answer:
    """Factored, with SparseToDenseMatMul."""
    matrices = []
    for starts, columns, values, size in _incidence(problem):
        rows = np.repeat(np.arange(size[0]), np.diff(starts))
        matrices.append((size, rows, columns, values))
    return _sparse_session(problem, threads, matrices)


def ort_laplacian(problem: Problem) -> Answer:
    """The Laplacian as two index lists: Gather, times the values, ScatterND."""
    rows, columns, values = problem.laplacian
    constants = {"rows": rows[:, None], "columns": columns, "values": values[:, None]}
    zeros = {f"zeros_{width}": np.zeros((problem.setting.vertices, width), np.float32) for width in _widths(problem)}

    def smooth(x: str, width: int) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Gather", [x, "columns"], [f"{x}_taken"], axis=0),
            helper.make_node("Mul", [f"{x}_taken", "values"], [f"{x}_scaled"]),
            helper.make_node("ScatterND", [f"zeros_{width}", "rows", f"{x}_scaled"], [f"{x}_smooth"], reduction="add"),
        ]

    return _scatter_session(problem, {**constants, **zeros}, smooth)


def ort_gathers(problem: Problem) -> Answer:
    """Factored: a Gather per place in the hyperedge and their Sum, for hyperedges of one size; back with ScatterND."""
    pairs = problem.hypergraph
    constants = {
        "scale": problem.scale[:, None],
        "mean": pairs.member_weight[:, None],
        "hyperedge": pairs.hyperedge,
        "vertex": pairs.vertex[:, None],
        **{f"place_{i}": np.ascontiguousarray(column) for i, column in enumerate(problem.members.T)},
    }
    zeros = {f"zeros_{width}": np.zeros((problem.setting.vertices, width), np.float32) for width in _widths(problem)}

    def smooth(x: str, width: int) -> list[onnx.NodeProto]:
        places = range(problem.setting.size)
        return [
            helper.make_node("Mul", [x, "scale"], [f"{x}_in"]),
            *(helper.make_node("Gather", [f"{x}_in", f"place_{i}"], [f"{x}_{i}"], axis=0) for i in places),
            helper.make_node("Sum", [f"{x}_{i}" for i in places], [f"{x}_sum"]),
            helper.make_node("Mul", [f"{x}_sum", "mean"], [f"{x}_mean"]),
            helper.make_node("Gather", [f"{x}_mean", "hyperedge"], [f"{x}_back"], axis=0),
            helper.make_node("ScatterND", [f"zeros_{width}", "vertex", f"{x}_back"], [f"{x}_out"], reduction="add"),
            helper.make_node("Mul", [f"{x}_out", "scale"], [f"{x}_smooth"]),
        ]

    return _scatter_session(problem, {**constants, **zeros}, smooth)


def ort_scatters(problem: Problem, threads: int = SCATTER_THREADS) -> Answer:
    """Factored: a Gather and a ScatterND each way, the form that a plain export of index_add has."""
    pairs, count = problem.hypergraph, problem.setting.vertices
    constants = {
        "scale": problem.scale[:, None],
        "mean": pairs.member_weight[:, None],
        "hyperedge": pairs.hyperedge,
        "hyperedge_rows": pairs.hyperedge[:, None],
        "vertex": pairs.vertex,
        "vertex_rows": pairs.vertex[:, None],
        **{f"zeros_{width}": np.zeros((count, width), np.float32) for width in _widths(problem)},
    }

    def smooth(x: str, width: int) -> list[onnx.NodeProto]:
        def scatter(rows: str, name: str) -> onnx.NodeProto:
            inputs = [f"zeros_{width}", rows, f"{x}_{name}"]
            return helper.make_node("ScatterND", inputs, [f"{x}_{name}_sums"], reduction="add")

        return [
            helper.make_node("Mul", [x, "scale"], [f"{x}_in"]),
            helper.make_node("Gather", [f"{x}_in", "vertex"], [f"{x}_there"], axis=0),
            scatter("hyperedge_rows", "there"),
            helper.make_node("Mul", [f"{x}_there_sums", "mean"], [f"{x}_mean"]),
            helper.make_node("Gather", [f"{x}_mean", "hyperedge"], [f"{x}_back"], axis=0),
            scatter("vertex_rows", "back"),
            helper.make_node("Mul", [f"{x}_back_sums", "scale"], [f"{x}_smooth"]),
        ]

    return _scatter_session(problem, constants, smooth, threads)


def _widths(problem: Problem) -> tuple[int, int]:
    return len(problem.weights.b1), len(problem.weights.b2)


def _incidence(problem: Problem) -> list[tuple[Array, Array, Array, tuple[int, int]]]:
    """The two factors of the Laplacian as CSR: starts, columns, values, size; vertices to hyperedges, and back."""
    vertices, size = problem.setting.vertices, problem.setting.size
    starts, hyperedges = problem.hyperedges_by_vertex
    pairs, counts = problem.hypergraph, np.diff(starts)
    values = problem.scale[pairs.vertex] * pairs.member_weight[pairs.hyperedge]
    return [
        (np.arange(0, len(pairs.vertex) + 1, size), pairs.vertex, values, (vertices, vertices)),
        (starts, hyperedges, np.repeat(problem.scale, counts), (vertices, vertices)),
    ]


Smooth = Callable[[str, int], Sequence[onnx.NodeProto]]


def two_layers(problem: Problem, smooth: Smooth) -> list[onnx.NodeProto]:
    """Nodes from `x` to `logits`; `smooth(name, width)` goes from `name` to `name`_smooth."""
    hidden, classes = _widths(problem)
    return [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["a"], transB=1),
        *smooth("a", hidden),
        helper.make_node("Relu", ["a_smooth"], ["h"]),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["b"], transB=1),
        *smooth("b", classes),
        helper.make_node("Identity", ["b_smooth"], ["logits"]),
    ]


def make_session(
    nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto], constants: Mapping[str, Array], threads: int
) -> onnxruntime.InferenceSession:
    """A session on nodes that give `logits`."""
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(list(nodes), "teacher", list(inputs), [logits], initializers),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )


def _scatter_session(
    problem: Problem, constants: Mapping[str, Array], smooth: Smooth, threads: int = SCATTER_THREADS
) -> Answer:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, problem.features.shape)
    constants = {**vars(problem.weights), **constants}
    session = make_session(two_layers(problem, smooth), [x], constants, threads)
    return lambda: np.asarray(session.run(None, {"x": problem.features})[0])


def _sparse_session(
    problem: Problem, threads: int, matrices: Sequence[tuple[tuple[int, int], Array, Array, Array]]
) -> Answer:
    """Smoothing is a product with each of the matrices (size, rows, columns, values) in turn."""
    names = [f"matrix_{i}" for i in range(len(matrices))]

    def smooth(x: str, width: int) -> list[onnx.NodeProto]:
        del width
        steps = [x, *(f"{x}_{name}" for name in names[:-1]), f"{x}_smooth"]
        return [
            helper.make_node("SparseToDenseMatMul", [name, steps[i]], [steps[i + 1]], domain="com.microsoft")
            for i, name in enumerate(names)
        ]

    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, problem.features.shape)]
    feeds = {"x": onnxruntime.OrtValue.ortvalue_from_numpy(problem.features)}
    cpu = onnxruntime.OrtDevice.make("cpu", 0)
    for name, (size, rows, columns, entries) in zip(names, matrices, strict=True):
        values.append(helper.make_sparse_tensor_value_info(name, TensorProto.FLOAT, size))
        indices = np.stack([rows, columns], axis=1).reshape(-1)
        matrix = onnxruntime.SparseTensor.sparse_coo_from_numpy(np.asarray(size), entries, indices, cpu)
        feeds[name] = onnxruntime.OrtValue.ort_value_from_sparse_tensor(matrix)
    session = make_session(two_layers(problem, smooth), values, vars(problem.weights), threads)
    return lambda: np.asarray(session.run_with_ort_values(["logits"], feeds)[0].numpy())
