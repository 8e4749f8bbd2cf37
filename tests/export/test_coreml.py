"""The coreml target: packages answer as PyTorch does on the reference runtime, and whatever cannot be is said."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import BundleError, EdgekitError, ExportError, InputError, ShapeError, UnknownNameError
from edgekit.runtime.coreml_info import ITEM_INFO, MODEL, WEIGHTS

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

from edgekit import custom_ops
from edgekit.export.coreml_options import coreml_options
from edgekit.export.coreml_tools import quiet_tools, source_line
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.tolerances import OUTPUT_REL_L2

RECIPE = ImagePreprocessing(size=(18, 14), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
LABELS = ["ape", "bee", "cat", "dog", "eel"]


class Small(nn.Module):
    """A classifier of 18x14 images with convolutions, norms, an op of ours and a linear layer worth compressing."""

    def __init__(self) -> None:
        super().__init__()
        custom_ops.register()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.GELU("tanh"))
        self.norm = nn.GroupNorm(1, 32)
        self.qkv = nn.Conv2d(32, 96, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(image))
        q, k, v = (t.flatten(2).unflatten(1, (2, 16)).mT for t in self.qkv(x).chunk(3, 1))
        y = torch.ops.edgekit.kernel_linear_attention(q, k, v, "relu", 1e-6)
        return self.head(y.mT.flatten(1, 2).mean(-1) + x.mean((2, 3)))


class Rows(nn.Module):
    """Sums of rows by index, for any number of each."""

    def forward(self, table: torch.Tensor, index: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = nn.functional.embedding(index, table)
        return {"sums": rows.sum(1), "largest": rows.amax(-1).argmax(-1)}


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def export(module: nn.Module, folder: Path, **options: Any) -> Any:
    return edgekit.export(module, "coreml", folder, **options)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("coreml")
    return export(small(), folder, shapes="image:1x3x18x14", preprocessing=RECIPE, labels=LABELS)


class TestBundle:
    def test_manifest_says_what_the_package_is_and_what_checked_it(self, bundle: Any) -> None:
        manifest, info = bundle.manifest, bundle.manifest.coreml
        assert bundle.path.name == "Small-coreml.edge"
        assert (manifest.target, manifest.precision, manifest.opsets) == ("coreml", "fp16", {"coreml": 7})
        assert (info.deployment_target, info.compute_precision, info.layout) == ("iOS16", "fp16", "standard")
        assert (info.image_input, info.label_outputs) == ("image", ("classLabel", "classLabel_probs"))
        assert {name: manifest.files[name].role for name in (ITEM_INFO, MODEL, WEIGHTS)} == {
            ITEM_INFO: "package",
            MODEL: "model",
            WEIGHTS: "weights",
        }
        assert manifest.ops["conv"] == 2
        assert "const" not in manifest.ops
        assert bundle.report()["export"]["lowered"] == {"kernel_linear_attention": 1}
        assert manifest.verification["runtime"] == "coreml-reference"
        assert "Apple" in manifest.verification["not_run"]
        (output,) = manifest.verification["outputs"]
        assert 1e-5 < output["rel_l2"] < OUTPUT_REL_L2["fp16"]
        assert set(manifest.tools) == {"edgekit", "python", "torch", "coremltools", "numpy"}

    def test_it_takes_levels_and_names_the_class(self, bundle: Any) -> None:
        """An image through the bundle's own preprocessing is what PyTorch makes of the normalised image."""
        rows, columns, channels = np.indices((18, 14, 3))
        image = (13 * rows + 5 * columns + 60 * channels).clip(0, 255).astype(np.uint8)
        (spec,) = bundle.manifest.inputs
        assert (spec.dtype, spec.layout, spec.preprocessing.pixels) == ("uint8", "NCHW", True)
        session = edgekit.load(bundle, backend="coreml-reference")
        got = session.run({"image": spec.preprocessing(image)})["output"]
        with torch.no_grad():
            wanted = small()(torch.from_numpy(RECIPE(image))).numpy()
        assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < OUTPUT_REL_L2["fp16"]
        assert session.predict(image)[0].label == LABELS[int(wanted.argmax())]

    def test_verify_rebuilds_the_model_as_one_that_takes_levels(self, bundle: Any) -> None:
        result = edgekit.verify(bundle, model=small(), backend="coreml-reference", inputs=2)
        assert [bool(check) for check in result.checks] == [True, True]

    def test_the_package_says_where_it_is_from(self, bundle: Any) -> None:
        from coremltools import proto

        spec = proto.Model_pb2.Model()
        spec.ParseFromString(bundle.read(MODEL))
        metadata = dict(spec.description.metadata.userDefined)
        assert metadata["com.github.edgekit.weights_sha256"] == bundle.manifest.model.weights.sha256
        assert metadata["com.github.edgekit.classes"] == '["ape", "bee", "cat", "dog", "eel"]'
        assert not [key for key in metadata if "date" in key]
        assert spec.description.predictedFeatureName == "classLabel"
        (image,) = spec.description.input
        assert (image.type.imageType.width, image.type.imageType.height) == (14, 18)
        assert "(x/255 - mean)/std" in image.shortDescription
        text = bundle.read(MODEL)
        assert str(Path(__file__).parent).encode() not in text  # no path of the exporting machine
        assert b"site-packages" not in text

    def test_an_edited_package_is_refused(self, bundle: Any, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(bundle.path, tmp_path / "edited.edge"))
        content = bytearray((copy / WEIGHTS).read_bytes())
        content[-1] ^= 1
        (copy / WEIGHTS).write_bytes(content)
        with pytest.raises(BundleError, match=r"weight\.bin was changed after export"):
            edgekit.load(copy, backend="coreml-reference")
        (copy / MODEL).write_bytes((copy / MODEL).read_bytes()[:-9])
        with pytest.raises(BundleError, match=r"model\.mlmodel is truncated"):
            edgekit.Bundle.open(copy)


