"""The models of the stand-in."""

import json
import os
from pathlib import Path

import numpy as np

import coremltools


class MLState:
    def __init__(self, states):
        self._values = {state["name"]: np.zeros(state["shape"], np.float16) for state in states}

    def read_state(self, name):
        return self._values[name].astype(np.float32)

    def write_state(self, name, value):
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.float32
        assert value.shape == self._values[name].shape
        self._values[name] = value.astype(np.float16)


class MLModel:
    def __init__(self, model, compute_units=coremltools.ComputeUnit.ALL, function_name=None):
        manifest = json.loads((Path(model).parent / "manifest.json").read_text())
        self._manifest, self._function = manifest, function_name
        info = manifest["coreml"]
        assert (function_name is None) == (len(info["functions"]) == 1)
        assert function_name is None or function_name in info["functions"]
        fault, _, where = os.environ.get("FAKE_COREML", "").partition(":")
        self._fault = fault if where in ("", compute_units.name) else ""
        if self._fault == "fails":
            raise RuntimeError("Error in declaring network:\n  no such unit")
        if self._fault == "interrupt":
            raise KeyboardInterrupt

    def make_state(self):
        if self._fault == "stateless":
            raise RuntimeError("This model was not loaded with the Core ML Framework. Cannot get state.")
        return MLState(self._manifest["coreml"]["states"])

    def predict(self, data, state=None):
        info = self._manifest["coreml"]
        if info["states"]:
            assert state is not None
            total = sum(float(array.astype(np.float64).sum()) for array in data.values())
            assert {array.dtype for array in data.values()} == {np.dtype(np.int32)}
            for entry in info["states"]:
                held = state.read_state(entry["name"])
                total += float(held.astype(np.float64).sum())
                state.write_state(entry["name"], held + np.float32(1))
            answer = {"logits": (total * np.arange(258))[None, None].astype(np.float32)}
        elif "image" in data:
            image = data.pop("image")  # as coremltools changes what it gets
            if info["image_input"]:
                assert image.mode in ("RGB", "L")
            scores = np.asarray(image, np.float64).mean() * np.array([[1, 2, 3]])
            answer = {"logits": scores.astype(np.float32), "classLabel": "cat", "probabilities": {"cat": 1.0}}
        else:
            answer = {"out": data["features"][:, :3] * 2, "out_": np.array([7, 0], np.int32)}
        first = next(iter(answer))
        if self._fault == "differs":
            answer[first] = answer[first] * np.float32(1.25)
        if self._fault == "nan":
            answer[first] = answer[first] * np.float32(np.nan)
        if self._fault == "no-output":
            del answer[first]
        return answer

    def get_compiled_model_path(self):
        return f"{self._function or 'main'}.mlmodelc"
