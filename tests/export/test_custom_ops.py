"""Models that call edgekit's ops: exported as one node each, which stock onnxruntime runs from its function body."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import edgekit
import edgekit.custom_ops
from edgekit.errors import ExportError, ShapeError, UnknownNameError
from edgekit.export.layers import compare_layers
from edgekit.export.source import load_model
from edgekit.runtime.manifest import CustomOp

KERNELS = ("portable", "native")


class Attending(nn.Module):
    """Convolution, linear attention over the positions, linear layer: `[B, 3, H, W]` to `[B, 4]`."""

    def __init__(self, feature_maps=("relu",)):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.fc = nn.Linear(8, 4)
        self.feature_maps = feature_maps

    def forward(self, image):
        heads = self.conv(image).flatten(2).unflatten(1, (3, 1, 8)).transpose(-2, -1)
        q, k, v = heads.unbind(1)
        for feature_map in self.feature_maps:
            v = torch.ops.edgekit.kernel_linear_attention(q, k, v, feature_map, 1e-3)
        return self.fc(v.mean((1, 2)))


class Scanning(nn.Module):
    """Two selective scans, one gated, over `[B, 6, L]`."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(6, 6, 3, padding=1)
        self.split = nn.Conv1d(6, 6 + 2 * 4, 1)
        self.log_rates = nn.Parameter(torch.rand(6, 4))
        self.skip = nn.Parameter(torch.rand(6))

    def forward(self, x):
        u = self.mix(x)
        delta, b, c = self.split(u).split((6, 4, 4), dim=1)
        rates = -torch.exp(self.log_rates)
        gated = torch.ops.edgekit.selective_scan(u, delta, rates, b, c, self.skip, x, delta_softplus=True)
        return gated + torch.ops.edgekit.selective_scan(u, delta.sigmoid(), rates, b, c, self.skip)


def counts(model):
    """Op and overload of each node of domain edgekit."""
    return sorted((node.op_type, node.overload) for node in model.graph.node if node.domain == "edgekit")


def check_functions(model):
    """Every node has its body at the model's opset, and names are unique."""
    bodies = {(function.name, function.overload): function for function in model.functions}
    assert set(counts(model)) == bodies.keys()
    opsets = {item.domain: item.version for item in model.opset_import}
    assert opsets["edgekit"] == 1
    for function in bodies.values():
        assert {item.domain: item.version for item in function.opset_import} == {"": opsets[""]}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("opset", [18, 20, 24])
def test_one_node_and_its_function(export, graph, opset):
    module = Attending()
    bundle = export(module, "image:Bx3x5x7", opset=opset)
    assert bundle.manifest.custom_ops == (CustomOp("edgekit", "KernelLinearAttention", 1, 1, KERNELS),)
    assert bundle.manifest.ops["edgekit::KernelLinearAttention"] == 1
    assert bundle.manifest.opsets == {"ai.onnx": opset, "edgekit": 1}
    model = graph(bundle)
    check_functions(model)
    onnx.checker.check_model(model, full_check=True)
    assert edgekit.verify(bundle, model=module)


