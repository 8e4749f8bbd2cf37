"""Static quantization: what became int8, from which data, and what the report says of it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto
from PIL import Image
from torch import nn

import edgekit
from edgekit.errors import ExportError, InputError
from edgekit.export.cost import _speed
from edgekit.export.data import MAX_CALIBRATION_ITEMS, load_calibration
from edgekit.export.shapes import parse_shapes
from edgekit.runtime.profiler import ProfileComparison


def small():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


RECIPE = {
    "size": [8, 8], "resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "color": "rgb", "scale": 1 / 255,
    "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "layout": "NCHW", "pad_value": 0.0,
}  # fmt: skip


class TestGraph:
    @pytest.fixture
    def model(self, digits, graph):
        return graph(digits("int8"))

    def test_layers_take_quantized_tensors(self, model):
        producers = {name: node for node in model.graph.node for name in node.output}
        layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
        assert len(layers) > 40
        for node in layers:
            assert {producers[name].op_type for name in node.input[:2]} == {"DequantizeLinear"}, node.name

    def test_weights_are_int8_per_channel(self, model):
        tensors = {item.name: item for item in model.graph.initializer}
        producers = {name: node for node in model.graph.node for name in node.output}
        convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
        for node in convolutions:
            dequantize = producers[node.input[1]]
            weight, scale = tensors[dequantize.input[0]], tensors[dequantize.input[1]]
            assert weight.data_type == TensorProto.INT8
            assert list(scale.dims) == [weight.dims[0]]

    def test_activations_are_uint8(self, model):
        tensors = {item.name: item for item in model.graph.initializer}
        zeros = [tensors[node.input[2]].data_type for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert set(zeros) == {TensorProto.UINT8}

    def test_outputs_are_not_quantized(self, model):
        producers = {name: node for node in model.graph.node for name in node.output}
        for value in model.graph.output:
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT
            assert producers[value.name].op_type != "DequantizeLinear"

    def test_softmax_and_sigmoid_stay_float(self, model):
        quantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
        floats = [node for node in model.graph.node if node.op_type == "Sigmoid"]
        after = {name for node in floats for name in node.output}
        assert floats
        assert (
            not any(set(node.input) & after for node in model.graph.node if node.op_type == "QuantizeLinear")
            or quantized
        )


class TestReport:
    def test_accuracy_of_all_three(self, digits):
        accuracy = digits("int8").report()["precision"]["accuracy"]
        assert "test part (360 images)" in accuracy["data"]
        assert accuracy["pytorch"] == accuracy["fp32"] > 0.97
        assert accuracy["int8"] > accuracy["fp32"] - 0.02

    def test_speed_is_told_as_measured(self, digits):
        speed = digits("int8").report()["precision"]["speed"]
        low, high = speed["interval_95"]
        assert low <= speed["speedup"] <= high
        assert speed["speedup"] == pytest.approx(speed["fp32_p50_ms"] / speed["int8_p50_ms"], rel=0.5)
        faster = speed["verdict"].startswith("int8 is") and "faster than fp32 on this machine" in speed["verdict"]
        assert (low > 1) == (faster and "no faster" not in speed["verdict"])
        assert ("SLOWER" in speed["verdict"]) == (high < 1)

    @pytest.mark.parametrize(
        ("ratio", "verdict"),
        [
            ((0.5, 0.45, 0.55), "int8 is 2.00x faster than fp32 on this machine"),
            ((1.3, 1.2, 1.4), "int8 is 1.30x SLOWER than fp32 on this machine: use it for size, not for speed"),
            ((0.98, 0.9, 1.1), "int8 is no faster than fp32 on this machine: use it for size, not for speed"),
        ],
    )
    def test_verdict_follows_the_interval(self, digits, ratio, verdict):
        from edgekit.runtime.profiler import profile
        from edgekit.runtime.timing import Ratio

        profiled = profile(digits("fp32"), runs=8, ops=False)
        comparison = ProfileComparison(profiled, profiled, Ratio(*ratio), 8, "")
        assert _speed(comparison, "int8")["verdict"] == verdict

    def test_manifest_names_the_calibration_data(self, digits):
        assert "digits, train part" in digits("int8").manifest.calibration
        assert digits("fp32").manifest.calibration is None

    def test_smaller(self, digits):
        assert digits("int8").size_of_model < 0.5 * digits("fp32").size_of_model

    def test_answers_live_inputs_like_its_samples(self, digits):
        assert edgekit.verify(digits("int8"), live=True)


class TestCalibration:
    @pytest.fixture
    def images(self, tmp_path):
        folder = tmp_path / "photos"
        folder.mkdir()
        for index in range(6):
            pixels = np.random.default_rng(index).integers(0, 255, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        return folder

    def test_a_folder_of_images(self, export, images):
        model = small()
        bundle = export(model, "x:1x3x8x8", precision="int8", calibration=images, preprocessing=RECIPE)
        assert "6 images" in bundle.manifest.calibration
        assert str(bundle.samples().inputs["x"].dtype) == "float32"
        assert edgekit.verify(bundle, model=model)
        assert bundle.report()["precision"]["agreement"]["items"] == 6

    @pytest.mark.parametrize("shape", ["x:4x3x8x8", "x:Nx3x8x8 | 1..4", "x:Nx3x8x8 | 3..4"])
    def test_batches_other_than_one(self, export, tmp_path, shape):
        np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((10, 3, 8, 8), np.float32))
        model = small()
        bundle = export(model, shape, precision="int8", calibration=tmp_path / "data.npz")
        assert edgekit.verify(bundle, model=model)

    def test_two_inputs_one_of_integers(self, export, tmp_path):
        class Tokens(nn.Module):
            def __init__(self):
                super().__init__()
                self.table, self.linear = nn.Embedding(50, 16), nn.Linear(16, 4)

            def forward(self, ids, scale):
                return self.linear(self.table(ids).sum(1) * scale)

        draw = np.random.default_rng(0)
        np.savez(tmp_path / "d.npz", ids=draw.integers(0, 50, (9, 5)), scale=draw.random((9, 1), np.float32))
        model = Tokens()
        bundle = export(model, ["ids:1x5@int64", "scale:1x1"], precision="int8", calibration=tmp_path / "d.npz")
        assert edgekit.verify(bundle, model=model)

    def test_random_is_for_timing(self, export):
        bundle = export(small(), "x:1x3x8x8", precision="int8", calibration="random")
        assert bundle.manifest.calibration == "random normal values (for timing only)"

    def test_none_given(self, export):
        with pytest.raises(InputError, match="int8 needs calibration data: pass --calibration"):
            export(small(), "x:1x3x8x8", precision="int8")

    def test_for_another_precision(self, export):
        with pytest.raises(InputError, match="calibration data is for onnx in int8; this export is fp16"):
            export(small(), "x:1x3x8x8", precision="fp16", calibration="random")

    def test_digits_need_image_preprocessing(self, export):
        with pytest.raises(InputError, match="'digits' holds images, but this model has no image preprocessing"):
            export(small(), "x:1x3x8x8", precision="int8", calibration="digits")

    @pytest.mark.parametrize(
        ("arrays", "why"),
        [
            ({"u": (4, 3, 8, 8), "v": (4, 1)}, "expected an array for each input"),
            ({"x": (4, 3, 9, 9)}, r"expected 'x' of shape \[N, 3, 8, 8\]"),
            ({"x": (4, 8)}, r"expected 'x' of shape \[N, 3, 8, 8\]"),
        ],
        ids=["names", "size", "rank"],
    )
    def test_arrays_that_do_not_fit(self, export, tmp_path, arrays, why):
        np.savez(tmp_path / "data.npz", **{name: np.zeros(shape, np.float32) for name, shape in arrays.items()})
        with pytest.raises(InputError, match=why):
            export(small(), "x:1x3x8x8", precision="int8", calibration=tmp_path / "data.npz")
        assert not (tmp_path / "out").exists()

    def test_missing_file(self, export, tmp_path):
        with pytest.raises(InputError, match="no such data set"):
            export(small(), "x:1x3x8x8", precision="int8", calibration=tmp_path / "none.npz")

    def test_fewer_items_than_a_batch(self, tmp_path):
        np.savez(tmp_path / "data.npz", x=np.zeros((3, 2), np.float32))
        with pytest.raises(InputError, match="holds 3 items, the model takes 4 at once"):
            load_calibration(tmp_path / "data.npz", parse_shapes("x:4x2"), None, None, batch=4)

    def test_float64_is_rounded_and_text_refused(self, tmp_path):
        np.savez(tmp_path / "data.npz", x=np.zeros((3, 2)))
        assert (
            load_calibration(tmp_path / "data.npz", parse_shapes("x:1x2"), None, None).inputs["x"].dtype == np.float32
        )
        with pytest.raises(InputError, match="holds float64 for x:1x2@int64; store it as int64"):
            load_calibration(tmp_path / "data.npz", parse_shapes("x:1x2@int64"), None, None)

    def test_a_large_set_is_drawn_from(self, tmp_path):
        np.savez(tmp_path / "data.npz", x=np.zeros((1000, 2), np.float32))
        data = load_calibration(tmp_path / "data.npz", parse_shapes("x:3x2"), None, None, batch=3)
        assert len(data) == MAX_CALIBRATION_ITEMS // 3 * 3


def test_nothing_to_quantize(export, tmp_path):
    with pytest.raises(ExportError, match="int8 found nothing to quantize"):
        export(nn.Sequential(nn.Softmax(-1), nn.Sigmoid()), "x:1x4", precision="int8", calibration="random")
    assert not list((tmp_path / "out").iterdir())
