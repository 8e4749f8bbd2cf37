"""The builder of function bodies: constants, subgraphs, defaults, and guards that speak in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgekit.custom_ops.onnx_function import FLOAT, GUARD, Function, Subgraph

Arrays = dict[str, np.ndarray]


def run(function: onnx.FunctionProto, feed: Arrays, **attributes: Any) -> list[np.ndarray]:
    """The function's outputs for float32 inputs of any shape, in onnxruntime."""
    node = helper.make_node(function.name, list(function.input), list(function.output), domain="edgekit", **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in function.input],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in function.output],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgekit", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def new(attributes: tuple[str, ...] = (), **more: Any) -> Function:
    return Function("Test", ["x"], attributes=attributes, opset=20, **more)


def test_equal_constants_are_made_once():
    f = new()
    assert f.constant([1, 2]) == f.constant(np.array([1, 2], np.int32))
    others = {f.constant([1, 2]), f.constant([[1, 2]]), f.constant([1, 2], np.float32), f.constant([1, 3])}
    assert len(others) == 4
    assert len(f.nodes) == 4


def test_several_outputs():
    f = new()
    values, places = f.ops("TopK", "x", f.constant([2]), outputs=2)
    got, at = run(f.proto(values, f.op("Cast", places, to=FLOAT)), {"x": np.float32([3, 1, 2])})
    assert got.tolist() == [3, 2]
    assert at.tolist() == [0, 2]


def test_a_subgraph_reads_the_function_around_it():
    f = new()
    step = Subgraph(f)
    row = step.input("row", FLOAT, [None])
    doubled = step.op("Mul", row, f.constant(2.0, np.float32))
    out = f.op("Scan", "x", body=step.proto("step", [(doubled, FLOAT)]), num_scan_inputs=1)
    assert run(f.proto(out), {"x": np.float32([[1, 2], [3, 4]])})[0].tolist() == [[2, 4], [6, 8]]


def test_defaults_of_attributes():
    f = new(("alpha", "beta"), defaults={"beta": 3.0})
    beta = helper.make_node("Constant", [], ["beta_value"])
    beta.attribute.append(onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name="beta"))
    f.nodes.append(beta)
    function = f.proto(f.op("Mul", "x", "beta_value"))
    assert list(function.attribute) == ["alpha"]
    x = np.float32([2])
    assert run(function, {"x": x}, alpha=1.0)[0].tolist() == [6]
    assert run(function, {"x": x}, alpha=1.0, beta=5.0)[0].tolist() == [10]


def guarded(*rules: tuple[str, float]) -> onnx.FunctionProto:
    """x unchanged, if all its entries are above each rule's bound; rules speak in their order."""
    f, passed = new(), None
    for text, bound in rules:
        passed = f.guard(f.op("Greater", "x", f.constant(bound, np.float32)), text, passed)
    assert passed is not None
    return f.proto(f.op("Reshape", "x", f.op("Add", f.op("Shape", "x"), passed)))


def test_a_guard_that_holds_changes_nothing():
    x = np.float32([[1, 2, 3]])
    assert np.array_equal(run(guarded(("x must be positive", 0.0)), {"x": x})[0], x)


@pytest.mark.parametrize("x", [[-1.0], [1.0, 0.0], [[3.0], [-2.0]], [np.nan]], ids=str)
def test_a_guard_that_fails_says_its_message(x):
    text = "x must be positive [B, N]: ceil(N / 2) >= 'a', -1"
    with pytest.raises(Exception, match="Gather") as error:
        run(guarded((text, 0.0)), {"x": np.float32(x)})
    assert f"{GUARD}{text}' Status Message" in str(error.value)


def test_of_two_guards_that_fail_the_earlier_speaks():
    for names in (("first", "second"), ("second", "first")):
        with pytest.raises(Exception, match=f"{GUARD}{names[0]}'"):
            run(guarded((names[0], 1.0), (names[1], 2.0)), {"x": np.float32([0])})
