"""The block-sparse attention kernel against a float64 loop over the contract's words, at every awkward edge."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.kernels.tvm.block_sparse_attention import variants
from edgekit.kernels.tvm.compat import IRModule, T, jit, merge
from edgekit.kernels.tvm.exp2 import exp2, tanh
from edgekit.kernels.tvm.targets import ARCHS

Array = np.ndarray[Any, np.dtype[Any]]
Kernels = dict[str, Callable[..., Any]]


def _cpu_features() -> set[str]:
    text = Path("/proc/cpuinfo").read_text()
    return {word for line in text.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}


@pytest.fixture(scope="module", params=[arch.name for arch in ARCHS.values() if arch.machine == platform.machine()])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """dtype -> the compiled kernel, for every arch that this CPU can run (the native tests run aarch64 under qemu)."""
    arch = ARCHS[request.param]
    if not set(arch.features) <= _cpu_features():
        pytest.skip(f"this CPU lacks {', '.join(sorted(set(arch.features) - _cpu_features()))} of {arch.name}")
    found = variants(arch)
    lookup = jit(merge(kernel.module(arch) for kernel in found), arch.target)
    return {kernel.dtype: lookup(kernel.symbol) for kernel in found}


@dataclass(frozen=True)
class Case:
    """One call; `index` overrides the random block index."""

    n: int = 200
    m: int | None = None
    dim: int = 64
    heads: int = 2
    kv_heads: int = 2
    index_heads: int = 1
    batch: int = 1
    block_q: int = 64
    block_k: int = 64
    density: float = 0.6
    causal: bool = True
    scale: float = 0.125
    softcap: float = 0.0
    window: int = 0
    dtype: str = "float32"
    index: tuple[int, ...] | None = None

    @property
    def keys(self) -> int:
        return self.n if self.m is None else self.m

    def tensors(self, seed: int = 0) -> tuple[Array, Array, Array, Array]:
        """q, k, v and a block index: some blocks of each row, shuffled, one of them twice, -1 between them."""
        rng = np.random.default_rng(seed)
        rows, columns = -(-self.n // self.block_q), -(-self.keys // self.block_k)
        q = rng.standard_normal((self.batch, self.heads, self.n, self.dim)).astype(self.dtype)
        k, v = (
            rng.standard_normal((self.batch, self.kv_heads, self.keys, self.dim)).astype(self.dtype) for _ in range(2)
        )
        if self.index is not None:
            shape = (self.batch, self.index_heads, rows, len(self.index))
            return q, k, v, np.broadcast_to(np.array(self.index, np.int32), shape).copy()
        index = np.full((self.batch, self.index_heads, rows, columns + 2), -1, np.int32)
        for place in np.ndindex(index.shape[:-1]):
            chosen = np.flatnonzero(rng.random(columns) < self.density)
            entries = np.concatenate([chosen, chosen[:1]])  # one of them twice
            slots = rng.permutation(columns + 2)[: len(entries)]
            index[place][slots] = entries
        return q, k, v, index

    def arguments(self) -> tuple[float, float, int, int, int, int]:
        return self.scale, self.softcap, int(self.causal), self.window, self.block_q, self.block_k


def oracle(case: Case, q: Array, k: Array, v: Array, index: Array) -> Array:
    """The contract, query by query, in float64."""
    out = np.zeros(q.shape)
    for b, h, i in np.ndindex(case.batch, case.heads, case.n):
        kv = h // (case.heads // case.kv_heads)
        ih = {1: 0, case.heads: h}.get(case.index_heads, kv)
        p = i + case.keys - case.n
        j = np.arange(case.keys)
        allowed = np.isin(j // case.block_k, index[b, ih, i // case.block_q])
        if case.causal:
            allowed &= j <= p
        if case.window:
            allowed &= (j > p - case.window) & (case.causal | (j < p + case.window))
        if not allowed.any():
            continue
        scores = case.scale * (k[b, kv, allowed].astype(np.float64) @ q[b, h, i].astype(np.float64))
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights @ v[b, kv, allowed].astype(np.float64) / weights.sum()
    return out


def run(kernels: Kernels, case: Case, q: Array, k: Array, v: Array, index: Array) -> Array:
    out = np.full(q.shape, np.nan, q.dtype)
    kernels[case.dtype](q, k, v, index, out, *case.arguments())
    return out


def check(kernels: Kernels, case: Case, actual: Array, expected: Array) -> None:
    assert relative_l2(actual, expected) <= tolerance("BlockSparseAttention", case.dtype, "tvm")


CASES = {
    "one-query": Case(n=1, index=(0,)),
    "63-queries": Case(n=63),
    "64-queries": Case(n=64),
    "65-queries": Case(n=65),
    "200-queries": Case(),
    "dense": Case(density=1.0),
    "more-keys": Case(n=70, m=333),
    "one-query-333-keys": Case(n=1, m=333),
    "dim-1": Case(dim=1),
    "dim-33": Case(dim=33),
    "dim-60": Case(dim=60),
    "dim-80": Case(dim=80, n=130),
    "dim-128": Case(dim=128),
    "dim-256": Case(dim=256, n=70),
    "dim-300": Case(dim=300, n=70),
    "blocks-16-64": Case(block_q=16),
    "blocks-64-16": Case(block_k=16),
    "blocks-128-32": Case(block_q=128, block_k=32, n=300),
    "blocks-32-128": Case(block_q=32, block_k=128, n=300),
    "blocks-1-1": Case(block_q=1, block_k=1, n=40),
    "blocks-7-5": Case(block_q=7, block_k=5, n=66),
    "blocks-100-70": Case(block_q=100, block_k=70, n=333),
    "blocks-300-300": Case(block_q=300, block_k=300, n=450),
    "block-beyond-length": Case(block_q=512, block_k=512, n=65, index=(0,)),
    "gqa": Case(heads=4, kv_heads=2),
    "gqa-index-per-kv-head": Case(heads=6, kv_heads=2, index_heads=2, n=130),
    "gqa-index-per-head": Case(heads=4, kv_heads=2, index_heads=4, n=130),
    "mqa-batch-3": Case(heads=3, kv_heads=1, index_heads=3, batch=3, n=130),
    "non-causal": Case(causal=False),
    "non-causal-more-keys": Case(causal=False, n=70, m=333),
    "window-1": Case(window=1, density=1.0),
    "window-50": Case(window=50),
    "window-huge": Case(window=1 << 62),
    "window-50-non-causal": Case(window=50, causal=False),
    "window-50-more-keys": Case(window=50, n=130, m=400),
    "softcap": Case(softcap=0.5, scale=1.0),
    "softcap-large": Case(softcap=1000.0, scale=0.5),
    "negative-scale": Case(scale=-0.3),
    "peaked": Case(scale=3.0),  # scores to 100: beyond, their rounding to float32 alone exceeds the tolerance
    "all-at-once": Case(n=131, m=277, dim=60, heads=4, index_heads=2, window=90, softcap=3.0, block_q=48, block_k=40),
    "unsorted-repeated": Case(index=(3, 0, -1, 3, 1, 0, 0)),
    "only-future": Case(index=(3,)),
    "no-key-at-all": Case(index=(-1, -1)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_contract(kernels: Kernels, name: str, dtype: str) -> None:
    case = replace(CASES[name], dtype=dtype)
    tensors = case.tensors()
    check(kernels, case, run(kernels, case, *tensors), oracle(case, *tensors))


def test_rows_without_an_allowed_key_are_zeros(kernels: Kernels) -> None:
    case = Case(n=128, index=(1,))  # the first 64 queries see only the future
    out = run(kernels, case, *case.tensors())
    assert (out[:, :, :64] == 0).all()
    assert (out[:, :, 64:] != 0).any(-1).all()


def test_repeats_and_order_do_not_change_a_row(kernels: Kernels) -> None:
    case = Case(index=(0, 1, 2, 3))
    q, k, v, index = case.tensors()
    expected = run(kernels, case, q, k, v, index)
    repeated = np.repeat(index, 2, -1)
    np.testing.assert_array_equal(run(kernels, case, q, k, v, repeated), expected)


def test_nan_outside_the_listed_blocks_does_not_leak(kernels: Kernels) -> None:
    case = Case(n=256, index=(0, 2))
    q, k, v, index = case.tensors()
    expected = oracle(case, q, k, v, index)
    for tensor in (k, v):
        tensor[:, :, 64:128] = np.nan
        tensor[:, :, 192:] = np.inf
    check(kernels, case, run(kernels, case, q, k, v, index), expected)


def test_nan_in_a_query_stays_in_its_row(kernels: Kernels) -> None:
    case = Case(density=1.0)
    q, k, v, index = case.tensors()
    expected = oracle(case, q, k, v, index)
    q[0, 1, 37] = np.nan
    out = run(kernels, case, q, k, v, index)
    assert np.isnan(out[0, 1, 37]).all()
    out[0, 1, 37] = expected[0, 1, 37]
    check(kernels, case, out, expected)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_in_an_allowed_key_shows(kernels: Kernels, which: str, softcap: float) -> None:
    case = Case(density=1.0, softcap=softcap)
    q, k, v, index = case.tensors()
    expected = oracle(case, q, k, v, index)
    (k if which == "k" else v)[0, 0, 130] = np.nan
    out = run(kernels, case, q, k, v, index)
    assert np.isnan(out[0, 0, 130:]).all()
    out[0, 0, 128:] = expected[0, 0, 128:]  # the earlier rows of that block may or may not be poisoned
    check(kernels, case, out, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(n=200, index=(1,)),
        Case(n=130, m=201, index=(1, 3), block_q=48, block_k=32),
        Case(n=200, index=(0, 1), window=20),
        Case(n=70, index=(1,), causal=False, block_k=32),
        Case(n=200, index=(0, 1), causal=False, window=20, block_k=40, block_q=100),
    ],
    ids=["causal", "more-keys", "window", "not-causal", "not-causal-window"],
)
def test_a_row_that_sees_only_scores_of_minus_infinity_is_not_one_that_sees_no_key(
    kernels: Kernels, case: Case, dtype: str
) -> None:
    """The softmax of -inf alone is NaN, as the reference has it; zeros say that no key was allowed."""
    case = replace(case, dtype=dtype)
    q, k, v, index = case.tensors()
    q = np.abs(q) + np.asarray(0.1, dtype)
    k[:, :, 3 * case.keys // 20 :] = -np.inf
    with np.errstate(invalid="ignore"):
        expected = oracle(case, q, k, v, index)
    out = run(kernels, case, q, k, v, index)
    lost = np.isnan(expected).all(-1)
    assert lost.any()
    assert not np.isfinite(out[lost]).any()
    check(kernels, case, out[~lost], expected[~lost])
    assert (out[(expected == 0).all(-1)] == 0).all()


def test_a_finite_score_beyond_the_kernels_range_is_not_taken_for_no_key(kernels: Kernels) -> None:
    """-3e38 is a float32 and -3e38 log2(e) not: alone in its row it gives no number, beside others it is nothing."""
    case = Case(n=2, dim=1, block_q=1, block_k=1, scale=1.0, index=(0, 1))
    q, k, v, index = case.tensors()
    q[...], k[:, :, 0], k[:, :, 1] = 1.0, -3e38, -2e38
    out = run(kernels, case, q, k, v, index)
    assert not np.isfinite(out[:, :, 0]).any()
    np.testing.assert_array_equal(out[:, :, 1], v[:, :, 1])


def test_infinities_do_not_crash(kernels: Kernels) -> None:
    case = Case()
    q, k, v, index = case.tensors()
    q[0, 0, 3], k[0, 0, 5], k[0, 1, 7], v[0, 1, 9] = np.inf, -np.inf, np.inf, np.inf
    assert not np.isfinite(run(kernels, case, q, k, v, index)[0, :, 70:]).all()


def test_unaligned_buffers(kernels: Kernels) -> None:
    case = Case(n=130, dim=60)
    tensors = case.tensors()
    moved = []
    for tensor in tensors:
        room = np.full(tensor.size + 1, np.nan if tensor.dtype.kind == "f" else -7).astype(tensor.dtype)
        room[1:] = tensor.ravel()
        moved.append(room[1:].reshape(tensor.shape))
    room = np.full(tensors[0].size + 2, np.nan, np.float32)
    out = room[1:-1].reshape(tensors[0].shape)
    kernels["float32"](*moved, out, *case.arguments())
    check(kernels, case, out, oracle(case, *tensors))
    assert np.isnan(room[[0, -1]]).all()


@contextmanager
def guarded(array: Array, *, flush: str) -> Iterator[Array]:
    """A copy of `array` that touches an inaccessible page at its "start" or its "end"."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = mmap.PAGESIZE
    room = -(-array.nbytes // page) * page
    pages = mmap.mmap(-1, room + 2 * page)
    anchor = ctypes.c_char.from_buffer(pages)
    base = ctypes.addressof(anchor)
    for guard in (base, base + page + room):
        assert libc.mprotect(guard, page, 0) == 0, ctypes.get_errno()
    try:
        offset = page if flush == "start" else page + room - array.nbytes
        copy: Array = np.ndarray(array.shape, array.dtype, pages, offset)
        copy[...] = array
        yield copy
    finally:
        for guard in (base, base + page + room):
            libc.mprotect(guard, page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.parametrize("flush", ["start", "end"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(n=1, index=(0,), dim=3),
        Case(n=65, m=131, dim=33, batch=2, heads=4, index_heads=2),
        Case(n=67, dim=60, block_q=7, block_k=5, causal=False),
        Case(n=130, dim=64, window=40),
        Case(n=129, dim=130, block_q=128, block_k=128),
    ],
    ids=["one-query", "more-keys", "odd-blocks", "window", "dim-130"],
)
def test_touches_nothing_outside_its_buffers(kernels: Kernels, case: Case, dtype: str, flush: str) -> None:
    case = replace(case, dtype=dtype)
    tensors = case.tensors()
    q, k, v, index = tensors
    with (
        guarded(q, flush=flush) as gq,
        guarded(k, flush=flush) as gk,
        guarded(v, flush=flush) as gv,
        guarded(index, flush=flush) as gi,
        guarded(np.full_like(q, np.nan), flush=flush) as out,
    ):
        kernels[dtype](gq, gk, gv, gi, out, *case.arguments())
        check(kernels, case, out.copy(), oracle(case, *tensors))


def test_inputs_are_not_written(kernels: Kernels) -> None:
    case = Case()
    tensors = case.tensors()
    before = [tensor.copy() for tensor in tensors]
    run(kernels, case, *tensors)
    for tensor, copy in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor, copy)


@pytest.fixture(scope="module")
def elementwise() -> Callable[[str, Array], Array]:
    """exp2 and tanh as compiled functions, on whichever arch runs here."""
    arch = next(
        arch for arch in ARCHS.values() if arch.machine == platform.machine() and set(arch.features) <= _cpu_features()
    )

    def make(name: str, function: Callable[[Any], Any]) -> IRModule:
        @T.prim_func(s_tir=True)
        def apply(x_handle: T.handle, y_handle: T.handle):  # type: ignore[no-untyped-def]
            T.func_attr({"tirx.noalias": True, "global_symbol": name})
            n = T.int64()
            x = T.match_buffer(x_handle, (n, 8), "float32", align=4)
            y = T.match_buffer(y_handle, (n, 8), "float32", align=4)
            for i in range(n):
                for lane in T.vectorized(8):
                    y[i, lane] = function(x[i, lane])

        return IRModule({name: apply})

    lookup = jit(merge([make("exp2", exp2), make("tanh", tanh)]), arch.target)

    def call(name: str, x: Array) -> Array:
        y = np.full_like(x, np.nan)
        lookup(name)(x.reshape(-1, 8), y.reshape(-1, 8))
        return y

    return call


def test_exp2(elementwise: Callable[[str, Array], Array]) -> None:
    x = np.linspace(-64, 0, 80_000, dtype=np.float32)
    np.testing.assert_allclose(elementwise("exp2", x), np.exp2(x.astype(np.float64)), rtol=2.5e-7)
    special = np.array([0.0, -64.0, np.nextafter(np.float32(-64), np.float32(-65)), -126.2, -1e30, -np.inf, np.nan, -1])
    expected = [1.0, 2.0**-64, 0.0, 0.0, 0.0, 0.0, np.nan, 0.5]
    np.testing.assert_array_equal(elementwise("exp2", special.astype(np.float32)), np.array(expected, np.float32))


def test_tanh(elementwise: Callable[[str, Array], Array]) -> None:
    x = np.concatenate([np.linspace(-20, 20, 80_000), np.geomspace(1e-20, 1, 800)]).astype(np.float32)
    np.testing.assert_allclose(elementwise("tanh", x), np.tanh(x.astype(np.float64)), rtol=4e-7)
    special = np.array([0.0, 1e30, -1e30, np.inf, -np.inf, np.nan, 100, -100], np.float32)
    np.testing.assert_array_equal(elementwise("tanh", special), np.tanh(special))
