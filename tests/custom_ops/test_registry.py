"""The registry of custom ops, for all of them: schemas, bodies, overloads, translation, the tolerance table."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import edgekit.custom_ops
from edgekit.custom_ops import registry
from edgekit.custom_ops.tolerances import BACKENDS, REL_L2, relative_l2, tolerance
from edgekit.errors import UnknownNameError

OPS = pytest.mark.parametrize("op", registry.OPS, ids=lambda op: op.name)


def node_of(op: registry.CustomOpSpec, **attributes: float) -> onnx.NodeProto:
    """A node with all inputs and the attributes that have no default."""
    schema = op.schema()
    required = {name: 1.0 for name, attribute in schema.attributes.items() if attribute.required}
    inputs = [item.name for item in schema.inputs]
    return helper.make_node(op.name, inputs, ["out"], domain=op.domain, **(required | attributes))


def test_importing_custom_ops_loads_neither_torch_nor_onnx():
    code = "import sys, edgekit.custom_ops; sys.exit(bool({'torch', 'onnx'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_register_may_be_called_again():
    edgekit.custom_ops.register()
    edgekit.custom_ops.register()
    for op in registry.OPS:
        assert hasattr(torch.ops.edgekit, op.folder)


@OPS
def test_schema(op):
    schema = op.schema()
    assert (schema.name, schema.domain, schema.since_version) == (op.name, "edgekit", 1)
    assert not onnx.defs.has(op.name), "onnx.reference resolves names without their domain"
    assert set(schema.type_constraints[0].allowed_type_strs) == {"tensor(float)", "tensor(float16)"}


@OPS
@pytest.mark.parametrize("opset", [18, 20, 24])
def test_a_body_has_the_nodes_inputs_attributes_and_opset(op, opset):
    node = node_of(op)
    (function,) = op.functions(opset, [node])
    schema = op.schema()
    assert (function.domain, function.name, function.overload) == ("edgekit", op.name, "")
    assert list(function.input) == [item.name for item in schema.inputs]
    declared = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
    assert declared == set(schema.attributes)
    assert [(item.domain, item.version) for item in function.opset_import] == [("", opset)]
    assert all(inner.domain == "" for inner in function.node)


@OPS
def test_bodies_are_deterministic(op):
    first, second = (op.functions(20, [node_of(op)])[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@OPS
def test_translation(op):
    key, translate = op.translation()
    assert key is getattr(torch.ops.edgekit, op.folder).default
    assert callable(translate)


def test_the_translation_table_has_every_op():
    assert len(registry.translation_table()) == len(registry.OPS)


def test_only_structures_beyond_the_first_are_overloads():
    op = registry.find_op("BlockSparseAttention")
    nodes = [node_of(op), node_of(op, causal=0), node_of(op), node_of(op, window=3), node_of(op, causal=0)]
    functions = op.functions(20, [helper.make_node("Relu", ["x"], ["y"]), *nodes])
    assert [node.overload for node in nodes] == ["", "v2", "", "v3", "v2"]
    assert [function.overload for function in functions] == ["", "v2", "v3"]


def test_a_second_call_gives_the_same_overloads():
    op = registry.find_op("BlockSparseAttention")
    nodes = [node_of(op, causal=0), node_of(op)]
    op.functions(20, nodes)
    op.functions(20, nodes)
    assert [node.overload for node in nodes] == ["", "v2"]


def test_functions_of_a_model_with_several_ops():
    nodes = [node_of(op) for op in reversed(registry.OPS)]
    assert [function.name for function in registry.functions(20, nodes)] == [op.name for op in registry.OPS]
    assert registry.functions(20, []) == []


def test_unknown_op():
    with pytest.raises(UnknownNameError, match="custom op 'SelectivScan'; did you mean SelectiveScan"):
        registry.find_op("SelectivScan")


def test_every_op_has_a_tolerance_for_every_backend_and_dtype():
    assert set(REL_L2) == {op.name for op in registry.OPS}
    for op in registry.OPS:
        for backend in BACKENDS:
            found = [tolerance(op.name, dtype, backend) for dtype in ("float64", "float32", "float16", "bfloat16")]
            assert found == sorted(found)
            assert 0 < found[0] <= found[-1] < 1e-2


@pytest.mark.parametrize(
    "wrong", [("Scan", "float32", "eager"), ("SelectiveScan", "int8", "eager"), ("SelectiveScan", "float32", "cpu")]
)
def test_unknown_tolerance(wrong):
    with pytest.raises(UnknownNameError, match="unknown"):
        tolerance(*wrong)


def test_relative_l2():
    want = np.array([3.0, 4.0])
    assert relative_l2(want, want) == 0.0
    assert relative_l2(np.array([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0.0
    for bad in (np.array([np.nan, 4]), np.array([np.inf, 4]), np.zeros((1, 2))):
        assert relative_l2(bad, want) == np.inf
        assert relative_l2(want, bad) == np.inf
    assert relative_l2(want, np.zeros(2)) == np.inf
