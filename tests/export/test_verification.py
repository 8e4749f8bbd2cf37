from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import ExportError, InputError, NothingToCompareError, WeightsError
from edgekit.export.source import load_model
from edgekit.export.verification import _fresh_size, fresh_inputs, own_sensitivity
from edgekit.runtime.bundle import Samples
from edgekit.runtime.manifest import DimRange
from edgekit.runtime.session import load


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    return model, edgekit.export(model, "onnx", tmp_path_factory.mktemp("linear"), shapes="x:Nx4 | 1..3")


class TestSides:
    def test_stored_and_live(self, digits):
        verification = edgekit.verify(digits("fp32"), live=True)
        assert verification
        assert [check.against for check in verification.checks] == [
            "stored PyTorch outputs",
            "live PyTorch on fresh inputs",
        ]
        assert verification.checks[1].inputs == 4
        assert verification.not_checked == ()

    def test_not_live(self, digits):
        verification = edgekit.verify(digits("fp32"), live=False)
        assert len(verification.checks) == 1
        assert verification.not_checked == ("live PyTorch: not asked for",)

    def test_a_module_cannot_be_rebuilt(self, linear):
        verification = edgekit.verify(linear[1])
        assert verification
        assert "pass the model to compare with" in verification.not_checked[0]
        with pytest.raises(ExportError, match="pass the model to compare with"):
            edgekit.verify(linear[1], live=True)

    def test_the_model_given(self, linear):
        assert len(edgekit.verify(linear[1], model=linear[0]).checks) == 2

    @pytest.mark.parametrize("live", [None, False, True])
    def test_another_model_given(self, linear, live):
        with pytest.raises(WeightsError, match="are not those that Sequential was exported with"):
            edgekit.verify(linear[1], model=nn.Linear(4, 4), live=live)

    def test_random_weights_are_rebuilt_from_the_seed(self, export):
        bundle = export("care_digits", weights="random", seed=11)
        assert edgekit.verify(bundle, live=True)

    def test_a_path_does_as_well(self, linear):
        assert edgekit.verify(str(linear[1].path))

    def test_number_of_fresh_inputs(self, linear):
        assert edgekit.verify(linear[1], model=linear[0], inputs=7).checks[1].inputs == 7
        with pytest.raises(InputError, match="inputs must be at least 1"):
            edgekit.verify(linear[1], inputs=0)

    def test_threads_reach_the_session(self, linear):
        with pytest.raises(InputError, match="threads must be"):
            edgekit.verify(linear[1], threads=0)
        assert edgekit.verify(linear[1], threads=1)

    def test_progress(self, linear):
        steps = []
        edgekit.verify(linear[1], model=linear[0], progress=steps.append)
        assert steps == ["open the bundle", "compare with stored samples", "compare with live PyTorch"]


class TestNothingToCompare:
    @pytest.fixture
    def bare(self, export, monkeypatch):
        """A bundle without samples, as one made elsewhere may be."""
        from edgekit.export import api

        model = nn.Linear(4, 2)
        write = api.BundleWriter.add
        monkeypatch.setattr(api.Samples, "save", lambda *_: None)
        monkeypatch.setattr(
            api.BundleWriter,
            "add",
            lambda self, name, role: self.folder / name if role == "samples" else write(self, name, role),
        )
        return model, export(model, "x:1x4", check=False)

    def test_is_an_error(self, bare):
        with pytest.raises(NothingToCompareError, match="stores no samples"):
            edgekit.verify(bare[1])

    def test_the_model_suffices(self, bare):
        verification = edgekit.verify(bare[1], model=bare[0])
        assert verification
        assert len(verification.checks) == 1
        assert "stores no samples" in verification.not_checked[0]


class TestAccuracy:
    def test_of_both_sides(self, digits):
        accuracy = edgekit.verify(digits("fp32"), data="digits").accuracy
        assert accuracy.items == 360
        assert accuracy.bundle == accuracy.pytorch > 0.97

    def test_of_the_bundle_alone(self, digits):
        accuracy = edgekit.verify(digits("int8"), data="digits", live=False).accuracy
        assert accuracy.pytorch is None
        assert accuracy.bundle > 0.95

    def test_from_arrays(self, linear, tmp_path):
        model, bundle = linear
        x = np.random.default_rng(0).standard_normal((10, 4), np.float32)
        labels = model(torch.from_numpy(x)).argmax(-1).numpy()
        np.savez(tmp_path / "data.npz", x=x, labels=labels)
        accuracy = edgekit.verify(bundle, model=model, data=tmp_path / "data.npz").accuracy
        assert (accuracy.bundle, accuracy.pytorch) == (1.0, 1.0)

    def test_digits_for_a_model_without_images(self, linear):
        with pytest.raises(InputError, match="has no image preprocessing"):
            edgekit.verify(linear[1], data="digits")


