"""The faults of Core ML Tools: each is still there without its workaround, and gone with it.

A test that fails on `as_it_is` says that a newer version mended the fault: take the workaround out.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

from edgekit.errors import ExportError
from edgekit.export import coreml_faults
from edgekit.export.coreml_faults import conversion, decompositions, finite_masks
from edgekit.export.coreml_tools import import_coremltools, quiet_tools, release
from edgekit.runtime.mil import MilInterpreter, load_program

Case = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


class Recurrent(nn.Module):
    """The sequence that a recurrent layer gives, without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Many(nn.Module):
    """Several modules beside each other: one conversion for all of them."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(module for module, _ in cases)
        self.counts = [len(inputs) for _, inputs in cases]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        return tuple(part(*(next(given) for _ in range(n))) for part, n in zip(self.parts, self.counts, strict=True))


def errors(cases: list[Case], folder: Path, *, mended: bool, fp16: bool = False) -> list[float]:
    """The relative L2 error of each answer on the reference runtime; infinite for another shape, or NaN."""
    module, inputs = Many(cases).eval(), tuple(tensor for _, tensors in cases for tensor in tensors)
    with torch.no_grad():
        wanted = [answer.numpy().astype(np.float64) for answer in module(*inputs)]
    ct = import_coremltools()
    with quiet_tools():
        program = torch.export.export(module, inputs)
        program = program.run_decompositions(decompositions() if mended else {})
        options: dict[str, Any] = {
            "convert_to": "mlprogram",
            "inputs": [ct.TensorType(f"in{i}", x.shape, np.float32) for i, x in enumerate(inputs)],
            "outputs": [ct.TensorType(f"out{i}", dtype=np.float32) for i in range(len(wanted))],
            "minimum_deployment_target": ct.target.iOS17,
            "compute_precision": ct.precision.FLOAT16 if fp16 else ct.precision.FLOAT32,
            "skip_model_load": True,
        }
        try:
            with conversion(program) if mended else contextlib.nullcontext():
                model = ct.convert(program, **options)
        except Exception as error:
            release(error)
            raise
        path = folder / f"{'mended' if mended else 'as_it_is'}.mlpackage"
        model.save(str(path))
    found = MilInterpreter(load_program(path)).run({f"in{i}": x.numpy() for i, x in enumerate(inputs)})
    return [_error(found[f"out{i}"], answer) for i, answer in enumerate(wanted)]


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return math.inf
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


SILENT: dict[str, Case] = {
    "gelu of tanh": (nn.GELU("tanh"), (3 * drawn(2, 50),)),
    "reciprocal": (Function(torch.reciprocal), (torch.tensor([0.01, 0.5, 3.0, -0.2]),)),
    "rsqrt": (Function(torch.rsqrt), (torch.tensor([1e-9, 1e-11]),)),
    "rms_norm of small values": (nn.RMSNorm(8, eps=1e-6), (1e-3 * drawn(2, 8),)),
    "diagonal": (Function(torch.diagonal), (drawn(4, 4),)),
    "var without correction": (Function(lambda x: torch.ops.aten.var.correction(x, [1])), (drawn(2, 5),)),
    "std of everything": (Function(lambda x: x + x.std()), (drawn(2, 5),)),
    "argmax of everything": (Function(lambda x: x.argmax()[None].float()), (drawn(2, 5, seed=3),)),
    "argmin of everything": (Function(lambda x: x.argmin()[None].float()), (drawn(2, 5, seed=3),)),
    "threshold of softplus": (nn.Softplus(2.0, 1.0), (5 * drawn(20),)),
    "alpha of sub": (Function(lambda x, y: torch.sub(x, y, alpha=2)), (drawn(9), drawn(9, seed=1))),
    "alpha of add": (Function(lambda x, y: torch.add(x, y, alpha=2)), (drawn(9), drawn(9, seed=1))),
}


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    found = errors(list(SILENT.values()), tmp_path_factory.mktemp("faults"), mended=False)
    return dict(zip(SILENT, found, strict=True))


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    cases = SILENT | REFUSED
    found = errors(list(cases.values()), tmp_path_factory.mktemp("faults"), mended=True)
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", SILENT)
def test_a_wrong_answer(name: str, as_it_is: dict[str, float], mended: dict[str, float]) -> None:
    assert as_it_is[name] > 1e-5
    assert mended[name] < 1e-6


REFUSED: dict[str, Case] = {
    "lstm": (Recurrent(nn.LSTM(4, 5, batch_first=True)), (drawn(2, 3, 4),)),
    "gru": (Recurrent(nn.GRU(4, 5, batch_first=True)), (drawn(2, 3, 4),)),
    "rms_norm without eps": (nn.RMSNorm(8), (drawn(2, 8),)),
    "a diagonal of inner axes": (Function(lambda x: torch.diagonal(x, 1, -2, -1)), (drawn(2, 4, 5),)),
    "trunc": (Function(torch.trunc), (3 * drawn(20),)),
    "fmod": (Function(lambda x: torch.fmod(x, 1.7)), (5 * drawn(20),)),
    "lerp": (Function(lambda x, y: torch.lerp(x, y, 0.3)), (drawn(9), drawn(9, seed=1))),
    "cosine_similarity": (Function(F.cosine_similarity), (drawn(2, 5), drawn(2, 5, seed=1))),
    "celu": (nn.CELU(0.7), (drawn(20),)),
    "addcmul": (Function(lambda x, y: torch.addcmul(x, x, y, value=0.3)), (drawn(9), drawn(9, seed=1))),
    "whole factors of addmm": (
        Function(lambda a, x, y: torch.addmm(a, x, y, beta=3, alpha=2)),
        (drawn(4), drawn(2, 3), drawn(3, 4)),
    ),
    "or of truth values": (Function(lambda x: ((x > 1) | (x < -1)).float()), (3 * drawn(20),)),
    "xor of truth values": (Function(lambda x: ((x > 1) ^ (x < 2)).float()), (3 * drawn(20),)),
    "alias": (Function(lambda x: 2 * torch.ops.aten.alias.default(x)), (drawn(9),)),
    "rsub with alpha": (Function(lambda x: torch.rsub(x, 3, alpha=2)), (drawn(9),)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_op_that_fails(name: str, mended: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises((NotImplementedError, ValueError, TypeError)):
        errors([REFUSED[name]], tmp_path, mended=False)
    assert mended[name] < 1e-6


def masked(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x > -9, torch.finfo(torch.float32).min).softmax(-1)


def test_a_row_that_is_masked_throughout_has_equal_weights_in_fp16(tmp_path: Path) -> None:
    case: Case = (Function(masked), (drawn(2, 9),))
    assert errors([case], tmp_path, mended=False, fp16=True) == [math.inf]
    assert errors([case], tmp_path, mended=True, fp16=True)[0] < 1e-3


def test_masks_among_the_constants_are_made_finite_too() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, torch.finfo(torch.float32).min, -math.inf, -1e30]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mask

    program = torch.export.export(Masked(), (drawn(4),))
    finite_masks(program)
    assert program.state_dict["mask"].tolist() == pytest.approx([0.0, -6.0e4, -math.inf, -1e30])


def test_rms_norm_holds_in_fp16_for_values_whose_squares_do_not(tmp_path: Path) -> None:
    cases: list[Case] = [(nn.RMSNorm(64, eps=1e-6), (scale * drawn(3, 64),)) for scale in (1e-3, 1.0, 2000.0)]
    assert max(errors(cases, tmp_path, mended=True, fp16=True)) < 2e-3


def test_antialiasing_is_refused_since_it_would_be_left_out(tmp_path: Path) -> None:
    module = Function(lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True))
    case: Case = (module, (drawn(1, 3, 9, 9),))
    assert errors([case], tmp_path, mended=False)[0] > 0.1
    with pytest.raises(ExportError, match="no antialiased resizing"):
        errors([case], tmp_path, mended=True)


def test_an_argument_that_would_be_ignored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that does not read an argument of its op does not get away with it."""
    from coremltools.converters.mil.frontend.torch import ops

    def deaf(context: Any, node: Any) -> None:
        context.add(ops.mb.gelu(x=ops._get_inputs(context, node)[0], name=node.name))

    monkeypatch.setattr(coreml_faults, "_conversions", lambda: {"gelu": deaf})
    with quiet_tools():
        program = torch.export.export(nn.Sequential(Function(nn.GELU("tanh"))), (drawn(4),)).run_decompositions({})
    with pytest.raises(ExportError, match=r"would ignore the argument approximate=.* of the op gelu \(test_coreml"):
        _convert(program)


