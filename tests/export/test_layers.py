"""`verify --layers` names the layer that is wrong, and no other."""

from __future__ import annotations

import hashlib
import json
import shutil

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import edgekit
from edgekit.errors import ExportError, NothingToCompareError
from edgekit.export.layers import compare_layers
from edgekit.export.source import load_model, reload_model
from edgekit.runtime.bundle import Bundle


def corrupted(bundle, folder, layer):
    """A copy of the bundle with one weight of the node that computes `layer` negated, and the hash made to fit."""
    path = shutil.copytree(bundle.path, folder / bundle.path.name)
    model = onnx.load(path / "model.onnx")
    tensors = {item.name: item for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    weight = next(name for name in producers[layer].input[1:] if name in tensors or name in producers)
    while weight not in tensors:  # int8 weights come through DequantizeLinear, fp16's may through Cast
        weight = producers[weight].input[0]
    values = -numpy_helper.to_array(tensors[weight])
    tensors[weight].CopyFrom(numpy_helper.from_array(values, weight))
    onnx.save(model, path / "model.onnx")
    manifest = json.loads((path / "manifest.json").read_text())
    content = (path / "model.onnx").read_bytes()
    manifest["files"]["model.onnx"] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_good_bundle_passes(digits, precision):
    bundle = digits(precision)
    report = compare_layers(bundle, reload_model(bundle.manifest, None, None))
    assert report, report.first_bad
    assert report.first_bad is None
    assert len(report.layers) > 60
    kinds = {layer.op for layer in report.layers}
    assert {"conv2d", "relu", "matmul", "softmax", "linear"} <= kinds
    assert "view" not in kinds


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_names_the_layer_with_the_wrong_weight(digits, precision, tmp_path):
    bundle = digits(precision)
    report = edgekit.verify(corrupted(bundle, tmp_path, "conv2d_20"), layers=True).layers
    assert not report
    assert report.first_bad.layer == "conv2d_20"
    assert report.first_bad.op == "conv2d"
    assert report.first_bad.module.startswith("blocks2.")


@pytest.mark.parametrize("layer", ["conv2d", "conv2d_7", "linear"])
def test_first_middle_and_last_layer(digits, tmp_path, layer, graph):
    bundle = digits("fp32")
    named = {name for node in graph(bundle).graph.node for name in node.output}
    tensor = layer if layer in named else "logits"
    report = edgekit.verify(corrupted(bundle, tmp_path, tensor), layers=True).layers
    assert report.first_bad.layer == layer


def test_layers_know_their_module_shape_and_order(digits):
    bundle = digits("fp32")
    report = compare_layers(bundle, reload_model(bundle.manifest, None, None))
    first, last = report.layers[0], report.layers[-1]
    assert (first.layer, first.module, first.op) == ("conv2d", "patch_embed.0", "conv2d")
    assert last.shape == (1, 10)
    assert max(layer.comparison.rel_l2 for layer in report.layers) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_with_a_dynamic_batch(export, tmp_path, precision):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    bundle = export(model, "input:Nx4 | 1..8", precision=precision)
    assert compare_layers(bundle, load_model(model))
    report = edgekit.verify(corrupted(bundle, tmp_path, "linear_1"), model=model, layers=True).layers
    assert (report.first_bad.layer, report.first_bad.module) == ("linear_1", "2")


def test_ops_whose_names_look_like_views(export):
    class Ops(nn.Module):
        def forward(self, x):
            root = (x.abs() + 1).sqrt()
            return torch.cat([root, root.rsqrt()], 1) * 2

    model = Ops()
    report = compare_layers(export(model, "x:1x4x4"), load_model(model))
    assert report
    assert {"sqrt", "rsqrt", "cat"} <= {layer.op for layer in report.layers}


def test_outputs_that_bear_the_names_of_inner_layers(export):
    class Names(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x):
            hidden = self.l(x)
            return {"linear": hidden.relu() + 1, "relu": hidden}

    model = Names()
    report = compare_layers(export(model, "x:1x4"), load_model(model))
    assert report
    assert [layer.layer for layer in report.layers] == ["linear", "relu", "add"]


def test_layers_need_the_model(export):
    bundle = export(nn.Linear(4, 4), "x:1x4")
    with pytest.raises(ExportError, match="pass the model to compare with"):
        edgekit.verify(bundle, layers=True)


def test_no_layer_to_compare(export):
    model = nn.Flatten()
    with pytest.raises(NothingToCompareError, match="share no layer"):
        edgekit.verify(export(model, "x:1x4x4"), model=model, layers=True)