def figures(bundle: Any) -> tuple[float, int]:
    return max(output["rel_l2"] for output in bundle.manifest.verification["outputs"]), bundle.size_of_model


class TestPrecisions:
    def test_fp32_is_as_exact_as_onnx(self, tmp_path: Path) -> None:
        made = export(small(), tmp_path, shapes="image:1x3x18x14", precision="fp32", input="tensor")
        assert made.path.name == "Small-coreml-fp32.edge"
        assert made.manifest.coreml.compute_precision == "fp32"
        assert made.manifest.inputs[0].dtype == "float32"
        assert figures(made)[0] < OUTPUT_REL_L2["fp32"]

    @pytest.mark.parametrize(
        ("precision", "target", "worst", "form"),
        [
            ("int8", None, 0.03, "constexpr_affine_dequantize"),
            ("int8", "iOS18", 0.03, "constexpr_blockwise_shift_scale"),
            ("int4", None, 0.2, "constexpr_blockwise_shift_scale"),
            ("palette4", None, 0.2, "constexpr_lut_to_dense"),
            ("palette6", "iOS17", 0.1, "constexpr_lut_to_dense"),
            ("palette8", "iOS18", 0.03, "constexpr_lut_to_dense"),
        ],
        ids=["int8", "int8-iOS18", "int4", "palette4", "palette6-iOS17", "palette8-iOS18"],
    )
    def test_weights_of_few_bits(
        self, bundle: Any, tmp_path: Path, precision: str, target: str | None, worst: float, form: str
    ) -> None:
        made = export(
            small(),
            tmp_path,
            shapes="image:1x3x18x14",
            preprocessing=RECIPE,
            labels=LABELS,
            precision=precision,
            deployment_target=target,
        )
        info = made.manifest.coreml
        assert info.deployment_target == (target or ("iOS18" if precision == "int4" else "iOS16"))
        assert made.manifest.ops[form] == 2  # of the stem and of q, k and v: the head is too small
        assert info.compression["weights"] == precision
        assert 0.8 < info.compression["share"] < 1
        assert 1e-4 < figures(made)[0] < worst
        before = made.report()["precision_before"]
        assert before["rel_l2"] < OUTPUT_REL_L2["fp16"]
        assert before["size"] == figures(bundle)[1] if target is None and precision != "int4" else True


