"""The golden cases: outputs of the authors' own implementations for weights that are a function of their names."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgekit.models import create_model, model_entry, seed_weights
from edgekit.models.registry import TensorInputs, TokenInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from torch import nn

FOLDER = Path(__file__).parent.parent / "golden"


class Golden:
    """One case of `tests/golden`: the original's keys, seeded weights, input and outputs."""

    def __init__(self, case: str) -> None:
        shapes = json.loads((FOLDER / f"{case}.keys.json").read_text())
        self.case = case
        self.keys = {key: tuple(shape) for key, shape in shapes.items()}
        self._seeded = _load_module(FOLDER / "seeded.py")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.asarray(self._seeded.parameter(key, s))) for key, s in self.keys.items()}

    def draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Standard normal values that are a function of `name`; `input:CASE` is the case's input."""
        return torch.from_numpy(self._seeded.draw(name, shape))

    def images(self, size: int) -> torch.Tensor:
        return self.draw(f"input:{self.case}", (2, 3, size, size))

    def output(self, array: str) -> torch.Tensor:
        with np.load(FOLDER / f"{self.case}.npz") as arrays:
            return torch.from_numpy(arrays[array])


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The case named by an indirect parameter."""
    return Golden(request.param)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Threads that wait for busy cores make small layers many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def active_model(name: str, **overrides: object) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A zoo model with every branch counting, and inputs for it by the names of its `forward`.

    Images are small where the model takes any size: every layer still sees several positions. A model of a fixed size
    is built for small ones. A text is longer than what sparse attention reads of it.
    """
    entry = model_entry(name)
    if isinstance(entry.input, TensorInputs):
        inputs = {key: torch.from_numpy(array) for key, array in entry.input.examples(1, **overrides).items()}
    elif isinstance(entry.input, TokenInput):
        inputs = {"": torch.randint(0, entry.input.vocab_size, (2, 700), generator=torch.Generator().manual_seed(1))}
    else:
        size = min(entry.input.size, 96)
        if "img_size" in entry.arguments():
            overrides = {"img_size": size, **overrides}
        generator = torch.Generator().manual_seed(1)
        inputs = {"": torch.randn(2, entry.input.channels, size, size, generator=generator)}
    model = create_model(name, weights="random", **overrides)
    seed_weights(model, 0)
    if "" in inputs:
        inputs = {next(iter(inspect.signature(model.forward).parameters)): inputs[""]}
    return model, inputs


@pytest.fixture
def active() -> Callable[..., tuple[nn.Module, dict[str, torch.Tensor]]]:
    """See `active_model`."""
    return active_model


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
