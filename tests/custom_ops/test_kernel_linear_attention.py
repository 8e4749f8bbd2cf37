"""KernelLinearAttention in torch: the reference against the quadratic formula, and the op against the reference."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import edgekit.custom_ops
from edgekit.custom_ops.kernel_linear_attention import FEATURE_MAPS, kernel_linear_attention
from edgekit.custom_ops.kernel_linear_attention.eager import kernel_linear_attention as eager
from edgekit.custom_ops.kernel_linear_attention.reference import features
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import InputError, ShapeError, UnknownNameError

edgekit.custom_ops.register()
operator = torch.ops.edgekit.kernel_linear_attention

# The same checks for what defines the answer, what computes it, and what a model calls.
FORMS = pytest.mark.parametrize("form", [kernel_linear_attention, eager, operator], ids=["reference", "eager", "op"])

PHI = {
    "relu": F.relu,
    "elu1": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "identity": lambda x: x,
}
SMALLEST = torch.finfo(torch.float32).tiny


def draw(tokens, d=5, e=3, batch=2, heads=3, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, heads, tokens, d)] * 2 + [(batch, heads, tokens, e)]
    return [(scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def quadratic(q, k, v, feature_map, eps=1e-6):
    """Row i holds the weights of query i over all keys; the definition with the N x N matrix written out."""
    weights = PHI[feature_map](q) @ PHI[feature_map](k).transpose(-2, -1) / k.shape[-2]
    return weights @ v / (weights.sum(-1, keepdim=True) + eps)


def test_every_feature_map_is_checked():
    assert set(FEATURE_MAPS) == set(PHI)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("tokens", [1, 7, 63, 65])
def test_equals_the_quadratic_formula(tokens, feature_map):
    q, k, v = draw(tokens)
    if feature_map == "identity":
        q, k = q.abs(), k.abs()  # signed features can make the denominator vanish
    got = kernel_linear_attention(q, k, v, feature_map)
    assert got.shape == (2, 3, tokens, 3)
    torch.testing.assert_close(got, quadratic(q, k, v, feature_map), rtol=1e-12, atol=1e-12)


def test_eps_counts():
    q, k, v = draw(7)
    torch.testing.assert_close(kernel_linear_attention(q, k, v, eps=0.5), quadratic(q, k, v, "relu", eps=0.5))


def test_a_query_without_features_gives_zeros():
    q, k, v = draw(7)
    q[:, :, 2] = -1
    got = kernel_linear_attention(q, k, v, "relu")
    assert torch.equal(got[:, :, 2], torch.zeros(2, 3, 3, dtype=torch.float64))


@FORMS
@pytest.mark.parametrize(("x", "eps"), [(-15.0, 1e-9), (-20.0, 0.0), (-40.0, 0.0), (-1e-4, 0.0)], ids=str)
def test_elu1_of_negative_numbers_keeps_its_digits(form, x, eps):
    """elu(x) + 1 would lose them: it is a multiple of 2^-24."""
    q, k, v = (torch.full((1, 1, 4, 8), value) for value in (x, x, 1.5))
    weight = 8 * torch.tensor(x, dtype=torch.float64).exp().square()
    torch.testing.assert_close(form(q, k, v, "elu1", eps), (1.5 * weight / (weight + eps)).float().expand(1, 1, 4, 8))


def test_the_gradient_of_elu1_is_its_derivative_on_both_sides_and_at_zero():
    x = torch.tensor([-30.0, -2.0, 0.0, 0.5, torch.inf, -torch.inf], requires_grad=True)
    (slope,) = torch.autograd.grad(features(x, "elu1").sum(), x)
    torch.testing.assert_close(slope, torch.tensor([-30.0, -2.0, 0.0, 0.0, 0.0, -torch.inf]).exp())


@FORMS
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_smallest_eps_still_gives_zeros_without_features(form, feature_map):
    k, v = (torch.ones(1, 1, 4, 8) for _ in "kv")
    q = torch.full_like(k, -torch.inf if feature_map == "elu1" else 0.0)
    assert torch.equal(form(q, k, v, feature_map, SMALLEST), torch.zeros_like(v))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_half_precision_inputs_at_4096_tokens(feature_map, dtype):
    q, k, v = draw(4096, d=16, e=16, batch=1, heads=2, dtype=dtype, scale=20)
    got = kernel_linear_attention(q, k, v, feature_map)
    assert got.dtype == dtype
    expected = quadratic(q.double(), k.double(), v.double(), feature_map)
    torch.testing.assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-2)


def test_a_half_precision_copy_of_the_graph_stays_finite_at_4096_tokens():
    """Exporters trace in float32 and convert; sums over the tokens would pass 65504 here."""
    q, k, v = draw(4096, d=16, e=16, batch=1, heads=2, dtype=torch.float32, scale=20)
    v = v.abs()
    assert float((F.relu(k).transpose(-2, -1) @ v).abs().max()) > 65504
    graph = make_fx(lambda q, k, v: kernel_linear_attention(q, k, v))(q, k, v)
    got = graph(q.half(), k.half(), v.half())
    assert got.dtype == torch.float16
    assert got.isfinite().all()
    torch.testing.assert_close(got.float(), kernel_linear_attention(q, k, v), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients(feature_map):
    q, k, v = (tensor.abs().add(0.1).requires_grad_() for tensor in draw(7, batch=1, heads=1))
    assert torch.autograd.gradcheck(lambda q, k, v: kernel_linear_attention(q, k, v, feature_map), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 196, 200])
@pytest.mark.parametrize(("d", "e"), [(5, 3), (60, 64), (64, 60)])
def test_op_gives_the_references_answer(tokens, d, e, dtype):
    name = str(dtype).removeprefix("torch.")
    for feature_map in ("relu", "elu1"):
        q, k, v = draw(tokens, d, e, dtype=dtype)
        expected = kernel_linear_attention(q.double(), k.double(), v.double(), feature_map)
        got = operator(q, k, v, feature_map)
        assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, v.shape, True)
        assert relative_l2(got, expected) <= tolerance("KernelLinearAttention", name, "eager")
        reference = kernel_linear_attention(q, k, v, feature_map)
        assert relative_l2(reference, expected) <= tolerance("KernelLinearAttention", name, "reference")


def test_op_takes_tensors_in_any_layout():
    q, k, v = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in draw(7))
    assert not q.is_contiguous()
    torch.testing.assert_close(operator(q, k, v), kernel_linear_attention(*draw(7)))


@pytest.mark.parametrize(
    ("dtype", "feature_map", "rounding"),
    [
        (torch.float64, "relu", None),
        (torch.float32, "elu1", None),
        (torch.float16, "identity", 2e-2),
        (torch.bfloat16, "relu", 1e-1),
    ],
    ids=str,
)
def test_opcheck(dtype, feature_map, rounding):
    """Schema, fake kernel with symbolic sizes, gradients, and tracing with those."""
    inputs = [tensor.abs().add(0.1).requires_grad_() for tensor in draw(7, dtype=dtype)]
    torch.library.opcheck(operator.default, (*inputs, feature_map, 1e-3), atol=rounding, rtol=rounding)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_gradients_of_the_op(feature_map):
    inputs = [tensor.abs().add(0.1).requires_grad_() for tensor in draw(7, batch=1, heads=1)]
    assert torch.autograd.gradcheck(lambda q, k, v: operator(q, k, v, feature_map), inputs)


def test_one_input_may_need_no_gradient():
    q, k, v = draw(7)
    v.requires_grad_()
    operator(q, k, v).sum().backward()
    assert v.grad.isfinite().all()


def test_multiply_accumulates_are_counted_as_those_of_the_reference():
    inputs = draw(63)
    with FlopCounterMode(display=False) as expected:
        kernel_linear_attention(*inputs)
    with FlopCounterMode(display=False) as counted:
        operator(*inputs)
    assert counted.get_total_flops() == expected.get_total_flops() == 2 * 2 * 3 * 63 * 5 * (2 * 3 + 1)


def test_export_keeps_one_node_with_dynamic_sizes():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return operator(q, k, v, "elu1")

    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("tokens")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Model(), tuple(draw(7)), dynamic_shapes=(sizes,) * 3)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [operator.default]
    inputs = draw(65, batch=3)
    torch.testing.assert_close(program.module()(*inputs), kernel_linear_attention(*inputs, "elu1"))


@FORMS
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_nan_and_infinity_stay_where_they_are(form, feature_map):
    q, k, v = draw(7)
    clean = form(q, k, v, feature_map)
    q[0, 0, 3, 1] = torch.nan
    k[1, 1, 2, 0] = torch.nan
    v[1, 2, 2, 0] = torch.inf
    got = form(q, k, v, feature_map)
    assert got[0, 0, 3].isnan().all(), "a row whose query is NaN"
    assert got[1, 1].isnan().all(), "a head with a NaN key"
    assert not got[1, 2, :, 0].isfinite().any(), "a column of values with an infinity"
    got[0, 0, 3], got[1, 1], got[1, 2, :, 0] = clean[0, 0, 3], clean[1, 1], clean[1, 2, :, 0]
    torch.testing.assert_close(got, clean)


@FORMS
def test_unknown_feature_map(form):
    with pytest.raises(UnknownNameError, match="feature map 'elu'; did you mean"):
        form(*draw(7), feature_map="elu")


@FORMS
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")], ids=str)
def test_eps_outside_the_contract(form, eps):
    with pytest.raises(InputError, match=f"KernelLinearAttention takes a finite eps >= 0; got {eps}"):
        form(*draw(7), eps=eps)


@FORMS
@pytest.mark.parametrize("eps", [1e-39, 1e-50, SMALLEST * 0.999, 3.5e38], ids=str)
def test_eps_that_float32_does_not_hold(form, eps):
    text = rf"takes eps 0 or a normal float32 number \(1.17549e-38 to 3.40282e\+38\); got {re.escape(f'{eps:g}')}\."
    with pytest.raises(InputError, match=text):
        form(*draw(7), eps=eps)


@FORMS
def test_mixed_and_other_dtypes(form):
    q, k, v = draw(7)
    with pytest.raises(InputError, match=r"one dtype out of .*; got q float64, k float32, v float64"):
        form(q, k.float(), v)
    with pytest.raises(InputError, match="got q int64, k int64, v int64"):
        form(q.long(), k.long(), v.long())


@FORMS
@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 7, 5), (2, 3, 8, 5), (2, 3, 8, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 4), (2, 3, 7, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 1, 7, 3)],
        [(2, 3, 7, 5), (1, 3, 7, 5), (2, 3, 7, 3)],
        [(3, 7, 5), (3, 7, 5), (3, 7, 3)],
        [(2, 3, 0, 5), (2, 3, 0, 5), (2, 3, 0, 3)],
        [(0, 3, 7, 5), (0, 3, 7, 5), (0, 3, 7, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 3, 7, 0)],
    ],
    ids=["tokens", "head-dim", "heads", "batch", "no-batch", "no-tokens", "empty-batch", "no-values"],
)
def test_shapes_that_do_not_fit(form, shapes):
    text = r"q and k \[B, H, N, D\] and v \[B, H, N, E\] .* at least 1; got q \["
    with pytest.raises(ShapeError, match=text):
        form(*(torch.zeros(shape) for shape in shapes))


def test_the_contract_needs_no_torch():
    code = (
        "import sys; from edgekit.custom_ops.kernel_linear_attention import contract; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_training_gives_the_same_gradients():
    weight = torch.randn(8, 8, requires_grad=True)

    def loss(x):
        y = x @ weight
        return torch.ops.edgekit.kernel_linear_attention(y, y, y).square().sum()

    x = torch.randn(1, 2, 7, 8)
    expected = torch.autograd.grad(loss(x), weight)[0]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), weight)[0], expected)
