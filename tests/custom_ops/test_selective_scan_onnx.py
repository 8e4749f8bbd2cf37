"""SelectiveScan's portable body in stock onnxruntime, against the torch op in float64 (itself tested against the
reference)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from edgekit.custom_ops.onnx_function import GUARD
from edgekit.custom_ops.registry import find_op
from edgekit.custom_ops.selective_scan.contract import NAMES
from edgekit.custom_ops.selective_scan.eager import selective_scan
from edgekit.custom_ops.selective_scan.onnx_op import CHUNK
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import InputError

SPEC = find_op("SelectiveScan")
RANKS = dict(zip(NAMES, (3, 3, 2, 3, 3, 1, 3), strict=True))


def make_model(
    *variants: tuple[int, dict[str, Any]], opset: int = 20, dtype: int = TensorProto.FLOAT
) -> onnx.ModelProto:
    """One node for each variant: how many of the inputs it takes, and its attributes.

    Every axis has a name of its own, so that nothing is known to fit before the model runs.
    """
    most = max(count for count, _ in variants)
    inputs = [
        helper.make_tensor_value_info(name, dtype, [f"{name}{axis}" for axis in range(RANKS[name])])
        for name in NAMES[:most]
    ]
    nodes = [
        helper.make_node("SelectiveScan", NAMES[:count], [f"y{n}"], domain="edgekit", **attributes)
        for n, (count, attributes) in enumerate(variants)
    ]
    outputs = [helper.make_tensor_value_info(f"y{n}", dtype, ["b", "c", "l"]) for n in range(len(nodes))]
    model = helper.make_model(
        helper.make_graph(nodes, "scan", inputs, outputs),
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


def draw(
    length: int, channels: int = 3, states: int = 5, *, count: int = 7, batch: int = 2, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The first `count` inputs; delta as before softplus and A negative, as in Mamba."""
    generator = np.random.default_rng(length)
    tokens, weights = (batch, channels, length), (batch, states, length)
    sizes = (tokens, tokens, (channels, states), weights, weights, (channels,), tokens)
    feed = {name: generator.standard_normal(size) for name, size in zip(NAMES, sizes, strict=True)}
    feed["delta"] -= 2
    feed["A"] = -np.exp(feed["A"] / 2)
    return {name: array.astype(dtype) for name, array in list(feed.items())[:count]}


def expected(feed: dict[str, np.ndarray], softplus: int = 1) -> torch.Tensor:
    return selective_scan(*(torch.from_numpy(array).double() for array in feed.values()), delta_softplus=bool(softplus))


@pytest.fixture(scope="module")
def dynamic() -> onnxruntime.InferenceSession:
    return session(make_model((7, {"delta_softplus": 1})))


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 23, 24])
@pytest.mark.parametrize("softplus", [0, 1], ids=["plain", "softplus"])
@pytest.mark.parametrize("count", [6, 7], ids=["no-gate", "gate"])
def test_equals_the_reference(count, softplus, opset):
    body = session(make_model((count, {"delta_softplus": softplus}), opset=opset))
    for length, channels, states in ((1, 3, 1), (CHUNK, 5, 3), (63, 192, 5), (65, 3, 16), (1000, 192, 16)):
        feed = draw(length, channels, states, count=count, batch=1 if length > 100 else 2)
        if not softplus:
            feed["delta"] = np.log1p(np.exp(feed["delta"]))
        (got,) = body.run(None, feed)
        error = relative_l2(got, expected(feed, softplus))
        assert error <= tolerance("SelectiveScan", "float32", "portable"), (length, channels, states)


