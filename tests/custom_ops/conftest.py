"""Core ML programs for the tests of the lowerings: converted, saved, run by the reference runtime."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgekit.custom_ops
from edgekit.custom_ops.coreml import keep_fp32, register_lowerings
from edgekit.export.coreml_faults import needs_fp32
from edgekit.export.onnx import quiet
from edgekit.runtime.mil import MilInterpreter, MilOp, load_program

TARGETS = ("iOS16", "iOS17", "iOS18")


@dataclass
class CoreMLProgram:
    """A saved package, loaded again."""

    path: Path

    def run(self, feed: dict[str, np.ndarray], numerics: str = "typed") -> list[np.ndarray]:
        """The outputs `o0`, `o1`, .. for inputs in the order of the function's."""
        interpreter = MilInterpreter(load_program(self.path), numerics=numerics)
        names = [value.name for value in interpreter.inputs]
        results = interpreter.run(dict(zip(names, feed.values(), strict=True)))
        return [results[f"o{n}"] for n in range(len(results))]

    @property
    def operations(self) -> list[MilOp]:
        """All ops of the main function but constants, those of inner blocks too."""
        return [op for op in load_program(self.path).function().walk() if op.op_type != "const"]

    @property
    def ops(self) -> Counter[str]:
        return Counter(op.op_type for op in self.operations)


class _Function(torch.nn.Module):
    """A function as a module: torch.export takes no other."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """coremltools logs, shows progress bars, and warns of what it uses itself."""
    with quiet(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("coremltools"), "level", logging.CRITICAL)
        yield


Convert = Callable[..., CoreMLProgram]


@pytest.fixture(scope="session")
def to_coreml(tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """Convert a function of tensors to a Core ML program: `to_coreml(function, feed, "iOS17", "fp16")`.

    A conversion takes half a second at least, so that tests share programs with many outputs where they can.
    """
    edgekit.custom_ops.register()
    with quiet_tools():
        import coremltools as ct

    def convert(
        function: Callable[..., Any],
        feed: dict[str, np.ndarray],
        target: str = "iOS16",
        precision: str = "fp32",
        dynamic: Any = None,
    ) -> CoreMLProgram:
        path = tmp_path_factory.mktemp("coreml") / "model.mlpackage"
        module = function if isinstance(function, torch.nn.Module) else _Function(function)
        tensors = tuple(torch.from_numpy(array) for array in feed.values())
        with torch.no_grad():
            results = module.eval()(*tensors)
        count = len(results) if isinstance(results, (tuple, list)) else 1
        half = ct.transform.FP16ComputePrecision(op_selector=lambda op: not (keep_fp32(op) or needs_fp32(op)))
        with quiet_tools():
            register_lowerings()
            program = torch.export.export(module, tensors, dynamic_shapes=dynamic).run_decompositions({})
            ct.convert(
                program,
                convert_to="mlprogram",
                outputs=[ct.TensorType(name=f"o{n}", dtype=np.float32) for n in range(count)],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=half if precision == "fp16" else ct.precision.FLOAT32,
                skip_model_load=True,
                # MLModel.save refuses loops in what torch.export traced (coremltools 9.0).
                package_dir=str(path),
            )
        return CoreMLProgram(path)

    return convert
