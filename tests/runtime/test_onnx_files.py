"""Nodes of our own ops in a serialized model, found without the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.runtime.onnx_files import CustomNode, adds_in_place, custom_nodes

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def value(name: str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, ["N"])


def ours(inputs: str, outputs: str, name: str = "", op: str = "Op") -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, domain="edgekit")


def function(name: str, nodes: list[onnx.NodeProto], domain: str = "edgekit") -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("edgekit", 1)]
    return helper.make_function(domain, name, ["x"], ["y"], nodes, opsets)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    *,
    initializers: list[onnx.TensorProto] | None = None,
    inner: list[onnx.ValueInfoProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    domains: tuple[str, ...] = ("edgekit",),
) -> memoryview:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers or [], value_info=inner or [])
    opsets = [helper.make_opsetid(domain, 1) for domain in domains] + [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions or [])
    return memoryview(model.SerializeToString())


def test_nodes_in_order_with_names_and_dtypes() -> None:
    model = model_of(
        [
            ours("x", "a", "first"),
            ours("a h", "b", "second", "Other"),
            ours("w", "c"),
            ours("unknown", "y", "by output"),
            ours("unknown", "z", "untold"),
            helper.make_node("Relu", ["x"], ["r"], name="not ours"),
            helper.make_node("Op", ["x"], ["s"], name="not ours either", domain="elsewhere"),
        ],
        [value("x"), value("h", HALF)],
        [value("y", TensorProto.DOUBLE)],
        initializers=[numpy_helper.from_array(np.zeros(3, np.float16), "w")],
        inner=[value("a", TensorProto.BFLOAT16)],
        functions=[function("Op", [])],
    )
    assert custom_nodes(model, "edgekit") == (
        CustomNode("first", "Op", "float32", True),
        CustomNode("second", "Other", "bfloat16", False),
        CustomNode("c", "Op", "float16", True),
        CustomNode("by output", "Op", "float64", True),
        CustomNode("untold", "Op", None, True),
    )


def test_nodes_in_subgraphs_see_the_graphs_around_them() -> None:
    innermost = helper.make_graph([ours("x", "z", "inner")], "inner", [], [value("z")])
    other = helper.make_graph([ours("local", "z2", "else")], "else", [value("local", HALF)], [value("z2")])
    choice = helper.make_node("If", ["c"], ["o"], then_branch=innermost, else_branch=other)
    body = helper.make_graph([choice, ours("s", "t", "outer")], "body", [value("s", HALF)], [value("o")])
    loop = helper.make_node("Scan", ["x"], ["y"], body=body, num_scan_inputs=1)
    found = custom_nodes(model_of([loop], [value("x"), value("c", TensorProto.BOOL)], [value("y")]), "edgekit")
    assert {(node.name, node.dtype) for node in found} == {
        ("outer", "float16"),
        ("inner", "float32"),
        ("else", "float16"),
    }


def test_nodes_in_functions_count_except_in_bodies_of_our_own() -> None:
    functions = [
        function("Op", [ours("x", "y", "in a body", "Part")]),
        function("Block", [ours("x", "y", "in a block")], "user"),
    ]
    block = helper.make_node("Block", ["x"], ["y"], domain="user")
    # The model itself need not import a domain that its functions alone use.
    model = model_of([block], [value("x")], [value("y")], functions=functions, domains=("user",))
    assert custom_nodes(model, "edgekit") == (CustomNode("in a block", "Op", None, True),)


def test_without_the_domain_nothing_is_searched() -> None:
    model = model_of([ours("x", "y")], [value("x")], [value("y")], domains=("edgekit2",))
    assert custom_nodes(model, "edgekit") == ()


def scatter(op: str = "ScatterND", reduction: str | None = "add") -> onnx.NodeProto:
    attributes = {} if reduction is None else {"reduction": reduction}
    return helper.make_node(op, ["x", "i", "x"], ["y"], **attributes)


def in_a_body(node: onnx.NodeProto) -> onnx.NodeProto:
    body = helper.make_graph([node], "body", [], [value("y")])
    return helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)


def by_parameter() -> onnx.NodeProto:
    node = scatter(reduction=None)
    node.attribute.append(onnx.AttributeProto(name="reduction", ref_attr_name="how", type=onnx.AttributeProto.STRING))
    return node


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (scatter(), True),
        (scatter(reduction="max"), True),
        (scatter(reduction="none"), False),
        (scatter(reduction=None), False),
        (scatter("ScatterElements"), False),
        (in_a_body(scatter()), True),
        (in_a_body(in_a_body(scatter())), True),
        (in_a_body(scatter(reduction="none")), False),
        (by_parameter(), True),
        (helper.make_node("Relu", ["ScatterND"], ["reduction"], name="add"), False),
    ],
    ids=["add", "max", "none", "default", "elements", "body", "body of a body", "none in a body", "parameter", "names"],
)
def test_scatters_that_reduce(node: onnx.NodeProto, expected: bool) -> None:
    relu, ends = helper.make_node("Relu", ["x"], ["y"]), ([value("x")], [value("y")])
    assert adds_in_place(model_of([relu, node], *ends)) is expected
    assert adds_in_place(model_of([ours("x", "y")], *ends, functions=[function("Op", [relu, node])])) is expected


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_model_is_a_value_error(keep: float) -> None:
    model = model_of([ours("x", "y", "n" * 50) for _ in range(20)], [value("x")], [value("y")])
    with pytest.raises(ValueError, match=r"are left|without an end"):
        custom_nodes(model[: int(len(model) * keep)], "edgekit")


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_damage_gives_nodes_or_a_value_error(position: int, byte: int) -> None:
    data = bytearray(model_of([ours("x", "y", "node")], [value("x")], [value("y")], functions=[function("Op", [])]))
    data[position % len(data)] = byte
    try:
        found = custom_nodes(memoryview(bytes(data)), "edgekit")
    except ValueError:
        return
    assert all(isinstance(node, CustomNode) for node in found)
