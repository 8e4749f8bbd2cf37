"""The digits: a fixed split, a batch prepared as the entry declares, and shipped weights that do what they claim."""

from __future__ import annotations

import builtins
import json
from importlib import resources

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.models import create_model, fuse, model_entry
from edgekit.models.digits import SPLIT_SIZES, digits_batch, load_digits_split
from edgekit.models.train_digits import Recipe, accuracy, augment, digits_models, main, train

RECIPE = Recipe()


def report(name):
    return json.loads((resources.files("edgekit.models") / "pretrained" / f"{name}.json").read_text())


def test_parts_are_disjoint_and_complete():
    parts = {part: load_digits_split(part) for part in SPLIT_SIZES}
    assert {part: len(labels) for part, (_, labels) in parts.items()} == SPLIT_SIZES
    assert sum(SPLIT_SIZES.values()) == 1797
    for images, labels in parts.values():
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert images.shape[1:] == (8, 8)
        assert (images.min(), images.max()) == (0, 255)
        assert set(labels) == set(range(10))
    data = load_digits()
    ours = sorted(image.tobytes() for images, _ in parts.values() for image in images)
    assert ours == sorted(np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in data.images)


def test_the_split_is_the_same_everywhere():
    """Weights, JSON and bundles name figures on this split; its first labels pin it."""
    assert load_digits_split("test")[1][:12].tolist() == [0, 8, 8, 8, 1, 5, 5, 6, 9, 6, 8, 7]


def test_unknown_part():
    with pytest.raises(UnknownNameError, match="part of the digits 'tests'; did you mean test"):
        load_digits_split("tests")


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"needs scikit-learn.*edgekit\[train\]"):
        load_digits_split("test")


def bilinear(image, size):
    """Half-pixel centres, written out for one image."""
    height, width = image.shape
    out = np.empty((size, size))
    for y in range(size):
        for x in range(size):
            sy = min(max((y + 0.5) * height / size - 0.5, 0), height - 1)
            sx = min(max((x + 0.5) * width / size - 0.5, 0), width - 1)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            fy, fx = sy - y0, sx - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    return out


def test_batch_is_prepared_as_the_entry_declares():
    images = load_digits_split("validation")[0][:3]
    batch = digits_batch(images)
    assert batch.shape == (3, 1, 32, 32)
    assert batch.dtype == torch.float32
    for name in digits_models():
        declared = model_entry(name).input
        assert (declared.channels, declared.size, declared.interpolation) == (1, 32, "bilinear")
        for image, got in zip(images, batch.numpy(), strict=True):
            expected = (bilinear(image.astype(np.float64), declared.size) / 255 - declared.mean[0]) / declared.std[0]
            np.testing.assert_allclose(got[0], expected, atol=2e-6)


def test_declared_mean_and_std_are_those_of_the_training_part():
    pixels = digits_batch(load_digits_split("train")[0])
    assert abs(float(pixels.mean())) < 2e-3
    assert abs(float(pixels.std()) - 1) < 2e-3


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8)), np.zeros((8, 8), np.uint8)], ids=["float", "no-batch"])
def test_batch_refuses_other_arrays(images):
    with pytest.raises(InputError, match="uint8 images"):
        digits_batch(images)


def test_augmentation_without_range_is_the_identity():
    pixels = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    still = Recipe(rotation=0, scaling=0, shear=0, shift=0, noise=0)
    torch.testing.assert_close(augment(pixels, torch.Generator().manual_seed(0), still), pixels, rtol=0, atol=1e-5)
    moved = augment(pixels, torch.Generator().manual_seed(0), RECIPE)
    assert moved.shape == pixels.shape
    assert not torch.allclose(moved, pixels)


@pytest.mark.parametrize("fused", [False, True], ids=["trained", "fused"])
@pytest.mark.parametrize("name", digits_models())
def test_shipped_accuracy(name, fused):
    images, labels = load_digits_split("test")
    model = create_model(name)
    right, _ = accuracy(fuse(model) if fused else model, digits_batch(images), torch.from_numpy(labels))
    assert right >= 0.97
    assert right == pytest.approx(report(name)["test_accuracy"], abs=1e-6)


@pytest.mark.parametrize("name", digits_models())
def test_shipped_files(name):
    folder, entry, told = resources.files("edgekit.models") / "pretrained", model_entry(name), report(name)
    assert told["parameters"] == entry.parameters < 300_000
    assert told["split"] == {"seed": told["split"]["seed"], **SPLIT_SIZES}
    assert told["recipe"].keys() == RECIPE.__dict__.keys()
    assert len((folder / entry.weights).read_bytes()) < 1_500_000


@pytest.mark.parametrize(("name", "tokens"), [("shvit_digits", {64, 16}), ("care_digits", {64, 16})])
def test_attention_sees_several_tokens(name, tokens):
    model, seen = create_model(name), set()
    for module in model.modules():
        if type(module).__name__ in ("SingleHeadAttention", "TokenMixer") and getattr(module, "head_dim", 1):
            module.register_forward_pre_hook(lambda module, inputs: seen.add(inputs[0].shape[2] * inputs[0].shape[3]))
    with torch.no_grad():
        model(torch.zeros(1, 1, 32, 32))
    assert seen == tokens


def test_training_script_runs(tmp_path, capsys):
    main(["--model", "shvit_digits", "--out", str(tmp_path), "--epochs", "1"])
    printed = capsys.readouterr().out
    assert "epoch 1/1" in printed
    assert f"wrote {tmp_path / 'shvit_digits.safetensors'}" in printed
    told = json.loads((tmp_path / "shvit_digits.json").read_text())
    assert told["recipe"]["epochs"] == 1
    assert told["versions"]["torch"] == torch.__version__
    assert create_model("shvit_digits", weights=tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "care_digits",
        # Its routers draw noise while it trains.
        pytest.param("dynamicvis_digits", marks=pytest.mark.slow),
    ],
)
def test_training_repeats(name):
    short = Recipe(epochs=1, batch_size=400)
    first, again = (train(name, short, log=lambda line: None).report for _ in range(2))
    assert first["weights_sha256"] == again["weights_sha256"]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("name", digits_models())
def test_the_full_run_reproduces(name):
    result = train(name, RECIPE)
    assert result.report["test_accuracy"] >= 0.97
    if result.report["versions"] == report(name)["versions"] and result.report["machine"] == report(name)["machine"]:
        assert result.report["test_accuracy"] == pytest.approx(report(name)["test_accuracy"], abs=0.01)
