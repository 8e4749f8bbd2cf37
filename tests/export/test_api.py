"""What an export leaves on disk: all of it, or nothing."""

from __future__ import annotations

import dataclasses
import errno
import json

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit import models
from edgekit.errors import BundleError, ExportError, InputError, MissingDependencyError, ShapeError, UnknownNameError
from edgekit.export import api
from edgekit.export.plan import make_plan
from edgekit.export.source import load_model
from edgekit.export.steps import recorded_tolerance
from edgekit.models import registry
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.tolerances import OUTPUT_REL_L2

RECIPE = {
    "size": [8, 8], "resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "color": "rgb", "scale": 1 / 255,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "layout": "NCHW", "pad_value": 0.0,
}  # fmt: skip


def left(folder):
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


class TestContent:
    @pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
    def test_files_and_manifest(self, digits, precision):
        bundle = Bundle.open(digits(precision).path)
        suffix = "" if precision == "fp32" else f"-{precision}"
        assert bundle.path.name == f"shvit_digits-onnx{suffix}.edge"
        assert left(bundle.path) == ["manifest.json", "model.onnx", "report.json", "samples.npz"]
        manifest = bundle.manifest
        assert (manifest.name, manifest.target, manifest.precision) == ("shvit_digits", "onnx", precision)
        assert (manifest.model.source, manifest.model.weights.source) == ("zoo:shvit_digits", "shipped")
        assert manifest.model.parameters == edgekit.models.model_entry("shvit_digits").parameters
        assert (manifest.opsets["ai.onnx"], manifest.ir_version) == (20, 10)
        assert [str(spec) for spec in manifest.inputs] == ["image: float32[1, 1, 32, 32]"]
        assert [str(spec) for spec in manifest.outputs] == ["logits: float32[1, 10]"]
        assert manifest.inputs[0].layout == "NCHW"
        assert manifest.labels == tuple("0123456789")
        assert {"Conv", "Softmax"} <= manifest.ops.keys()
        assert {"torch", "onnx", "onnxsim", "onnxruntime", "edgekit", "python"} <= manifest.tools.keys()
        assert manifest.files["model.onnx"].role == "model"

    def test_preprocessing_reads_a_picture(self, digits, tmp_path):
        from PIL import Image

        from edgekit.models.digits import load_digits_split

        images, labels = load_digits_split("test")
        Image.fromarray(images[0]).save(tmp_path / "digit.png")
        best = edgekit.load(digits("fp32")).predict(tmp_path / "digit.png")[0]
        assert best.label == str(labels[0])

    def test_figures_of_the_check(self, digits):
        for precision in ("fp32", "fp16", "int8"):
            figures = digits(precision).manifest.verification
            assert figures["checked"] is True
            assert figures["outputs"][0]["rel_l2"] <= figures["outputs"][0]["tolerance"]

    def test_samples_are_what_the_unfused_model_answers(self, digits):
        model = edgekit.create_model("shvit_digits")
        for inputs, outputs in digits("fp32").samples():
            with torch.no_grad():
                expected = model(torch.from_numpy(inputs["image"])).numpy()
            np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-6, atol=1e-6)

    def test_metadata_in_the_model_file(self, digits, graph):
        properties = {item.key: item.value for item in graph(digits("fp16")).metadata_props}
        assert properties["model"] == "zoo:shvit_digits"
        assert properties["precision"] == "fp16"
        assert properties["weights_sha256"] == digits("fp16").manifest.model.weights.sha256

    def test_report_is_json_without_nan(self, digits):
        for precision in ("fp32", "fp16", "int8"):
            text = (digits(precision).path / "report.json").read_text()
            assert json.loads(text, parse_constant=pytest.fail)["export"]["nodes"] > 10

    def test_progress_names_the_steps(self, export):
        steps = []
        export(nn.Linear(4, 2), "x:1x4", progress=steps.append)
        assert steps[0] == "load the model"
        assert steps[-1] == "check fp32 against PyTorch"
        assert len(steps) == len(set(steps))


