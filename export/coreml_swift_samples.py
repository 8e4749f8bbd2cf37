"""The bundle's samples for the unit test of its Swift package: one file of numbers and a list of what lies where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgekit.runtime.manifest import Manifest, TensorSpec
    from edgekit.runtime.preprocess import ImagePreprocessing
    from edgekit.runtime.samples import Samples

# A test needs few samples, and an app's repository should not grow by much. The limit is in bytes of a graph's samples.
SAMPLES_PER_GRAPH = 2
LIMIT = 2**20


@dataclass(frozen=True)
class Resources:
    """`listing` is `samples.json`, `data` is `samples.bin`; `image_step` lies between levels of the tests' image."""

    listing: dict[str, Any]
    data: bytes
    image_step: int


class _Numbers:
    """Numbers one after the other, little-endian, each array at a multiple of four bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, name: str, dtype: str, shape: tuple[int, ...], content: bytes | None) -> dict[str, Any]:
        offset = None
        if content is not None:
            self.data += bytes(-len(self.data) % 4)
            offset = len(self.data)
            self.data += content
        return {"name": name, "dtype": dtype, "shape": list(shape), "offset": offset}

    def tensor(self, name: str, values: NDArray[Any]) -> dict[str, Any]:
        """Floats as float32, integers and booleans as int32; zeros take no room."""
        dtype = "float32" if values.dtype.kind == "f" else "int32"
        content = values.astype("<f4" if dtype == "float32" else "<i4").tobytes() if values.any() else None
        return self.add(name, dtype, values.shape, content)

    def image(self, name: str, values: NDArray[Any], recipe: ImagePreprocessing) -> dict[str, Any]:
        """Levels `[1, C, H, W]` in the order of the recipe as rows of pixels, red first."""
        levels = values[0].transpose(1, 2, 0)
        if recipe.color == "bgr":
            levels = levels[..., ::-1]
        return self.add(name, "image", levels.shape, np.ascontiguousarray(levels, np.uint8).tobytes())


def collect(
    manifest: Manifest,
    samples: Samples,
    decode_samples: Samples | None,
    *,
    tolerance: float,
    image: tuple[NDArray[np.float32], int] | None,
) -> Resources:
    """The first samples of each graph, as many as fit into `LIMIT`, and the levels of the tests' own image.

    States are inputs and outputs to edgekit: they are listed apart, by their names in the package and without the slots
    behind the text, which are zeros in a new state. What a run makes of them is left to `check_on_mac.py`.
    """
    numbers = _Numbers()
    info = manifest.coreml
    listed: list[dict[str, Any]] = []
    graphs: list[tuple[str | None, tuple[TensorSpec, ...], Samples]] = [
        (None if info is None or manifest.decode is None else info.function, manifest.inputs, samples)
    ]
    if manifest.decode is not None and decode_samples is not None:
        graphs.append((manifest.decode.function, manifest.decode.inputs, decode_samples))
    for function, specs, given in graphs:
        begin = len(numbers.data)
        for inputs, outputs in list(given)[:SAMPLES_PER_GRAPH]:
            before = len(numbers.data)
            sample = _sample(numbers, manifest, specs, inputs, outputs)
            if len(numbers.data) > begin + LIMIT:
                del numbers.data[before:]
                continue
            listed.append({"function": function, **sample})
    entry, step = None, 1
    if image is not None:
        levels, step = image
        entry = numbers.tensor("image", levels)
    return Resources({"tolerance": tolerance, "samples": listed, "image": entry}, bytes(numbers.data), step)


def _sample(
    numbers: _Numbers,
    manifest: Manifest,
    specs: tuple[TensorSpec, ...],
    inputs: Mapping[str, NDArray[Any]],
    outputs: Mapping[str, NDArray[Any]],
) -> dict[str, Any]:
    info = manifest.coreml
    states = {} if info is None else {state.input: state.name for state in info.states}
    read = set() if info is None else {state.output for state in info.states}
    recipes = {spec.name: spec.preprocessing for spec in specs}
    entries: dict[str, list[dict[str, Any]]] = {"inputs": [], "states": [], "outputs": []}
    for name, values in inputs.items():
        recipe = recipes.get(name)
        if name in states:
            entries["states"].append(numbers.tensor(states[name], _filled(values)))
        elif info is not None and name == info.image_input and recipe is not None:
            entries["inputs"].append(numbers.image(name, values, recipe))
        else:
            entries["inputs"].append(numbers.tensor(name, values))
    for name, values in outputs.items():
        if name not in read:
            entries["outputs"].append(numbers.tensor(name, np.asarray(values, np.float32)))
    return entries


def _filled(state: NDArray[Any]) -> NDArray[Any]:
    """A state `[1, Hkv, C, D]` up to its last slot that is not zero, and at least one."""
    slots = np.flatnonzero(state.any(axis=(0, 1, 3)))
    return state[:, :, : int(slots[-1]) + 1 if len(slots) else 1]
