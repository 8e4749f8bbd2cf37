"""BlockSparseAttention in PyTorch: the reference against dense masked softmax; eager and the torch op against it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgekit.custom_ops
from edgekit.custom_ops.block_sparse_attention import eager
from edgekit.custom_ops.block_sparse_attention.contract import resolve
from edgekit.custom_ops.block_sparse_attention.reference import block_sparse_attention as reference
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import InputError, ShapeError

edgekit.custom_ops.register()
op = torch.ops.edgekit.block_sparse_attention


@dataclass(frozen=True)
class Case:
    """Sizes and attributes of one call."""

    n: int = 65
    m: int | None = None
    d: int = 8
    heads: tuple[int, int, int] = (2, 2, 1)  # Hq, Hkv, Hm
    blocks: tuple[int, int] = (16, 16)
    listed: int = 3
    batch: int = 1
    options: dict[str, float] = field(default_factory=dict)

    def attributes(self):
        return {"block_q": self.blocks[0], "block_k": self.blocks[1], **self.options}

    def tensors(self, dtype=torch.float64, seed=0):
        """q, k, v standard normal; lists with repeats and -1."""
        generator = torch.Generator().manual_seed(seed)
        m = self.m or self.n
        hq, hkv, hm = self.heads
        q, k, v = (
            torch.randn(self.batch, heads, tokens, self.d, generator=generator, dtype=torch.float64).to(dtype)
            for heads, tokens in ((hq, self.n), (hkv, m), (hkv, m))
        )
        index = torch.randint(
            -1,
            -(-m // self.blocks[1]),
            (self.batch, hm, -(-self.n // self.blocks[0]), self.listed),
            generator=generator,
            dtype=torch.int32,
        )
        return q, k, v, index


CASES = {
    "N=1": Case(n=1, m=1),
    "N=1,M=70": Case(n=1, m=70, listed=2),
    "N=63,D=33": Case(n=63, d=33),
    "N=65,D=60": Case(n=65, d=60, batch=2),
    "N=64,one-block": Case(n=64, blocks=(64, 64), listed=1),
    "N=200,M=261": Case(n=200, m=261, blocks=(64, 64)),
    "bq=32,bk=64": Case(n=100, m=130, blocks=(32, 64)),
    "bq=16,bk=48": Case(n=65, m=100, blocks=(16, 48), listed=2),
    "bq=48,bk=16": Case(n=63, blocks=(48, 16)),
    "bq=7,bk=5": Case(n=33, m=40, blocks=(7, 5), listed=6),
    "blocks-above-N": Case(n=9, m=11, blocks=(1000, 1000), listed=1),
    "GQA-8:2,Hm=1": Case(n=33, heads=(8, 2, 1)),
    "GQA-8:2,Hm=2": Case(n=33, heads=(8, 2, 2), batch=2),
    "GQA-8:2,Hm=8": Case(n=33, heads=(8, 2, 8), batch=2),
    "many-repeats": Case(n=63, listed=20),
    "window=1": Case(options={"window": 1}),
    "window=20": Case(m=80, options={"window": 20}),
    "window=40,bq=8,bk=24": Case(m=80, blocks=(8, 24), options={"window": 40}),
    "window=1000": Case(options={"window": 1000}),
    "softcap": Case(options={"softcap": 1.5}),
    "scale": Case(options={"scale": -0.3}),
    "not-causal": Case(m=80, options={"causal": False}),
    "not-causal,window=2^63-1": Case(options={"causal": False, "window": 2**63 - 1}),
    "not-causal,window": Case(m=81, options={"causal": False, "window": 20}),
    "not-causal,softcap,Hm=2": Case(n=65, heads=(4, 2, 2), options={"causal": False, "softcap": 2.0}),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def dense(q, k, v, index, block_q, block_k, causal=True, scale=None, softcap=0.0, window=0):
    """The contract as one masked softmax over all keys, with the mask filled in entry by entry."""
    (batch, hq, n, d), (hkv, m), hm = q.shape, k.shape[1:3], index.shape[1]
    mask = torch.zeros(batch, hq, n, m, dtype=torch.bool)
    for b in range(batch):
        for h in range(hq):
            of_index = {1: 0, hq: h}.get(hm, h // (hq // hkv))
            for i in range(n):
                for block in index[b, of_index, i // block_q].tolist():
                    for j in range(block * block_k, min(m, (block + 1) * block_k)) if block >= 0 else ():
                        p = i + m - n
                        near = window == 0 or (j > p - window and (causal or j < p + window))
                        mask[b, h, i, j] = near and (not causal or j <= p)
    k, v = (tensor.repeat_interleave(hq // hkv, dim=1) for tensor in (k, v))
    scores = (d**-0.5 if scale is None else scale) * q @ k.mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


@by_case
def test_the_reference_is_a_masked_softmax(case):
    tensors = case.tensors()
    got = reference(*tensors, **case.attributes())
    assert relative_l2(got, dense(*tensors, **case.attributes())) <= tolerance(
        "BlockSparseAttention", "float64", "reference"
    )


@by_case
def test_eager_equals_the_reference(case):
    tensors = case.tensors()
    got, expected = op(*tensors, **case.attributes()), reference(*tensors, **case.attributes())
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float64", "eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["N=65,D=60", "GQA-8:2,Hm=2", "not-causal,window", "softcap"])
def test_dtypes(name, dtype):
    case = CASES[name]
    q, k, v, index = case.tensors(dtype)
    got = op(q, k, v, index, **case.attributes())
    assert got.dtype == dtype
    expected = reference(q.double(), k.double(), v.double(), index, **case.attributes())
    assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", str(dtype).removeprefix("torch."), "eager")
    assert relative_l2(reference(q, k, v, index, **case.attributes()), expected) <= tolerance(
        "BlockSparseAttention", str(dtype).removeprefix("torch."), "reference"
    )


@by_case
def test_gradients_are_the_references(case):
    q, k, v, index = case.tensors()
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    found = []
    for function in (op, reference):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = function(*leaves, index, **case.attributes())
        found.append(torch.autograd.grad((out * weight).sum(), leaves))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_half_precision_gradients_are_summed_in_float32():
    case = Case(n=200, d=16)
    q, k, v, index = case.tensors(torch.float16)
    found = []
    for tensors in ((q, k, v), (q.double(), k.double(), v.double())):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        found.append(torch.autograd.grad(op(*leaves, index, **case.attributes()).sum(), leaves))
    for got, expected in zip(*found, strict=True):
        assert got.dtype == torch.float16
        assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float16", "eager")


@pytest.mark.parametrize("name", ["GQA-8:2,Hm=2", "not-causal,window"])
def test_opcheck(name):
    case = CASES[name]
    q, k, v, index = case.tensors(torch.float32)
    leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))
    torch.library.opcheck(op.default, (*leaves, index), case.attributes())


def test_flops_are_those_of_the_listed_blocks():
    q, k, v, index = Case(n=100, heads=(4, 2, 2)).tensors()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        op(q, k, v, index, 16, 16)
    assert counter.get_total_flops() == 4 * 4 * 100 * (3 * 16) * 8


def test_chunks_of_one_row_and_of_many_give_the_same(monkeypatch):
    case = Case(n=200, heads=(4, 2, 4), listed=8, batch=2)
    q, k, v, index = case.tensors()
    attributes = resolve(case.d, **case.attributes())
    grad = torch.ones_like(q)
    whole = eager.forward(q, k, v, index, attributes), *eager.backward(grad, q, k, v, index, attributes)
    monkeypatch.setattr(eager, "CHUNK", 1)
    rows = eager.forward(q, k, v, index, attributes), *eager.backward(grad, q, k, v, index, attributes)
    for a, b in zip(whole, rows, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_tensor_is_larger_than_the_chunk(monkeypatch):
    """Memory beyond the inputs' size: nothing that eager makes grows with N * M."""
    monkeypatch.setattr(eager, "CHUNK", 1 << 12)
    case = Case(n=1024, d=8, heads=(1, 1, 1), listed=2)
    q, k, v, index = case.tensors(torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    with Watch():
        attributes = resolve(case.d, **case.attributes())
        eager.forward(q, k, v, index, attributes)
        eager.backward(q, q, k, v, index, attributes)
    assert largest <= max(1 << 12, q.numel())


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
def test_non_contiguous_tensors(function):
    case = Case(n=33, m=40)
    q, k, v, index = case.tensors()
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    lists = torch.stack([index, torch.full_like(index, 99)], dim=-1)[..., 0]
    got = function(*strided, lists, **case.attributes())
    assert torch.equal(got, function(q, k, v, index, **case.attributes()))


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
def test_rows_that_list_nothing_or_only_what_is_out_of_reach_give_zeros(function):
    q, k, v, index = Case(n=64).tensors()
    index[:, :, 0] = -1
    index[:, :, 1] = torch.tensor([3, -1, 2], dtype=torch.int32)  # behind every query of block 1
    k[:, :, 48:], v[:, :, 48:] = torch.nan, torch.nan
    got = function(q, k, v, index, 16, 16)
    assert torch.equal(got[:, :, :32], torch.zeros_like(got[:, :, :32]))


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_listed_never_leaks(function, bad, value):
    """Two blocks, one of them the last, hold no number; only rows that list them may notice."""
    case = Case(n=73, listed=4)
    q, k, v, index = case.tensors()
    index[index == 4] = bad
    index[:, :, 2] = torch.tensor([1 - bad, 2, -1, 2], dtype=torch.int32)  # one row is clean, and shorter than others
    clean = ~(index == bad).any(dim=3)[0, 0].repeat_interleave(16)[:73]
    expected = function(q, k, v, index, **case.attributes())
    for block in (slice(16 * bad, 16 * bad + 16), slice(64, 73)):
        k[:, :, block], v[:, :, block] = value, value
    got = function(q, k, v, index, **case.attributes())
    assert clean.any()
    torch.testing.assert_close(got[:, :, clean], expected[:, :, clean])


def test_a_nan_that_is_seen_shows():
    case = Case(n=32, listed=1)
    q, k, v, index = case.tensors()
    index[:] = 0
    k[:, :, 3] = torch.nan
    for function in (op, reference):
        got = function(q, k, v, index, **case.attributes())
        assert got[:, :, 3:].isnan().all()


SHAPES = [(1, 4, 40, 8), (1, 2, 50, 8), (1, 2, 50, 8), (1, 1, 3, 2)]


def changed(position, shape):
    return [shape if n == position else old for n, old in enumerate(SHAPES)]


WRONG_SHAPES = {
    "q-3D": (changed(0, (4, 40, 8)), r"takes q \[B, Hq, N, D\], .* got q \[4, 40, 8\], k \[1, 2, 50, 8\]"),
    "index-5D": (changed(3, (1, 1, 1, 3, 2)), "takes q"),
    "empty-batch": ([(0, *shape[1:]) for shape in SHAPES], "every axis"),
    "empty-sequence": ([(1, 4, 0, 8), (1, 2, 0, 8), (1, 2, 0, 8), (1, 1, 0, 2)], "every axis"),
    "no-key-heads": ([(1, 4, 40, 8), (1, 0, 50, 8), (1, 0, 50, 8), (1, 1, 3, 2)], "every axis"),
    "no-list": (changed(3, (1, 1, 3, 0)), "every axis"),
    "head-dim-0": ([(1, 4, 40, 0), (1, 2, 50, 0), (1, 2, 50, 0), (1, 1, 3, 2)], "every axis"),
    "k-and-v-differ": (changed(2, (1, 2, 49, 8)), "k and v of one shape"),
    "head-dims-differ": (changed(0, (1, 4, 40, 7)), "k and v of one shape"),
    "batches-differ": (changed(0, (2, 4, 40, 8)), "k and v of one shape"),
    "head-ratio": (changed(0, (1, 3, 40, 8)), "multiple of the number of key heads"),
    "M-below-N": ([(1, 4, 51, 8), *SHAPES[1:3], (1, 1, 4, 2)], "at least as many keys as queries"),
    "index-rows": (changed(3, (1, 1, 4, 2)), r"block_index \[B, Hm, ceil\(N / block_q\), K\]"),
    "index-heads": (changed(3, (1, 3, 3, 2)), "Hm one of 1, Hkv, Hq"),
    "index-batch": (changed(3, (2, 1, 3, 2)), r"block_index \[B, Hm"),
}


@pytest.mark.parametrize(("shapes", "message"), WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
def test_wrong_shapes(function, shapes, message):
    tensors = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ShapeError, match=f"^BlockSparseAttention .*{message}"):
        function(*tensors[:3], tensors[3].int(), 16, 16)
    with pytest.raises(ShapeError, match=message), torch.device("meta"):  # the fake kernel
        op(*(torch.zeros(shape) for shape in shapes[:3]), torch.zeros(shapes[3], dtype=torch.int32), 16, 16)


WRONG_ATTRIBUTES = {
    "scale-0": ({"scale": 0.0}, "scale that is finite and not 0, got 0.0"),
    "scale-nan": ({"scale": float("nan")}, "scale that is finite and not 0, got nan"),
    "scale-inf": ({"scale": float("inf")}, "scale that is finite and not 0, got inf"),
    "softcap-below-0": ({"softcap": -1.0}, "softcap that is finite and at least 0 .* got -1.0"),
    "softcap-nan": ({"softcap": float("nan")}, "softcap"),
    "softcap-denormal": (
        {"softcap": 1e-40},
        r"softcap of 0 \(none\) or a normal float32 number \(1.17549e-38 to 3.40282e\+38\), got 1e-40",
    ),
    "softcap-0-in-float32": ({"softcap": 1e-50}, "softcap of 0 .* got 1e-50"),
    "softcap-infinite-in-float32": ({"softcap": 4e38}, r"softcap of 0 .* got 4e\+38"),
    "scale-over-softcap": ({"scale": -8.0, "softcap": 2e-38}, "scale / softcap that float32 can hold, got -8 / 2e-38"),
    "window-below-0": ({"window": -1}, "window of at least 0 .* got -1"),
    "block-q-0": ({"block_q": 0}, "block_q of at least 1, got 0"),
    "block-k-below-0": ({"block_k": -3}, "block_k of at least 1, got -3"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_ATTRIBUTES.values(), ids=WRONG_ATTRIBUTES.keys())
@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
def test_wrong_attributes(function, options, message):
    case = Case(n=33)
    with pytest.raises(InputError, match=message):
        function(*case.tensors(), **(case.attributes() | options))


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
@pytest.mark.parametrize("softcap", [2.0**-126, 1e-30], ids=["smallest", "1e-30"])
def test_a_tiny_softcap_makes_all_keys_equal(function, softcap):
    q, k, v, index = Case(n=1, m=16, listed=1).tensors(torch.float32)
    index[:] = 0
    q[:, :1] = 0
    got = function(q, k, v, index, 16, 16, softcap=softcap)
    torch.testing.assert_close(got, v.mean(2, keepdim=True))


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
@pytest.mark.parametrize("index", [99, 3, -2, -(2**31), 2**31 - 1])
def test_block_index_out_of_range(function, index):
    q, k, v, lists = Case(n=33).tensors()
    lists[0, 0, 1, 1] = index
    with pytest.raises(InputError, match=rf"got block index {index} out of range -1\.\.2: 33 keys make 3 blocks of 16"):
        function(q, k, v, lists, 16, 16)


@pytest.mark.parametrize("function", [op, reference], ids=["op", "reference"])
def test_wrong_dtypes(function):
    q, k, v, index = Case(n=33).tensors(torch.float32)
    with pytest.raises(InputError, match=r"one dtype of float32, .* got float32, float64, float32"):
        function(q, k.double(), v, index, 16, 16)
    with pytest.raises(InputError, match="got int32, int32, int32"):
        function(q.int(), k.int(), v.int(), index, 16, 16)
    with pytest.raises(InputError, match="block_index as int32, got int64; convert it"):
        function(q, k, v, index.long(), 16, 16)


cases = st.builds(
    Case,
    n=st.integers(1, 24),
    d=st.integers(1, 9),
    heads=st.sampled_from([(1, 1, 1), (4, 2, 1), (4, 2, 2), (4, 2, 4), (3, 1, 3)]),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    listed=st.integers(1, 5),
    batch=st.integers(1, 2),
    options=st.fixed_dictionaries(
        {}, optional={"causal": st.booleans(), "window": st.integers(0, 30), "softcap": st.sampled_from([0.0, 2.0])}
    ),
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases, more=st.integers(0, 9), seed=st.integers(0, 99))
def test_any_call_equals_the_reference(case, more, seed):
    case = replace(case, m=case.n + more)
    tensors = case.tensors(seed=seed)
    got, expected = op(*tensors, **case.attributes()), reference(*tensors, **case.attributes())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