class TestShapes:
    SHAPES = ("table:Vx4", "index:SxW@int64<V")

    def test_ranges_and_indices(self, tmp_path: Path) -> None:
        made = export(Rows(), tmp_path, shapes=self.SHAPES, precision="fp32")
        manifest = made.manifest
        assert [(spec.name, spec.dtype, spec.index_of) for spec in manifest.inputs] == [
            ("table", "float32", None),
            ("index", "int32", "V"),
        ]
        assert [(spec.name, spec.dtype) for spec in manifest.outputs] == [("sums", "float32"), ("largest", "int32")]
        assert manifest.coreml.input_dtypes == {"index": "int64"}
        assert {name: (limits.min, limits.max) for name, limits in manifest.dims.items()}["V"] == (1, 4096)
        session = edgekit.load(made, backend="coreml-reference")
        table = np.random.default_rng(0).standard_normal((7, 4), dtype=np.float32)
        index = np.array([[0, 6, 3], [2, 2, 5]], np.int32)
        got = session.run({"table": table, "index": index})
        assert np.allclose(got["sums"], table[index].sum(1), atol=1e-6)
        assert edgekit.verify(made, model=Rows(), backend="coreml-reference")

    def test_listed_sizes(self, tmp_path: Path) -> None:
        module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        made = export(module, tmp_path, shapes="x:1x2xSxS | S=8/12/20", precision="fp32")
        assert made.manifest.dims["S"].values == (8, 12, 20)
        assert edgekit.verify(made, model=module, backend="coreml-reference", inputs=3)
        session = edgekit.load(made, backend="coreml-reference")
        with pytest.raises(InputError, match="S in 8/12/20"):
            session.run({"x": np.zeros((1, 2, 9, 9), np.float32)})
        from coremltools import proto

        spec = proto.Model_pb2.Model()
        spec.ParseFromString(made.read(MODEL))
        shapes = spec.description.input[0].type.multiArrayType.enumeratedShapes.shapes
        assert [list(shape.shape) for shape in shapes] == [[1, 2, 8, 8], [1, 2, 12, 12], [1, 2, 20, 20]]

    @pytest.mark.parametrize(
        ("shapes", "options", "kind", "words"),
        [
            (["x:1xN | 5000.."], {}, ShapeError, "needs an upper bound for N"),
            (["x:SxN | S=1/2"], {}, ShapeError, "lists all sizes of an input or none"),
            (["x:SxN | S=1/2, N=2/3", "y:SxN | S=1/2, N=2/3"], {}, InputError, "at least iOS18"),
            (["x:SxN@float64"], {}, InputError, "is float64; Core ML takes float32"),
            (["x.1:4x4"], {}, InputError, "takes names of letters"),
            (["x:4x4"], {"input": "image"}, InputError, "can take no Core ML image"),
        ],
        ids=["unbounded", "half listed", "two listed", "float64", "name", "no image"],
    )
    def test_what_core_ml_has_not(
        self, tmp_path: Path, shapes: list[str], options: Any, kind: type[EdgekitError], words: str
    ) -> None:
        class Sum(nn.Module):
            def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
                return sum(tensors[1:], tensors[0] * 2)

        with pytest.raises(kind, match=words):
            export(Sum(), tmp_path, shapes=shapes, **options)
        assert not list(tmp_path.iterdir())


