"""Sessions: right answers for whatever numpy can hold, a clear refusal for the rest, no file read but the model's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import BundleError, InputError, UnknownNameError
from edgekit.runtime.bundle import MANIFEST, Bundle, BundleWriter
from edgekit.runtime.manifest import DimRange, Manifest, ModelInfo, TensorSpec, WeightsInfo
from edgekit.runtime.onnx_files import ExternalTensor, external_data
from edgekit.runtime.onnxruntime_backend import OnnxRuntimeSession
from edgekit.runtime.profiler import profile
from edgekit.runtime.session import Session, check_inputs, load, random_inputs

NUMBERS = np.arange(12, dtype=np.float32).reshape(4, 3)


def value_info(name: str, dtype: int, shape: list[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    initializers: list[onnx.TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers or [])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])


def write(
    path: Path,
    model: onnx.ModelProto | bytes,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    dims: dict[str, DimRange] | None = None,
    target: str = "onnx",
) -> Bundle:
    manifest = Manifest(
        name="t",
        model=ModelInfo("tests", WeightsInfo("random", "0" * 64, seed=0), parameters=1),
        target=target,
        precision="fp32",
        inputs=inputs,
        outputs=outputs,
        dims={"N": DimRange(1, 4)} if dims is None else dims,
    )
    with BundleWriter(path) as writer:
        content = model if isinstance(model, bytes) else model.SerializeToString()
        writer.add("model.onnx", "model").write_bytes(content)
        return writer.finish(manifest, {})


@pytest.fixture
def pair(tmp_path: Path) -> Session:
    """y = a - 2 b for a and b float32 [N, 3], N in 0..4, and z = c for c int64 [2]."""
    model = model_of(
        [
            helper.make_node("Mul", ["b", "two"], ["twice"]),
            helper.make_node("Sub", ["a", "twice"], ["y"]),
            helper.make_node("Identity", ["c"], ["z"]),
        ],
        [
            value_info("a", TensorProto.FLOAT, ["N", 3]),
            value_info("b", TensorProto.FLOAT, ["N", 3]),
            value_info("c", TensorProto.INT64, [2]),
        ],
        [value_info("y", TensorProto.FLOAT, ["N", 3]), value_info("z", TensorProto.INT64, [2])],
        [numpy_helper.from_array(np.float32(2), "two")],
    )
    specs = (
        TensorSpec("a", "float32", ("N", 3)),
        TensorSpec("b", "float32", ("N", 3)),
        TensorSpec("c", "int64", (2,)),
    )
    outputs = (TensorSpec("y", "float32", ("N", 3)), TensorSpec("z", "int64", (2,)))
    return load(write(tmp_path / "pair.edge", model, specs, outputs, {"N": DimRange(0, 4)}), threads=1)


A, B, C = np.ones((2, 3), np.float32), np.full((2, 3), 0.25, np.float32), np.array([5, -7])


def test_run(pair: Session) -> None:
    answers = pair.run({"a": A, "b": B, "c": C})
    assert list(answers) == ["y", "z"]
    np.testing.assert_array_equal(answers["y"], A - 2 * B)
    np.testing.assert_array_equal(answers["z"], C)
    assert pair.backend == "onnxruntime-cpu"
    assert pair.load_seconds > 0


GRID = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(GRID[:, :3]),
        GRID[:, ::2],
        GRID[::-1, 2:5],
        GRID[::2, 5:2:-1],
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.broadcast_to(np.float32([1, 2, 3]), (4, 3)),
        np.frombuffer(b"\0" + bytes(GRID.tobytes()), np.uint8)[1:49].view(np.float32).reshape(4, 3),
    ],
    ids=["fortran", "strided", "reversed", "both", "transposed", "broadcast", "unaligned"],
)
def test_memory_layout_does_not_matter(pair: Session, array: np.ndarray[Any, Any]) -> None:
    array = array[:4]
    b = np.zeros(array.shape, np.float32)
    answers = pair.run({"a": array, "b": b, "c": C})
    np.testing.assert_array_equal(answers["y"], np.array(array, order="C"))
    array.flags.writeable = False
    np.testing.assert_array_equal(pair.run({"a": b, "b": array, "c": C})["y"], -2 * np.array(array))


def test_zero_size(pair: Session) -> None:
    empty = np.zeros((0, 3), np.float32)
    assert pair.run({"a": empty, "b": empty, "c": C})["y"].shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"d": A},
            r"expected the inputs a: float32\[N, 3\], b: float32\[N, 3\], c: int64\[2\]; got 'a', 'b', 'c', 'd'",
        ),
        ({"a": None}, r"input a: float32\[N, 3\] must be a numpy array, got NoneType; use numpy\.asarray"),
        ({"a": A.tolist()}, "must be a numpy array, got list"),
        ({"a": np.float32(1)}, "must be a numpy array, got float32"),
        (
            {"a": A.astype(np.float64)},
            r"input a: float32\[N, 3\] got dtype float64; use array\.astype\(numpy\.float32\)",
        ),
        ({"a": A.astype(">f4")}, "got dtype >f4"),
        ({"c": C.astype(np.int32)}, "got dtype int32"),
        ({"a": A.astype(object)}, "got dtype object"),
        ({"a": A[0]}, r"got an array of shape \[3\]: 1 axes"),
        ({"a": A[None]}, r"got an array of shape \[1, 2, 3\]: 3 axes"),
        ({"a": np.array(1, np.float32)}, r"got an array of shape \[\]: 0 axes"),
        ({"a": A[:, :2]}, r"input a: float32\[N, 3\] got an array of shape \[2, 2\]"),
        ({"a": A[:1]}, r"dimension N is 1 in one place and 2 in b"),
        ({"a": np.ones((5, 3), np.float32), "b": np.ones((5, 3), np.float32)}, r"got N=5; .* exported for N in 0\.\.4"),
        ({"c": np.zeros((0,), np.int64)}, r"got an array of shape \[0\]"),
    ],
)
def test_inputs_that_do_not_fit(pair: Session, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        pair.run({"a": A, "b": B, "c": C, **change})


@pytest.mark.parametrize("inputs", [A, [A, B, C], None, {}, {"a": A}], ids=lambda value: type(value).__name__)
def test_inputs_that_are_not_named(pair: Session, inputs: Any) -> None:
    with pytest.raises(InputError, match=r"expected (the )?inputs"):
        pair.run(inputs)


def test_threads_share_a_session(pair: Session) -> None:
    def answer(seed: int) -> bool:
        inputs = pair.random_inputs(seed=seed, sizes={"N": 1 + seed % 4})
        return np.array_equal(pair.run(inputs)["y"], inputs["a"] - 2 * inputs["b"])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(answer, range(400)))


def test_a_failing_run_is_an_input_error(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [value_info("x", TensorProto.FLOAT, ["N"])],
        [value_info("y", TensorProto.FLOAT, [2, 1])],
        [numpy_helper.from_array(np.array([2, 1]), "shape")],
    )
    inputs, outputs = (TensorSpec("x", "float32", ("N",)),), (TensorSpec("y", "float32", (2, 1)),)
    session = load(write(tmp_path / "t.edge", model, inputs, outputs))
    assert session.run({"x": np.ones(2, np.float32)})["y"].shape == (2, 1)
    with pytest.raises(InputError, match="onnxruntime could not run t-onnx"):
        session.run({"x": np.ones(3, np.float32)})


@pytest.mark.parametrize("reduction", ["add", "none", None])
@pytest.mark.parametrize("threads", [None, 1, 2])
def test_sums_by_scatter_get_one_thread(tmp_path: Path, reduction: str | None, threads: int | None) -> None:
    """With more, onnxruntime 1.31 loses additions to the same row: most runs of a graph model were wrong."""
    attributes = {} if reduction is None else {"reduction": reduction}
    model = model_of(
        [helper.make_node("ScatterND", ["x", "index", "x"], ["y"], **attributes)],
        [value_info("x", TensorProto.FLOAT, [4, 3])],
        [value_info("y", TensorProto.FLOAT, [4, 3])],
        [numpy_helper.from_array(np.array([[0], [1], [2], [3]]), "index")],
    )
    specs = (TensorSpec("x", "float32", (4, 3)),), (TensorSpec("y", "float32", (4, 3)),)
    session = load(write(tmp_path / "t.edge", model, *specs), threads=threads)
    assert session.threads == (1 if reduction == "add" else threads)
    assert bool(session.threads_note) == (reduction == "add" and threads != 1)
    if threads == 2:
        assert profile(tmp_path / "t.edge", threads=2, runs=1, warmup=1, ops=False).threads == session.threads
    x = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x if reduction == "add" else x)


# Random inputs


def test_random_inputs_are_the_same_every_time(pair: Session) -> None:
    first, again, other = (pair.random_inputs(seed=seed) for seed in (3, 3, 4))
    assert {name: (array.shape, str(array.dtype)) for name, array in first.items()} == {
        "a": ((1, 3), "float32"),
        "b": ((1, 3), "float32"),
        "c": ((2,), "int64"),
    }
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["a"], other["a"])
    # Known values: the same on every machine.
    np.testing.assert_allclose(first["a"][0, :2], np.random.default_rng(3).standard_normal(2, dtype=np.float32))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"M": 1}, "unknown dimension 'M'; this bundle has N"),
        ({"N": 5}, r"N=5 is outside 0\.\.4"),
        ({"N": "2"}, "must be an integer, got '2'"),
        ({"N": 2.0}, "must be an integer"),
    ],
)
def test_sizes_that_do_not_fit(pair: Session, sizes: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        pair.random_inputs(sizes=sizes)


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**62,)])
def test_inputs_that_no_memory_holds(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"cannot make inputs of x: float32.*choose smaller sizes"):
        random_inputs((TensorSpec("x", "float32", shape),), {})


# Indices

EDGES = (
    TensorSpec("vertex", "int64", ("P", 2), index_of="V"),
    TensorSpec("features", "float32", ("V", 3)),
    TensorSpec("word", "uint8", ("P",), index_of="200"),
    TensorSpec("row", "int64", ("P",), index_of="V+P+1"),
)
EDGE_DIMS = {"V": DimRange(1), "P": DimRange(0)}


def check_edges(vertex: Any, word: Any = (0,), row: Any = None, *, vertices: int = 5) -> None:
    inputs = {
        "vertex": np.asarray(vertex, np.int64).reshape(-1, 2),
        "features": np.zeros((vertices, 3), np.float32),
        "word": np.asarray(word, np.uint8),
        "row": np.zeros(len(word), np.int64) if row is None else np.asarray(row),
    }
    check_inputs({spec.name: (spec, np.dtype(spec.dtype)) for spec in EDGES}, inputs, EDGE_DIMS)


def test_indices_within_their_range() -> None:
    check_edges([[0, 4]], [199], [6])
    check_edges([], [])


@pytest.mark.parametrize(
    ("vertex", "word", "words"),
    [
        ([[0, 4], [5, 1]], [0, 0], r"vertex: int64\[P, 2\] < V holds 5 at \[1, 0\]; .* from 0 to 4 \(V is 5\)"),
        ([[0, -3]], [0], r"vertex.* holds -3 at \[0, 1\]; its values are indices from 0 to 4"),
        ([[-1, 99]], [0], r"vertex.* holds -1 at \[0, 0\]"),
        ([[0, 0], [0, 0]], [3, 200], r"word: uint8\[P\] < 200 holds 200 at \[1\]; its values are .* 0 to 199$"),
    ],
    ids=["too large", "negative", "both", "fixed limit"],
)
def test_indices_out_of_range(vertex: Any, word: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_edges(vertex, word)


def test_indices_into_several_things() -> None:
    with pytest.raises(InputError, match=r"row: .*< V\+P\+1 holds 8 at \[1\]; .* from 0 to 7 \(V\+P\+1 is 8\)"):
        check_edges([[0, 0], [0, 0]], [0, 0], [7, 8])


def test_drawn_indices_use_their_whole_range() -> None:
    drawn = random_inputs(EDGES, EDGE_DIMS, sizes={"V": 7, "P": 4000})
    assert set(drawn["vertex"].ravel().tolist()) == set(range(7))
    assert set(drawn["word"].tolist()) == set(range(200))
    assert drawn["row"].min() >= 0
    assert 3000 < drawn["row"].max() < 7 + 4000 + 1
    assert {name: str(array.dtype) for name, array in drawn.items()} == {spec.name: spec.dtype for spec in EDGES}
    check_inputs({spec.name: (spec, np.dtype(spec.dtype)) for spec in EDGES}, drawn, EDGE_DIMS)


def test_a_range_wider_than_the_dtype() -> None:
    """8-bit integers may point into 1000 rows: those that they reach are drawn."""
    drawn = random_inputs((TensorSpec("x", "int8", (5000,), index_of="1000"),), {})["x"]
    assert (drawn.min(), drawn.max()) == (0, 127)


# Loading


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2"])
def test_threads_that_make_no_sense(tiny_bundle: Bundle, threads: Any) -> None:
    with pytest.raises(InputError, match="threads must be at least 1"):
        load(tiny_bundle, threads=threads)


def test_unknown_backends_and_targets(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown backend 'onnxruntim'; did you mean onnxruntime"):
        load(tiny_bundle, backend="onnxruntim")
    spec = (TensorSpec("x", "float32", (1,)),)
    with pytest.raises(UnknownNameError, match=r"unknown target .* 'abacus'"):
        load(write(tmp_path / "t.edge", b"m", spec, spec, target="abacus"))


@pytest.mark.parametrize("packed", [False, True])
def test_every_prefix_of_a_model_with_a_fitting_hash(tiny_bundle: Bundle, packed: bool) -> None:
    model = tiny_bundle.path / "model.onnx"
    content = model.read_bytes()
    for length in range(0, len(content), 3 if not packed else 29):
        model.write_bytes(content[:length])
        forge(tiny_bundle)
        bundle = Bundle.open(tiny_bundle.path)
        with pytest.raises(BundleError, match=r"model\.onnx|the model of"):
            load(bundle.pack() if packed else bundle)


def forge(bundle: Bundle) -> None:
    """Write the true sizes and hashes of the bundle's files into its manifest, as an attacker would."""
    data = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    for name, entry in data["files"].items():
        content = (bundle.path / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle.path / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((TensorSpec("z", "float32", ("N", 4)),), None),
        ((TensorSpec("x", "float64", ("N", 4)),), None),
        ((TensorSpec("x", "float32", ("N", 5)),), None),
        ((TensorSpec("x", "float32", ("N", 4, 1)),), None),
        (None, (TensorSpec("z", "float32", ("N", 3)),)),
        (None, (TensorSpec("y", "int64", ("N", 3)),)),
        (None, (TensorSpec("y", "float32", ("N", 4)),)),
        (None, (TensorSpec("y", "float32", (3,)),)),
        (None, (TensorSpec("y", "float32", ("N", 3)), TensorSpec("w", "float32", ("N", 3)))),
    ],
)
def test_a_model_unlike_its_manifest(tmp_path: Path, tiny_bundle: Bundle, inputs: Any, outputs: Any) -> None:
    manifest = tiny_bundle.manifest
    model = tiny_bundle.read("model.onnx")
    bundle = write(tmp_path / "t.edge", model, inputs or manifest.inputs, outputs or manifest.outputs)
    with pytest.raises(BundleError, match=r"the model of t\.edge has .*its manifest says .*; export it again"):
        load(bundle)


