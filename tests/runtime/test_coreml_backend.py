"""Sessions on coreml bundles: the reference runtime here, and Core ML itself with a stand-in for its model class."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import BundleError, InputError, MissingDependencyError, UnknownNameError
from edgekit.runtime import coreml_backend
from edgekit.runtime.bundle import Bundle, BundleWriter
from edgekit.runtime.coreml_backend import CoreMLSession
from edgekit.runtime.coreml_info import ITEM_INFO, MODEL, WEIGHTS, CoreMLInfo, StateSpec
from edgekit.runtime.coreml_reference import CoreMLReferenceSession
from edgekit.runtime.manifest import Manifest, ModelInfo, TensorSpec, WeightsInfo
from edgekit.runtime.preprocess import ImagePreprocessing

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

WEIGHT = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
ROLES = {ITEM_INFO: "package", MODEL: "model", WEIGHTS: "weights"}


def bundle_of(package: Path, folder: Path, info: CoreMLInfo, inputs: Any, outputs: Any) -> Bundle:
    manifest = Manifest(
        name="dense",
        model=ModelInfo("test:dense", WeightsInfo("random", "0" * 64, seed=0), parameters=12),
        target="coreml",
        precision="fp16",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        coreml=info,
    )
    with BundleWriter(folder / "dense-coreml.edge") as writer:
        for name, role in ROLES.items():
            source = package / Path(name).relative_to("model.mlpackage")
            if source.exists():
                writer.add(name, role).write_bytes(source.read_bytes())
        return writer.finish(manifest, {})


@pytest.fixture(scope="module")
def dense(write_package, tmp_path_factory) -> Bundle:
    def build(mb: Any, x: Any) -> Any:
        return mb.linear(x=x, weight=WEIGHT.astype(np.float16), bias=np.zeros(4, np.float16), name="y")

    package = write_package({"main": ({"x": ("fp16", (2, 3))}, build)}, "iOS16")
    specs = [TensorSpec("x", "float32", (2, 3))], [TensorSpec("y", "float32", (2, 4))]
    return bundle_of(package, tmp_path_factory.mktemp("dense"), CoreMLInfo("iOS16", 7), *specs)


@pytest.fixture(scope="module")
def stateful(write_package, tmp_path_factory) -> Bundle:
    """Two functions; each adds its input to a state."""

    def build(mb: Any, x: Any, cache: Any) -> Any:
        after = mb.coreml_update_state(state=cache, value=mb.add(x=mb.read_state(input=cache), y=x))
        return mb.mul(x=after, y=np.float16(2), name="y")

    specs = {"x": ("fp16", (2,)), "cache": ("fp16", (2,), "state")}
    package = write_package({"prefill": (specs, build), "decode": (specs, build)}, "iOS18")
    info = CoreMLInfo(
        "iOS18",
        9,
        function="decode",
        functions=("decode", "prefill"),
        states=(StateSpec("cache", "float16", (2,), "past_key_values.0.key", "present.0.key"),),
    )
    inputs = [TensorSpec("x", "float32", (2,)), TensorSpec("past_key_values.0.key", "float16", (2,))]
    outputs = [TensorSpec("y", "float32", (2,)), TensorSpec("present.0.key", "float16", (2,))]
    return bundle_of(package, tmp_path_factory.mktemp("stateful"), info, inputs, outputs)


X = np.arange(6, dtype=np.float32).reshape(2, 3)


class TestReference:
    def test_default_away_from_a_mac(self, dense, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        session = edgekit.load(dense)
        assert isinstance(session, CoreMLReferenceSession)
        assert (session.backend, session.interpreter.numerics) == ("coreml-reference", "typed")
        result = session.run({"x": X})
        assert result["y"].dtype == np.float32
        np.testing.assert_allclose(result["y"], X @ WEIGHT.T, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("mode", ["fp32", "fp16sum"])
    def test_modes(self, dense, mode):
        session = edgekit.load(dense, backend=f"coreml-reference-{mode}")
        assert (session.backend, session.interpreter.numerics) == (f"coreml-reference-{mode}", mode)
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ WEIGHT.T, rtol=5e-3, atol=5e-3)

    def test_states_are_inputs_and_outputs(self, stateful):
        session = edgekit.load(stateful, backend="coreml-reference")
        cache = np.array([1, 2], np.float16)
        result = session.run({"x": np.array([10, 20], np.float32), "past_key_values.0.key": cache})
        assert result["present.0.key"].tolist() == [11, 22]
        assert result["present.0.key"].dtype == np.float16
        assert result["y"].tolist() == [22, 44]
        assert cache.tolist() == [1, 2]

    def test_packed(self, dense, tmp_path):
        session = edgekit.load(dense.pack(tmp_path / "dense.edge.zip"), backend="coreml-reference")
        folder = session.interpreter.program.path.parent
        np.testing.assert_allclose(session.run({"x": X})["y"], X @ WEIGHT.T, rtol=1e-3, atol=1e-3)
        assert folder.exists()
        del session
        assert not folder.exists()

    def test_sessions_of_one_bundle_share_its_package(self, stateful, tmp_path):
        opened = Bundle.open(stateful.pack(tmp_path / "stateful.edge.zip"))
        other = replace(opened.manifest, coreml=replace(opened.manifest.coreml, function="prefill"))
        decode = edgekit.load(opened, backend="coreml-reference")
        prefill = edgekit.load(Bundle(opened._storage, other), backend="coreml-reference-fp32")
        assert (decode.interpreter.function.name, prefill.interpreter.function.name) == ("decode", "prefill")
        assert prefill.interpreter.program is decode.interpreter.program
        folder = decode.interpreter.program.path.parent
        del decode
        assert folder.exists()
        del prefill
        assert not folder.exists()

    def test_trace(self, dense):
        session, seen = edgekit.load(dense, backend="coreml-reference"), []
        assert isinstance(session, CoreMLReferenceSession)
        session.run_traced({"x": X}, lambda call: seen.append(call.op_type))
        assert seen == ["linear"]

    def test_another_targets_backend(self, dense):
        with pytest.raises(
            InputError, match="onnxruntime cannot run dense-coreml, a bundle for coreml; it takes coreml or"
        ):
            edgekit.load(dense, backend="onnxruntime")
        with pytest.raises(UnknownNameError, match="did you mean coreml-reference"):
            edgekit.load(dense, backend="coreml-referense")

    def test_kernels_at_a_path(self, dense):
        with pytest.raises(InputError, match="leave kernels at 'auto' for a coreml bundle"):
            edgekit.load(dense, kernels="/kernels")

    def test_its_time_is_not_taken(self, dense):
        with pytest.raises(InputError, match=r"time says nothing of a device.*check_on_mac.py"):
            edgekit.profile(dense, backend="coreml-reference")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(
                {"inputs": (TensorSpec("z", "float32", (2, 3)),)}, "names the inputs z; its package has x", id="input"
            ),
            pytest.param({"outputs": (TensorSpec("z", "float32", (2, 4)),)}, "has no output 'z'", id="output"),
            pytest.param(
                {"coreml": CoreMLInfo("iOS16", 7, "decode", ("decode",))}, "names the function 'decode'", id="function"
            ),
        ],
    )
    def test_a_manifest_of_another_package(self, dense, change, message):
        edited = Bundle(dense._storage, replace(dense.manifest, **change))
        with pytest.raises(BundleError, match=message):
            CoreMLReferenceSession(edited)


class StandIn:
    """Records what a session asks of coremltools' MLModel, and computes with numpy."""

    made: list[StandIn]

    def __init__(self, path: str, compute_units: str, function_name: str | None) -> None:
        self.path, self.compute_units, self.function_name = path, compute_units, function_name
        self.calls: list[tuple[dict[str, Any], Any]] = []
        self.made.append(self)

    def make_state(self) -> Any:
        held: dict[str, np.ndarray] = {}
        return types.SimpleNamespace(held=held, write_state=held.__setitem__, read_state=held.__getitem__)

    def predict(self, data: dict[str, Any], state: Any = None) -> dict[str, Any]:
        self.calls.append((data, state))
        if state is not None:
            state.held["cache"] = state.held["cache"] + data["x"]
            return {"y": state.held["cache"] * 2}
        x = np.asarray(data["x"], np.float32)
        return {"y": x @ WEIGHT.T if x.shape == (2, 3) else np.full((2, 4), x.sum()), "classLabel": "cat"}


