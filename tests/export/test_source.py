from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekit import models
from edgekit.errors import EdgekitError, ExportError, InputError, ShapeError, UnknownNameError, WeightsError
from edgekit.export.source import load_model, reload_model

FACTORIES = """
import torch
from torch import nn

def net(width=4):
    return nn.Linear(4, width)

ready = nn.Linear(4, 2)
number = 3

def gives_text():
    return "no module"

def fails():
    raise OSError("no such checkpoint")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a user's module in it; whatever it adds to Python's state is undone."""
    (tmp_path / "usermodels.py").write_text(FACTORIES)
    (tmp_path / "brokenmodels.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    sys.modules.pop("usermodels", None)


class TestZoo:
    def test_shipped_weights(self):
        loaded = load_model("shvit_digits")
        assert (loaded.source, loaded.weights.source, loaded.weights.seed) == ("zoo:shvit_digits", "shipped", None)
        assert [str(shape) for shape in loaded.defaults.shapes] == ["image:1x1x32x32"]
        assert loaded.defaults.labels == tuple("0123456789")
        assert not loaded.module.training

    def test_random_weights_follow_the_seed(self):
        hashes = [load_model("care_digits", weights="random", seed=seed).weights.sha256 for seed in (0, 0, 1)]
        assert hashes[0] == hashes[1] != hashes[2]

    def test_options_reach_the_constructor(self):
        loaded = load_model("shvit_digits", weights="random", overrides={"num_classes": 3})
        assert loaded.call({"image": torch.zeros(1, 1, 32, 32)}).shape == (1, 3)
        assert loaded.defaults.labels is None

    @pytest.mark.parametrize(
        ("name", "options", "source", "labels"),
        [
            ("shvit_digits", {"num_classes": 10}, "shipped", 10),
            ("shvit_digits", {"num_classes": 3}, "random", None),
            ("shvit_digits", {"in_chans": 3}, "random", 10),
            ("lighthgnn_digits", {"num_classes": 3}, "random", None),
            ("dynamicvis_digits", {"img_size": 64}, "shipped", 10),
        ],
        ids=["unchanged", "classes", "channels", "student", "image size"],
    )
    def test_options_that_shipped_weights_do_not_fit_make_them_random(self, name, options, source, labels):
        loaded = load_model(name, overrides=options)
        assert loaded.weights.source == source
        assert (loaded.defaults.labels and len(loaded.defaults.labels)) == labels

    def test_options_out_of_range_are_an_error_all_the_same(self):
        with pytest.raises(ShapeError, match="num_classes must be at least 1"):
            load_model("shvit_digits", overrides={"num_classes": 0})
        with pytest.raises(EdgekitError, match="shvit_digits does not take depth"):
            load_model("shvit_digits", overrides={"depth": 2})

    def test_unknown_name_proposes_the_nearest(self):
        with pytest.raises(UnknownNameError, match="unknown model 'shvit_digit'; did you mean shvit_digits"):
            load_model("shvit_digit")

    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", "wrapped.pth"])
    def test_weights_from_a_file(self, tmp_path, suffix):
        model = models.create_model("shvit_digits", weights="random", seed=5)
        path = tmp_path / f"mine{suffix}"
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"model": state} if suffix == "wrapped.pth" else state, path)
        loaded = load_model("shvit_digits", weights=path)
        assert (loaded.weights.source, loaded.weights.file) == ("file", path.name)
        assert loaded.weights.sha256 == models.state_dict_sha256(model)

    def test_pickled_code_is_refused(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.system, ("touch " + str(tmp_path / "owned"),)

        torch.save({"weight": Attack()}, tmp_path / "evil.pth")
        with pytest.raises(WeightsError, match="asks to run code"):
            load_model("shvit_digits", weights=tmp_path / "evil.pth")
        assert not (tmp_path / "owned").exists()

    def test_weights_of_another_model(self, tmp_path):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
        with pytest.raises(WeightsError, match="missing"):
            load_model("shvit_digits", weights=tmp_path / "other.pth")

    @pytest.mark.parametrize("name", ["best.pth", "best.safetensors", "dir/best.ckpt"])
    def test_a_weights_file_is_no_model(self, name):
        with pytest.raises(WeightsError, match="name the architecture and pass the file beside it"):
            load_model(name)


class TestModule:
    def test_the_callers_module_stays_as_it_was(self):
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
        module[0].eval()
        loaded = load_model(module)
        assert [part.training for part in module] == [False, True, True]
        assert not any(part.training for part in loaded.module.modules())
        assert loaded.module is not module
        assert loaded.weights.sha256 == models.state_dict_sha256(module)

    def test_name_is_the_class(self):
        loaded = load_model(nn.Linear(2, 2))
        assert (loaded.name, loaded.source) == ("Linear", "module:Linear")

    @pytest.mark.parametrize("given", [{"weights": "w.pth"}, {"overrides": {"width": 3}}])
    def test_brings_its_own_weights(self, given):
        with pytest.raises(WeightsError, match="Linear brings its own weights"):
            load_model(nn.Linear(2, 2), **given)

    def test_on_the_meta_device(self):
        with pytest.raises(ExportError, match="on the meta device: weight has a shape and no values"):
            load_model(nn.Linear(2, 2, device="meta"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_half_precision(self, dtype):
        with pytest.raises(ExportError, match=r"holds b?float16 tensors \(weight\); .* pass model.float()"):
            load_model(nn.Linear(2, 2).to(dtype))

    def test_that_cannot_be_copied(self):
        module = nn.Linear(2, 2)
        module.lock = (i for i in range(3))
        with pytest.raises(ExportError, match="Linear cannot be copied"):
            load_model(module)


class TestFactory:
    def test_from_the_working_directory(self, folder):
        loaded = load_model("usermodels:net")
        assert (loaded.name, loaded.source) == ("net", "factory:usermodels:net")
        assert (loaded.weights.source, loaded.weights.seed) == ("factory", 0)

    def test_seed_decides_and_the_global_state_stays(self, folder):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        hashes = [load_model("usermodels:net", seed=seed).weights.sha256 for seed in (1, 1, 2)]
        assert hashes[0] == hashes[1] != hashes[2]
        assert torch.equal(torch.get_rng_state(), before)

    def test_options_are_arguments(self, folder):
        assert load_model("usermodels:net", overrides={"width": 7}).module.out_features == 7

    def test_a_module_in_place_of_a_function(self, folder):
        assert load_model("usermodels:ready").module.out_features == 2

    @pytest.mark.parametrize(
        ("text", "error", "why"),
        [
            ("usermodels:nett", UnknownNameError, "unknown factory in usermodels 'nett'; did you mean net"),
            ("usermodels:gives_text", InputError, "gave a str; it must give a torch.nn.Module"),
            ("usermodels:number", InputError, "is a int; it must be a function"),
            ("usermodels:fails", InputError, r"fails\(\) failed: OSError: no such checkpoint"),
            ("nosuchmodule:net", InputError, "cannot import 'nosuchmodule'"),
            ("brokenmodels:net", InputError, "importing 'brokenmodels' failed: RuntimeError: no licence"),
            ("usermodels:net()", InputError, "neither a zoo model nor package.module:factory"),
            (":net", InputError, "neither a zoo model nor package.module:factory"),
        ],
    )
    def test_refuses(self, folder, text, error, why):
        with pytest.raises(error, match=why):
            load_model(text)

    def test_wrong_options(self, folder):
        with pytest.raises(InputError, match=r"net\(depth=2\) failed: TypeError"):
            load_model("usermodels:net", overrides={"depth": 2})

    def test_takes_no_weights(self, folder):
        with pytest.raises(WeightsError, match="brings its own weights"):
            load_model("usermodels:net", weights="w.pth")


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, bias):
        return self.linear(x) + bias


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "my model.pt2"
    torch.export.save(torch.export.export(Scale(), (torch.ones(2, 4),), {"bias": torch.ones(4)}), path)
    return path


class TestProgram:
    def test_loads(self, program):
        loaded = load_model(program)
        assert (loaded.name, loaded.source) == ("my_model", "pt2:my model.pt2")
        assert (loaded.weights.source, loaded.weights.file) == ("program", "my model.pt2")

    def test_binds_by_name_whatever_the_order(self, program):
        loaded = load_model(program)
        x, bias = torch.randn(2, 4), torch.randn(4)
        assert torch.equal(loaded.call({"bias": bias, "x": x}), loaded.call({"x": x, "bias": bias}))

    def test_takes_no_weights(self, program):
        with pytest.raises(WeightsError, match="brings its own weights"):
            load_model(program, weights="w.pth")

    def test_missing(self, tmp_path):
        with pytest.raises(InputError, match=r"no program at .*nothing\.pt2"):
            load_model(tmp_path / "nothing.pt2")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("content", ["garbage", "empty", "other zip", "truncated"])
    def test_damaged(self, program, tmp_path, content):
        path = tmp_path / "bad.pt2"
        if content == "other zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("readme", "hello")
        else:
            whole = program.read_bytes()
            path.write_bytes(
                {"garbage": b"PK\x03\x04 no zip", "empty": b"", "truncated": whole[: len(whole) // 2]}[content]
            )
        with pytest.raises(InputError, match=r"is no readable \.pt2 program"):
            load_model(path)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_pickled_code_is_refused(self, program, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.system, ("touch " + str(tmp_path / "owned"),)

        evil = io.BytesIO()
        torch.save({"weight": Attack(), "x": pickle.dumps(0)}, evil)
        with zipfile.ZipFile(program) as source, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as target:
            for name in source.namelist():
                sample = "sample_inputs" in name
                target.writestr(name, evil.getvalue() if sample else source.read(name))
        with pytest.raises(InputError, match=r"is no readable \.pt2 program"):
            load_model(tmp_path / "evil.pt2")
        assert not (tmp_path / "owned").exists()
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class TestReload:
    def test_random_weights_are_rebuilt(self, export):
        bundle = export("care_digits", weights="random", seed=3)
        assert reload_model(bundle.manifest, None, None).weights.sha256 == bundle.manifest.model.weights.sha256

    def test_factory_is_rebuilt(self, folder, export):
        bundle = export("usermodels:net", "input:1x4", seed=3, overrides={"width": 6})
        loaded = reload_model(bundle.manifest, None, None)
        assert loaded.module.out_features == 6

    def test_a_module_must_be_given(self, export):
        module = nn.Linear(4, 2)
        manifest = export(module, "input:1x4").manifest
        with pytest.raises(ExportError, match="was exported from module:Linear; pass the model to compare with"):
            reload_model(manifest, None, None)
        assert reload_model(manifest, module, None)
        with pytest.raises(WeightsError, match="are not those that Linear was exported with"):
            reload_model(manifest, nn.Linear(4, 2), None)

    def test_a_weights_file_must_be_given_again(self, tmp_path, export):
        state = models.create_model("shvit_digits", weights="random", seed=5).state_dict()
        torch.save(state, tmp_path / "mine.pth")
        manifest = export("shvit_digits", weights=tmp_path / "mine.pth").manifest
        with pytest.raises(WeightsError, match=r"exported with the weights file mine\.pth; pass it again"):
            reload_model(manifest, None, None)
        assert reload_model(manifest, None, tmp_path / "mine.pth")


def test_errors_of_forward_are_told_in_plain_words():
    with pytest.raises(ShapeError, match=r"Linear does not run on x \[1, 5\] torch.float32: mat1 and mat2"):
        load_model(nn.Linear(4, 2)).call({"x": torch.zeros(1, 5)})


def test_runner_takes_and_gives_arrays():
    run = load_model(nn.Linear(4, 2)).runner(["y"])
    assert run({"x": np.ones((3, 8), np.float32)[:, ::2]})["y"].shape == (3, 2)


def test_a_folder_without_config(tmp_path):
    with pytest.raises(InputError, match=r"is a folder without config\.json"):
        load_model(Path(tmp_path))
