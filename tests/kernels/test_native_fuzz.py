"""Random calls of the native kernels: any shape, offset, index or bit pattern gives the contract's answer, no crash.

Every tensor ends or begins at a page that cannot be touched, scratch memory starts out as NaN and ends at such a page,
and the bytes around tensors must survive: reads and writes out of bounds by the compiled kernels do not pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.custom_ops.tolerances import tolerance

BSA, KLA, SCAN = "BlockSparseAttention", "KernelLinearAttention", "SelectiveScan"
OK, INVALID = 0, 1
SPECIALS = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1.0)
Array = np.ndarray[Any, Any]

pytestmark = pytest.mark.xdist_group("native")
quick = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
long = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))

size = st.one_of(st.integers(1, 9), st.integers(1, 80), st.sampled_from([16, 31, 32, 33, 63, 64, 65]))
block = st.one_of(
    st.integers(1, 9), st.sampled_from([16, 32, 63, 64, 65, 128]), st.sampled_from([2**31, 2**62, 2**63 - 1])
)
how = st.fixed_dictionaries(
    {"placement": st.integers(-1, 9), "threads": st.sampled_from([0, 0, 1, 2, 5])},
)
dtypes = st.sampled_from(["float32", "float16"])


def normal(draw: Any, generator: np.random.Generator, dtype: str, *shape: int, special: bool = True) -> Array:
    """Normal values, some replaced by NaN, infinities, zeros or a denormal."""
    array = generator.standard_normal(shape).astype(dtype)
    if special and draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            array.flat[draw(st.integers(0, array.size - 1))] = draw(st.sampled_from(SPECIALS))
    return array


def check(driver: Any, case: Any, clean: Array, expected: Array, bound: Array) -> None:
    """The answer is within the tolerance of `expected` where `clean`; `bound` says how large the summed terms are."""
    answer = driver(case)
    assert (answer.code, answer.message) == (OK, "")
    error = np.where(clean, answer.output.astype(np.float64) - np.where(clean, expected, 0), 0)
    assert np.isfinite(error).all()
    limit = tolerance(case.op, case.dtype, "native") * np.linalg.norm(np.where(clean, bound, 0))
    limit += np.sqrt(clean.size) * np.finfo(case.dtype).smallest_subnormal  # what rounding costs next to 0
    assert np.linalg.norm(error) <= limit


def finite(array: Array) -> Array:
    """The array with zeros in place of what is not finite."""
    return np.where(np.isfinite(array), array, 0).astype(array.dtype)


def fuzz_bsa(data: Any, driver: Any, make_case: Any, op_reference: Any) -> None:
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, batch, kv_heads, group = (
        draw(dtypes),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    queries, dim, listed = draw(size), draw(size), draw(st.integers(1, 6))
    keys = queries + draw(st.one_of(st.just(0), size))
    options = {
        "block_q": draw(block),
        "block_k": draw(block),
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "window": draw(st.sampled_from([0, 0, 1, 3, 40, 2**62, 2**63 - 1])),
        "scale": draw(st.sampled_from([1.0, -0.5])) * dim**-0.5,
    }
    heads = kv_heads * group
    index_heads = draw(st.sampled_from([1, kv_heads, heads]))
    q = normal(draw, generator, dtype, batch, heads, queries, dim)
    k, v = (normal(draw, generator, dtype, batch, kv_heads, keys, dim) for _ in range(2))
    rows, blocks = -(-queries // options["block_q"]), -(-keys // options["block_k"])
    index = generator.integers(-1, blocks, (batch, index_heads, rows, listed), dtype=np.int32)
    case = make_case[BSA](q, k, v, index, **options, **draw(how))
    if draw(st.integers(0, 7)) == 0:
        bad = draw(st.sampled_from([-2, blocks, blocks + 1, 2**31 - 1, -(2**31)]))
        index.flat[draw(st.integers(0, index.size - 1))] = bad
        answer = driver(case)
        assert answer.code == INVALID
        assert f"block index {bad} out of range -1..{blocks - 1}" in answer.message
        return
    # A row is exact if it and all that stands in its listed blocks is finite.
    clean = np.isfinite(q).all(axis=3, keepdims=True)
    for b, h, i in np.ndindex(batch, heads, queries):
        kv = h // group
        row = index[b, {1: 0, heads: h}.get(index_heads, kv), i // options["block_q"]]
        seen = np.isin(np.arange(keys) // options["block_k"], row)
        clean[b, h, i] &= np.isfinite(k[b, kv, seen]).all() and np.isfinite(v[b, kv, seen]).all()
    q, k, v = map(finite, (q, k, v))
    expected, bound = (op_reference(BSA, [q, k, w, index], options) for w in (v, abs(v)))
    check(driver, case, clean, expected, bound)


def fuzz_kla(data: Any, driver: Any, make_case: Any, op_reference: Any) -> None:
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, batch, heads = draw(dtypes), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    length = draw(st.one_of(size, st.integers(1, 700)))
    dim, value_dim = draw(size), draw(size)
    options = {
        "feature_map": draw(st.sampled_from(["relu", "elu1", "identity"])),
        "eps": draw(st.sampled_from([1e-6, 0.01, 1.0])),
    }
    q, k = (normal(draw, generator, dtype, batch, heads, length, dim) for _ in range(2))
    if options["feature_map"] == "identity":  # with both signs the denominator comes near 0
        q, k = abs(q), abs(k)
    v = normal(draw, generator, dtype, batch, heads, length, value_dim)
    case = make_case[KLA](q, k, v, **options, **draw(how))
    of_head = np.isfinite(k).all(axis=(2, 3)) & np.isfinite(v).all(axis=(2, 3))
    clean = np.isfinite(q).all(axis=3, keepdims=True) & of_head[:, :, None, None]
    q, k, v = map(finite, (q, k, v))
    expected, bound = (op_reference(KLA, [q, k, w], options) for w in (v, abs(v)))
    check(driver, case, clean, expected, bound)


def fuzz_scan(data: Any, driver: Any, make_case: Any, op_reference: Any) -> None:
    draw = data.draw
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype, batch, channels = draw(dtypes), draw(st.integers(1, 2)), draw(size)
    length, state = draw(size), draw(st.one_of(st.integers(1, 17), st.sampled_from([16, 32, 64])))
    options = {"delta_softplus": draw(st.booleans())}
    u = normal(draw, generator, dtype, batch, channels, length)
    delta = normal(draw, generator, dtype, batch, channels, length)
    delta = (delta if options["delta_softplus"] else abs(delta) / 2).astype(dtype)
    a = (-abs(normal(draw, generator, dtype, channels, state)) - np.float32(0.01)).astype(dtype)
    b, c = (normal(draw, generator, dtype, batch, state, length) for _ in range(2))
    d = normal(draw, generator, dtype, channels)
    z = normal(draw, generator, dtype, batch, channels, length) if draw(st.booleans()) else None
    case = make_case[SCAN](u, delta, a, b, c, d, z, **options, **draw(how))
    # What is not finite in a channel spoils it from there on; in B or C, the batch; in A or D, the channel.
    clean = np.logical_and.accumulate(np.isfinite(u) & np.isfinite(delta), axis=2)
    clean &= (np.isfinite(b).all(axis=(1, 2)) & np.isfinite(c).all(axis=(1, 2)))[:, None, None]
    clean &= (np.isfinite(a).all(axis=1) & np.isfinite(d))[None, :, None]
    if z is not None:
        clean &= np.isfinite(z)
    u, delta, a, b, c, d = map(finite, (u, delta, a, b, c, d))
    z = None if z is None else finite(z)
    expected = op_reference(SCAN, [u, delta, a, b, c, d, z], options)
    bound = abs(op_reference(SCAN, [abs(u), delta, a, abs(b), abs(c), abs(d), z], options))
    check(driver, case, clean, expected, bound)


FUZZ = {BSA: fuzz_bsa, KLA: fuzz_kla, SCAN: fuzz_scan}


@pytest.mark.parametrize("op", FUZZ)
def test_the_shipped_library(shared_driver: Any, make_case: Any, op_reference: Any, op: str) -> None:
    @quick
    @given(st.data())
    def run(data: Any) -> None:
        FUZZ[op](data, shared_driver, make_case, op_reference)

    run()


@pytest.mark.parametrize("op", FUZZ)
def test_with_guarded_scratch_memory(static_driver: Any, make_case: Any, op_reference: Any, op: str) -> None:
    @quick
    @given(st.data())
    def run(data: Any) -> None:
        FUZZ[op](data, static_driver, make_case, op_reference)

    run()


@pytest.mark.parametrize("op", FUZZ)
def test_briefly_under_address_sanitizer(sanitized_driver: Any, make_case: Any, op_reference: Any, op: str) -> None:
    """The C layer under AddressSanitizer and UndefinedBehaviorSanitizer, the same few examples in every run."""

    @quick
    @given(st.data())
    def run(data: Any) -> None:
        FUZZ[op](data, sanitized_driver, make_case, op_reference)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("op", FUZZ)
def test_under_address_sanitizer(sanitized_driver: Any, make_case: Any, op_reference: Any, op: str) -> None:
    """The C layer under AddressSanitizer and UndefinedBehaviorSanitizer, other examples in every run."""

    @long
    @given(st.data())
    def run(data: Any) -> None:
        FUZZ[op](data, sanitized_driver, make_case, op_reference)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("op", FUZZ)
def test_kernels_under_address_sanitizer(
    sanitized_kernels_driver: Any, make_case: Any, op_reference: Any, op: str
) -> None:
    """The compiled kernels under AddressSanitizer as well, where a clang of TVM's LLVM version is at hand."""

    @long
    @given(st.data())
    def run(data: Any) -> None:
        FUZZ[op](data, sanitized_kernels_driver, make_case, op_reference)

    _short_tensors_are_noticed(sanitized_kernels_driver, make_case, op)
    run()