def test_a_float_that_numpy_lacks(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16)],
        [value_info("x", TensorProto.FLOAT, [1])],
        [value_info("y", TensorProto.BFLOAT16, [1])],
    )
    spec = TensorSpec("x", "float32", (1,))
    with pytest.raises(BundleError, match="bfloat16"):
        load(write(tmp_path / "t.edge", model, (spec,), (TensorSpec("y", "float32", (1,)),)))


# Files that the model names


def outside(location: str) -> onnx.TensorProto:
    """A tensor of NUMBERS, kept in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("length", "48")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


PADDED = b"\0" * 64 + NUMBERS.tobytes()  # 112 bytes
X, Y = value_info("x", TensorProto.FLOAT, ["N", 4]), value_info("y", TensorProto.FLOAT, ["N", 3])
MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


def in_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model_of([MATMUL], [X], [Y], [tensor])


def in_attribute(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model_of([helper.make_node("Constant", [], ["w"], value=tensor), MATMUL], [X], [Y])


def in_branch(tensor: onnx.TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph([MATMUL], "then", [], [Y], [tensor])
    other = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["y"])], "else", [], [Y], [numpy_helper.from_array(NUMBERS, "v")]
    )
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other)
    return model_of([node], [X], [Y], [numpy_helper.from_array(np.array(True), "yes")])


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=tensor), MATMUL]
    function = helper.make_function("f", "Multiply", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
    return model_of([helper.make_node("Multiply", ["x"], ["y"], domain="f")], [X], [Y], functions=[function])


PLACES = [in_initializer, in_attribute, in_branch, in_function]
Place = Callable[[onnx.TensorProto], onnx.ModelProto]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("location", ["../secret.bin", "{folder}/secret.bin", "link.bin", "listed.bin", "here.bin"])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_reads_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, location: str, packed: bool
) -> None:
    """Of a packed bundle, onnxruntime would take the path from the current folder: `here.bin` lies there."""
    (tmp_path / "secret.bin").write_bytes(NUMBERS.tobytes())
    model = place(outside(location.format(folder=tmp_path)))
    bundle = write(
        tmp_path / "t.edge", model, (TensorSpec("x", "float32", ("N", 4)),), (TensorSpec("y", "float32", ("N", 3)),)
    )
    (bundle.path / "link.bin").symlink_to("../secret.bin")
    for folder in (bundle.path, tmp_path):
        shutil.copy(tmp_path / "secret.bin", folder / "here.bin")
        shutil.copy(tmp_path / "secret.bin", folder / "listed.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"model\.onnx keeps tensors in other files \('location="):
        load(bundle.pack() if packed else bundle)


def weights_bundle(
    folder: Path, model: onnx.ModelProto, *, content: bytes = PADDED, role: str = "weights", name: str = "weights.bin"
) -> Bundle:
    """A bundle with a model and a second file."""
    with BundleWriter(folder) as writer:
        writer.add("model.onnx", "model").write_bytes(model.SerializeToString())
        writer.add(name, role).write_bytes(content)
        manifest = Manifest(
            name="t",
            model=ModelInfo("test", WeightsInfo("random", "0" * 64), parameters=12),
            target="onnx",
            precision="fp32",
            inputs=(TensorSpec("x", "float32", ("N", 4)),),
            outputs=(TensorSpec("y", "float32", ("N", 3)),),
            dims={"N": DimRange()},
        )
        return writer.finish(manifest, {})


def placed(**entries: str) -> onnx.TensorProto:
    """A tensor of NUMBERS that lies in `PADDED`, or says that it does."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "64", "length": "48", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_weights_in_a_listed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, mapped: bool) -> None:
    """`mapped`: as large weights are, which stay in their file."""
    monkeypatch.setattr("edgekit.runtime.onnxruntime_backend.MAPPED_FROM", 0 if mapped else 2**62)
    bundle = weights_bundle(tmp_path / "t.edge", in_initializer(placed()))
    assert json.loads((bundle.path / "manifest.json").read_text())["schema"] == 3
    session = load(bundle.pack() if packed else bundle.path)
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ NUMBERS)
    assert isinstance(session, OnnxRuntimeSession)
    assert session.op_times({"x": x}, runs=1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "other.bin"}, "no file 'other.bin'"),
        ({"location": "./weights.bin"}, "no file './weights.bin'"),
        ({"location": "../t.edge/weights.bin"}, "no file"),
        ({"location": "model.onnx"}, "no file 'model.onnx' with the role 'weights'"),
        ({"location": "manifest.json"}, "no file"),
        ({"location": ""}, "no file ''"),
        ({"offset": "65"}, "behind the 112 bytes"),
        ({"offset": "112", "length": "1"}, "behind the 112 bytes"),
        ({"length": "49"}, "behind the 112 bytes"),
        ({"offset": "-64"}, "must be numbers"),
        ({"offset": "064"}, "must be numbers"),
        ({"offset": "1e1"}, "must be numbers"),
        ({"length": "9" * 30}, "must be numbers"),
        ({"checksum": "0"}, "location, offset and length"),
    ],
)
def test_weights_elsewhere(tmp_path: Path, entries: dict[str, str], words: str, packed: bool) -> None:
    bundle = weights_bundle(tmp_path / "t.edge", in_initializer(placed(**entries)))
    (tmp_path / "other.bin").write_bytes(PADDED)
    (bundle.path / "other.bin").write_bytes(PADDED)
    with pytest.raises(BundleError, match=re.escape(words)) as caught:
        load(bundle.pack() if packed else bundle.path)
    assert "model.onnx keeps tensors in other files" in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["*/_ORT_MEM_ADDR_/*", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*"])
def test_an_address_in_memory_is_no_file(tmp_path: Path, name: str, packed: bool) -> None:
    """onnxruntime's marks for tensors in memory are legal names of files, and the offset would be an address."""
    bundle = weights_bundle(tmp_path / "t.edge", in_initializer(placed(location=name)), name=name)
    with pytest.raises(BundleError, match="takes for an address in memory"):
        load(bundle.pack() if packed else bundle.path)


def test_a_location_given_twice(tmp_path: Path) -> None:
    tensor = placed()
    tensor.external_data.add(key="location", value="weights.bin")
    with pytest.raises(BundleError, match="each once"):
        load(weights_bundle(tmp_path / "t.edge", in_initializer(tensor)))


@pytest.mark.parametrize("role", ["other", "samples", "tokenizer"])
def test_weights_in_a_file_of_another_role(tmp_path: Path, role: str) -> None:
    with pytest.raises(BundleError, match="with the role 'weights'"):
        load(weights_bundle(tmp_path / "t.edge", in_initializer(placed()), role=role))


@pytest.mark.parametrize("place", PLACES[1:])
def test_only_weights_of_the_main_graph_lie_outside(tmp_path: Path, place: Place) -> None:
    with pytest.raises(BundleError, match="only weights of the main graph"):
        load(weights_bundle(tmp_path / "t.edge", place(placed())))


def test_edited_truncated_or_linked_weights(tmp_path: Path) -> None:
    bundle = weights_bundle(tmp_path / "t.edge", in_initializer(placed()))
    file = bundle.path / "weights.bin"
    file.write_bytes(PADDED[:-1] + b"x")
    with pytest.raises(BundleError, match=r"weights\.bin was changed"):
        load(bundle.path)
    file.write_bytes(PADDED[:-1])
    with pytest.raises(BundleError, match=r"weights\.bin is truncated"):
        load(bundle.path)
    (tmp_path / "secret.bin").write_bytes(PADDED)
    file.unlink()
    file.symlink_to("../secret.bin")
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        load(bundle.path)


@pytest.mark.parametrize("place", PLACES)
def test_the_same_models_with_the_data_inside_run(tmp_path: Path, place: Place) -> None:
    model = place(numpy_helper.from_array(NUMBERS, "w"))
    inputs, outputs = (TensorSpec("x", "float32", ("N", 4)),), (TensorSpec("y", "float32", ("N", 3)),)
    session = load(write(tmp_path / "t.edge", model, inputs, outputs))
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ NUMBERS)