@pytest.fixture
def core_ml(monkeypatch) -> type[StandIn]:
    """A Mac with coremltools, as far as a session can tell."""
    stand_in = type("MLModel", (StandIn,), {"made": []})
    units = types.SimpleNamespace(**{name: name for name in coreml_backend.COMPUTE_UNITS})
    tools = types.SimpleNamespace(models=types.SimpleNamespace(MLModel=stand_in), ComputeUnit=units)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "coremltools", tools)
    return stand_in


class TestCoreML:
    def test_away_from_a_mac(self, dense, monkeypatch):
        monkeypatch.setattr(sys, "platform", "linux")
        with pytest.raises(InputError, match=r"runs on macOS alone.*coreml-reference.*check_on_mac.py"):
            edgekit.load(dense, backend="coreml")

    def test_without_coremltools(self, dense, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setitem(sys.modules, "coremltools", None)
        with pytest.raises(MissingDependencyError, match=r"edgekit\[coreml\]"):
            edgekit.load(dense)

    def test_default_on_a_mac(self, dense, core_ml):
        session = edgekit.load(dense)
        assert isinstance(session, CoreMLSession)
        np.testing.assert_array_equal(session.run({"x": X})["y"], X @ WEIGHT.T)
        (model,) = core_ml.made
        assert (model.compute_units, model.function_name) == ("ALL", None)
        assert model.path == str(dense.path / "model.mlpackage")

    def test_compute_units(self, dense, core_ml):
        CoreMLSession(dense, compute_units="CPU_ONLY")
        assert core_ml.made[0].compute_units == "CPU_ONLY"
        with pytest.raises(UnknownNameError, match="CPU_AND_NE"):
            CoreMLSession(dense, compute_units="NPU")

    def test_functions_and_states(self, stateful, core_ml):
        session = edgekit.load(stateful)
        cache = np.array([1, 2], np.float16)
        result = session.run({"x": np.array([10, 20], np.float32), "past_key_values.0.key": cache})
        assert core_ml.made[0].function_name == "decode"
        ((data, _state),) = core_ml.made[0].calls
        assert list(data) == ["x"]
        assert (result["present.0.key"].tolist(), result["y"].tolist()) == ([11, 22], [22, 44])
        assert result["present.0.key"].dtype == np.float16

    def test_integers_are_int32(self, dense, core_ml):
        spec = TensorSpec("x", "int64", (2, 3))
        session = CoreMLSession(Bundle(dense._storage, replace(dense.manifest, inputs=(spec,))))
        session.run({"x": X.astype(np.int64)})
        assert core_ml.made[0].calls[0][0]["x"].dtype == np.int32

    @pytest.mark.parametrize(("color", "channels"), [("gray", 1), ("rgb", 3), ("bgr", 3)])
    def test_images(self, dense, core_ml, color, channels):
        """Core ML takes pictures in RGB, whatever order the package wants."""
        numbers = (0.0,) * channels, (1.0,) * channels
        recipe = ImagePreprocessing(size=(4, 5), color=color, mean=numbers[0], std=numbers[1], pixels=True)
        spec = TensorSpec("x", "uint8", (1, channels, 4, 5), "NCHW", recipe)
        info = CoreMLInfo("iOS16", 7, image_input="x")
        session = CoreMLSession(Bundle(dense._storage, replace(dense.manifest, inputs=(spec,), coreml=info)))
        levels = np.random.default_rng(0).integers(0, 256, (1, channels, 4, 5)).astype(np.uint8)
        session.run({"x": levels})
        picture = core_ml.made[0].calls[0][0]["x"]
        assert (picture.mode, picture.size) == ("L" if channels == 1 else "RGB", (5, 4))
        order = [2, 1, 0] if color == "bgr" else list(range(channels))
        seen = np.asarray(picture).reshape(4, 5, channels)
        np.testing.assert_array_equal(seen, levels[0].transpose(1, 2, 0)[..., order])

    def test_threads(self, dense, core_ml):
        with pytest.raises(InputError, match="Core ML chooses its own threads"):
            edgekit.load(dense, threads=2)

    def test_what_core_ml_cannot_do(self, dense, core_ml, monkeypatch):
        session = edgekit.load(dense)

        def fails(self: Any, data: Any, state: Any = None) -> Any:
            raise RuntimeError("Error in declaring network.\nmore")

        monkeypatch.setattr(core_ml, "predict", fails)
        with pytest.raises(InputError, match=r"Core ML could not run dense-coreml: Error in declaring network\.$"):
            session.run({"x": X})
        monkeypatch.setattr(core_ml, "predict", lambda self, data: {"z": 1})
        with pytest.raises(InputError, match="Core ML gave no output 'y'; it gave z"):
            session.run({"x": X})
        monkeypatch.setattr(core_ml, "__init__", fails)
        with pytest.raises(BundleError, match="Core ML cannot load dense-coreml"):
            edgekit.load(dense)
