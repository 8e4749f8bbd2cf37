"""Run `coreml` bundles with Core ML itself, on a Mac, through coremltools.

No run of this file on a Mac is on record: it was written to coremltools' documentation and tested with a stand-in.
https://apple.github.io/coremltools/docs-guides/source/model-prediction.html
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgekit.errors import BundleError, InputError, MissingDependencyError, UnknownNameError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import StateSpec
from edgekit.runtime.coreml_reference import unpacked
from edgekit.runtime.mil.loading import quiet_import
from edgekit.runtime.session import Array, Session

COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


class CoreMLSession(Session):
    """A package in Core ML behind the `Session` contract; see `edgekit.load`. macOS alone.

    Attributes:
        compute_units: which processors Core ML may choose from.
    """

    backend = "coreml"

    def __init__(self, bundle: Bundle, *, threads: int | None = None, compute_units: str = "ALL") -> None:
        super().__init__(bundle, threads)
        if compute_units not in COMPUTE_UNITS:
            raise UnknownNameError("compute units", compute_units, COMPUTE_UNITS)
        info = bundle.manifest.coreml
        if info is None:
            raise BundleError(f"{bundle.path.name} says nothing of its Core ML package; export it again")
        if threads is not None:
            raise InputError("Core ML chooses its own threads; leave threads out for this backend")
        self.compute_units = compute_units
        self._info = info
        self._state_of: tuple[StateSpec, ...] = info.states
        start = time.perf_counter()
        tools = import_coremltools()
        package, folder = unpacked(bundle)
        if folder is not None:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # Core ML refuses a function's name for the package of one function.
        function = info.function if len(info.functions) > 1 else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._model = tools.models.MLModel(
                    str(package), compute_units=getattr(tools.ComputeUnit, compute_units), function_name=function
                )
        except Exception as error:  # Core ML's errors arrive as built-in ones of several kinds
            raise BundleError(f"Core ML cannot load {bundle.name}: {_first_line(error)}") from error
        self.load_seconds = time.perf_counter() - start

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given: dict[str, Any] = dict(inputs)
        arguments: dict[str, Any] = {}
        state = None
        try:
            if self._state_of:
                state = self._model.make_state()
                for spec in self._state_of:
                    state.write_state(spec.name, np.asarray(given.pop(spec.input), np.float32))
            for name, array in given.items():
                arguments[name] = self._picture(array) if name == self._info.image_input else _passed(array)
            found = dict(self._model.predict(arguments) if state is None else self._model.predict(arguments, state))
            for spec in self._state_of:
                found[spec.output] = state.read_state(spec.name)  # type: ignore[union-attr]
        except InputError:
            raise
        except Exception as error:  # see __init__
            raise InputError(f"Core ML could not run {self.bundle.name}: {_first_line(error)}") from error
        missing = [spec.name for spec in self.outputs if spec.name not in found]
        if missing:
            raise InputError(f"Core ML gave no output {missing[0]!r}; it gave {', '.join(sorted(found))}")
        return {spec.name: np.asarray(found[spec.name]).astype(spec.dtype, copy=False) for spec in self.outputs}

    def _picture(self, array: Array) -> Any:
        """uint8 `[1, C, H, W]` as a Pillow image. Core ML takes RGB and reorders it for a package that wants BGR."""
        from PIL import Image

        if array.ndim != 4 or array.shape[0] != 1 or array.shape[1] not in _MODES or array.dtype != np.uint8:
            raise InputError(f"an image for Core ML is uint8 [1, 1 or 3, H, W]; got {array.dtype}{list(array.shape)}")
        levels = array[0].transpose(1, 2, 0)
        recipe = next(s.preprocessing for s in self.inputs if s.name == self._info.image_input)
        if recipe is not None and recipe.color == "bgr":
            levels = levels[..., ::-1]
        levels = np.ascontiguousarray(levels)
        return Image.fromarray(levels[..., 0] if array.shape[1] == 1 else levels)


def import_coremltools() -> Any:
    """coremltools on a Mac. Raises `InputError` elsewhere, `MissingDependencyError` where it is not installed."""
    if sys.platform != "darwin":
        raise InputError(
            "Core ML runs on macOS alone. Here, backend='coreml-reference' (on the command line --backend "
            "coreml-reference) says what the package computes; on a Mac, run check_on_mac.py of the bundle"
        )
    try:
        with quiet_import():
            import coremltools
    except ImportError as error:
        raise MissingDependencyError("coremltools", "coreml", "running a coreml bundle") from error
    return coremltools


def _passed(array: Array) -> Array:
    """Core ML's arrays are int32 and floats; a bool has no type of its own there."""
    return array.astype(np.int32) if array.dtype.kind in "iub" else np.ascontiguousarray(array)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
