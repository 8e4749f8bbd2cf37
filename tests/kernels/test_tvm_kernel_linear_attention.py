"""The KernelLinearAttention kernels against a float64 oracle: awkward sizes, NaN, memory bounds, both dtypes."""

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
    from edgekit.kernels.tvm.kernel_linear_attention import variants
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


TESTED = ("float32", "float32 d16", "float32 d32", "float32 d64", "float16", "float16 d32")
"""Both dtypes and every size; the other float16 kernels differ from these in one size only."""
MAPS = ("relu", "elu1", "identity")


def _name(kernel: Any) -> str:
    head_dim = dict(kernel.parameters).get("head_dim")
    return f"{kernel.dtype} d{head_dim}" if head_dim else str(kernel.dtype)


def make_inputs(batch: int, heads: int, length: int, dim: int, width: int, dtype: str = "float32") -> list[Array]:
    """q, k, v; positive on the whole, so that the identity's denominator stays away from 0 as well."""
    rng = np.random.default_rng(length * 1000 + dim)
    q, k = (rng.standard_normal((batch, heads, length, dim)) + 1.0 for _ in range(2))
    v = rng.standard_normal((batch, heads, length, width))
    return [x.astype(dtype) for x in (q, k, v)]


def features(x: Array, feature_map: str) -> Array:
    if feature_map == "relu":
        return np.where(x < 0, 0, x)
    if feature_map == "elu1":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    return x


def oracle(inputs: list[Array], feature_map: str, eps: float = 1e-6) -> Array:
    """The contract in float64."""
    q, k, v = (x.astype(np.float64) for x in inputs)
    q, k = features(q, feature_map), features(k, feature_map)
    state = k.swapaxes(-1, -2) @ v / k.shape[2]
    return np.asarray(q @ state / (q @ k.mean(2)[..., None] + eps))


def call(kernel: Callable[..., Any], inputs: list[Array], feature_map: str = "relu", eps: float = 1e-6) -> Array:
    import tvm_ffi

    out = np.full_like(inputs[2], np.nan)
    kernel(*[tvm_ffi.from_dlpack(x) for x in (*inputs, out)], eps, MAPS.index(feature_map))
    return out


@pytest.mark.parametrize("length", [1, 7, 63, 65, 196, 200, 1031])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_specialised_kernels_agree(kernels: Kernels, length: int, feature_map: str, head_dim: int) -> None:
    inputs = make_inputs(2, 3, length, head_dim, head_dim)
    error = relative_l2(call(kernels[f"float32 d{head_dim}"], inputs, feature_map), oracle(inputs, feature_map))
    assert error <= tolerance("KernelLinearAttention", "float32", "tvm")


@pytest.mark.parametrize("length", [1, 7, 63, 200])
@pytest.mark.parametrize(
    "dims", [(1, 1), (5, 33), (8, 8), (12, 12), (33, 5), (60, 64), (64, 64), (256, 31)], ids="D{0[0]}-E{0[1]}".format
)
def test_generic_kernel_agrees(kernels: Kernels, length: int, dims: tuple[int, int]) -> None:
    inputs = make_inputs(2, 3, length, *dims)
    for feature_map in MAPS:
        if feature_map == "identity":  # features of either sign would let the denominator vanish
            inputs = [np.abs(inputs[0]), np.abs(inputs[1]), inputs[2]]
        error = relative_l2(call(kernels["float32"], inputs, feature_map), oracle(inputs, feature_map))
        assert error <= tolerance("KernelLinearAttention", "float32", "tvm"), feature_map