def test_onnxruntimes_own_format_is_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(tiny_bundle.read("model.onnx"), options)
    content = (tmp_path / "model.ort").read_bytes()
    manifest = tiny_bundle.manifest
    with pytest.raises(BundleError, match="onnxruntime's own format"):
        load(write(tmp_path / "t.edge", content, manifest.inputs, manifest.outputs))


def test_external_data_in_every_corner() -> None:
    tensor = outside("a")
    sparse = onnx.SparseTensorProto(values=tensor, indices=outside("b"), dims=[4, 3])
    attribute = onnx.AttributeProto(name="s", sparse_tensors=[sparse], tensors=[tensor], sparse_tensor=sparse)
    model = in_initializer(numpy_helper.from_array(NUMBERS, "w"))
    assert external_data(memoryview(model.SerializeToString())) == []
    model.graph.sparse_initializer.append(sparse)
    model.graph.node[0].attribute.append(attribute)
    model.training_info.add().algorithm.initializer.append(tensor)
    model.functions.add().attribute_proto.add().t.CopyFrom(tensor)
    found = external_data(memoryview(model.SerializeToString()))
    assert sum("location=a" in str(item) for item in found) == 6
    assert sum("location=b" in str(item) for item in found) == 3
    assert not any(item.initializer for item in found)