class TestPrograms:
    """What torch.export.save wrote."""

    @pytest.mark.parametrize("sizes", [None, {0: torch.export.Dim("b", min=1, max=6)}], ids=["fixed", "batch"])
    def test_a_pt2_file(self, tmp_path: Path, sizes: Any) -> None:
        module = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()
        program = torch.export.export(
            module, (torch.randn(2, 3, 6, 7),), dynamic_shapes=None if sizes is None else (sizes,)
        )
        torch.export.save(program, tmp_path / "net.pt2")
        made = edgekit.export(tmp_path / "net.pt2", "coreml", tmp_path)
        (spec,) = made.manifest.inputs
        assert spec.shape[0] == 2 if sizes is None else isinstance(spec.shape[0], str)
        assert edgekit.verify(made, model=module, inputs=2)


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "kind", "words"),
        [
            (("int4", "iOS16"), InputError, "int4 needs a deployment target of at least iOS18, and iOS16 was asked"),
            (("fp16", "iOS15"), UnknownNameError, "unknown deployment target 'iOS15'"),
            (("fp16", None, "nhwc"), UnknownNameError, "unknown layout 'nhwc'"),
            (("fp16", None, "standard", "video"), UnknownNameError, "unknown kind of input 'video'"),
        ],
        ids=["too old", "no target", "no layout", "no input"],
    )
    def test_refused(self, arguments: tuple[Any, ...], kind: type[EdgekitError], words: str) -> None:
        with pytest.raises(kind, match=words):
            coreml_options(*arguments)

    @pytest.mark.parametrize(
        ("target", "options", "words"),
        [
            ("coreml", {"opset": 20}, "has no opset"),
            ("coreml", {"kernels": ["aarch64"]}, "holds no kernels"),
            ("coreml", {"calibration": "digits", "precision": "int8"}, "for onnx in int8"),
            ("coreml", {"tune": 3}, "for the target tvm"),
            ("onnx", {"deployment_target": "iOS17"}, "for the target coreml"),
            ("onnx", {"layout": "ane"}, "for the target coreml"),
            ("onnx", {"precision": "palette4"}, "onnx is exported as fp32, fp16, int8, int4"),
            ("tvm", {"precision": "palette4"}, "computes in fp32"),
        ],
    )
    def test_of_another_target(self, tmp_path: Path, target: str, options: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            edgekit.export("shvit_digits", target, tmp_path, **options)


class Unconvertible(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) + 1


class TestFailures:
    def test_an_op_that_cannot_be_converted_is_named_with_its_line(self, tmp_path: Path) -> None:
        words = r"the op .*bessel_j0.* \(test_coreml\.py:\d+: return torch\.special\.bessel_j0\(x\) \+ 1\)"
        with pytest.raises(ExportError, match=words) as caught:
            export(Unconvertible(), tmp_path, shapes="x:2x3")
        assert "export to onnx" in str(caught.value)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (
                lambda x: torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a - 1, (x,)),
                r"the op cond.*test_coreml\.py:\d+: .*no branches and loops of torch\.export\. Compute both",
            ),
            (
                lambda x: x.reshape(1, 1, 1, 2, 1, 3) * 2,
                r"the op aten\.(view|reshape)\.default \(test_coreml\.py:\d+: .*rank <= 5.*tensor\. Write that part",
            ),
        ],
        ids=["branch", "six axes"],
    )
    def test_what_the_converter_says_nothing_of_is_found_too(self, tmp_path: Path, function: Any, words: str) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return function(x)

        with pytest.raises(ExportError, match=words):
            export(Model(), tmp_path, shapes="x:2x3")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("function", "words"),
        [
            (lambda x: x, "the output output is the input x unchanged"),
            (lambda x: (lambda y: (y, y))(x + 1), "is the same tensor as another"),
            (lambda x: x > 0, "is bool; Core ML gives"),
        ],
        ids=["identity", "twice", "bool"],
    )
    def test_outputs_that_core_ml_has_not(self, tmp_path: Path, function: Any, words: str) -> None:
        class Model(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return function(x)

        with pytest.raises(ExportError, match=words):
            export(Model(), tmp_path, shapes="x:2x3")
        assert not list(tmp_path.iterdir())

    def test_a_wrong_package_is_not_left_behind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from edgekit.export import coreml_bundle

        write = coreml_bundle.describe

        def spoiled(spec: Any, *args: Any, **options: Any) -> None:
            write(spec, *args, **options)
            body = spec.mlProgram.functions["main"]
            (op,) = [op for op in body.block_specializations[body.opset].operations if op.type == "relu"]
            op.type = "sigmoid"

        monkeypatch.setattr(coreml_bundle, "describe", spoiled)
        with pytest.raises(ExportError, match="does not answer as PyTorch does"):
            export(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), tmp_path, shapes="x:2x3")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("later", [None, ValueError("torch is missing")], ids=["swallowed", "error"])
def test_an_interrupt_is_never_lost(later: Exception | None) -> None:
    """Core ML Tools tries imports under a bare `except:`."""

    def careless() -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        if later is not None:
            raise later

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), quiet_tools():
            careless()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_source_lines_are_the_users_own() -> None:
    trace = (
        'File "/home/me/nets/net.py", line 12, in forward\n    y = block(x)\n'
        'File "/usr/lib/site-packages/torch/nn/functional.py", line 99, in relu\n    return x.relu()\n'
    )
    assert source_line(trace) == "net.py:12: y = block(x)"
    assert source_line(None) == ""


ONCE = """
import sys, torch
from pathlib import Path
from torch import nn
import edgekit
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 5))
edgekit.export(net, "coreml", Path(sys.argv[1]), shapes="x:1x40", labels=list("abcde"), precision="palette4")
"""


def test_equal_exports_give_equal_bytes_in_other_processes_too(tmp_path: Path) -> None:
    """Sets and dictionaries of another hash seed, identifiers and dates must not show."""
    contents = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", ONCE, str(folder)], check=True, env=environment, capture_output=True)
        (made,) = folder.iterdir()
        files = sorted(path for path in made.rglob("*") if path.is_file() and path.name != "report.json")
        contents.append({str(path.relative_to(made)): path.read_bytes() for path in files})
    assert contents[0] == contents[1]
