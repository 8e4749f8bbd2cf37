"""The native kernels through their C interface: the same answers as the references, and the same errors."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import EdgekitError

INVALID, OUT_OF_MEMORY = 1, 3
BSA, KLA, SCAN = "BlockSparseAttention", "KernelLinearAttention", "SelectiveScan"

pytestmark = pytest.mark.xdist_group("native")
Array = np.ndarray[Any, Any]


def assert_close(answer: Any, expected: Array, parity: Any) -> None:
    assert (answer.code, answer.message) == (0, "")
    error = relative_l2(answer.output, expected)
    assert error <= tolerance(parity.op, parity.dtype, "native"), error


def test_agrees_with_the_reference(shared_driver: Any, parity: Any) -> None:
    case, expected = parity.make()
    assert_close(shared_driver(case), expected, parity)


def test_agrees_with_threads_of_the_caller(shared_driver: Any, parity: Any) -> None:
    case, expected = parity.make(threads=3)
    assert_close(shared_driver(case), expected, parity)


def test_poisoned_scratch_memory_changes_nothing(static_driver: Any, parity: Any) -> None:
    """Scratch memory full of NaN, ending at a guard page; tensors right behind a guard page; two threads."""
    case, expected = parity.make(threads=2, placement=-1)
    assert_close(static_driver(case), expected, parity)


def test_the_other_arch_of_this_machine_agrees(x86_64_v3_driver: Any, parity: Any) -> None:
    case, expected = parity.make(threads=2)
    assert_close(x86_64_v3_driver(case), expected, parity)


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 12, 63], ids=lambda offset: f"{offset}_bytes_off")
@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_misaligned_buffers_are_served(shared_driver: Any, make_case: Any, op: str, offset: int) -> None:
    aligned, shifted = (shared_driver(small(make_case, op, placement=at)) for at in (0, offset))
    assert (shifted.code, shifted.message) == (0, "")
    np.testing.assert_array_equal(shifted.output, aligned.output)


def test_rows_without_keys_are_zeros(shared_driver: Any, make_case: Any) -> None:
    q, k, v, index = bsa_arrays()
    index[:] = -1
    answer = shared_driver(make_case[BSA](q, k, v, index, block_q=16, block_k=16))
    assert answer.code == 0
    np.testing.assert_array_equal(answer.output, np.zeros_like(q))


def test_nan_in_an_unlisted_block_does_not_leak(shared_driver: Any, make_case: Any) -> None:
    q, k, v, index = bsa_arrays()
    index[:] = 0
    clean = shared_driver(make_case[BSA](q, k, v, index, block_q=16, block_k=16))
    k[:, :, 16:], v[:, :, 16:] = np.nan, np.inf
    answer = shared_driver(make_case[BSA](q, k, v, index, block_q=16, block_k=16))
    np.testing.assert_array_equal(answer.output, clean.output)


def test_every_failing_allocation_is_reported(static_driver: Any, make_case: Any) -> None:
    """Whichever allocation fails: a clean error, nothing leaked (the driver checks), and the next call works."""
    for op in (BSA, KLA, SCAN):
        for threads in (0, 2):
            for failing in range(1, 400):
                case = small(make_case, op, threads=threads, fail_allocation=failing, placement=2)
                answer = static_driver(case)
                if answer.code == 0:
                    break
                assert answer.code == OUT_OF_MEMORY
                assert answer.message.startswith(f"{op}: ")
                assert "bytes of scratch memory could not be had" in answer.message
            assert failing > 1, "no allocation failed"
            assert answer.code == 0


# ---- errors ----


def bsa_arrays(queries: int = 40, keys: int = 40) -> list[Array]:
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((1, 2, n, 8)).astype("float32") for n in (queries, keys, keys))
    return [q, k, v, np.zeros((1, 1, -(-queries // 16), 2), np.int32)]


def kla_arrays() -> list[Array]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, 2, 20, d)).astype("float32") for d in (8, 8, 5)]


def scan_arrays() -> list[Array]:
    generator = np.random.default_rng(0)
    shapes = [(1, 3, 20), (1, 3, 20), (3, 4), (1, 4, 20), (1, 4, 20), (3,), (1, 3, 20)]
    return [abs(generator.standard_normal(shape)).astype("float32") for shape in shapes]


def small(make_case: Any, op: str, **how: Any) -> Any:
    """A small valid call of the op."""
    if op == BSA:
        return make_case[BSA](*bsa_arrays(), block_q=16, block_k=16, **how)
    return make_case[op](*(kla_arrays() if op == KLA else scan_arrays()), **how)


def bsa_reference(*arrays: Array, **options: Any) -> None:
    import torch

    from edgekit.custom_ops.block_sparse_attention.reference import block_sparse_attention

    block_sparse_attention(*map(torch.from_numpy, arrays), **options)


def kla_reference(*arrays: Array, **options: Any) -> None:
    import torch

    from edgekit.custom_ops.kernel_linear_attention.reference import kernel_linear_attention

    kernel_linear_attention(*map(torch.from_numpy, arrays), **options)


BAD_ATTRIBUTES = {
    "scale_zero": (BSA, {"scale": 0.0}, "needs a scale that is finite and not 0, got 0"),
    "scale_nan": (BSA, {"scale": float("nan")}, "needs a scale that is finite and not 0, got nan"),
    "scale_infinite": (BSA, {"scale": float("-inf")}, "needs a scale that is finite and not 0, got -inf"),
    "softcap_negative": (BSA, {"softcap": -1.0}, "needs a softcap that is finite and at least 0 (0 for none), got -1"),
    "softcap_nan": (
        BSA,
        {"softcap": float("nan")},
        "needs a softcap that is finite and at least 0 (0 for none), got nan",
    ),
    "softcap_denormal": (
        BSA,
        {"softcap": 2.0**-130},
        "needs a softcap of 0 (none) or a normal float32 number (1.17549e-38 to 3.40282e+38), got 7.34684e-40",
    ),
    "scale_over_softcap": (
        BSA,
        {"scale": 2.0**100, "softcap": 2.0**-100},
        "needs a scale / softcap that float32 can hold, got 1.26765e+30 / 7.88861e-31",
    ),
    "window_negative": (BSA, {"window": -3}, "needs a window of at least 0 (0 for none), got -3"),
    "block_q_zero": (BSA, {"block_q": 0}, "needs block_q of at least 1, got 0"),
    "block_k_negative": (BSA, {"block_k": -16}, "needs block_k of at least 1, got -16"),
    "eps_negative": (KLA, {"eps": -0.5}, "takes a finite eps >= 0; got -0.5. The usual one is 1e-6"),
    "eps_denormal": (
        KLA,
        {"eps": 2.0**-130},
        "takes eps 0 or a normal float32 number (1.17549e-38 to 3.40282e+38); got 7.34684e-40. The usual one is 1e-6",
    ),
    "eps_nan": (KLA, {"eps": float("nan")}, "takes a finite eps >= 0; got nan. The usual one is 1e-6"),
}


@pytest.mark.parametrize("name", BAD_ATTRIBUTES)
def test_bad_attributes_say_what_the_reference_says(shared_driver: Any, make_case: Any, name: str) -> None:
    op, options, text = BAD_ATTRIBUTES[name]
    arrays = bsa_arrays() if op == BSA else kla_arrays()
    options = {"block_q": 16, "block_k": 16, **options} if op == BSA else options
    reference: Callable[..., None] = bsa_reference if op == BSA else kla_reference
    answer = shared_driver(make_case[op](*arrays, **options))
    assert (answer.code, answer.message) == (INVALID, f"{op} {text}")
    with pytest.raises(EdgekitError) as raised:
        reference(*arrays, **options)
    assert str(raised.value).replace(".0", "") == answer.message


@pytest.mark.parametrize("index", [3, 99, -2, 2**31 - 1, -(2**31)])
def test_bad_indices_say_what_the_reference_says(shared_driver: Any, make_case: Any, index: int) -> None:
    arrays = bsa_arrays()
    arrays[3][0, 0, 1, 1] = index
    answer = shared_driver(make_case[BSA](*arrays, block_q=16, block_k=16))
    with pytest.raises(EdgekitError) as raised:
        bsa_reference(*arrays, block_q=16, block_k=16)
    assert (answer.code, answer.message) == (INVALID, str(raised.value))
    assert f"block index {index} out of range -1..2" in answer.message


# name of a size -> its place in `ints`
_BSA_SIZES = {
    "batch": 0,
    "heads": 1,
    "kv_heads": 2,
    "index_heads": 3,
    "queries": 4,
    "keys": 5,
    "head_dim": 6,
    "listed": 7,
}
_KLA_SIZES = {"batch": 0, "heads": 1, "length": 2, "head_dim": 3, "value_dim": 4}
_SCAN_SIZES = {"batch": 0, "channels": 1, "length": 2, "state": 3}
_SIZES = [
    (op, *item) for op, sizes in ((BSA, _BSA_SIZES), (KLA, _KLA_SIZES), (SCAN, _SCAN_SIZES)) for item in sizes.items()
]


@pytest.mark.parametrize("value", [0, -1, -(2**63), 2**62, 2**63 - 1])
@pytest.mark.parametrize(("op", "name", "place"), _SIZES, ids=[f"{op}-{name}" for op, name, _ in _SIZES])
def test_impossible_sizes_are_refused(
    shared_driver: Any, make_case: Any, op: str, name: str, place: int, value: int
) -> None:
    case = small(make_case, op)
    ints = list(case.ints)
    ints[place] = value
    answer = shared_driver(dataclasses.replace(case, ints=ints))
    assert answer.code == INVALID
    assert answer.message.startswith(op)
    if value < 1:
        assert "each axis at least 1" in answer.message or "every axis" in answer.message
        assert str(value) in answer.message


BAD_BSA = {
    "head_ratio": ({1: 3}, "multiple of the number of key heads"),
    "fewer_keys_than_queries": ({5: 39}, "at least as many keys as queries"),
    "index_heads": ({3: 7}, "Hm one of 1, Hkv, Hq"),
}


@pytest.mark.parametrize("name", BAD_BSA)
def test_sizes_that_do_not_fit_together(shared_driver: Any, make_case: Any, name: str) -> None:
    changes, text = BAD_BSA[name]
    case = small(make_case, BSA)
    answer = shared_driver(dataclasses.replace(case, ints=[changes.get(i, n) for i, n in enumerate(case.ints)]))
    assert answer.code == INVALID
    assert text in answer.message


@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_null_pointers_are_named(shared_driver: Any, make_case: Any, op: str) -> None:
    case = small(make_case, op)
    names = {BSA: ("q", "k", "v", "block_index"), KLA: ("q", "k", "v"), SCAN: ("u", "delta", "A", "B", "C", "D")}[op]
    for i, name in enumerate(names):
        tensors = [None if j == i else tensor for j, tensor in enumerate(case.tensors)]
        answer = shared_driver(dataclasses.replace(case, tensors=tensors))
        assert (answer.code, answer.message) == (INVALID, f"{op}: {name} is NULL")
    answer = shared_driver(dataclasses.replace(case, null_output=True))
    assert (answer.code, answer.message) == (INVALID, f"{op}: out is NULL")


@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
@pytest.mark.parametrize(
    ("code", "name"), [(2, "int32"), (3, "float64"), (4, "bfloat16"), (-1, "another"), (99, "another")]
)
def test_other_dtypes_are_refused(shared_driver: Any, make_case: Any, op: str, code: int, name: str) -> None:
    answer = shared_driver(small(make_case, op, dtype_code=code))
    assert answer.code == INVALID
    assert "float32, float16" in answer.message
    assert name in answer.message


def test_other_flags_are_refused(shared_driver: Any, make_case: Any) -> None:
    case = small(make_case, BSA)
    answer = shared_driver(dataclasses.replace(case, ints=[*case.ints[:10], 2, 0]))
    assert (answer.code, answer.message) == (INVALID, "BlockSparseAttention needs causal to be 0 or 1, got 2")
    case = small(make_case, SCAN)
    answer = shared_driver(dataclasses.replace(case, ints=[*case.ints[:4], 2]))
    assert (answer.code, answer.message) == (INVALID, "SelectiveScan takes delta_softplus 0 or 1; got 2")
    case = small(make_case, KLA)
    answer = shared_driver(dataclasses.replace(case, ints=[*case.ints[:5], 3]))
    assert answer.code == INVALID
    assert "takes feature_map 0 (relu), 1 (elu1) or 2 (identity); got 3" in answer.message


# ---- what frameworks and programs ask before a call ----


def c_struct(pointers: str, sizes: str, floats: str = "") -> type[ctypes.Structure]:
    """An args struct of edgekit_kernels.h: the dtype, pointers, int64s, floats."""
    fields: list[tuple[str, Any]] = [("dtype", ctypes.c_int)]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int64) for name in sizes.split()]
    fields += [(name, ctypes.c_float) for name in floats.split()]
    return type("Args", (ctypes.Structure,), {"_fields_": fields})


ARGS = {
    BSA: (
        "edgekit_bsa_kernel",
        c_struct(
            "q k v block_index out",
            "batch heads kv_heads index_heads length kv_length head_dim blocks_per_row block_q block_k causal window",
            "scale softcap",
        ),
    ),
    KLA: (
        "edgekit_kla_kernel",
        c_struct("q k v out", "batch heads length head_dim value_dim feature_map", "eps"),
    ),
    SCAN: (
        "edgekit_scan_kernel",
        c_struct("u delta A B C D z out", "batch channels length state delta_softplus"),
    ),
}


@pytest.mark.parametrize("op", [BSA, KLA, SCAN])
def test_the_kernel_that_would_serve_a_call_is_named(built_library: Any, op: str) -> None:
    name, args = ARGS[op]
    function = getattr(ctypes.CDLL(str(built_library.library)), name)
    function.restype = ctypes.c_char_p

    def kernel(dtype: int, **sizes: int) -> str | None:
        others = {field: 7 for field, kind in args._fields_ if kind is ctypes.c_int64}
        found = function(ctypes.byref(args(dtype=dtype, **(others | sizes))))
        return None if found is None else found.decode()

    mine = [entry for entry in built_library.kernels if entry.op == op]
    assert mine
    for entry in mine:
        assert kernel(("float32", "float16").index(entry.dtype), **dict(entry.parameters)) == entry.symbol
    assert kernel(2) is None
    assert function(None) is None


class Tensor(ctypes.Structure):
    """`edgekit_tensor`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


@pytest.mark.parametrize(
    ("gate", "code", "text"),
    [("none", 0, ""), ("given", 0, ""), ("without_data", INVALID, "SelectiveScan: z is NULL")],
    ids=["none", "given", "without_data"],
)
def test_a_gate_without_data_is_not_no_gate(built_library: Any, gate: str, code: int, text: str) -> None:
    arrays = scan_arrays()
    tensors = [
        Tensor(array.ctypes.data, 0, array.ndim, (ctypes.c_int64 * array.ndim)(*array.shape)) for array in arrays
    ]
    if gate == "without_data":
        tensors[6].data = None
    views = [None if gate == "none" and i == 6 else ctypes.byref(tensor) for i, tensor in enumerate(tensors)]
    args, error = ARGS[SCAN][1](), ctypes.create_string_buffer(200)
    shapes = ctypes.CDLL(str(built_library.library)).edgekit_scan_shapes
    assert shapes(*views, ctypes.byref(args), error, ctypes.c_size_t(len(error))) == code
    assert error.value.decode() == text
    if code == 0:
        assert args.z == (None if gate == "none" else arrays[6].ctypes.data)
        assert (args.batch, args.channels, args.length, args.state) == (1, 3, 20, 4)