class TestFreshInputs:
    def test_take_several_sizes_and_repeat_no_sample(self, linear):
        session = load(linear[1])
        drawn = list(fresh_inputs(session, 5))
        assert [item["x"].shape[0] for item in drawn] == [1, 2, 3, 1, 2]
        stored = [inputs["x"] for inputs, _ in linear[1].samples()]
        assert not any(np.array_equal(item["x"], known) for item in drawn for known in stored)

    def test_long_ranges_are_not_only_multiples_of_a_block(self):
        sizes = [_fresh_size(DimRange(512, 16384), index) for index in range(4)]
        assert sizes[0] == 512
        assert all(size % 16 for size in sizes[1:])
        assert all(512 <= size <= 1600 for size in sizes)

    def test_are_the_same_every_time(self, linear):
        session = load(linear[1])
        for a, b in zip(fresh_inputs(session, 3), fresh_inputs(session, 3), strict=True):
            np.testing.assert_array_equal(a["x"], b["x"])

    def test_of_int8_lie_between_samples(self, digits):
        session = load(digits("int8"))
        stored = digits("int8").samples().inputs["image"]
        for item in fresh_inputs(session, 4):
            assert stored.min() <= item["image"].min()
            assert item["image"].max() <= stored.max()
            assert not any(np.array_equal(item["image"], known) for known in stored)


def test_a_wrong_bundle_fails_live_and_stored(linear, tmp_path):
    """Equal weights, another function: the hash cannot tell, the answers do."""
    model, _ = linear
    other = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid())
    other.load_state_dict(model.state_dict())
    bundle = edgekit.export(other, "onnx", tmp_path, shapes="x:1x4")
    verification = edgekit.verify(bundle, model=model)
    assert not verification
    assert [bool(check) for check in verification.checks] == [True, False]
    assert verification.to_json()["passed"] is False


class Step(nn.Module):
    """Answers with which values lie above one."""

    def forward(self, x):
        return (x > 1).float()


class TestOwnSensitivity:
    @pytest.mark.parametrize(
        ("precision", "low", "high"), [("fp32", 1e-8, 1e-6), ("fp16", 1e-4, 1e-2), ("int8", 3e-4, 3e-2)]
    )
    def test_of_a_smooth_model_is_that_of_its_input(self, linear, precision, low, high):
        assert low < own_sensitivity(linear[1].samples(), load_model(linear[0]), precision) < high

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_of_a_threshold_is_large(self, precision):
        """One value in two crosses it, and the others are far from it."""
        x = np.where(np.arange(400) % 2, 1, 3).astype(np.float32).reshape(1, 1, 400)
        samples = Samples({"x": x}, {"output": (x > 1).astype(np.float32)})
        assert own_sensitivity(samples, load_model(Step()), precision) > 0.5

    def test_of_a_sort_is_large(self):
        """Equal values have no order of their own."""

        class Order(nn.Module):
            def forward(self, x):
                return x.argsort(dim=-1, stable=True)

        x = np.ones((2, 1, 50), np.float32)
        samples = Samples({"x": x}, {"output": np.tile(np.arange(50), (2, 1, 1))})
        assert own_sensitivity(samples, load_model(Order())) > 0.5

    def test_answers_that_are_no_numbers(self):
        x = np.full((1, 1, 4), np.nan, np.float32)
        assert np.isnan(own_sensitivity(Samples({"x": x}, {"output": x}), load_model(nn.ReLU())))

    def test_integers_have_none(self):
        ids = np.zeros((1, 1, 4), np.int64)
        samples = Samples({"input": ids}, {"output": np.zeros((1, 1, 4, 3), np.float32)})
        assert own_sensitivity(samples, load_model(nn.Embedding(5, 3))) is None


class TestTolerance:
    def test_a_larger_one_is_recorded_and_used_on_every_machine(self, tmp_path: Path) -> None:
        bundle = edgekit.export("shvit_digits", "onnx", tmp_path, precision="fp16", tolerance=0.05)
        assert bundle.manifest.verification["tolerance"] == 0.05
        verification = edgekit.verify(bundle)
        assert {item.tolerance for check in verification.checks for item in check.outputs} == {0.05}
        assert not edgekit.verify(bundle, live=False, tolerance=1e-6)

    def test_a_smaller_one_refuses_the_bundle(self, tmp_path: Path) -> None:
        with pytest.raises(ExportError, match="--tolerance"):
            edgekit.export("shvit_digits", "onnx", tmp_path, precision="fp16", tolerance=1e-6)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("tolerance", [0.0, -1.0, 1.0, float("nan")])
    def test_one_that_is_none_is_refused(self, digits_bundle: Path, tolerance: float) -> None:
        with pytest.raises(InputError, match="tolerance"):
            edgekit.verify(digits_bundle, live=False, tolerance=tolerance)
