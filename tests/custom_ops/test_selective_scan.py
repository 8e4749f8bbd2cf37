"""SelectiveScan in torch: the reference against its closed form, and the op against the reference."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import edgekit.custom_ops
from edgekit.custom_ops.selective_scan import selective_scan
from edgekit.custom_ops.selective_scan.eager import selective_scan as eager
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import InputError, ShapeError

edgekit.custom_ops.register()
operator = torch.ops.edgekit.selective_scan

# The same checks for what defines the answer, what computes it, and what a model calls.
FORMS = pytest.mark.parametrize("form", [selective_scan, eager, operator], ids=["reference", "eager", "op"])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def draw(length, channels=3, states=5, batch=2, gate=True, dtype=torch.float64):
    """u, delta, A, B, C, D and z; delta as before softplus and A negative, as in Mamba."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u, delta = normal(batch, channels, length), normal(batch, channels, length) - 2
    rates = -torch.exp(normal(channels, states) / 2)
    weights = [normal(batch, states, length) for _ in range(2)]
    tensors = [u, delta, rates, *weights, normal(channels)] + ([normal(batch, channels, length)] if gate else [])
    return [tensor.to(dtype) for tensor in tensors]


def with_steps(tensors):
    """The same with softplus done, for calls without it."""
    return [tensors[0], F.softplus(tensors[1]), *tensors[2:]]


def unrolled(u, delta, rates, b, c, skip):
    """y_t = sum over s <= t of C_t exp(A sum of delta over s+1..t) delta_s B_s u_s + D u_t: no recurrence."""
    total = delta.cumsum(-1)
    span = (total[:, :, :, None] - total[:, :, None, :]).tril()  # [B, C, t, s]
    decay = torch.exp(span[..., None] * rates[:, None, None, :])  # [B, C, t, s, S]
    per_state = decay * (delta * u)[:, :, None, :, None] * b.transpose(1, 2)[:, None, None]
    weights = (per_state * c.transpose(1, 2)[:, None, :, None]).sum(-1).tril()
    return weights.sum(-1) + skip[:, None] * u


@pytest.mark.parametrize("length", [1, 7, 63, 65])
def test_reference_equals_the_unrolled_formula(length):
    tensors = with_steps(draw(length, gate=False))
    torch.testing.assert_close(selective_scan(*tensors), unrolled(*tensors), rtol=1e-10, atol=1e-12)


def test_gate_and_softplus():
    *tensors, z = draw(9)
    expected = selective_scan(*with_steps(tensors)) * F.silu(z)
    torch.testing.assert_close(selective_scan(*tensors, z, delta_softplus=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("length", "channels", "states"), [(1, 3, 1), (63, 192, 5), (65, 3, 16), (300, 192, 16), (1000, 3, 5)]
)
def test_op_gives_the_references_answer(length, channels, states, dtype):
    name = str(dtype).removeprefix("torch.")
    for gate in (True, False):
        tensors = draw(length, channels, states, batch=1, gate=gate, dtype=dtype)
        expected = eager(*(tensor.double() for tensor in tensors), delta_softplus=True)
        if length * channels < 5000:  # the eager form in float64 stands in for the slow reference beyond
            reference = selective_scan(*(tensor.double() for tensor in tensors), delta_softplus=True)
            assert relative_l2(expected, reference) <= tolerance("SelectiveScan", "float64", "eager")
        got = operator(*tensors, delta_softplus=True)
        assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, tensors[0].shape, True)
        assert relative_l2(got, expected) <= tolerance("SelectiveScan", name, "eager")


@pytest.mark.parametrize("chunk", [1, 2, 16, 64])
def test_chunks_of_any_size_give_the_same(chunk, monkeypatch):
    tensors = draw(65)
    expected = selective_scan(*tensors)
    monkeypatch.setattr("edgekit.custom_ops.selective_scan.eager.MAX_CHUNK", chunk)
    torch.testing.assert_close(eager(*tensors), expected, rtol=1e-12, atol=1e-12)


@FORMS
def test_strong_decay_and_long_steps_stay_finite(form):
    """delta A down to -1e6: a quotient of decays would be infinite."""
    tensors = with_steps(draw(65, gate=False, dtype=torch.float32))
    tensors[1][:, :, ::3] = 1e5
    got = form(*tensors)
    assert got.isfinite().all()
    assert relative_l2(got, selective_scan(*(tensor.double() for tensor in tensors))) <= 5e-6


@FORMS
def test_growth_is_right_where_the_answer_is_finite(form):
    """A > 0: decays whose product over the tokens is infinite, on a state that is zero until the last of them."""
    tensors = with_steps(draw(65, gate=False, dtype=torch.float32))
    tensors[2].abs_()
    tensors[0][:, :, :60] = 0
    tensors[1].fill_(4.0)
    expected = selective_scan(*(tensor.double() for tensor in tensors))
    assert torch.exp(tensors[1].sum(-1).max() * tensors[2].max()).isinf()
    assert relative_l2(form(*tensors), expected) <= tolerance("SelectiveScan", "float32", "eager")