def _convert(program: torch.export.ExportedProgram) -> None:
    ct = import_coremltools()
    with quiet_tools(), conversion(program):
        try:
            ct.convert(program, convert_to="mlprogram", skip_model_load=True)
        except ExportError as error:
            release(error)
            raise


def test_the_converter_is_left_as_it_was() -> None:
    from coremltools.converters.mil.backend.mil import load
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
    from coremltools.converters.mil.mil import Program
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager

    def state() -> tuple[Any, ...]:
        registry = dict(_TORCH_OPS_REGISTRY.name_to_func_mapping)
        checks = PassPipelineManager.apply_pipeline, Program.validate
        return registry, ops.convert_single_node, load.load, load._add_classify_op, *checks

    before = state()
    with conversion():
        assert state() != before
    assert state() == before
    with contextlib.suppress(KeyError), conversion():
        raise KeyError
    assert state() == before


def test_a_program_is_checked_once_per_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Core ML Tools checks it after each of its passes."""
    from coremltools.converters.mil.mil import Builder, Program
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipeline, PassPipelineManager

    @Builder.program(input_specs=[Builder.TensorSpec((2,))])
    def program(x: Any) -> Any:
        return Builder.relu(x=x)

    checks: list[Program] = []
    monkeypatch.setattr(Program, "validate", lambda self, check_essential_scope=False: checks.append(self))
    with quiet_tools():
        PassPipelineManager.apply_pipeline(program, PassPipeline.CLEANUP)
        many = len(checks)
        with coreml_faults.checked_once():
            PassPipelineManager.apply_pipeline(program, PassPipeline.CLEANUP)
    assert many > 5
    assert len(checks) == many + 1
