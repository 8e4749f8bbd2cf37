"""The tvm target: the library answers as PyTorch does, our kernels serve our ops, and the rest is refused."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import ExportError, InputError, MissingDependencyError, UnknownNameError
from edgekit.runtime.kernel_library import Host

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from edgekit import custom_ops
from edgekit.export import tvm as tvm_target
from edgekit.export.tvm_schedule import Registers, Tile, tiles
from edgekit.kernels.tvm.targets import ARCHS

HERE = Host("x86_64", "linux", frozenset(ARCHS["x86-64-v3"].features), "0", None)


class Mixer(nn.Module):
    """A small network with all that a tvm bundle is about: convolutions, an op of ours, a normal operator tail."""

    def __init__(self, feature_map: str = "relu") -> None:
        super().__init__()
        custom_ops.register()
        self.feature_map = feature_map
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.GELU())
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.qkv = nn.Conv2d(24, 72, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.stem(image))
        q, k, v = (t.flatten(2).unflatten(1, (2, 12)).mT for t in self.qkv(x).chunk(3, 1))
        y = torch.ops.edgekit.kernel_linear_attention(q, k, v, self.feature_map, 1e-6)
        return self.head(y.mT.flatten(1, 2).mean(-1) + x.mean((2, 3)))


@pytest.fixture(scope="module")
def mixer(tmp_path_factory):
    torch.manual_seed(0)
    return edgekit.export(Mixer().eval(), "tvm", tmp_path_factory.mktemp("tvm"), shapes="image:1x3x18x14")


class TestBundle:
    def test_manifest_names_the_kernels_and_the_arch(self, mixer):
        manifest = mixer.manifest
        assert mixer.path.name == "Mixer-tvm.edge"
        assert (manifest.target, manifest.precision, manifest.model_file) == ("tvm", "fp32", "model.so")
        assert manifest.verification["checked"] is True
        assert [(op.name, op.nodes, op.kernels) for op in manifest.custom_ops] == [
            ("KernelLinearAttention", 1, ("tvm",))
        ]
        assert manifest.ops["edgekit::KernelLinearAttention"] == 1
        assert manifest.ops["nn.conv2d"] == 3
        assert "apache-tvm" in manifest.tools
        build = json.loads(mixer.read("build.json"))
        assert build["arch"] == tvm_target.choose_arch(None).name
        assert [entry["op"] for entry in build["kernels"]] == ["KernelLinearAttention"]

    def test_kernels_for_c_are_in_it(self, mixer):
        arch = tvm_target.choose_arch(None).name
        names = {name for name, entry in mixer.manifest.files.items() if entry.role == "kernels"}
        assert f"kernels/{arch}/edgekit_kernels.h" in names
        assert f"kernels/{arch}/edgekit_kernel_linear_attention.o" in names

    def test_live_verification(self, mixer):
        torch.manual_seed(0)
        assert edgekit.verify(mixer, model=Mixer().eval(), backend="tvm")

    def test_equal_exports_are_equal(self, mixer, tmp_path):
        torch.manual_seed(0)
        again = edgekit.export(Mixer().eval(), "tvm", tmp_path, shapes="image:1x3x18x14")
        assert again.manifest.files["model.so"] == mixer.manifest.files["model.so"]


class TestOps:
    @pytest.mark.parametrize("feature_map", ["elu1", "identity"])
    def test_feature_maps(self, tmp_path, feature_map):
        bundle = edgekit.export(Mixer(feature_map).eval(), "tvm", tmp_path, shapes="image:1x3x10x10", kernels=[])
        assert bundle.manifest.verification["checked"] is True


class TestShapes:
    def test_dynamic_batch(self, tmp_path):
        torch.manual_seed(0)
        model = Mixer().eval()
        bundle = edgekit.export(model, "tvm", tmp_path, shapes="image:Nx3x10x10 | 1..8", kernels=[])
        assert str(bundle.manifest.outputs[0]) == "output: float32[N, 10]"
        session = edgekit.load(bundle, backend="tvm", threads=1)
        for size in (1, 3, 8):
            image = np.random.default_rng(size).standard_normal((size, 3, 10, 10), dtype=np.float32)
            with torch.no_grad():
                expected = model(torch.from_numpy(image)).numpy()
            np.testing.assert_allclose(session.run({"image": image})["output"], expected, atol=2e-6, rtol=2e-5)

    def test_several_inputs_and_outputs_keep_their_order(self, tmp_path):
        class Two(nn.Module):
            def forward(self, b, a):
                return {"sum": a + 2 * b, "index": (a > b).to(torch.int64)}

        bundle = edgekit.export(Two().eval(), "tvm", tmp_path, shapes=["a:2x5", "b:2x5"])
        a, b = np.ones((2, 5), np.float32), np.zeros((2, 5), np.float32)
        got = edgekit.load(bundle, backend="tvm").run({"a": a, "b": b})
        np.testing.assert_array_equal(got["sum"], a)
        assert got["index"].dtype == np.int64
        assert got["index"].all()

    @pytest.mark.parametrize("features", [1, 2, 37, 131], ids=str)
    def test_awkward_sizes(self, tmp_path, features):
        model = nn.Sequential(nn.Linear(13, features), nn.ReLU(), nn.Linear(features, 1))
        bundle = edgekit.export(model, "tvm", tmp_path, shapes="x:5x13", name="awkward")
        assert bundle.manifest.verification["checked"] is True


class Summing(nn.Module):
    """Rows chosen by `source`, added up in those that `target` names."""

    def forward(self, x, source, target):
        zeros = torch.zeros_like(x)
        return zeros.index_put((target,), x.index_select(0, source), accumulate=True)


class TestSegmentSums:
    def test_agree_at_every_size(self, tmp_path):
        shapes = ["x:Vx3 | 1..40", "source:P@int64<V", "target:P@int64<V"]
        bundle = edgekit.export(Summing(), "tvm", tmp_path, shapes=shapes)
        session = edgekit.load(bundle, backend="tvm")
        inputs = session.random_inputs(sizes={"V": 7, "P": 50})
        expected = np.zeros((7, 3), np.float32)
        np.add.at(expected, inputs["target"], inputs["x"][inputs["source"]])
        np.testing.assert_allclose(session.run(inputs)["output"], expected, atol=1e-5)

    def test_rows_counted_from_the_end(self, tmp_path):
        class Last(nn.Module):
            def forward(self, x, at):
                return x.index_put((at - 2,), torch.zeros(1, 3))

        bundle = edgekit.export(Last(), "tvm", tmp_path, shapes=["x:4x3", "at:1@int64<4"])
        x = np.ones((4, 3), np.float32)
        answer = edgekit.load(bundle, backend="tvm").run({"x": x, "at": np.array([0])})["output"]
        assert answer.sum(1).tolist() == [3, 3, 0, 3]

    @pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1)], ids=str)
    def test_values_that_torch_repeats(self, tmp_path, shape):
        class Put(nn.Module):
            def forward(self, x, at):
                return x.index_put((at,), torch.arange(6.0)[: math.prod(shape)].reshape(shape) + 7)

        bundle = edgekit.export(Put(), "tvm", tmp_path, shapes=["x:4x3", "at:2@int64<4"])
        x, at = np.zeros((4, 3), np.float32), np.array([3, 1])
        answer = edgekit.load(bundle, backend="tvm").run({"x": x, "at": at})["output"]
        np.testing.assert_array_equal(answer, Put()(torch.from_numpy(x), torch.from_numpy(at)).numpy())


class TestActivations:
    @pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=["gelu", "gelu_tanh", "silu"])
    def test_polynomials(self, tmp_path, layer):
        bundle = edgekit.export(layer, "tvm", tmp_path, shapes="x:1x1007", name="layer")
        x = np.linspace(-40, 40, 1007, dtype=np.float32)[None]
        x[0, 5] = np.nan
        got = edgekit.load(bundle, backend="tvm").run({"x": x})["output"]
        expected = layer(torch.from_numpy(x).double()).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-6)


class TestArch:
    def test_the_best_that_the_processor_has(self):
        assert tvm_target.choose_arch(None, HERE).name == "x86-64-v3"
        other = Host("riscv64", "linux", frozenset(), "0", None)
        with pytest.raises(InputError, match="--arch"):
            tvm_target.choose_arch(None, other)

    def test_unknown(self, tmp_path):
        with pytest.raises(UnknownNameError, match="x86-64-v3"):
            edgekit.export(Mixer().eval(), "tvm", tmp_path, shapes="image:1x3x10x10", arch="x86-64-v5")

    def test_another_machine_is_not_checked_and_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tvm_target, "this_host", lambda: HERE)
        bundle = edgekit.export(
            nn.Linear(4, 3),
            "tvm",
            tmp_path,
            shapes="x:1x4",
            name="other",
            arch="x86-64-v4",
            tolerance=0.01,
            progress=(said := []).append,
        )
        assert bundle.manifest.verification["checked"] is False
        assert bundle.manifest.verification["tolerance"] == 0.01  # for the check on its device
        assert "x86-64-v4" in bundle.manifest.verification["reason"]
        assert any(step.startswith("not checked: compiled for x86-64-v4") for step in said)

    @pytest.mark.slow
    def test_aarch64(self, tmp_path):
        bundle = edgekit.export(Mixer().eval(), "tvm", tmp_path, shapes="image:1x3x18x14", arch="aarch64")
        assert bundle.read("model.so")[18:20] == b"\xb7\x00"  # ELF's number of the machine: AArch64
        if tvm_target.choose_arch(None).name != "aarch64":
            assert bundle.manifest.verification["checked"] is False


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"precision": "fp16"}, "computes in fp32"),
            ({"opset": 20}, "has no opset"),
            ({"tune": -1}, "at least 0"),
            ({"kernels": ["x86-64-v3"]}, "uses no ops of edgekit's own"),
        ],
        ids=["precision", "opset", "tune", "kernels"],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(InputError, match=message):
            edgekit.export(nn.Linear(4, 3), "tvm", tmp_path, shapes="x:1x4", name="m", **options)
        assert not list(tmp_path.rglob("*.edge"))

    def test_options_of_tvm_for_onnx(self, tmp_path):
        with pytest.raises(InputError, match="target tvm"):
            edgekit.export(nn.Linear(4, 3), "onnx", tmp_path, shapes="x:1x4", arch="x86-64-v3")

    def test_operators_that_tvm_does_not_know(self, tmp_path):
        class Odd(nn.Module):
            def forward(self, x):
                return torch.special.bessel_j0(x)

        with pytest.raises(ExportError, match=r"it knows no .*bessel_j0"):
            edgekit.export(Odd(), "tvm", tmp_path, shapes="x:1x4")

    def test_without_tvm(self, tmp_path, monkeypatch):
        for name in [name for name in sys.modules if name.startswith(("edgekit.export.tvm", "edgekit.kernels.tvm"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "tvm", None)
        with pytest.raises(MissingDependencyError, match=r"edgekit\[tvm\]"):
            edgekit.export(nn.Linear(4, 3), "tvm", tmp_path, shapes="x:1x4", name="m")


class TestTiles:
    WIDE = Registers(16, 32)

    def test_a_tile_fits_the_registers(self):
        for registers in (self.WIDE, Registers(8, 16), Registers(4, 32)):
            for extents in [(1, 14, 14, 96), (49, 224), (1, 1000), (7, 13, 17), (1, 1, 1), (None, 12, 64)]:
                found = tiles(extents, registers)
                assert found
                for tile in found:
                    vectors = -(-tile.lanes // registers.lanes)
                    assert (np.prod(tile.rows, dtype=int) + 1) * vectors < registers.count + vectors
                    assert all(e is None or e % t == 0 for e, t in zip(extents, (*tile.rows, tile.lanes), strict=True))

    def test_the_likeliest(self):
        assert tiles((1, 14, 14, 96), self.WIDE)[:2] == [Tile((1, 1, 7), 48), Tile((1, 1, 7), 32)]
        assert tiles((None, 1, 1, 64), self.WIDE)[0].rows == (1, 1, 1)


@pytest.mark.slow
class TestZoo:
    @pytest.mark.parametrize(
        "name",
        ["shvit_digits", "care_s0", "hgnn_digits", pytest.param("dynamicvis_digits", marks=pytest.mark.slow)],
    )
    def test_models(self, tmp_path, name):
        bundle = edgekit.export(name, "tvm", tmp_path, kernels=[])
        assert bundle.manifest.verification["checked"] is True

    def test_tuning_keeps_the_answers(self, tmp_path):
        torch.manual_seed(0)
        bundle = edgekit.export(Mixer().eval(), "tvm", tmp_path, shapes="image:1x3x34x34", tune=8, kernels=[])
        assert bundle.manifest.verification["checked"] is True
        tuning = bundle.report()["tuning"]
        assert 0 < tuning["measured"] <= tuning["trials"] == 8
        assert all(record["best_us"] > 0 for record in tuning["records"])
