"""The SelectiveScan kernels against a float64 recurrence: awkward sizes, NaN, memory bounds, both dtypes."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.custom_ops.tolerances import relative_l2, tolerance

pytest.importorskip("tvm", reason="the kernels are compiled with apache-tvm")

Array = np.ndarray[Any, Any]
Kernels = dict[str, Callable[..., Any]]

ARCHS = ("x86-64-v4", "x86-64-v3", "aarch64")


def _runs_here(name: str) -> bool:
    from edgekit.kernels.tvm.targets import get_arch

    arch = get_arch(name)
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return platform.machine() == arch.machine and set(arch.features) <= flags


@dataclass(frozen=True)
class Library:
    """Kernels compiled for one arch."""

    path: Path
    symbols: dict[str, str]
    """Name in these tests -> the function's symbol."""


@pytest.fixture(scope="module", params=ARCHS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The kernels under test, compiled once per arch."""
    if not _runs_here(request.param):
        pytest.skip(f"this CPU does not run {request.param}")
    import tvm

    from edgekit.kernels.tvm.compat import merge
    from edgekit.kernels.tvm.selective_scan import variants
    from edgekit.kernels.tvm.targets import get_arch

    arch = get_arch(request.param)
    found = {_name(kernel): kernel for kernel in variants(arch) if _name(kernel) in TESTED}
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    tvm.compile(merge(kernel.module(arch) for kernel in found.values()), target=arch.target).export_library(str(path))
    return Library(path, {name: kernel.symbol for name, kernel in found.items()})


@pytest.fixture(scope="module")
def kernels(library: Library) -> Kernels:
    """Name -> the function."""
    import tvm

    module = tvm.runtime.load_module(str(library.path))
    return {name: module[symbol] for name, symbol in library.symbols.items()}


TESTED = ("float32", "float16")


def _name(kernel: Any) -> str:
    return str(kernel.dtype)


def make_inputs(batch: int, channels: int, length: int, states: int, *, seed: int = 0) -> dict[str, Array]:
    """Inputs as a Mamba layer has them: positive small delta, negative A; float32."""
    rng = np.random.default_rng(seed)
    inputs = {
        "u": rng.standard_normal((batch, channels, length)),
        "delta": np.log1p(np.exp(rng.standard_normal((batch, channels, length)) - 3)),
        "A": -np.arange(1, states + 1) * np.exp(0.1 * rng.standard_normal((channels, states))),
        "B": rng.standard_normal((batch, states, length)),
        "C": rng.standard_normal((batch, states, length)),
        "D": rng.standard_normal(channels),
        "z": rng.standard_normal((batch, channels, length)) * 3,
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def oracle(inputs: dict[str, Array], *, softplus: bool, gate: bool) -> Array:
    """The contract's recurrence in float64."""
    u, delta, a, b, c, d, z = (inputs[name].astype(np.float64) for name in ("u", "delta", "A", "B", "C", "D", "z"))
    if softplus:
        delta = np.logaddexp(0.0, delta)
    state = np.zeros((*u.shape[:2], a.shape[1]))
    y = np.empty_like(u)
    with np.errstate(invalid="ignore"):
        for t in range(u.shape[2]):
            step = delta[:, :, t, None]
            state = np.exp(step * a) * state + step * b[:, None, :, t] * u[:, :, t, None]
            y[:, :, t] = (state * c[:, None, :, t]).sum(-1) + d * u[:, :, t]
    return y * z / (1 + np.exp(-z)) if gate else y


def call(kernel: Callable[..., Any], inputs: dict[str, Array], *, softplus: bool = False, gate: bool = False) -> Array:
    import tvm_ffi

    out = np.full_like(inputs["u"], np.nan)
    tensors = [*(inputs[name] for name in ("u", "delta", "A", "B", "C", "D")), inputs["z" if gate else "u"], out]
    kernel(*[tvm_ffi.from_dlpack(tensor) for tensor in tensors], int(softplus), int(gate))
    return out


SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 15, 5),
    (1, 17, 17, 16),
    (2, 16, 64, 8),
    (1, 5, 129, 33),
    (1, 192, 1000, 16),
    (1, 20, 200, 256),
]


