"""`verify --layers` of Core ML packages names the layer that is wrong, and no other."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import NothingToCompareError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import PACKAGE, WEIGHTS
from edgekit.runtime.mil import load_program


class Small(nn.Module):
    """A convolution, a norm and two linear layers: a name for each kind that the converter renames."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(16, 24, 1)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)

    def forward(self, image):
        x = torch.relu(self.stem(image))
        x = nn.functional.gelu(self.mix(x)).mean((2, 3))
        return self.head(self.norm(x))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def bundles(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    return {
        precision: edgekit.export(model, "coreml", folder, precision=precision, shapes="image:1x3x20x28")
        for precision in ("fp32", "fp16")
    }


def corrupted(bundle, folder, layer):
    """A copy of the bundle with the weight of the op that computes `layer` negated, and the hash made to fit."""
    path = shutil.copytree(bundle.path, folder / bundle.path.name)
    function = load_program(path / PACKAGE).functions["main"]
    op = next(op for op in function.operations if op.output.startswith(layer) and "weight" in op.inputs)
    weight = function.constant(op, "weight")
    content = (path / WEIGHTS).read_bytes()
    assert content.count(weight.tobytes()) == 1
    (path / WEIGHTS).write_bytes(content.replace(weight.tobytes(), (-weight).tobytes()))
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
    manifest["files"][WEIGHTS]["sha256"] = digest
    (path / "manifest.json").write_text(json.dumps(manifest))
    return Bundle.open(path)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_good_bundle_passes(bundles, model, precision):
    result = edgekit.verify(bundles[precision], model=model, layers=True)
    assert result
    assert result.layers.first_bad is None
    found = {(layer.op, layer.module) for layer in result.layers.layers}
    assert {("conv2d", "stem"), ("conv2d", "mix"), ("linear", "head")} <= found
    assert result.layers.layers[-1].shape == (1, 10)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("layer", "module"), [("conv2d", "stem"), ("conv2d_1", "mix")])
def test_names_the_layer_with_the_wrong_weight(bundles, model, precision, layer, module, tmp_path):
    name = f"{layer}_cast_fp16" if precision == "fp16" else layer
    result = edgekit.verify(corrupted(bundles[precision], tmp_path, name), model=model, layers=True)
    assert not result
    assert (result.layers.first_bad.layer, result.layers.first_bad.module) == (layer, module)


@pytest.mark.parametrize("layout", ["standard", "ane"])
def test_pixels_labels_and_either_layout(coreml_bundle_of, layout):
    result = edgekit.verify(coreml_bundle_of("care_digits", layout), layers=True)
    assert result, result.layers.first_bad
    assert len(result.layers.layers) > 80


def test_integers_and_dynamic_sizes(tmp_path):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.out = nn.Linear(6, 5)

        def forward(self, ids):
            return torch.tanh(self.out(self.table(ids)))

    model = Rows().eval()
    bundle = edgekit.export(model, "coreml", tmp_path, shapes="ids:Nx3@int64<7 | 1..4")
    result = edgekit.verify(bundle, model=model, layers=True)
    assert result
    assert {"embedding", "tanh"} <= {layer.op for layer in result.layers.layers}


def test_says_that_apple_was_not_asked(bundles, model):
    notes = edgekit.verify(bundles["fp16"], model=model).not_checked
    assert any("Apple's runtime" in note and "check_on_mac.py" in note for note in notes)


def test_no_layer_to_compare(bundles, model, monkeypatch):
    monkeypatch.setattr("edgekit.export.layers_coreml._shared", lambda wanted, actual: iter(()))
    with pytest.raises(NothingToCompareError, match="share no layer"):
        edgekit.verify(bundles["fp32"], model=model, layers=True)
