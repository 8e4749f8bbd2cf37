"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os

# Before torch: several test processes with a thread per core each would mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
from edgekit.runtime.manifest import CustomOp, DimRange, Manifest, ModelInfo, TensorSpec, WeightsInfo

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