@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}-C{0[1]}-L{0[2]}-S{0[3]}".format)
@pytest.mark.parametrize("softplus", [False, True], ids=("delta", "softplus"))
@pytest.mark.parametrize("gate", [False, True], ids=("plain", "gated"))
def test_agrees_with_the_recurrence(
    kernels: Kernels, shape: tuple[int, int, int, int], softplus: bool, gate: bool
) -> None:
    inputs = make_inputs(*shape)
    if softplus:
        inputs["delta"] = inputs["delta"] * 20 - 8
    actual = call(kernels["float32"], inputs, softplus=softplus, gate=gate)
    error = relative_l2(actual, oracle(inputs, softplus=softplus, gate=gate))
    assert error <= tolerance("SelectiveScan", "float32", "tvm")


@pytest.mark.parametrize("shape", SHAPES[:5], ids="B{0[0]}-C{0[1]}-L{0[2]}-S{0[3]}".format)
def test_float16_is_computed_in_float32(kernels: Kernels, shape: tuple[int, int, int, int]) -> None:
    inputs = {name: value.astype(np.float16) for name, value in make_inputs(*shape).items()}
    actual = call(kernels["float16"], inputs, softplus=True, gate=True)
    assert actual.dtype == np.float16
    error = relative_l2(actual, oracle(inputs, softplus=True, gate=True))
    assert error <= tolerance("SelectiveScan", "float16", "tvm")


def test_error_does_not_build_up_over_a_long_sequence(kernels: Kernels) -> None:
    inputs = make_inputs(1, 16, 16384, 4)
    assert relative_l2(call(kernels["float32"], inputs), oracle(inputs, softplus=False, gate=False)) <= 2e-6


def test_slow_decays_lose_no_more_than_float32_itself(kernels: Kernels) -> None:
    """A memory of thousands of steps: as good as the float32 recurrence with an exact exponential."""
    inputs = make_inputs(1, 16, 16384, 4)
    inputs["A"] *= np.float32(1e-3)
    u, delta, a, b, c, d = (inputs[name] for name in ("u", "delta", "A", "B", "C", "D"))
    state, y = np.zeros((1, 16, 4), np.float32), np.empty_like(u)
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = np.exp(step * a) * state + step * u[:, :, t, None] * b[:, None, :, t]
        y[:, :, t] = (state * c[:, None, :, t]).sum(-1) + d * u[:, :, t]
    expected = oracle(inputs, softplus=False, gate=False)
    assert relative_l2(call(kernels["float32"], inputs), expected) <= relative_l2(y, expected)