class TestOptions:
    def test_another_size_keeps_the_recipe(self, export):
        manifest = export("shvit_digits", "image:1x1x48x48", weights="random").manifest
        assert manifest.inputs[0].preprocessing.size == (48, 48)
        assert manifest.model.macs is None

    def test_a_dynamic_size_has_no_recipe(self, export):
        manifest = export("shvit_digits", "image:Nx1x32x32 | 1..4").manifest
        assert manifest.inputs[0].preprocessing is not None
        assert manifest.dims["N"].max == 4

    def test_own_preprocessing_and_labels(self, export):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        bundle = export(model, "x:1x3x8x8", preprocessing=RECIPE, labels=["cat", "dog"], name="pets")
        assert bundle.path.name == "pets-onnx.edge"
        picture = np.zeros((20, 30, 3), np.uint8)
        assert {item.label for item in edgekit.load(bundle).predict(picture)} == {"cat", "dog"}

    @pytest.mark.parametrize(
        ("options", "error", "why"),
        [
            (
                {"preprocessing": RECIPE | {"size": [9, 9]}},
                InputError,
                r"makes \[1, 3, 9, 9\], the model's first input",
            ),
            ({"preprocessing": {"size": [8, 8]}}, InputError, "preprocessing: missing field"),
            ({"labels": ["cat", "dog", "bird"]}, InputError, "there are 3 labels for the model's 2 classes"),
            ({"labels": "cat,dog"}, InputError, "labels must be a list of names"),
            ({"name": "../up"}, InputError, r"the name '\.\./up' must|name .*'\.\./up'"),
            ({"name": ""}, InputError, "name"),
            ({"name": "my model"}, InputError, "name"),
            ({"precision": "int3"}, UnknownNameError, "unknown precision 'int3'"),
            ({"opset": 3}, InputError, "opset 3 is not supported"),
            ({"weights": "w.pth"}, edgekit.EdgekitError, "brings its own weights"),
        ],
    )
    def test_refused(self, export, tmp_path, options, error, why):
        with pytest.raises(error, match=why):
            export(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), "x:1x3x8x8", **options)
        assert left(tmp_path / "out") == []

    def test_unknown_target_proposes_the_nearest(self, tmp_path):
        with pytest.raises(UnknownNameError, match="unknown target 'onx'; did you mean onnx"):
            edgekit.export("shvit_digits", "onx", tmp_path)

    def test_shapes_are_needed(self, export):
        with pytest.raises(ShapeError, match="the input shapes of Linear are unknown; pass --shape"):
            export(nn.Linear(4, 2))

    def test_the_extra_is_missing(self, export, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxsim" else object())
        with pytest.raises(MissingDependencyError, match=r"pip install 'edgekit\[export\]'"):
            export("shvit_digits")

    @pytest.mark.parametrize("name", ["Größe", "a b", "..", "-x", "日本"])
    def test_class_names_with_odd_characters(self, export, name):
        model = type(name, (nn.Linear,), {})(4, 2)
        bundle = export(model, "x:1x4")
        assert Bundle.open(bundle.path).path.parent.name == "out"
        assert bundle.manifest.name.isascii()


class TestPrograms:
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
    def test_a_pt2_file(self, export, tmp_path, dynamic):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
        shapes = ({0: torch.export.Dim("batch", min=1, max=8)},) if dynamic else None
        path = tmp_path / "mine.pt2"
        torch.export.save(torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes), path)
        bundle = export(path)
        assert bundle.path.name == "mine-onnx.edge"
        first = bundle.manifest.inputs[0].shape[0]
        assert bundle.manifest.dims[first].max == 8 if dynamic else first == 2
        verification = edgekit.verify(bundle, model=path, layers=True)
        assert verification
        assert [layer.op for layer in verification.layers.layers] == ["relu", "linear"]
        assert "pass the model to compare with" in edgekit.verify(bundle).not_checked[0]
        with pytest.raises(ShapeError, match="fixed its shapes when it was exported"):
            export(path, "x:1x3x8x8")