def test_a_location_without_entries_counts() -> None:
    tensor = TensorProto(name="w", data_location=TensorProto.EXTERNAL)
    found = external_data(memoryview(in_initializer(tensor).SerializeToString()))
    assert found == [ExternalTensor((), initializer=True)]
    assert str(found[0]) == "data_location"


def test_a_graph_in_two_parts_is_found() -> None:
    """protobuf merges a message that stands there twice."""
    plain, other = in_initializer(numpy_helper.from_array(NUMBERS, "v")), onnx.ModelProto()
    other.graph.initializer.append(outside("a"))
    both = plain.SerializeToString() + other.SerializeToString()
    assert external_data(memoryview(both))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",  # a field without its value
        b"\x3a\x05ab",  # five bytes of which two are there
        b"\x08" + b"\xff" * 11,  # an integer without an end
        b"\xba\x80\x80\x80\x10\x00",  # a tag of more than 32 bits: protobuf would read field 7, the graph
        b"\x3b\x3c",  # a group
        b"\x08\x0a",  # a model without a graph
    ],
)
def test_what_is_no_protobuf(content: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # the words differ
        external_data(memoryview(content))


@given(content=st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_end(content: bytes) -> None:
    try:
        assert isinstance(external_data(memoryview(content)), list)
    except ValueError:
        return
