"""Models that no one here wrote: transformers' own, as modules, through a factory, and from a folder on disk."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import edgekit
from edgekit.errors import EdgekitError, InputError, MissingDependencyError, ShapeError, WeightsError
from edgekit.export.huggingface import load_pretrained

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

LABELS = {0: "cat", 1: "dog", 2: "bird"}
PROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 36}, "resample": 2, "do_center_crop": True,
    "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.25],
}  # fmt: skip

FACTORIES = """
import torch
import transformers
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification
from transformers import MobileViTV2Config, MobileViTV2ForImageClassification
from edgekit.models import seed_weights

def seeded(model):
    # Fresh batch norms and layers of std 0.02 would let the signal fade to nothing.
    seed_weights(model, 0)
    return model.eval()

def mobilenet():
    config = MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=3, finegrained_output=False)
    return seeded(MobileNetV2ForImageClassification(config))

def mobilevit():
    config = MobileViTV2Config(image_size=64, width_multiplier=0.25, num_labels=5)
    return seeded(MobileViTV2ForImageClassification(config))
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "foreign.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("foreign", None)


def foreign(name):
    scope = {}
    exec(compile(FACTORIES, "foreign", "exec"), scope)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scope[name]().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `save_pretrained` writes for a tiny MobileNetV2, with labels and an image processor."""
    path = tmp_path_factory.mktemp("hub") / "tiny-mobilenet"
    model = foreign("mobilenet")
    model.config.id2label = LABELS
    model.config.label2id = {name: index for index, name in LABELS.items()}
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder with fields of config.json replaced."""

    def make(**fields):
        target = tmp_path / "copy"
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | fields
        (target / "config.json").write_text(json.dumps(config))
        return target

    return make


class TestForeignModels:
    def test_mobilenet_as_a_module(self, export):
        model = foreign("mobilenet")
        bundle = export(model, "pixel_values:Nx3x32x32 | 1..4")
        assert [str(spec) for spec in bundle.manifest.outputs] == ["logits: float32[N, 3]"]
        verification = edgekit.verify(bundle, model=model)
        assert verification
        assert len(verification.checks) == 2
        profile = edgekit.profile(bundle, runs=10, warmup=2)
        assert profile.latency_ms.p50 > 0
        assert {op.op for op in profile.ops} & {"Conv", "FusedConv"} or profile.ops

    def test_mobilevit_through_a_factory(self, export, factories):
        bundle = export("foreign:mobilevit", "pixel_values:1x3x64x64")
        verification = edgekit.verify(bundle, live=True, layers=True)
        assert verification
        assert len(verification.layers.layers) > 30
        assert any("mobilevitv2" in layer.module for layer in verification.layers.layers)
        assert edgekit.profile(bundle, runs=10, warmup=2, ops=False).latency_ms.p50 > 0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mobilenet", "mobilevit"])
    def test_in_half_precision_with_a_dynamic_batch(self, export, name):
        model = foreign(name)
        size = model.config.image_size
        bundle = export(model, f"pixel_values:Nx3x{size}x{size} | 1..4", precision="fp16")
        assert edgekit.verify(bundle, model=model)


