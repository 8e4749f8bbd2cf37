"""What is half precision and what stays fp32, looked up in the graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import edgekit
from edgekit.export.fp16 import FP32_OPS, to_fp16

FP32, FP16 = TensorProto.FLOAT, TensorProto.FLOAT16


def types(model):
    """The element type of every tensor in the graph."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    found = {item.name: item.data_type for item in inferred.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return found


def constants(model):
    names = {item.name for item in model.graph.initializer}
    return names | {node.output[0] for node in model.graph.node if node.op_type == "Constant"}


class Mixed(nn.Module):
    """A convolution, norms, softmax attention, and a mean."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.group = nn.GroupNorm(2, 8)
        self.layer = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        x = self.group(self.conv(x)).relu()
        q, k, v = self.qkv(self.layer(x.flatten(2).transpose(1, 2))).chunk(3, -1)
        return ((q @ k.transpose(1, 2) / 8**0.5).softmax(-1) @ v).mean(1)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    model = Mixed()
    bundle = edgekit.export(
        model, "onnx", tmp_path_factory.mktemp("mixed"), shapes="x:Nx3x8x8 | 1..4", precision="fp16"
    )
    return model, bundle


@pytest.mark.parametrize("which", ["mixed", "digits"])
def test_sums_divisions_and_exponentials_are_fp32(mixed, digits, graph, which):
    model = graph(mixed[1] if which == "mixed" else digits("fp16"))
    kinds, fixed = types(model), constants(model)
    seen = set()
    for node in model.graph.node:
        product = node.op_type == "MatMul" and not set(node.input) & fixed
        if node.op_type in FP32_OPS or product:
            seen.add(node.op_type)
            floats = [kinds[name] for name in (*node.input, *node.output) if kinds[name] in (FP32, FP16)]
            assert FP16 not in floats, (node.op_type, node.name)
    assert {"Softmax", "ReduceMean", "MatMul"} <= seen
    assert seen & {"InstanceNormalization", "GroupNormalization"}


@pytest.mark.parametrize("which", ["mixed", "digits"])
def test_weights_of_layers_are_fp16(mixed, digits, graph, which):
    model = graph(mixed[1] if which == "mixed" else digits("fp16"))
    kinds, fixed = types(model), constants(model)
    layers = [
        node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and set(node.input) & fixed
    ]
    assert layers
    assert {kinds[name] for node in layers for name in (*node.input, *node.output)} == {FP16}


def test_inputs_and_outputs_stay_fp32(mixed, graph):
    _, bundle = mixed
    model = graph(bundle)
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {FP32}
    assert {spec.dtype for spec in (*bundle.manifest.inputs, *bundle.manifest.outputs)} == {"float32"}


def test_no_value_goes_to_fp16_and_back(mixed, digits, graph):
    for bundle in (mixed[1], digits("fp16")):
        model = graph(bundle)
        kinds = types(model)
        producers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            before = producers.get(node.input[0]) if node.op_type == "Cast" else None
            if before is not None and before.op_type == "Cast":
                assert [kinds[before.input[0]], kinds[before.output[0]], kinds[node.output[0]]] != [FP32, FP16, FP32]


def test_verifies_with_a_dynamic_batch(mixed):
    model, bundle = mixed
    verification = edgekit.verify(bundle, model=model)
    assert verification
    assert verification.checks[1].outputs[0].rel_l2 > 1e-6  # it is half precision after all


def test_half_the_size(digits):
    assert 0.45 < digits("fp16").size_of_model / digits("fp32").size_of_model < 0.62


def test_report_compares_with_fp32(digits):
    cost = digits("fp16").report()["precision"]
    assert cost["accuracy"]["fp16"] == pytest.approx(cost["accuracy"]["pytorch"], abs=0.01)
    assert cost["size_ratio"] < 0.62


@pytest.mark.parametrize("kind", ["sum", "mean", "attention", "norm", "squares"])
def test_survives_what_overflows_in_half_precision(export, kind):
    class Large(nn.Module):
        def forward(self, x):
            y = x.abs() * 100 + 100
            if kind == "sum":
                return y.sum(-1) / 1000
            if kind == "mean":
                return y.mean(-1)
            if kind == "squares":  # a root mean square norm, written out
                return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)
            if kind == "norm":
                return nn.functional.layer_norm(y * 20, y.shape[-1:])
            return (y @ y.transpose(1, 2)) / 1e5

    model = Large()
    bundle = export(model, "x:1x4x1024", precision="fp16")
    output = edgekit.load(bundle).run({"x": np.ones((1, 4, 1024), np.float32)})["output"]
    assert np.isfinite(output).all()
    assert edgekit.verify(bundle, model=model)


def test_the_users_own_casts_stay(export):
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.linear = nn.Linear(8, 4)

        def forward(self, ids):
            weight = (ids > 0).float().unsqueeze(-1)
            return self.linear((self.table(ids) * weight).half().float().sum(1)), ids.argmax(-1), ids > 0

    model = Casts()
    bundle = export(model, "ids:Nx5@int64 | 1..4", precision="fp16")
    assert [spec.dtype for spec in bundle.manifest.outputs] == ["float32", "int64", "bool"]
    assert edgekit.verify(bundle, model=model)


def test_the_graph_is_in_order_and_the_original_unchanged():
    """The converter leaves casts at the end of the node list; onnxruntime wants producers first."""
    weight = helper.make_tensor("w", FP32, [4, 4], np.eye(4, dtype=np.float32).ravel())
    nodes = [
        helper.make_node("Exp", ["x"], ["e"], name="e"),
        helper.make_node("MatMul", ["e", "w"], ["m"], name="m"),
        helper.make_node("Softmax", ["m"], ["y"], name="s"),
    ]
    x, y = (helper.make_tensor_value_info(name, FP32, [1, 4]) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 20)]
    )
    half = to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    known = {"x", *(item.name for item in half.graph.initializer)}
    for node in half.graph.node:
        assert set(node.input) <= known
        known |= set(node.output)


def test_torch_half_output_matches(mixed):
    model, bundle = mixed
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    got = edgekit.load(bundle).run({"x": x.numpy()})["output"]
    with torch.no_grad():
        np.testing.assert_allclose(got, model.eval()(x).numpy(), atol=5e-3)


def test_one_tensor_read_by_several_fp32_ops(export):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            y = self.linear(x)
            return y.softmax(-1) + y.exp() / (y.exp().sum(-1, keepdim=True) + 1)

    model = Branches()
    assert edgekit.verify(export(model, "x:2x4", precision="fp16"), model=model)


def test_the_attention_op_stays_fp32(export, graph):
    """From opset 23 on, scaled dot product attention is one node with the softmax inside."""

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            x = self.linear(x)
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model = SelfAttention()
    bundle = export(model, "x:1x2x6x8", precision="fp16", opset=23)
    content = graph(bundle)
    kinds = types(content)
    node = next(node for node in content.graph.node if node.op_type == "Attention")
    assert {kinds[name] for name in (*node.input, *node.output) if name} == {FP32}
    assert edgekit.verify(bundle, model=model)


def test_scatters_that_add_stay_fp32(export, graph):
    """onnxruntime has no kernel that adds in half precision."""

    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, target):
            return self.fc(torch.zeros_like(x).index_put((target,), self.fc(x), accumulate=True))

    bundle = export(Summing(), ["x:8x4", "target:8@int64<8"], precision="fp16")
    model = graph(bundle)
    (scatter,) = [node for node in model.graph.node if node.op_type == "ScatterND"]
    found = types(model)
    assert found[scatter.output[0]] == FP32
    assert FP16 in found.values()
