"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os

# Before torch: several test processes with a thread per core each would mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.errors import EdgekitError
from edgekit.kernels.build import sources_digest
from edgekit.kernels.headers import find_headers
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.kernel_library import this_host
from edgekit.runtime.manifest import (
    CustomOp,
    DimRange,
    Generation,
    Graph,
    Manifest,
    ModelInfo,
    TensorSpec,
    TokenizerInfo,
    WeightsInfo,
)

MakeBundle = Callable[..., Bundle]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without compilers, skip what compiles kernels or models; where the environment says they are there, fail."""
    if os.environ.get("EDGEKIT_TESTS_HAVE_TOOLS") or all(map(shutil.which, ("cc", "c++"))):
        return
    for item in items:
        if item.path.parent.name == "kernels" or item.path.name.startswith("test_tvm"):
            item.add_marker(pytest.mark.skip(reason="needs a C and a C++ compiler (Debian: apt-get install g++)"))


@pytest.fixture(scope="session", autouse=True)
def no_built_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever this user has built: edgekit looks for kernels in an empty folder, unless a test names another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_KERNELS", str(tmp_path_factory.mktemp("no-kernels")))
        yield


@pytest.fixture(scope="session")
def this_arch() -> str:
    """The arch of the kernels that this machine runs fastest."""
    from edgekit.kernels.tvm.targets import best_arch

    host = this_host()
    return best_arch(host.machine, host.system, host.features).name


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Builds y = relu(x W + b) for x float32 ["N", 4] and y ["N", 3], N in 1..16, with two stored samples of N = 1."""

    def make(name: str = "tiny", *, samples: int = 2, batch: int | None = None) -> Bundle:
        generator = np.random.default_rng(0)
        weight = generator.standard_normal((4, 3), dtype=np.float32)
        bias = generator.standard_normal(3, dtype=np.float32)
        rows: int | str = "N" if batch is None else batch
        graph = helper.make_graph(
            [
                helper.make_node("Gemm", ["x", "weight", "bias"], ["linear"], name="linear"),
                helper.make_node("Relu", ["linear"], ["y"], name="relu"),
            ],
            name,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 3])],
            [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        x = generator.standard_normal((samples, batch or 1, 4), dtype=np.float32)
        with BundleWriter(tmp_path / f"{name}-onnx.edge") as writer:
            writer.add("model.onnx", "model").write_bytes(model.SerializeToString())
            if samples:
                stored = Samples({"x": x}, {"y": np.maximum(x @ weight + bias, 0)})
                stored.save(writer.add(SAMPLES, "samples"))
            manifest = Manifest(
                name=name,
                model=ModelInfo("tests:tiny", WeightsInfo("random", "0" * 64, seed=0), parameters=15),
                target="onnx",
                precision="fp32",
                inputs=(TensorSpec("x", "float32", (rows, 4)),),
                outputs=(TensorSpec("y", "float32", (rows, 3)),),
                dims={"N": DimRange(1, 16)} if batch is None else {},
                opsets={"": 20},
                ir_version=10,
            )
            return writer.finish(manifest, {})

    return make


@pytest.fixture
def tiny_bundle(make_bundle: MakeBundle) -> Bundle:
    """The default bundle of `make_bundle`."""
    return make_bundle()


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shvit_digits` at fp32: a real, trained model. Do not change it; copy it first."""
    return edgekit.export("shvit_digits", "onnx", tmp_path_factory.mktemp("digits")).path


@pytest.fixture(scope="session")
def coreml_bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A zoo model's bundle for Core ML in a layout, exported when a test first asks for it. Copy it to change it."""

    @functools.cache
    def export(name: str, layout: str = "standard") -> Bundle:
        return edgekit.export(name, "coreml", tmp_path_factory.mktemp(layout), layout=layout)

    return export


@pytest.fixture
def make_custom_bundle(tmp_path: Path) -> MakeBundle:
    """Builds y = 4 x for x ["N"], N in 1..8, x >= 0, of two nodes `edgekit::Twice`, the second in a branch of an `If`.

    `body`: whether the model holds the op's function body. `typed`: whether it says the dtype of what lies inside.
    """

    def make(name: str = "custom", *, dtype: str = "float32", body: bool = True, typed: bool = True) -> Bundle:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        inside = [helper.make_tensor_value_info("half", kind, ["N"])] if typed else []
        branch = helper.make_graph(
            [helper.make_node("Twice", ["half"], ["yes"], name="second", domain="edgekit")],
            "branch",
            [],
            [helper.make_tensor_value_info("yes", kind, ["N"])],
        )
        other = helper.make_graph(
            [helper.make_node("Neg", ["half"], ["no"], name="negative")],
            "other",
            [],
            [helper.make_tensor_value_info("no", kind, ["N"])],
        )
        graph = helper.make_graph(
            [
                helper.make_node("Twice", ["x"], ["half"], name="first", domain="edgekit"),
                helper.make_node("Cast", ["half"], ["floats"], to=TensorProto.FLOAT),
                helper.make_node("ReduceMin", ["floats"], ["least"], keepdims=0),
                helper.make_node("GreaterOrEqual", ["least", "zero"], ["fine"]),
                helper.make_node("If", ["fine"], ["y"], name="choose", then_branch=branch, else_branch=other),
            ],
            name,
            [helper.make_tensor_value_info("x", kind, ["N"])],
            [helper.make_tensor_value_info("y", kind, ["N"])],
            [numpy_helper.from_array(np.float32(0), "zero")],
            value_info=inside,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgekit", 1)]
        functions = [_twice_function()] if body else []
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
        x = np.arange(4, dtype=dtype)[None]
        with BundleWriter(tmp_path / f"{name}-onnx.edge") as writer:
            writer.add("model.onnx", "model").write_bytes(model.SerializeToString())
            Samples({"x": x}, {"y": 4 * x}).save(writer.add(SAMPLES, "samples"))
            manifest = Manifest(
                name=name,
                model=ModelInfo("tests:custom", WeightsInfo("random", "0" * 64, seed=0), parameters=0),
                target="onnx",
                precision="fp32",
                inputs=(TensorSpec("x", dtype, ("N",)),),
                outputs=(TensorSpec("y", dtype, ("N",)),),
                dims={"N": DimRange(1, 8)},
                opsets={"": 20, "edgekit": 1},
                ir_version=10,
                ops={"edgekit::Twice": 2, "If": 1},
                custom_ops=(CustomOp("edgekit", "Twice", 1, 2, ("portable", "native")),),
            )
            return writer.finish(manifest, {})

    return make


MakeLanguageModel = Callable[..., Bundle]


@pytest.fixture
def make_language_model(tmp_path: Path) -> MakeLanguageModel:
    """Builds a language model of two layers that says plainly which token comes next.

    Its next token is s mod 257, where s sums t (p + 1) + (layer + 1) t + (t + 1) over both layers and over all tokens t
    at positions p that the attention mask shows. The first summand comes from the cached keys, the second from the
    values, the third from the table of chunks by way of the cached chunk ids. A row without a token in a pass scores
    NaN. So a cache, mask or position that is fed wrongly changes the text.

    Args (by name): `tokenizer` the content of a tokenizer.json, `vocabulary` its size; the others as in `Generation`.
    """

    def make(
        name: str = "toy",
        *,
        context: int = 64,
        block_size: int = 4,
        pass_tokens: int = 16,
        vocabulary: int = 259,
        eos: tuple[int, ...] = (),
        add_bos: bool = False,
        tokenizer: bytes | None = None,
        rows: int = 8,
        least_tokens: int = 1,
    ) -> Bundle:
        graphs = {"model": _toy_graph("tokens", vocabulary), "decode": _toy_graph(1, vocabulary)}
        sizes = {"batch": DimRange(1, rows), "past": DimRange(0, context - 1), "total": DimRange(1, context)}
        sizes["chunks"] = DimRange(0, context)
        tensors = {}
        for role, (model, inputs, outputs) in graphs.items():
            onnx.checker.check_model(model)
            tensors[role] = tuple(TensorSpec(*item) for item in inputs), tuple(TensorSpec(*item) for item in outputs)
        with BundleWriter(tmp_path / f"{name}-onnx.edge") as writer:
            for role, (model, _, _) in graphs.items():
                writer.add(f"{role}.onnx", role).write_bytes(model.SerializeToString())
            if tokenizer is not None:
                writer.add("tokenizer.json", "tokenizer").write_bytes(tokenizer)
            inputs, outputs = tensors["model"]
            manifest = Manifest(
                name=name,
                model=ModelInfo("tests:toy", WeightsInfo("random", "0" * 64, seed=0), parameters=0),
                target="onnx",
                precision="fp32",
                inputs=inputs,
                outputs=outputs,
                dims=sizes | {"tokens": DimRange(least_tokens, context)},
                opsets={"": 20},
                ir_version=10,
                decode=Graph("decode.onnx", *tensors["decode"], dims=sizes),
                generation=Generation(
                    context=context,
                    layers=2,
                    block_size=block_size,
                    pass_tokens=pass_tokens,
                    tokenizer=TokenizerInfo(
                        kind="bytes" if tokenizer is None else "huggingface",
                        file=None if tokenizer is None else "tokenizer.json",
                        vocab_size=vocabulary,
                        bos=256,
                        eos=eos,
                        pad=258,
                        add_bos=add_bos,
                    ),
                    attention={"kind": "dhsa", "chunks_per_block": block_size},
                ),
            )
            return writer.finish(manifest, {})

    return make


_Tensors = list[tuple[str, str, tuple[str | int, ...]]]


def _toy_graph(tokens: str | int, vocabulary: int) -> tuple[onnx.ModelProto, _Tensors, _Tensors]:
    """One graph of `make_language_model`, its inputs and its outputs."""
    nodes: list[onnx.NodeProto] = []
    constants = {"zero": 0, "one": 1, "mod": 257, "axis1": [1], "axes": [1, 3], "end": [2**62]}

    def add(op: str, inputs: str, output: str, **attributes: int) -> str:
        nodes.append(helper.make_node(op, inputs.split(), [output], **attributes))
        return output

    add("Shape", "input_ids", "new", start=1)
    add("Neg", "new", "back")
    add("CumSum", "attention_mask one", "counts")
    add("Slice", "counts back end axis1", "new_counts")
    add("Slice", "attention_mask back end axis1", "new_mask")
    add("ReduceMax", "new_mask axis1", "any", keepdims=1)
    add("Cast", "input_ids", "t", to=TensorProto.FLOAT)
    add("Cast", "new_counts", "p1", to=TensorProto.FLOAT)  # positions + 1
    add("Cast", "attention_mask", "shown", to=TensorProto.FLOAT)
    add("Unsqueeze", "t axes", "t4")
    add("Unsqueeze", "p1 axes", "p4")
    add("Concat", "t4 p4", "key", axis=3)
    add("Shape", "past_chunks.0.key", "chunks", start=2, end=3)
    add("Add", "t4 onef", "chunk")
    nodes.append(helper.make_node("ConstantOfShape", ["new"], ["ones"], value=helper.make_tensor("v", 7, [1], [1])))
    add("CumSum", "ones zero", "upto")
    add("Sub", "upto ones", "range")
    add("Add", "range chunks", "ids_row")
    add("Shape", "input_ids", "ids_shape")
    add("Expand", "ids_row ids_shape", "new_ids")
    add("Concat", "past_chunk_ids new_ids", "present_chunk_ids", axis=1)
    inputs: _Tensors = [("input_ids", "int64", ("batch", tokens)), ("attention_mask", "int64", ("batch", "total"))]
    outputs: _Tensors = [("logits", "float32", ("batch", 1, vocabulary))]
    for layer in range(2):
        past = f"past_key_values.{layer}"
        inputs += [(f"{past}.key", "float32", ("batch", 1, "past", 2))]
        inputs += [(f"{past}.value", "float32", ("batch", 1, "past", 1))]
        inputs += [(f"past_chunks.{layer}.key", "float32", ("batch", 1, "chunks", 1))]
        outputs += [(f"present.{layer}.key", "float32", ("batch", 1, "total", 2))]
        outputs += [(f"present.{layer}.value", "float32", ("batch", 1, "total", 1))]
        outputs += [(f"present_chunks.{layer}.key", "float32", ("batch", 1, "all_chunks", 1))]
        add("Concat", f"{past}.key key", f"present.{layer}.key", axis=2)
        add("Mul", f"t4 layer{layer}", f"value{layer}")
        add("Concat", f"{past}.value value{layer}", f"present.{layer}.value", axis=2)
        add("Concat", f"past_chunks.{layer}.key chunk", f"present_chunks.{layer}.key", axis=2)
        add("ReduceProd", f"present.{layer}.key axes", f"first{layer}", keepdims=0)
        add("Squeeze", f"present.{layer}.value axes", f"second{layer}")
        add("Squeeze", f"present_chunks.{layer}.key axes", f"table{layer}")
        add("GatherElements", f"table{layer} present_chunk_ids", f"third{layer}", axis=1)
        add("Add", f"first{layer} second{layer}", f"some{layer}")
        add("Add", f"some{layer} third{layer}", f"all{layer}")
    inputs += [("past_chunk_ids", "int64", ("batch", "past"))]
    outputs += [("present_chunk_ids", "int64", ("batch", "total"))]
    add("Add", "all0 all1", "all")
    add("Mul", "all shown", "seen")
    add("ReduceSum", "seen axis1", "sum", keepdims=1)
    add("Cast", "sum", "whole", to=TensorProto.INT64)
    add("Mod", "whole mod", "next")
    add("Sub", "next numbers", "distance")
    add("Abs", "distance", "far")
    add("Neg", "far", "near")
    add("Cast", "near", "scores", to=TensorProto.FLOAT)
    add("Cast", "any", "has", to=TensorProto.BOOL)
    add("Where", "has scores nan", "known")
    add("Unsqueeze", "known axis1", "logits")
    arrays = {key: np.asarray(value, np.int64) for key, value in constants.items()}
    arrays |= {"numbers": np.arange(vocabulary)[None], "nan": np.float32(np.nan), "onef": np.float32(1)}
    arrays |= {f"layer{layer}": np.float32(layer + 1) for layer in range(2)}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "toy",
        *(
            [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(np.dtype(d)), s) for n, d, s in side]
            for side in (inputs, outputs)
        ),
        [numpy_helper.from_array(np.asarray(array), key) for key, array in arrays.items() if key in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), inputs, outputs


def _twice_function() -> onnx.FunctionProto:
    """y = 2 x, with a guard as the bodies of edgekit's ops have them."""
    nodes = [
        helper.make_node("Cast", ["x"], ["numbers"], name="numbers", to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Less", ["numbers", "zero"], ["negative"], name="negative"),
        helper.make_node("Cast", ["negative"], ["wrong"], name="wrong", to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["wrong"], ["index"], name="index", keepdims=1),
        helper.make_node("Constant", [], ["none"], value_ints=[0]),
        helper.make_node("Gather", ["none", "index"], ["nothing"], name="edgekit: Twice: 'x' must be >= 0"),
        helper.make_node("CastLike", ["nothing", "x"], ["added"], name="added"),
        helper.make_node("Add", ["x", "x"], ["twice"], name="twice"),
        helper.make_node("Add", ["twice", "added"], ["y"], name="sum"),
    ]
    return helper.make_function("edgekit", "Twice", ["x"], ["y"], nodes, [helper.make_opsetid("", 20)])


@pytest.fixture(scope="session")
def toy_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real library whose kernel serves `edgekit::Twice` in float32, and its `kernels.json`."""
    give_up = pytest.fail if os.environ.get("EDGEKIT_TESTS_HAVE_TOOLS") else pytest.skip
    compiler = shutil.which("cc")
    if compiler is None:
        give_up("needs a C compiler")
    try:
        headers = find_headers()
    except EdgekitError as error:
        give_up(str(error).splitlines()[0])
    folder = tmp_path_factory.mktemp("kernels") / "x"
    folder.mkdir()
    library = folder / "libtoy.so"
    source = Path(__file__).parent / "runtime" / "toy_kernels.c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{headers.folder}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    _describe(folder, library="libtoy.so", ort_api=headers.api)
    return folder


@pytest.fixture
def describe_library() -> Callable[..., None]:
    """Writes a folder's `kernels.json`: one that fits this machine, except for the fields given by name."""
    return _describe


def _describe(folder: Path, *, library: str = "lib.so", **changes: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / library).exists():
        (folder / library).write_bytes(b"no library")
    host = this_host()
    data = {
        "schema": 1,
        "edgekit": edgekit.__version__,
        "arch": folder.name,
        "machine": host.machine,
        "system": host.system,
        "features": [],
        "library": library,
        "sha256": hashlib.sha256((folder / library).read_bytes()).hexdigest(),
        "ort_api": 20,
        "kernels": [{"op": "Twice", "dtype": "float32", "symbol": "twice_f32", "parameters": {}}],
        "tools": {},
        "sources": sources_digest(),
    }
    (folder / "kernels.json").write_text(json.dumps(data | changes))