STEPS = ["fuse and trace", "convert to ONNX", "store samples", "check fp32 against PyTorch"]


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=["error", "interrupt"])
    @pytest.mark.parametrize("at", STEPS)
    def test_fp32(self, tmp_path, at, error):
        self.stop(tmp_path, at, error, "fp32")

    @pytest.mark.parametrize("at", ["convert to fp16", "check fp16 against PyTorch", "compare fp16 with fp32"])
    def test_fp16(self, tmp_path, at):
        self.stop(tmp_path, at, KeyboardInterrupt, "fp16")

    @staticmethod
    def stop(tmp_path, at, error, precision):
        def progress(step):
            if step == at:
                raise error("stop")

        with pytest.raises(error, match="stop"):
            edgekit.export(
                nn.Linear(4, 2), "onnx", tmp_path / "out", shapes="x:1x4", precision=precision, progress=progress
            )
        assert left(tmp_path / "out") == []

    def test_a_bundle_that_stood_there_is_untouched(self, export, monkeypatch):
        before = export(nn.Linear(4, 2), "x:1x4")
        content = (before.path / "model.onnx").read_bytes()
        monkeypatch.setattr(api.onnx_target, "finalize", broken)
        with pytest.raises(ExportError, match="broken"):
            export(nn.Linear(4, 2), "x:1x4")
        assert (before.path / "model.onnx").read_bytes() == content
        assert left(before.path.parent) == left_of(before)

    def test_a_bundle_that_stood_there_is_replaced_whole(self, export):
        first = export(nn.Linear(4, 2), "x:1x4")
        (first.path / "notes.txt").write_text("mine")
        second = export(nn.Linear(4, 2), "x:1x4")
        assert first.manifest.model.weights.sha256 != second.manifest.model.weights.sha256
        assert left(second.path.parent) == left_of(second)

    def test_something_else_stands_there(self, export, tmp_path):
        (tmp_path / "out" / "Linear-onnx.edge").mkdir(parents=True)
        with pytest.raises(BundleError, match="exists and is no bundle"):
            export(nn.Linear(4, 2), "x:1x4")

    @pytest.mark.parametrize("at", ["model", "samples"])
    def test_the_disk_is_full(self, export, tmp_path, monkeypatch, at):
        def full(*_args, **_options):
            raise OSError(errno.ENOSPC, "No space left on device")

        if at == "model":
            monkeypatch.setattr("pathlib.Path.write_bytes", full)
        else:
            monkeypatch.setattr("edgekit.runtime.bundle.Samples.save", full)
        with pytest.raises(ExportError, match=r"Linear-onnx\.edge failed: No space left on device"):
            export(nn.Linear(4, 2), "x:1x4")
        assert left(tmp_path / "out") == []

    def test_the_folder_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BundleError, match="cannot write to"):
            edgekit.export(nn.Linear(4, 2), "onnx", tmp_path / "file" / "out", shapes="x:1x4")

    def test_an_error_of_the_users_forward(self, export, tmp_path):
        class Fails(nn.Module):
            def forward(self, x):
                raise OSError("the camera is off")

        with pytest.raises(ShapeError, match="the camera is off"):
            export(Fails(), "x:1x4")
        assert left(tmp_path / "out") == []


def broken(*_args, **_options):
    raise ExportError("broken")


def left_of(bundle):
    return sorted([bundle.path.name, *(f"{bundle.path.name}/{name}" for name in left(bundle.path))])


@pytest.fixture
def perturbed(monkeypatch):
    """A converter that gets one weight wrong."""
    convert = api.onnx_target.convert

    def wrong(*args, **options):
        exported = convert(*args, **options)
        tensor = next(item for item in exported.model.graph.initializer if len(item.dims) == 2)
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.01)).tobytes()
        return exported

    monkeypatch.setattr(api.onnx_target, "convert", wrong)


