"""The reference of KernelLinearAttention against the quadratic formula, at awkward sizes and in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from edgekit.custom_ops.kernel_linear_attention import FEATURE_MAPS, kernel_linear_attention
from edgekit.errors import ShapeError, UnknownNameError

PHI = {"relu": F.relu, "elu1": lambda x: F.elu(x) + 1, "identity": lambda x: x}


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


def test_unknown_feature_map():
    with pytest.raises(UnknownNameError, match="feature map 'elu'; did you mean"):
        kernel_linear_attention(*draw(7), feature_map="elu")


@pytest.mark.parametrize(
    "shapes",
    [
        [(2, 3, 7, 5), (2, 3, 8, 5), (2, 3, 8, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 4), (2, 3, 7, 3)],
        [(2, 3, 7, 5), (2, 3, 7, 5), (2, 1, 7, 3)],
        [(3, 7, 5), (3, 7, 5), (3, 7, 3)],
    ],
    ids=["tokens", "head-dim", "heads", "no-batch"],
)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ShapeError, match=r"q and k \[B, H, N, D\] and v \[B, H, N, E\]; got q \("):
        kernel_linear_attention(*(torch.zeros(shape) for shape in shapes))