def test_op_takes_tensors_in_any_layout():
    tensors = draw(65)
    strided = [tensor.transpose(0, -1).contiguous().transpose(0, -1) for tensor in tensors]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(operator(*strided), selective_scan(*tensors), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "gate", "softplus", "rounding"),
    [
        (torch.float64, True, True, None),
        (torch.float32, False, False, None),
        (torch.float16, True, False, 2e-2),
        (torch.bfloat16, False, True, 1e-1),
    ],
    ids=str,
)
def test_opcheck(dtype, gate, softplus, rounding):
    """Schema, fake kernel with symbolic sizes, gradients, and tracing with those."""
    tensors = [tensor.requires_grad_() for tensor in draw(9, gate=gate, dtype=dtype)]
    if not softplus:
        tensors[1] = F.softplus(tensors[1].detach()).requires_grad_()
    arguments = (*tensors, *([] if gate else [None]), softplus)
    torch.library.opcheck(operator.default, arguments, atol=rounding, rtol=rounding)


@pytest.mark.parametrize("softplus", [True, False], ids=["softplus", "plain"])
@pytest.mark.parametrize("gate", [True, False], ids=["gate", "no-gate"])
def test_gradients(gate, softplus):
    tensors = [tensor.requires_grad_() for tensor in draw(5, channels=2, states=3, gate=gate)]
    assert torch.autograd.gradcheck(lambda *inputs: operator(*inputs, delta_softplus=softplus), tensors)


def test_one_input_may_need_no_gradient():
    tensors = draw(7)
    tensors[2].requires_grad_()
    operator(*tensors).sum().backward()
    assert tensors[2].grad.isfinite().all()


def test_memory_does_not_hold_all_states(monkeypatch):
    """The largest tensor of a long call is a chunk's, or the input's: never one with a state for each token."""
    sizes = []
    new_empty = torch.Tensor.new_empty

    def record(self, *shape, **options):
        result = new_empty(self, *shape, **options)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", record)
    tensors = draw(4096, channels=8, states=16, batch=1)
    eager(*tensors)
    assert 0 < max(sizes) < 4096 * 8 * 16 / 4


def test_multiply_accumulates():
    with FlopCounterMode(display=False) as counter:
        operator(*draw(63))
    assert counter.get_total_flops() == 2 * (2 * 3 * 63 * 5 * 2)


def test_export_keeps_one_node_with_dynamic_sizes():
    class Model(torch.nn.Module):
        def forward(self, u, delta, a, b, c, d, z):
            return operator(u, delta, a, b, c, d, z, delta_softplus=True)

    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length")}
    dims = [sizes if tensor.ndim == 3 else None for tensor in draw(7)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(), tuple(draw(7)), dynamic_shapes=dims)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [operator.default]
    tensors = draw(65, batch=3)
    expected = selective_scan(*tensors, delta_softplus=True)
    torch.testing.assert_close(program.module()(*tensors), expected, rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("index", [0, 1, 6], ids=["u", "delta", "z"])
def test_nan_stays_in_its_channel_and_does_not_reach_back(form, index):
    tensors = draw(40)
    clean = form(*tensors, delta_softplus=True)
    tensors[index][1, 2, 20] = torch.nan
    got = form(*tensors, delta_softplus=True)
    assert got[1, 2, 20].isnan()
    got[1, 2, 20:] = clean[1, 2, 20:]
    torch.testing.assert_close(got, clean)


@FORMS
def test_mixed_and_other_dtypes(form):
    tensors = draw(7)
    with pytest.raises(InputError, match=r"SelectiveScan takes tensors of one dtype out of .*; got u float64, delta"):
        form(*tensors[:2], tensors[2].float(), *tensors[3:])
    with pytest.raises(InputError, match="got u int64, delta int64"):
        form(*(tensor.long() for tensor in tensors))


FITTING = {"u": (2, 3, 7), "delta": (2, 3, 7), "A": (3, 4), "B": (2, 4, 7), "C": (2, 4, 7), "D": (3,), "z": (2, 3, 7)}
WRONG = {
    "delta": {"delta": (2, 3, 1)},
    "rates": {"A": (4, 4)},
    "input-weights": {"B": (2, 4, 8)},
    "output-weights": {"C": (1, 4, 7)},
    "skip": {"D": (1,)},
    "gate": {"z": (2, 3, 1)},
    "rank": {"u": (3, 7), "delta": (3, 7), "z": (3, 7)},
    "no-tokens": {"u": (2, 3, 0), "delta": (2, 3, 0), "B": (2, 4, 0), "C": (2, 4, 0), "z": (2, 3, 0)},
    "no-states": {"A": (3, 0), "B": (2, 0, 7), "C": (2, 0, 7)},
    "no-batch": {"u": (0, 3, 7), "delta": (0, 3, 7), "B": (0, 4, 7), "C": (0, 4, 7), "z": (0, 3, 7)},
}


@FORMS
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit(form, change):
    text = r"SelectiveScan takes u and delta \[B, C, L\], A \[C, S\], .* at least 1; got u \["
    with pytest.raises(ShapeError, match=text):
        form(*(torch.zeros(shape) for shape in (FITTING | change).values()))


def test_the_contract_needs_no_torch():
    module = "edgekit.custom_ops.selective_scan.contract"
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
