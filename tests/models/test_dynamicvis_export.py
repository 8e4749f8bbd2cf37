"""DynamicVis out of PyTorch: torch.export with a dynamic batch, and onnxruntime without native kernels."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

import edgekit
from edgekit.models import create_model, seed_weights
from edgekit.models.digits import digits_batch, load_digits_split
from edgekit.models.dynamicvis import DynamicVis, SparseMixer, Stage


def tiny(*, reduce=True, pooled=False):
    """Two small stages, with weights that let every branch count."""
    stages = (Stage(16, 1, 4 if reduce else 1, patch=7, stride=4), Stage(24, 2, 2 if reduce else 1))
    model = DynamicVis(stages, img_size=(32, 48), global_tokens=reduce, scale_all=reduce, pooled=pooled).eval()
    seed_weights(model, 0)
    return model


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def flat():
    """Without a position embedding, a flat image is one token many times."""
    model = tiny()
    with torch.no_grad():
        model.pos_embed.zero_()
    return model


@pytest.fixture(scope="module")
def bundle(flat, tmp_path_factory):
    """`edgekit.export` refuses a bundle that differs from PyTorch."""
    folder = tmp_path_factory.mktemp("dynamicvis")
    return edgekit.export(flat, "onnx", folder, shapes="image:Nx3x32x48 | 1..4", name="dynamicvis_tiny")


def run(bundle, x):
    return list(edgekit.load(bundle, kernels="portable").run({"image": x.numpy()}).values())


def assert_same_maps(bundle, model, x):
    with torch.no_grad():
        expected = model(x)
    for got, wanted in zip(run(bundle, x), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_onnxruntime_answers_with_a_dynamic_batch(bundle, flat, batch):
    assert_same_maps(bundle, flat, images(batch, 3, 32, 48, seed=batch))


def test_equal_tokens_keep_their_order_in_both_runtimes(bundle, flat):
    """Ties, which both break by place."""
    assert_same_maps(bundle, flat, torch.full((1, 3, 32, 48), 0.3))


def test_a_pixel_that_is_no_number_spoils_its_image_alone_in_onnxruntime(bundle):
    x = images(2, 3, 32, 48)
    clean = run(bundle, x)
    x[1, 0, 3, 4] = torch.nan
    for before, after in zip(clean, run(bundle, x), strict=True):
        np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
        assert np.isnan(after[1]).all()


def test_graph_moves_whole_tokens(bundle, flat):
    """Tokens are picked and put back as rows: one ScatterND of rows per mixer, and no element-wise scatter."""
    ops = Counter(node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node)
    mixers = sum(isinstance(module, SparseMixer) for module in flat.modules())
    assert {op: ops[op] for op in ("TopK", "ScatterND", "Softmax", "SelectiveScan")} == {
        "TopK": mixers,
        "ScatterND": mixers,
        "Softmax": mixers,
        "SelectiveScan": mixers,
    }
    assert not ops.keys() & {"ScatterElements", "NonZero", "Loop", "If"}


@pytest.mark.slow
def test_all_tokens_in_onnxruntime(tmp_path):
    model = tiny(reduce=False)
    assert_same_maps(
        edgekit.export(model, "onnx", tmp_path, shapes="image:Nx3x32x48 | 1..4", name="dynamicvis_all"),
        model,
        images(2, 3, 32, 48),
    )


@pytest.mark.slow
def test_digits_in_onnxruntime(tmp_path):
    """The shipped model gives the classes that PyTorch gives, on real images in one dynamic batch."""
    pixels, labels = load_digits_split("test")
    model = create_model("dynamicvis_digits")
    bundle = edgekit.export("dynamicvis_digits", "onnx", tmp_path, shapes="image:Nx1x32x32 | 1..64")
    x = digits_batch(pixels[:64])
    (logits,) = edgekit.load(bundle, kernels="portable").run({"image": x.numpy()}).values()
    with torch.no_grad():
        expected = model(x)
    assert np.array_equal(logits.argmax(1), expected.argmax(1).numpy())
    assert (logits.argmax(1) == labels[:64]).mean() > 0.95


def test_torch_export_has_a_dynamic_batch_and_writes_in_place_nowhere():
    model = tiny(pooled=True)
    x = images(5, 3, 32, 48)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert not [t for t in targets if isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable]
    with torch.no_grad():
        for batch in (1, 5):
            torch.testing.assert_close(program.module()(x[:batch]), model(x[:batch]), rtol=1e-5, atol=1e-5)
