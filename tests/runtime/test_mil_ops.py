"""Each op against two accounts: coremltools' own value inference, where it has one, and PyTorch or numpy."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.runtime.mil import MilInterpreter, MilProgram, load_program
from edgekit.runtime.mil.ops import KERNELS

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

# Test folders are no packages: the cases beside this file are loaded by their path.
_SPEC = importlib.util.spec_from_file_location("mil_cases", Path(__file__).parent / "mil_cases" / "__init__.py")
assert _SPEC is not None
assert _SPEC.loader is not None
cases = importlib.util.module_from_spec(_SPEC)
sys.modules["mil_cases"] = cases
_SPEC.loader.exec_module(cases)
Case = cases.Case

_DTYPES = {"float32": "fp32", "int32": "int32", "bool": "bool", "int8": "int8", "uint8": "uint8"}

# Ops that store what passes from one step to the next, so that they round more than once.
STEPPING = frozenset({"rnn", "lstm"})
# Ops that add terms up: their sums in half differ from sums in fp32 by more than the last bit.
SUMMING = frozenset({"conv", "conv_transpose", "linear", "matmul", "einsum", "scaled_dot_product_attention", "softmax"})

CASES = {case.name: case for family in cases.FAMILIES for case in family()}

# Ops that are tested elsewhere: see the class or file named here.
ELSEWHERE = {
    **dict.fromkeys(("while_loop", "cond", "read_state", "write_state", "classify"), "test_mil_program.py"),
    **dict.fromkeys((op for op in KERNELS if op.startswith("constexpr_")), "test_mil_weights.py"),
}


def test_every_op_is_tested():
    """An op that the interpreter knows has a case here, or is named with the file that tests it."""
    tested = {case.op for case in CASES.values()}
    assert sorted((set(KERNELS) | {"while_loop", "cond", "read_state", "write_state"}) - tested - set(ELSEWHERE)) == []
    assert sorted(tested & set(ELSEWHERE)) == []
    assert sum(1 for _ in CASES) == sum(1 for family in cases.FAMILIES for _ in family())  # no two of one name


def _spec(value: np.ndarray, half: bool) -> tuple[str, tuple[int, ...]]:
    name = _DTYPES[value.dtype.name]
    return ("fp16" if half and name == "fp32" else name), value.shape


def _half(value: Any, half: bool) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float32 and half:
        return value.astype(np.float16)
    return value


def _build(case: Case, half: bool) -> tuple[dict[str, Any], Callable[..., Any]]:
    specs: dict[str, Any] = {}
    for name, value in case.inputs.items():
        for index, part in enumerate(value) if isinstance(value, list) else [(None, value)]:
            specs[name if index is None else f"{name}_{index}"] = _spec(part, half)

    def build(mb: Any, **inputs: Any) -> Any:
        given = {
            name: [inputs[f"{name}_{i}"] for i in range(len(value))] if isinstance(value, list) else inputs[name]
            for name, value in case.inputs.items()
        }
        return getattr(mb, case.op)(**given, **_parameters(case, half))

    if not specs:  # a function needs an input
        specs["unused"] = ("fp32", (1,))
    return specs, build


def _parameters(case: Case, half: bool) -> dict[str, Any]:
    keep = ("scale_factor_height", "scale_factor_width")
    return {
        name: [_half(v, half) for v in value]
        if isinstance(value, list) and isinstance(value[0], np.ndarray)
        else value
        if name in keep
        else _half(value, half)
        for name, value in case.parameters.items()
    }


@pytest.fixture(scope="module")
def programs(write_package) -> dict[tuple[str, bool], MilProgram]:
    """By opset and whether its floats are fp16: a program with a function per case."""
    made = {}
    for half in (False, True):
        for opset in sorted({case.opset for case in CASES.values()}):
            chosen = {name: case for name, case in CASES.items() if case.opset == opset and (case.floats or not half)}
            functions = {name: _build(case, half) for name, case in chosen.items() if not half or _takes_half(case)}
            made[opset, half] = load_program(write_package(functions, opset))
    return made


def _takes_half(case: Case) -> bool:
    return case.op not in ("cast",)


def _arrays(case: Case, half: bool) -> dict[str, Any]:
    return {
        name: [_half(part, half) for part in value] if isinstance(value, list) else _half(value, half)
        for name, value in case.inputs.items()
    }


def _run(program: MilProgram, case: Case, half: bool, numerics: str = "typed") -> list[np.ndarray]:
    given = {}
    for name, value in _arrays(case, half).items():
        given |= {f"{name}_{i}": part for i, part in enumerate(value)} if isinstance(value, list) else {name: value}
    interpreter = MilInterpreter(program, case.name, numerics=numerics)
    return list(interpreter.run(given or {"unused": np.zeros(1, np.float32)}).values())


def _torch_says(case: Case, half: bool) -> list[np.ndarray]:
    """The other account, in float32: the values are the same in both precisions."""
    given = {
        name: [torch.tensor(part) for part in value] if isinstance(value, list) else torch.tensor(np.asarray(value))
        for name, value in case.inputs.items()
    }
    result = case.expected(**given)
    arrays = [part.numpy() for part in (result if isinstance(result, tuple | list) else [result])]
    return [array.astype(np.float16) if half and array.dtype.kind == "f" else array for array in arrays]


def _compare(got: list[np.ndarray], want: list[np.ndarray], tolerance: float, small: float = 3e-6) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        if ours.dtype.kind != "f":
            np.testing.assert_array_equal(ours, theirs)
        else:
            scale = max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0)))
            np.testing.assert_allclose(ours.astype(np.float64), theirs, rtol=tolerance, atol=small * scale)


@pytest.mark.parametrize("name", CASES)
def test_against_pytorch(name, programs):
    case = CASES[name]
    _compare(_run(programs[case.opset, False], case, half=False), _torch_says(case, half=False), 3e-6)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.floats and _takes_half(case)])
def test_fp16_is_rounded_once(name, programs):
    """Every op of fp16 gives the fp32 result of its inputs, rounded once: at most one bit of fp16 from PyTorch's."""
    case = CASES[name]
    got = _run(programs[case.opset, True], case, half=True)
    assert all(array.dtype.kind != "f" or array.dtype == np.float16 for array in got)
    want = _torch_says(case, half=True)
    _compare(got, want, 2.0**-7, 2.0**-11) if case.op in STEPPING else _compare(got, want, 2.0**-10)


