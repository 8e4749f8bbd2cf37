"""Fixtures that several folders of tests use."""

from __future__ import annotations

import os

# Before torch: several test processes with a thread per core each would mostly wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.manifest import DimRange, Manifest, ModelInfo, TensorSpec, WeightsInfo

MakeBundle = Callable[..., Bundle]


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