class TestCheck:
    def test_a_bundle_that_differs_is_refused(self, export, tmp_path, perturbed):
        with pytest.raises(ExportError, match=r"does not answer as PyTorch does \(output: relative L2 error") as caught:
            export(nn.Linear(4, 2), "x:1x4")
        assert "--no-check" in str(caught.value)
        assert caught.value.exit_code == 1
        assert left(tmp_path / "out") == []

    def test_or_kept_on_demand_and_says_so(self, export, perturbed):
        model = nn.Linear(4, 2)
        bundle = export(model, "x:1x4", check=False)
        assert bundle.manifest.verification == {"checked": False}
        assert not edgekit.verify(bundle, model=model)

    def test_the_message_tells_how_much_rounding_moves_pytorch(self, export, perturbed):
        expected = r"PyTorch's own answer moves by [1-9]\.\de-0[78] when its input changes by one rounding of fp32"
        with pytest.raises(ExportError, match=expected):
            export(nn.Linear(4, 2), "x:1x4")

    def test_integers_have_no_rounding(self, export, perturbed):
        with pytest.raises(
            ExportError, match=r"Nothing was written; a model known to be this sensitive .* --tolerance"
        ):
            export(nn.Embedding(5, 3), "input:1x4@int64<5")


class TestToleranceOfTheZoo:
    """Of a model that is sensitive to rounding by itself."""

    @pytest.fixture
    def student(self, export, monkeypatch):
        """Exports lighthgnn_digits as if its entry had this tolerance."""

        def make(entry_tolerance, **options):
            entry = dataclasses.replace(models.model_entry("lighthgnn_digits"), tolerance=entry_tolerance)
            monkeypatch.setitem(registry._ENTRIES, entry.name, entry)
            return export(entry.name, "features:1x64", **options)

        return make

    @staticmethod
    def recorded(bundle):
        figures = bundle.manifest.verification
        return figures.get("tolerance"), {output["tolerance"] for output in figures.get("outputs", ())}

    def test_is_used_and_recorded(self, student):
        bundle = student(3e-3)
        assert self.recorded(bundle) == (3e-3, {3e-3})
        checks = edgekit.verify(bundle).checks
        assert {output.tolerance for check in checks for output in check.outputs} == {3e-3}

    def test_refuses_what_is_worse(self, student, tmp_path):
        with pytest.raises(ExportError, match="tolerance 1e-09"):
            student(1e-9)
        assert left(tmp_path / "out") == []

    @pytest.mark.parametrize(("precision", "expected"), [("fp16", 0.03), ("int4", 0.4), ("fp32", None)])
    def test_of_core_ml_is_for_what_computes_in_fp16(self, precision, expected):
        entry = dataclasses.replace(models.model_entry("lighthgnn_digits"), half_tolerance=0.03)
        loaded = dataclasses.replace(load_model("lighthgnn_digits"), entry=entry)
        plan = make_plan(loaded, "features:1x64", None, None, 20, 0, True, None, lambda _: None)
        assert recorded_tolerance(plan, precision, "coreml") == expected
        assert recorded_tolerance(plan, precision, "onnx") is None
        own = dataclasses.replace(plan, tolerance=0.5)
        assert recorded_tolerance(own, precision, "coreml") == 0.5

    def test_is_for_fp32_alone(self, student):
        assert self.recorded(student(1e-4, precision="fp16")) == (None, {OUTPUT_REL_L2["fp16"]})

    def test_the_callers_own_goes_before(self, student):
        assert self.recorded(student(1e-9, tolerance=4e-3)) == (4e-3, {4e-3})

    def test_none_leaves_the_table(self, student):
        assert self.recorded(student(None)) == (None, {OUTPUT_REL_L2["fp32"]})

    def test_is_recorded_for_a_later_check_too(self, student):
        bundle = student(3e-3, check=False)
        assert bundle.manifest.verification == {"checked": False, "tolerance": 3e-3}