@pytest.mark.parametrize("op", FUZZ)
def test_a_read_out_of_bounds_is_noticed(shared_driver: Any, make_case: Any, op: str) -> None:
    _short_tensors_are_noticed(shared_driver, make_case, op)


def _short_tensors_are_noticed(driver: Any, make_case: Any, op: str) -> None:
    """Calls whose sizes claim one element more than a tensor has: each must end the process."""
    shapes = {BSA: [(1, 1, 16, 8)] * 3, KLA: [(1, 1, 16, 8)] * 3}.get(
        op, [(1, 3, 16)] * 2 + [(3, 4)] + [(1, 4, 16)] * 2
    )
    tensors = [np.ones(shape, np.float32) for shape in shapes]
    if op == BSA:
        case = make_case[BSA](*tensors, np.zeros((1, 1, 1, 1), np.int32), block_q=16, block_k=16)
    else:
        case = make_case[op](*tensors, *([np.ones(3, np.float32), tensors[0]] if op == SCAN else []))
    for i, tensor in enumerate(case.tensors):
        short = [t.reshape(-1)[:-1] if j == i else t for j, t in enumerate(case.tensors)]
        with pytest.raises(AssertionError, match="the kernel's process ended"):
            driver(dataclasses.replace(case, tensors=short))
        assert tensor is not None
    assert driver(case).code == OK
