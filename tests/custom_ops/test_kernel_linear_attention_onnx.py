"""KernelLinearAttention's portable body in stock onnxruntime, against the reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgekit.custom_ops.kernel_linear_attention import FEATURE_MAPS, kernel_linear_attention
from edgekit.custom_ops.onnx_function import GUARD
from edgekit.custom_ops.registry import find_op
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import InputError, UnknownNameError

SPEC = find_op("KernelLinearAttention")
# Every axis has a name of its own, so that nothing is known to fit before the model runs.
DYNAMIC = {name: [f"{name}{axis}" for axis in range(4)] for name in "qkv"}


def make_model(
    *attributes: dict[str, Any], opset: int = 20, dtype: int = TensorProto.FLOAT, shapes: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """One node for each of `attributes`, all on the same inputs."""
    shapes = shapes or DYNAMIC
    inputs = [helper.make_tensor_value_info(name, dtype, shapes[name]) for name in "qkv"]
    nodes = [
        helper.make_node("KernelLinearAttention", list("qkv"), [f"o{n}"], domain="edgekit", **each)
        for n, each in enumerate(attributes)
    ]
    outputs = [
        helper.make_tensor_value_info(f"o{n}", dtype, [f"r{axis}" for axis in range(4)]) for n in range(len(nodes))
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "attention", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("edgekit", 1)],
        ir_version=10,
    )
    model.functions.extend(SPEC.functions(opset, model.graph.node))
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def draw(tokens: int, d: int = 5, e: int = 3, dtype: Any = np.float32, scale: float = 1.0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(tokens)
    sizes = {"q": (2, 3, tokens, d), "k": (2, 3, tokens, d), "v": (2, 3, tokens, e)}
    return {name: (scale * generator.standard_normal(size)).astype(dtype) for name, size in sizes.items()}


def expected(feed: dict[str, np.ndarray], feature_map: str = "relu", eps: float = 1e-6) -> torch.Tensor:
    q, k, v = (torch.from_numpy(array).double() for array in feed.values())
    return kernel_linear_attention(q, k, v, feature_map, eps)


@pytest.fixture(scope="module")
def dynamic() -> onnxruntime.InferenceSession:
    return session(make_model({}))


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 23, 24])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_equals_the_reference(feature_map, opset):
    body = session(make_model({"feature_map": feature_map, "eps": 1e-3}, opset=opset))
    for tokens, d, e in ((1, 5, 3), (7, 60, 64), (196, 64, 60), (200, 64, 64)):
        feed = draw(tokens, d, e)
        if feature_map == "identity":
            feed = {name: np.abs(array) for name, array in feed.items()}
        (got,) = body.run(None, feed)
        error = relative_l2(got, expected(feed, feature_map, 1e-3))
        assert error <= tolerance("KernelLinearAttention", "float32", "portable"), (tokens, d, e)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_half_precision_does_not_overflow_at_4096_tokens(feature_map):
    body = session(make_model({"feature_map": feature_map}, dtype=TensorProto.FLOAT16))
    feed = {name: np.abs(array) for name, array in draw(4096, 16, 16, np.float16, scale=20).items()}
    (got,) = body.run(None, feed)
    assert got.dtype == np.float16
    assert relative_l2(got, expected(feed, feature_map)) <= tolerance("KernelLinearAttention", "float16", "portable")


@pytest.mark.parametrize(("x", "eps"), [(-15.0, 1e-9), (-20.0, 0.0), (-40.0, 0.0), (-1e-4, 0.0)], ids=str)
def test_elu1_of_negative_numbers_keeps_its_digits(x, eps):
    feed = {name: np.full((1, 1, 4, 8), value, np.float32) for name, value in (("q", x), ("k", x), ("v", 1.5))}
    (got,) = session(make_model({"feature_map": "elu1", "eps": eps})).run(None, feed)
    assert relative_l2(got, expected(feed, "elu1", eps)) <= tolerance("KernelLinearAttention", "float32", "portable")


def test_nodes_of_different_attributes_in_one_model():
    attributes = [{}, {"feature_map": "elu1"}, {"eps": 0.5}, {"feature_map": "elu1"}]
    model = make_model(*attributes)
    assert len(model.functions) == 3
    feed = draw(7)
    for each, got in zip(attributes, session(model).run(None, feed), strict=True):
        assert relative_l2(got, expected(feed, **each)) <= tolerance("KernelLinearAttention", "float32", "portable")


# numpy's matrix product of small odd sizes may also compute with lanes that hold no entry, whatever lies there.
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_onnxs_own_evaluator_agrees():
    feed = draw(7)
    model = make_model({"feature_map": "elu1", "eps": 1e-6})
    (got,) = onnx.reference.ReferenceEvaluator(model).run(None, feed)
    assert relative_l2(got, expected(feed, "elu1")) <= tolerance("KernelLinearAttention", "float32", "portable")


def test_nothing_is_left_of_the_guard_where_shapes_are_fixed(tmp_path):
    feed = draw(7)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = make_model({}, shapes={name: list(array.shape) for name, array in feed.items()})
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert ops <= {"Max", "ReduceMean", "Transpose", "MatMul", "FusedMatMul", "Add", "Div", "Cast"}


@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_nan_stays_where_it_is(feature_map):
    body = session(make_model({"feature_map": feature_map}))
    feed = draw(7)
    (clean,) = body.run(None, feed)
    feed["q"][0, 0, 3, 1] = np.nan
    feed["k"][1, 1, 2, 0] = np.nan
    (got,) = body.run(None, feed)
    assert np.isnan(got[0, 0, 3]).all()
    assert np.isnan(got[1, 1]).all()
    got[0, 0, 3], got[1, 1] = clean[0, 0, 3], clean[1, 1]
    np.testing.assert_allclose(got, clean, rtol=1e-5, atol=1e-6)


def test_a_query_without_features_gives_zeros(dynamic):
    feed = draw(7)
    feed["q"][:, :, 2] = -1
    assert not dynamic.run(None, feed)[0][:, :, 2].any()


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 7, 5), (2, 3, 8, 5), (2, 3, 8, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 4), (2, 3, 7, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 3, 9, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 1, 7, 3)],
        [(2, 3, 7, 5), (1, 3, 7, 5), (2, 3, 7, 3)],
        [(2, 3, 0, 5), (2, 3, 0, 5), (2, 3, 0, 3)],
        [(0, 3, 7, 5), (0, 3, 7, 5), (0, 3, 7, 3)],
        [(2, 3, 7, 0), (2, 3, 7, 0), (2, 3, 7, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 3, 7, 0)],
    ],
    ids=["tokens", "head-dim", "values", "heads", "batch", "no-tokens", "empty-batch", "no-features", "no-values"],
)
def test_shapes_that_do_not_fit_stop_with_the_contracts_words(dynamic, shapes):
    feed = {name: np.ones(shape, np.float32) for name, shape in zip("qkv", shapes, strict=True)}
    with pytest.raises(
        Exception, match=rf"{GUARD}KernelLinearAttention takes q and k \[B, H, N, D\] and v \[B, H, N, E\]"
    ):
        dynamic.run(None, feed)


def test_attributes_outside_the_contract():
    with pytest.raises(UnknownNameError, match="feature map 'elu'"):
        make_model({"feature_map": "elu"})
    with pytest.raises(InputError, match="finite eps >= 0; got -1"):
        make_model({"eps": -1.0})
    with pytest.raises(InputError, match="takes the attributes feature_map, eps; got scale"):
        make_model({"scale": 1.0})


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"eps": 1e-39}, r"takes eps 0 or a normal float32 number \(1.17549e-38 to 3.40282e\+38\); got 1e-39"),
        ({"eps": 1}, "needs eps as float, got 1"),
        ({"eps": "1e-6"}, "needs eps as float, got b'1e-6'"),
        ({"feature_map": 0}, "needs feature_map as string, got 0"),
        ({"feature_map": ["relu"]}, "needs feature_map as string"),
    ],
    ids=["eps-denormal", "eps-int", "eps-string", "map-int", "map-list"],
)
def test_attributes_of_another_kind_or_that_float32_does_not_hold(attributes, text):
    with pytest.raises(InputError, match=text):
        make_model(attributes)
