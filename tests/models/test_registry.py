"""Names, overrides and weights of the zoo."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest
import torch

import edgekit.models
from edgekit.errors import EdgekitError, InputError, ShapeError, UnknownNameError, WeightsError
from edgekit.models import create_model, list_models, model_entry, state_dict_sha256
from edgekit.models.registry import FAMILIES, ImageInput, TensorInputs, TokenInput, register_model

DIGITS = ["care_digits", "dynamicvis_digits", "hgnn_digits", "lighthgnn_digits", "shvit_digits"]
SIZES = {"shvit_s4": 256, "dynamicvis_base": 512, "dynamicvis_large": 512} | dict.fromkeys(DIGITS, 32)

SMALL = [name for name in list_models() if model_entry(name).parameters < 2e7]


def test_names():
    names = list_models()
    assert names == sorted(names)
    assert set(names) == {
        *("shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4", "care_s0", "care_s1", "care_s2"),
        *("dynamicvis_base", "dynamicvis_large", "hgnn", "hgnnp", "lighthgnn", "dhsa_bytes"),
        *DIGITS,
    }


@pytest.mark.parametrize("name", list_models())
def test_entries(name):
    entry = model_entry(name)
    assert entry.name == name == entry.factory.__name__
    assert entry.family in FAMILIES
    assert "arXiv" in entry.paper or "doi" in entry.paper
    if isinstance(entry.input, ImageInput):
        assert entry.input.size == SIZES.get(name, 224)
        assert len(entry.input.mean) == len(entry.input.std) == entry.input.channels
        assert entry.arguments().get("img_size", entry.input.size) == entry.input.size
    if isinstance(entry.input, TokenInput):
        assert entry.num_classes == entry.input.vocab_size
        assert entry.arguments()["context"] == entry.input.context
    if entry.labels:
        assert len(entry.labels) == entry.num_classes
    assert bool(entry.weights) == bool(entry.dataset)
    assert isinstance(entry.input, TokenInput) or bool(entry.weights) == (name in DIGITS)


@pytest.mark.parametrize("name", SMALL)
def test_models_come_ready_to_run(name):
    assert not create_model(name).training


@pytest.mark.parametrize("name", [name for name in list_models() if isinstance(model_entry(name).input, TensorInputs)])
def test_examples_and_labels_of_models_without_images(name):
    """Inputs that the model runs on, with the names and dtypes that the entry says, and one answer per row."""
    entry = model_entry(name)
    first, again, other = (entry.input.examples(seed) for seed in (3, 3, 4))
    assert [(key, str(value.dtype), value.ndim) for key, value in first.items()] == [
        (item.name, item.dtype, len(item.dims)) for item in entry.input.tensors
    ]
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert not all(np.array_equal(first[key], other[key]) for key in first)
    model = create_model(name)
    with torch.no_grad():
        logits = model(**{key: torch.from_numpy(value) for key, value in first.items()})
    assert logits.shape == (len(first[entry.input.tensors[0].name]), entry.num_classes)
    assert (entry.input.labelled is not None) == (entry.dataset is not None)
    if entry.input.labelled is not None:
        inputs, labels = entry.input.labelled()
        assert inputs.keys() == first.keys()
        assert len(labels) == len(inputs[entry.input.tensors[0].name])
        assert -1 <= labels.min() <= labels.max() == entry.num_classes - 1


def test_unknown_name_proposes_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown model 'shvit_s9'; did you mean shvit_s"):
        model_entry("shvit_s9")
    with pytest.raises(UnknownNameError):
        create_model("resnet50")


def test_duplicate_name_raises():
    def shvit_s1():
        raise NotImplementedError

    register = register_model(
        family="shvit", input=ImageInput(), num_classes=1, parameters=0, macs=0, paper="", summary=""
    )
    with pytest.raises(ValueError, match=r"'shvit_s1' is registered twice: by edgekit\.models\.shvit"):
        register(shvit_s1)


@pytest.mark.parametrize("name", ["shvit_s1", "care_s0"])
def test_overrides(name):
    model = create_model(name, num_classes=7, in_chans=5)
    with torch.no_grad():
        assert model(torch.zeros(1, 5, 64, 64)).shape == (1, 7)


def test_unknown_override_names_the_accepted_ones():
    with pytest.raises(EdgekitError, match="shvit_s1 does not take classes; it takes num_classes, in_chans, dist"):
        create_model("shvit_s1", classes=3)


@pytest.mark.parametrize("override", ["num_classes", "in_chans"])
@pytest.mark.parametrize("name", ["shvit_s1", "care_s0"])
def test_sizes_below_one(name, override):
    with pytest.raises(ShapeError, match=f"{override} must be at least 1; got 0"):
        create_model(name, **{override: 0})


@pytest.mark.parametrize("name", DIGITS)
def test_shipped_weights_are_loaded_by_default(name):
    report = json.loads((resources.files("edgekit.models") / "pretrained" / f"{name}.json").read_text())
    assert state_dict_sha256(create_model(name)) == report["weights_sha256"]
    assert state_dict_sha256(create_model(name, weights="random")) != report["weights_sha256"]


@pytest.mark.parametrize("name", DIGITS)
def test_shipped_weights_do_not_silently_mismatch(name):
    with pytest.raises(WeightsError, match=r'do not fit a changed num_classes.*weights="random"'):
        create_model(name, num_classes=4)
    assert state_dict_sha256(create_model(name, num_classes=10)) == state_dict_sha256(create_model(name))
    assert create_model(name, num_classes=4, weights="random")


def test_shipped_weights_serve_an_option_that_they_fit():
    """The position embedding is resized to the image, as the authors do."""
    shipped, resized = create_model("dynamicvis_digits").state_dict(), create_model("dynamicvis_digits", img_size=64)
    changed = [key for key, value in resized.state_dict().items() if not torch.equal(value, shipped[key])]
    assert changed == ["backbone.pos_embed"]
    with torch.no_grad():
        assert resized(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


def test_arguments_of_an_entry():
    entry = model_entry("shvit_digits")
    assert entry.arguments({"num_classes": 3}) == {**entry.arguments(), "num_classes": 3}
    assert entry.changed({"num_classes": 10, "in_chans": 3}) == ["in_chans"]


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("shvit_digits", {"num_classes": "ten"}, ShapeError, "num_classes must be a whole number .*; got 'ten'"),
        ("shvit_digits", {"num_classes": True}, ShapeError, "num_classes must be a whole number .*; got True"),
        ("dynamicvis_digits", {"in_chans": [1]}, ShapeError, r"in_chans must be a whole number .*; got \[1\]"),
        ("lighthgnn", {"hidden": 2.5}, ShapeError, "hidden must be a whole number .*; got 2.5"),
        ("dynamicvis_digits", {"token_selection": "no"}, InputError, "token_selection is true or false; got 'no'"),
        ("shvit_s1", {"distillation": 1}, InputError, "distillation is true or false; got 1"),
        ("lighthgnn", {"dropout": "high"}, InputError, "dropout is a number, such as 0.5; got 'high'"),
    ],
)
def test_options_of_the_wrong_kind(name, options, error, words):
    with pytest.raises(error, match=words):
        create_model(name, weights="random", **options)


def test_seed_of_the_initialisation():
    first, again, other = (state_dict_sha256(create_model("care_s0", seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    random.seed(3)
    before = torch.random.get_rng_state(), random.getstate()
    create_model("shvit_s1", seed=11)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize("name", ["shvit_s1", "care_s0", "care_digits", "shvit_digits", "dynamicvis_digits"])
def test_wrong_input_shapes(name):
    model = create_model(name)
    channels = model_entry(name).input.channels
    with pytest.raises(ShapeError, match=rf"images \[B, {channels}, (H, W|32, 32)\].*got \(1, 9, 64, 64\)"):
        model(torch.zeros(1, 9, 64, 64))
    with pytest.raises(ShapeError, match=r"add the batch dimension with image.unsqueeze\(0\)"):
        model(torch.zeros(channels, 64, 64))


def test_care_names_its_smallest_image():
    with pytest.raises(ShapeError, match=r"H and W at least 32; got \(1, 3, 16, 64\)"):
        create_model("care_s0")(torch.zeros(1, 3, 16, 64))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_package_and_the_registry_does_not_import_torch():
    code = "import sys, edgekit.models, edgekit.models.registry; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_the_facade():
    assert set(edgekit.models.__all__) <= set(dir(edgekit.models))
    for name in edgekit.models.__all__:
        assert callable(getattr(edgekit.models, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgekit.models.nothing  # noqa: B018


def test_without_torch_the_error_says_how_to_get_it():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import edgekit.models\n"
        "for call in (edgekit.models.list_models, lambda: edgekit.models.fuse):\n"
        "    try: call()\n"
        "    except ImportError as error: print(type(error).__name__, error)"
    )
    lines = run_python(code).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("MissingDependencyError") and "edgekit[export]" in line for line in lines)