class TestFolder:
    def test_exports_with_what_the_folder_says(self, export, folder):
        bundle = export(folder)
        manifest = bundle.manifest
        assert bundle.path.name == "tiny-mobilenet-onnx.edge"
        assert (manifest.model.source, manifest.model.weights.source) == ("huggingface:tiny-mobilenet", "folder")
        assert [str(spec) for spec in manifest.inputs] == ["pixel_values: float32[1, 3, 32, 32]"]
        assert manifest.labels == ("cat", "dog", "bird")
        recipe = manifest.inputs[0].preprocessing
        assert (recipe.size, recipe.resize, recipe.interpolation) == ((32, 32), "shortest", "bilinear")
        assert (recipe.mean, recipe.std, recipe.color) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.25), "rgb")
        assert round(recipe.size[0] / recipe.crop_pct) == 36
        assert edgekit.verify(bundle, model=folder)
        assert "pass the model" in edgekit.verify(bundle).not_checked[0]
        picture = np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
        assert edgekit.load(bundle).predict(picture, k=1)[0].label in LABELS.values()

    def test_the_model_is_that_of_the_folder(self, folder):
        loaded, original = load_pretrained(folder).module, foreign("mobilenet")
        for (name, ours), (_, theirs) in zip(loaded.state_dict().items(), original.state_dict().items(), strict=True):
            assert torch.equal(ours, theirs), name

    def test_brings_its_own_weights(self, export, folder):
        with pytest.raises(WeightsError, match="brings its own weights"):
            export(folder, weights="other.safetensors")

    def test_without_a_processor(self, copy):
        path = copy()
        (path / "preprocessor_config.json").unlink()
        assert load_pretrained(path).preprocessing is None

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            pytest.param({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "squash", id="squash"),
            pytest.param({"size": 36}, "shortest", id="a number"),
            pytest.param({"do_flip_channel_order": True}, "bgr", id="bgr"),
            pytest.param({"resample": 3}, "bicubic", id="bicubic"),
            pytest.param({"do_normalize": False, "image_mean": None}, "rgb", id="no normalisation"),
            pytest.param({"do_center_crop": False}, None, id="no fixed size"),
            pytest.param({"size": {"shortest_edge": 20}}, None, id="crop beyond the image"),
            pytest.param({"do_pad": True}, None, id="padding"),
            pytest.param({"do_rescale": False}, None, id="not rescaled"),
            pytest.param({"resample": 4}, None, id="unknown interpolation"),
            pytest.param({"image_std": [0, 0, 0]}, None, id="std of zero"),
            pytest.param({"image_mean": None}, None, id="no mean"),
            pytest.param({"size": {"longest_edge": 32}}, None, id="longest edge"),
        ],
    )
    def test_processors(self, copy, fields, expected):
        path = copy()
        (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | fields))
        recipe = load_pretrained(path).preprocessing
        if expected is None:
            assert recipe is None
        else:
            assert expected in (recipe.resize, recipe.color, recipe.interpolation)

    def test_placeholder_labels_are_none(self, copy):
        assert load_pretrained(copy(id2label={str(i): f"LABEL_{i}" for i in range(3)})).labels is None

    def test_a_config_without_image_size_needs_shapes(self, export, copy):
        path = copy(image_size=0)
        assert load_pretrained(path).shape is None
        with pytest.raises(EdgekitError, match="pass --shape"):
            export(path)

    @pytest.mark.parametrize(
        ("name", "sizes", "advice"),
        [
            ("BertModel", {}, r"unknown; pass --shape 'input_ids:1x64@int64<50', once for each input$"),
            (
                "MistralForCausalLM",
                {"num_key_value_heads": 1},
                "another architecture, mistral; those that become bundles which generate text are gemma2, llama",
            ),
        ],
    )
    def test_models_of_text(self, tmp_path, capfd, name, sizes, advice):
        """transformers' own progress bars stay away."""
        import transformers

        sizes = sizes | {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        kind = getattr(transformers, name)
        kind(kind.config_class(num_attention_heads=2, **sizes)).save_pretrained(tmp_path / "text")
        capfd.readouterr()
        shown = transformers.utils.logging.is_progress_bar_enabled()
        with pytest.raises(ShapeError, match=advice):
            edgekit.export(tmp_path / "text", "onnx", tmp_path / "out")
        assert capfd.readouterr() == ("", "")
        assert transformers.utils.logging.is_progress_bar_enabled() == shown

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"architectures": None}, "names no class in 'architectures'"),
            ({"architectures": []}, "names no class in 'architectures'"),
            ({"architectures": ["MyOwnModel"], "auto_map": {"AutoModel": "evil.MyOwnModel"}}, "does not ship"),
            ({"architectures": ["AutoConfig"]}, "does not ship"),
            ({"architectures": ["pipeline"]}, "does not ship"),
        ],
    )
    def test_classes_that_transformers_does_not_ship(self, copy, fields, why):
        path = copy(**fields)
        (path / "evil.py").write_text("raise SystemExit('code of the folder ran')")
        with pytest.raises(InputError, match=why):
            load_pretrained(path)

    def test_weights_of_another_width(self, copy):
        with pytest.raises(WeightsError):
            load_pretrained(copy(depth_multiplier=0.5))

    def test_pickled_weights_are_refused(self, copy):
        path = copy()
        (path / "model.safetensors").unlink()
        torch.save({"weight": torch.zeros(1)}, path / "pytorch_model.bin")
        with pytest.raises(WeightsError, match="could not be loaded"):
            load_pretrained(path)

    def test_missing_tensors_are_named(self, copy):
        from safetensors.torch import load_file, save_file

        path = copy()
        state = load_file(path / "model.safetensors")
        save_file(
            {k: v for k, v in state.items() if "classifier" not in k}, path / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(WeightsError, match=r"no fitting weights for 2 tensors .*classifier"):
            load_pretrained(path)

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_damaged_config(self, copy, text):
        path = copy()
        (path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            load_pretrained(path)

    def test_transformers_is_missing(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingDependencyError, match="needs transformers"):
            load_pretrained(folder)