def test_extreme_exponents(kernels: Kernels) -> None:
    """exp(delta A) at and beyond float32's range: 0, its largest power and infinity."""
    inputs = make_inputs(1, 6, 2, 1)
    inputs["u"][..., 0], inputs["u"][..., 1] = 1.0, 0.0
    inputs["delta"][..., 0], inputs["delta"][..., 1] = 2.0**-10, 1.0  # so h = 2**-10 after the first step
    inputs["A"][:, 0] = (-1e30, -200.0, -70.0, 88.0, 88.7, 200.0)
    inputs["B"][...], inputs["C"][...], inputs["D"][...] = 1.0, 1.0, 0.0
    actual = call(kernels["float32"], inputs)[0, :, 1] * 2.0**10
    assert (actual[:2] < 1e-34).all()
    assert np.isposinf(actual[5])
    np.testing.assert_allclose(actual[2:5], np.exp(inputs["A"][2:5, 0].astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("size", [119.0, 121.0, 1e6, np.inf], ids=str)
def test_a_fast_decay_makes_only_its_own_chunk_take_the_long_way(kernels: Kernels, size: float) -> None:
    """Exponents around and beyond the limit of the short exponential, in one step of one channel."""
    inputs = make_inputs(1, 19, 400, 16)
    inputs["delta"][0, 5, 200] = np.float32(size * np.log(2)) / -inputs["A"][5].min()
    inputs["u"][0, 5, 200] = 0.0 if np.isfinite(size) else 1.0
    actual = call(kernels["float32"], inputs)
    clear = np.ones(actual.shape, bool)
    clear[0, 5, 200:] = np.isfinite(size)
    expected = oracle(inputs, softplus=False, gate=False)
    assert relative_l2(actual[clear], expected[clear]) <= tolerance("SelectiveScan", "float32", "tvm")
    assert np.isfinite(actual[0, 5, 200:]).all() == np.isfinite(size)


def test_softplus_is_accurate_relative_to_small_values(kernels: Kernels) -> None:
    inputs = make_inputs(1, 40, 3, 1)
    inputs["delta"][0] = np.linspace(-60, 90, 120, dtype=np.float32).reshape(40, 3)
    inputs["A"][...], inputs["D"][...], inputs["B"][...], inputs["C"][...], inputs["u"][...] = -1e30, 0.0, 1.0, 1.0, 1.0
    actual = call(kernels["float32"], inputs, softplus=True)
    np.testing.assert_allclose(actual, np.logaddexp(0.0, inputs["delta"].astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("name", ["u", "delta", "z"])
def test_nan_stays_in_its_channel_and_after_its_step(kernels: Kernels, name: str) -> None:
    inputs = make_inputs(2, 19, 150, 5)
    clean = call(kernels["float32"], inputs, gate=True)
    inputs[name][1, 17, 70] = np.nan
    actual = call(kernels["float32"], inputs, gate=True)
    touched = np.zeros(actual.shape, bool)
    touched[1, 17, 70 : 71 if name == "z" else None] = True
    assert np.isnan(actual[touched]).all()
    np.testing.assert_array_equal(actual[~touched], clean[~touched])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFFFFFFF], ids=hex)
def test_nan_in_a_stays_in_its_channel(kernels: Kernels, bits: int) -> None:
    """Also NaNs whose payload would cancel in the exponent's bits."""
    inputs = make_inputs(1, 19, 70, 5)
    clean = call(kernels["float32"], inputs)
    inputs["A"][3, 2] = np.array(bits, np.uint32).view(np.float32)
    actual = call(kernels["float32"], inputs)
    assert np.isnan(actual[0, 3]).all()
    np.testing.assert_array_equal(np.delete(actual, 3, 1), np.delete(clean, 3, 1))


def test_unaligned_buffers(kernels: Kernels) -> None:
    inputs = make_inputs(2, 17, 37, 5)
    expected = call(kernels["float32"], inputs, gate=True)
    for name, value in inputs.items():
        shifted = np.empty(value.size + 1, np.float32)[1:].reshape(value.shape)
        shifted[...] = value
        inputs[name] = shifted
    np.testing.assert_array_equal(call(kernels["float32"], inputs, gate=True), expected)


def test_touches_nothing_outside_the_buffers(library: Library, tmp_path: Path) -> None:
    cases: dict[str, Any] = {}
    expected: list[tuple[str, Array]] = []
    for dtype, symbol in library.symbols.items():
        for shape in ((1, 1, 1, 1), (2, 3, 17, 5), (1, 17, 130, 16), (1, 16, 128, 8)):
            inputs = {name: value.astype(dtype) for name, value in make_inputs(*shape).items()}
            arguments: list[Any] = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "z")]
            arguments += [np.full_like(inputs["u"], np.nan), np.int64(1), np.int64(1)]
            case = len(expected)
            cases |= {f"{case}/{i}": argument for i, argument in enumerate(arguments)}
            cases |= {f"{case}/out": 7, f"{case}/symbol": symbol}
            expected.append((dtype, oracle(inputs, softplus=True, gate=True)))
    results = _run_guarded(library, cases, tmp_path)
    for case, (dtype, want) in enumerate(expected):
        for placement in ("end", "begin"):
            assert relative_l2(results[f"{case}/{placement}"], want) <= tolerance("SelectiveScan", dtype, "tvm")


def _run_guarded(library: Library, cases: dict[str, Any], folder: Path) -> dict[str, Array]:
    """The outputs of `cases`, computed by `tvm_guarded_run.py`."""
    np.savez(folder / "cases.npz", **cases)
    script = Path(__file__).with_name("tvm_guarded_run.py")
    command = [sys.executable, *map(str, (script, library.path, folder / "cases.npz", folder / "results.npz"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode} (-11 is an access outside a buffer)\n{done.stderr}"
    return dict(np.load(folder / "results.npz"))


def test_every_arch_has_one_generic_kernel_per_dtype() -> None:
    from edgekit.kernels.tvm.selective_scan import variants
    from edgekit.kernels.tvm.targets import get_arch

    for name in ARCHS:
        assert [(kernel.dtype, kernel.parameters) for kernel in variants(get_arch(name))] == [
            ("float32", ()),
            ("float16", ()),
        ]
