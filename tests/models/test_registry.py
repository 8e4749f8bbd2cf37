"""Names, overrides and weights of the zoo."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib import resources

import pytest
import torch

import edgekit.models
from edgekit.errors import EdgekitError, ShapeError, UnknownNameError, WeightsError
from edgekit.models import create_model, list_models, model_entry, state_dict_sha256
from edgekit.models.registry import FAMILIES, ImageInput, register_model

DIGITS = ["care_digits", "shvit_digits"]


def test_names():
    names = list_models()
    assert names == sorted(names)
    assert {"shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4", "care_s0", "care_s1", "care_s2", *DIGITS} == set(names)


@pytest.mark.parametrize("name", list_models())
def test_entries(name):
    entry = model_entry(name)
    assert entry.name == name == entry.factory.__name__
    assert entry.family in FAMILIES
    assert entry.input.size == (256 if name == "shvit_s4" else 32 if name in DIGITS else 224)
    assert len(entry.input.mean) == len(entry.input.std) == entry.input.channels
    assert "arXiv" in entry.paper
    assert not create_model(name).training
    if entry.labels:
        assert len(entry.labels) == entry.num_classes


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
    assert create_model(name, num_classes=10)
    assert create_model(name, num_classes=4, weights="random")


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


@pytest.mark.parametrize("name", ["shvit_s1", "care_s0", *DIGITS])
def test_wrong_input_shapes(name):
    model = create_model(name)
    channels = model.in_chans
    with pytest.raises(ShapeError, match=rf"images \[B, {channels}, H, W\].*got \(1, 9, 64, 64\)"):
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