def _coremltools_says(case: Case) -> list[np.ndarray] | None:
    """coremltools' own result for constant inputs; None where it infers none."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder, Function

        with Function({}, opset_version=getattr(ct.target, case.opset)):
            given = {
                name: [Builder.const(val=v) for v in value] if isinstance(value, list) else Builder.const(val=value)
                for name, value in case.inputs.items()
            }
            result = getattr(Builder, case.op)(**given, **case.parameters)
    outputs = list(result) if isinstance(result, tuple | list) else [result]
    values = [var.val for var in outputs]
    if len(values) == 1 and values[0] is None and hasattr(outputs[0].op, "materialized_val_inference"):
        values = [outputs[0].op.materialized_val_inference()]
    return None if any(value is None for value in values) else [np.asarray(value) for value in values]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.coremltools])
def test_against_coremltools(name, programs):
    case = CASES[name]
    want = _coremltools_says(case)
    if want is None:
        assert case.op in NO_INFERENCE, f"coremltools infers no value for {name}: add it to NO_INFERENCE"
        return
    assert case.op not in NO_INFERENCE
    _compare(_run(programs[case.opset, False], case, half=False), want, 3e-6)


# Ops for which coremltools infers no value, so that PyTorch or numpy is the one oracle.
NO_INFERENCE = frozenset(
    {
        "affine",
        "avg_pool",
        "batch_norm",
        "batch_to_space",
        "conv",
        "conv_transpose",
        "crop",
        "depth_to_space",
        "gather_nd",
        "instance_norm",
        "l2_pool",
        "local_response_norm",
        "lstm",
        "max_pool",
        "one_hot",
        "pixel_shuffle",
        "pixel_unshuffle",
        "resample",
        "reshape_like",
        "resize",
        "resize_bilinear",
        "resize_nearest_neighbor",
        "reverse_sequence",
        "rnn",
        "scatter",
        "scatter_nd",
        "silu",
        "sliding_windows",
        "space_to_batch",
        "space_to_depth",
        "upsample_bilinear",
        "upsample_nearest_neighbor",
    }
)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op in SUMMING])
def test_half_sums_stay_near(name, programs):
    """Sums in half are worse than sums in fp32, and still sums of the same terms."""
    case = CASES[name]
    got = _run(programs[case.opset, True], case, half=True, numerics="fp16sum")
    _compare(got, _torch_says(case, half=True), 2.0**-6, 2.0**-8)