def test_stock_onnxruntime_runs_it_at_any_batch(export):
    module = Attending(("relu", "elu1", "relu"))
    bundle = export(module, "image:Bx3x5x7")
    session = onnxruntime.InferenceSession(bundle.read("model.onnx"), providers=["CPUExecutionProvider"])
    images = torch.randn(3, 3, 5, 7)
    (got,) = session.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(got, module.eval()(images).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_different_attributes_become_overloads(export, graph):
    bundle = export(Attending(("relu", "elu1", "relu")), "image:2x3x5x7")
    assert [overload for _, overload in counts(graph(bundle))] == ["", "", "v2"]
    check_functions(graph(bundle))
    assert bundle.manifest.custom_ops[0].nodes == 3


def test_selective_scan_with_dynamic_length(export, graph):
    module = Scanning()
    bundle = export(module, "x:Bx6xL")
    assert bundle.manifest.custom_ops == (CustomOp("edgekit", "SelectiveScan", 1, 2, KERNELS),)
    check_functions(graph(bundle))
    session = edgekit.load(bundle)
    for batch, length in ((1, 1), (2, 63), (1, 200)):
        x = torch.randn(batch, 6, length)
        np.testing.assert_allclose(
            session.run({"x": x.numpy()})["output"], module.eval()(x).detach().numpy(), rtol=1e-4, atol=1e-5
        )


def test_a_model_without_them_has_no_functions(export, graph):
    bundle = export(nn.Linear(3, 2), "x:2x3")
    assert bundle.manifest.custom_ops == ()
    assert "edgekit" not in bundle.manifest.opsets
    assert not graph(bundle).functions


def test_half_precision_keeps_the_node(export, graph):
    bundle = export(Attending(), "image:2x3x5x7", precision="fp16")
    model = graph(bundle)
    check_functions(model)
    assert bundle.manifest.ops["edgekit::KernelLinearAttention"] == 1
    producers = {name: node for node in model.graph.node for name in node.output}
    (node,) = [node for node in model.graph.node if node.domain == "edgekit"]
    sources = [producers[name] for name in node.input]
    assert not any(source.op_type == "Cast" for source in sources), "the op takes fp16 as it is"


def test_int8_quantizes_around_the_node(export, graph, tmp_path):
    np.savez(tmp_path / "calibration.npz", image=np.random.default_rng(0).standard_normal((8, 3, 5, 7), np.float32))
    bundle = export(Attending(), "image:1x3x5x7", precision="int8", calibration=tmp_path / "calibration.npz")
    model = graph(bundle)
    check_functions(model)
    assert bundle.manifest.ops["edgekit::KernelLinearAttention"] == 1
    producers = {name: node for node in model.graph.node for name in node.output}
    (conv,) = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [producers[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_care_has_four_nodes_and_agrees_layer_by_layer(tmp_path, graph, precision):
    bundle = edgekit.export("care_digits", "onnx", tmp_path, precision=precision)
    assert bundle.manifest.custom_ops == (CustomOp("edgekit", "KernelLinearAttention", 1, 4, KERNELS),)
    check_functions(graph(bundle))
    if precision == "int8":
        assert bundle.manifest.ops["QuantizeLinear"] > bundle.manifest.ops["Conv"] == 48
    report = compare_layers(bundle, load_model("care_digits"))
    assert report, report.first_bad
    assert sum(layer.op == "kernel_linear_attention" for layer in report.layers) == 4


def test_a_program_that_calls_them_loads_in_a_fresh_process(tmp_path):
    """torch cannot read such a file before the ops are registered, which nothing in it does."""
    program = torch.export.export(Scanning().eval(), (torch.randn(1, 6, 40),))
    torch.export.save(program, tmp_path / "scanning.pt2")
    code = f"""
import edgekit
bundle = edgekit.export({str(tmp_path / "scanning.pt2")!r}, "onnx", {str(tmp_path)!r})
assert bundle.manifest.ops["edgekit::SelectiveScan"] == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_shapes_outside_the_contract_are_told_before_export(export):
    class Wrong(nn.Module):
        def forward(self, q, v):
            return torch.ops.edgekit.kernel_linear_attention(q, q, v)

    with pytest.raises(ShapeError, match=r"KernelLinearAttention takes q and k .* got q \[1, 2, 7, 4\], k"):
        export(Wrong(), ["q:1x2x7x4", "v:1x2x8x4"])


class Branching(nn.Module):
    """Linear attention in either branch of a condition."""

    def forward(self, x):
        def attend(feature_map):
            def branch(y):
                return torch.ops.edgekit.kernel_linear_attention(y, y, y, feature_map, 1e-3)

            return branch

        return torch.cond(x.sum() > 0, attend("relu"), attend("elu1"), (x,))


def test_ops_in_branches(tmp_path):
    bundle = edgekit.export(Branching(), "onnx", tmp_path, shapes=["x:1x2x37x8"])
    assert bundle.manifest.custom_ops == (CustomOp("edgekit", "KernelLinearAttention", 1, 2, KERNELS),)
    session = edgekit.load(bundle, kernels="portable")
    for sign in (1.0, -1.0):
        x = sign * torch.rand(1, 2, 37, 8)
        expected = Branching()(x).numpy()
        np.testing.assert_allclose(session.run({"x": x.numpy()})["output"], expected, rtol=1e-5, atol=1e-6)


class Double(nn.Module):
    def forward(self, x):
        x = x.double()
        return torch.ops.edgekit.kernel_linear_attention(x, x, x, "relu", 1e-3).float()


def test_a_dtype_that_the_ops_lack_is_told_before_export(tmp_path):
    with pytest.raises(ExportError, match=r"kernel_linear_attention in float64; .*\.float\(\)"):
        edgekit.export(Double(), "onnx", tmp_path, shapes=["x:1x2x7x8"])


def test_an_unknown_arch_is_told_before_any_work(tmp_path):
    steps = []
    with pytest.raises(UnknownNameError, match="mips"):
        edgekit.export(Attending(), "onnx", tmp_path, shapes=["image:1x3x4x4"], kernels=["mips"], progress=steps.append)
    assert not steps


@pytest.mark.parametrize("op", ["kernel_linear_attention", "selective_scan"])
def test_second_derivatives_are_refused(op):
    edgekit.custom_ops.register()
    x = torch.rand(1, 2, 7, 8, requires_grad=True)
    if op == "kernel_linear_attention":
        y = torch.ops.edgekit.kernel_linear_attention(x, x, x)
    else:
        u = x[0]
        y = torch.ops.edgekit.selective_scan(u, u, -torch.ones(7, 2), u[:, :2], u[:, :2], torch.ones(7))
    with pytest.raises(NotImplementedError, match=f"{op} has no second derivatives"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
