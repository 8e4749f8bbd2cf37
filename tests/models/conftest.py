"""The golden cases: outputs of the authors' own implementations for weights that are a function of their names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

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

    def images(self, size: int) -> torch.Tensor:
        return torch.from_numpy(self._seeded.draw(f"input:{self.case}", (2, 3, size, size)))

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


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