@pytest.mark.parametrize(("name", "dim", "width"), [("float16", 33, 20), ("float16", 64, 64), ("float16 d32", 32, 32)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_float16_is_computed_in_float32(kernels: Kernels, name: str, dim: int, width: int, feature_map: str) -> None:
    for length in (1, 65, 196):
        inputs = make_inputs(1, 2, length, dim, width, "float16")
        actual = call(kernels[name], inputs, feature_map)
        assert actual.dtype == np.float16
        error = relative_l2(actual, oracle(inputs, feature_map))
        assert error <= tolerance("KernelLinearAttention", "float16", "tvm")


@pytest.mark.parametrize("heads", [1, 8], ids="H{}".format)
def test_parts_of_long_sequences_add_up(kernels: Kernels, heads: int) -> None:
    """N = 5003 is cut into parts of its keys, none of a round size."""
    inputs = make_inputs(1, heads, 5003, 64, 64)
    for name in ("float32 d64", "float32"):
        error = relative_l2(call(kernels[name], inputs), oracle(inputs, "relu"))
        assert error <= tolerance("KernelLinearAttention", "float32", "tvm")


def test_the_means_do_not_overflow(kernels: Kernels) -> None:
    q, k, v = make_inputs(1, 1, 2000, 16, 16)
    inputs = [np.abs(q), np.float32(1e19) * np.abs(k), np.float32(1e18) * np.abs(v)]  # the sums of k v pass 3.4e38
    for name in ("float32 d16", "float32"):
        error = relative_l2(call(kernels[name], inputs), oracle(inputs, "relu"))
        assert error <= tolerance("KernelLinearAttention", "float32", "tvm")


def test_elu1_is_exact_at_zero_and_vanishes_far_below(kernels: Kernels) -> None:
    inputs = [
        np.zeros((1, 1, 4, 16), np.float32),
        np.zeros((1, 1, 4, 16), np.float32),
        np.ones((1, 1, 4, 16), np.float32),
    ]
    np.testing.assert_array_equal(call(kernels["float32 d16"], inputs, "elu1", 0.0), inputs[2])
    inputs[0][...] = -1e30
    np.testing.assert_array_equal(call(kernels["float32 d16"], inputs, "elu1"), np.zeros_like(inputs[2]))


@pytest.mark.parametrize(("x", "eps"), [(-10.0, 1e-9), (-20.0, 0.0), (-40.0, 0.0)], ids=str)
def test_elu1_of_negative_numbers_keeps_its_digits(kernels: Kernels, x: float, eps: float) -> None:
    """elu(x) + 1 in float32 would be a multiple of 2^-24."""
    q, k, v = make_inputs(1, 2, 40, 16, 16)
    inputs = [np.float32(x) + np.clip(q, -4, 4), np.float32(x) + np.clip(k, -4, 4), v]
    for name in ("float32 d16", "float32"):
        error = relative_l2(call(kernels[name], inputs, "elu1", eps), oracle(inputs, "elu1", eps))
        assert error <= tolerance("KernelLinearAttention", "float32", "tvm")


@pytest.mark.parametrize("eps", [1e-6, float(np.finfo(np.float32).tiny)], ids=str)
def test_a_query_without_features_gives_zeros(kernels: Kernels, eps: float) -> None:
    q, k, v = make_inputs(1, 2, 30, 32, 32)
    q[0, 1, 7] = -1.0
    assert (call(kernels["float32 d32"], [q, k, v], eps=eps)[0, 1, 7] == 0).all()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("name", ["float32", "float32 d32"])
def test_nan_stays_where_it_belongs(kernels: Kernels, name: str, feature_map: str) -> None:
    """In q: its row. In k: its batch and head. In v: its column there. -0.0 features keep their zero."""
    inputs = make_inputs(2, 3, 70, 32, 32)
    clean = call(kernels[name], inputs, feature_map)
    for which, index, touched in (
        (0, (1, 2, 69, 31), np.s_[1, 2, 69]),
        (1, (0, 1, 3, 0), np.s_[0, 1]),
        (2, (1, 0, 64, 31), np.s_[1, 0, :, 31]),
    ):
        poisoned = [x.copy() for x in inputs]
        poisoned[which][index] = np.nan
        actual = call(kernels[name], poisoned, feature_map)
        mask = np.zeros(actual.shape, bool)
        mask[touched] = True
        assert np.isnan(actual[mask]).all()
        np.testing.assert_array_equal(actual[~mask], clean[~mask])


@pytest.mark.parametrize("name", ["float32", "float32 d32"])
def test_unaligned_buffers(kernels: Kernels, name: str) -> None:
    inputs = make_inputs(1, 3, 67, 32, 32)
    shifted = [np.empty(x.size + 1, np.float32)[1:].reshape(x.shape) for x in inputs]
    for copy, x in zip(shifted, inputs, strict=True):
        copy[...] = x
    np.testing.assert_array_equal(call(kernels[name], shifted), call(kernels[name], inputs))


def test_touches_nothing_outside_the_buffers(library: Library, tmp_path: Path) -> None:
    cases: dict[str, Any] = {}
    expected: list[tuple[str, Array]] = []
    for name, symbol in library.symbols.items():
        dtype, _, head_dim = name.partition(" d")
        for length, dim, width in ((1, 1, 1), (65, 33, 20), (7, 16, 17), (300, 64, 64)):
            inputs = make_inputs(2, 1, length, int(head_dim or dim), int(head_dim or width), dtype)
            arguments: list[Any] = [*inputs, np.full_like(inputs[2], np.nan), np.float64(1e-6), np.int64(1)]
            case = len(expected)
            cases |= {f"{case}/{i}": argument for i, argument in enumerate(arguments)}
            cases |= {f"{case}/out": 3, f"{case}/symbol": symbol}
            expected.append((dtype, oracle(inputs, "elu1")))
    results = _run_guarded(library, cases, tmp_path)
    for case, (dtype, want) in enumerate(expected):
        for placement in ("end", "begin"):
            assert relative_l2(results[f"{case}/{placement}"], want) <= tolerance("KernelLinearAttention", dtype, "tvm")


def _run_guarded(library: Library, cases: dict[str, Any], folder: Path) -> dict[str, Array]:
    """The outputs of `cases`, computed by `tvm_guarded_run.py`."""
    np.savez(folder / "cases.npz", **cases)
    script = Path(__file__).with_name("tvm_guarded_run.py")
    command = [sys.executable, *map(str, (script, library.path, folder / "cases.npz", folder / "results.npz"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode} (-11 is an access outside a buffer)\n{done.stderr}"
    return dict(np.load(folder / "results.npz"))


def test_every_arch_ends_with_a_generic_kernel_per_dtype() -> None:
    from edgekit.kernels.tvm.kernel_linear_attention import variants
    from edgekit.kernels.tvm.targets import get_arch

    for name in ARCHS:
        found = variants(get_arch(name))
        assert len({kernel.symbol for kernel in found}) == len(found)
        for dtype in ("float32", "float16"):
            parameters = [kernel.parameters for kernel in found if kernel.dtype == dtype]
            assert parameters[-1] == ()
            assert all(parameters[:-1])