@pytest.mark.parametrize("length", [*range(CHUNK - 1, CHUNK + 2), 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_every_kind_of_tail(dynamic, length):
    feed = draw(length)
    (got,) = dynamic.run(None, feed)
    assert got.shape == feed["u"].shape
    assert relative_l2(got, expected(feed)) <= tolerance("SelectiveScan", "float32", "portable")


def test_small_and_large_steps_keep_their_digits(dynamic):
    """softplus(-15) is 3e-7, which log(1 + exp(x)) rounds to a multiple of 1.2e-7; softplus(90) is 90."""
    feed = draw(65)
    for step in (-30.0, -15.0, 0.0, 19.0, 21.0, 90.0):
        feed["delta"][:] = step
        feed["D"][:] = 0  # so that only what the steps bring counts
        error = relative_l2(dynamic.run(None, feed)[0], expected(feed))
        assert error <= tolerance("SelectiveScan", "float32", "portable"), step


def test_half_precision():
    body = session(make_model((7, {"delta_softplus": 1}), dtype=TensorProto.FLOAT16))
    feed = draw(300, 16, 16, dtype=np.float16)
    (got,) = body.run(None, feed)
    assert got.dtype == np.float16
    assert relative_l2(got, expected(feed)) <= tolerance("SelectiveScan", "float16", "portable")


def test_the_state_is_carried_by_one_scan_over_chunks():
    (function,) = make_model((6, {})).functions
    (scan,) = [node for node in function.node if node.op_type == "Scan"]
    (body,) = [attribute.g for attribute in scan.attribute if attribute.name == "body"]
    assert not any(node.op_type in ("Scan", "Loop", "If") for node in body.node)
    assert sum(node.op_type == "Exp" for node in body.node) == 1, "the decays of a chunk come from one call"


def test_nodes_of_different_structure_in_one_model():
    variants = [(6, {}), (7, {"delta_softplus": 1}), (7, {"delta_softplus": 0}), (6, {"delta_softplus": 0})]
    model = make_model(*variants)
    assert len(model.functions) == 3
    feed = draw(33)
    feed["delta"] = np.abs(feed["delta"])
    for (count, attributes), got in zip(variants, session(model).run(None, feed), strict=True):
        want = expected(dict(list(feed.items())[:count]), attributes.get("delta_softplus", 0))
        assert relative_l2(got, want) <= tolerance("SelectiveScan", "float32", "portable")


def test_onnxs_own_evaluator_agrees():
    feed = draw(33)
    (got,) = onnx.reference.ReferenceEvaluator(make_model((7, {"delta_softplus": 1}))).run(None, feed)
    assert relative_l2(got, expected(feed)) <= tolerance("SelectiveScan", "float32", "portable")


@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_channel_and_does_not_reach_back(dynamic, name):
    feed = draw(40)
    (clean,) = dynamic.run(None, feed)
    feed[name][1, 2, 20] = np.nan
    (got,) = dynamic.run(None, feed)
    assert np.isnan(got[1, 2, 20])
    got[1, 2, 20:] = clean[1, 2, 20:]
    np.testing.assert_allclose(got, clean, rtol=1e-5, atol=1e-6)


def test_growth_is_right_where_the_answer_is_finite():
    """A > 0: decays whose product over the tokens is infinite, on a state that is zero until the last of them."""
    feed = draw(65, count=6)
    feed["A"], feed["delta"][:] = np.abs(feed["A"]), 4.0
    feed["u"][:, :, :60] = 0
    (got,) = session(make_model((6, {}))).run(None, feed)
    assert relative_l2(got, expected(feed, 0)) <= tolerance("SelectiveScan", "float32", "portable")


FITTING = dict(zip(NAMES, ((2, 3, 7), (2, 3, 7), (3, 4), (2, 4, 7), (2, 4, 7), (3,), (2, 3, 7)), strict=True))
WRONG = {
    "delta": {"delta": (2, 3, 8)},
    "delta-broadcasts": {"delta": (2, 3, 1)},
    "rates": {"A": (4, 4)},
    "input-weights": {"B": (2, 4, 8)},
    "output-weights": {"C": (1, 4, 7)},
    "skip": {"D": (1,)},
    "skip-of-other-size": {"D": (5,)},
    "gate": {"z": (2, 3, 1)},
    "no-tokens": {"u": (2, 3, 0), "delta": (2, 3, 0), "B": (2, 4, 0), "C": (2, 4, 0), "z": (2, 3, 0)},
    "no-states": {"A": (3, 0), "B": (2, 0, 7), "C": (2, 0, 7)},
    "no-batch": {"u": (0, 3, 7), "delta": (0, 3, 7), "B": (0, 4, 7), "C": (0, 4, 7), "z": (0, 3, 7)},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit_stop_with_the_contracts_words(dynamic, change):
    feed = {name: np.ones(shape, np.float32) for name, shape in (FITTING | change).items()}
    text = rf"{GUARD}SelectiveScan takes u and delta \[B, C, L\], A \[C, S\]"
    with pytest.raises(Exception, match=text):  # onnxruntime's classes have no common base
        dynamic.run(None, feed)


def test_attributes_outside_the_contract():
    with pytest.raises(InputError, match="delta_softplus of 0 or 1; got 2"):
        make_model((6, {"delta_softplus": 2}))
    with pytest.raises(InputError, match="takes the attribute delta_softplus; got eps"):
        make_model((6, {"eps": 1.0}))
