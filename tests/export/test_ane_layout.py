"""The layout rewrite: other ops, the same answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgekit
from edgekit.errors import ExportError
from edgekit.export import ane_layout
from edgekit.export.ane_layout import AneRewrite, relative_error, to_ane

TOKENS = [1, 49]


class Attention(nn.Module):
    """Multi-head attention as it is mostly written; `fused` with F.scaled_dot_product_attention."""

    def __init__(self, dim: int, heads: int, *, fused: bool = True, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.fused, self.causal = heads, fused, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            y = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Vit(nn.Module):
    """A vision transformer with a class token and learned positions."""

    def __init__(self, dim: int = 24, heads: int = 3, *, fused: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, 10, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attention = Attention(dim, heads, fused=fused)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.5), nn.Linear(2 * dim, dim))
        self.gamma = nn.Parameter(torch.rand(dim))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1) + self.pos
        x = x + self.gamma * self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


def ops(rewrite: AneRewrite) -> Counter[str]:
    assert isinstance(rewrite.module, torch.fx.GraphModule)
    names = (node.target for node in rewrite.module.graph.nodes if node.op == "call_function")
    return Counter(getattr(getattr(target, "overloadpacket", target), "__name__", str(target)) for target in names)


def check(module: nn.Module, *inputs: torch.Tensor, seed: int = 1) -> AneRewrite:
    """Rewrite, and compare on other inputs than those of the trace."""
    module = module.eval()
    rewrite = to_ane(module, inputs)
    generator = torch.Generator().manual_seed(seed)
    fresh = [torch.randn(x.shape, generator=generator) for x in inputs]
    with torch.no_grad():
        expected, actual = module(*fresh), rewrite.module(*fresh)
    for first, second in zip(*(torch.utils._pytree.tree_leaves(side) for side in (expected, actual)), strict=True):
        assert second.shape == first.shape
        assert relative_error(first, second) <= ane_layout.TOLERANCE
    return rewrite


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", TOKENS)
def test_mlp_on_tokens(tokens: int, batch: int) -> None:
    module = nn.Sequential(nn.LayerNorm(33), nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 33, bias=False))
    found = ops(check(module, torch.randn(batch, tokens, 33)))
    assert found["conv2d"] == 2
    assert not found["linear"] + found["layer_norm"]
    assert found["permute"] <= 2  # at the input and at the output


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "products"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_head_by_head(tokens: int, heads: int, fused: bool) -> None:
    found = ops(check(Attention(12, heads, fused=fused), torch.randn(min(tokens, 2), tokens, 12)))
    assert found["einsum"] == 2 * heads
    assert found["transpose"] == 1  # the keys, once
    assert found["permute"] <= 2
    assert not found["matmul"] + found["linear"] + found["scaled_dot_product_attention"]


def test_one_token_each_of_a_batch() -> None:
    check(Attention(12, 3), torch.randn(2, 1, 12))
    check(Attention(12, 3, fused=False), torch.randn(2, 1, 12))


def test_causal_attention() -> None:
    assert ops(check(Attention(8, 2, causal=True), torch.randn(1, 9, 8)))["einsum"] == 4


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "products"])
@pytest.mark.parametrize("batch", [1, 3])
def test_vit(batch: int, fused: bool) -> None:
    found = ops(check(Vit(fused=fused), torch.randn(batch, 3, 12, 12)))
    assert found["einsum"] == 6
    assert found["permute"] == 0
    assert found["transpose"] == 1
    assert not found["linear"] + found["matmul"] + found["layer_norm"]


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["SBC", "BSC"])
@pytest.mark.parametrize("batch", [1, 2])
def test_transformer_encoder_layer(batch: int, batch_first: bool, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 50, batch_first=batch_first, norm_first=norm_first)
    shape = (batch, 11, 24) if batch_first else (11, batch, 24)
    rewrite = check(layer, torch.randn(*shape))
    found = ops(rewrite)
    assert found["conv2d"] == 4
    assert not found["linear"] + found["scaled_dot_product_attention"] + found["layer_norm"]


def test_masks_of_several_kinds() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.register_buffer("bias", torch.randn(2, 5, 5))
            self.register_buffer("allowed", torch.ones(5, 5).tril().bool())

        def forward(self, x: torch.Tensor, extra: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, k, v = (y.reshape(1, 5, 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
            attend = F.scaled_dot_product_attention
            masks = (self.bias, self.allowed, extra.reshape(1, 1, 5, 5))
            return tuple(attend(q, k, v, attn_mask=mask, scale=0.3).transpose(1, 2).flatten(2) for mask in masks)

    found = ops(check(Masked(), torch.randn(1, 5, 8), torch.randn(5, 5)))
    assert found["einsum"] == 12


def test_mask_that_leaves_a_query_without_keys_stays() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(4, 4)
            allowed = torch.ones(3, 3).bool()
            allowed[1] = False
            self.register_buffer("allowed", allowed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).unsqueeze(1)
            return F.scaled_dot_product_attention(q, q, q, attn_mask=self.allowed)

    rewrite = check(Blind(), torch.randn(1, 3, 4))
    assert ops(rewrite)["scaled_dot_product_attention"] == 1


def test_grouped_queries() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(12, 16), nn.Linear(12, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
            k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.kv(x).split(8, -1))
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)

    assert ops(check(Grouped(), torch.randn(1, 6, 12)))["einsum"] == 8


def test_what_has_no_rule_stays_with_the_right_answers() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.a(x)
            y = y.cumsum(1) + y.roll(1, 1)
            y = torch.relu_(y)
            best = y.reshape(2, 5, 4, 2).sum(-1).topk(2).indices
            z = y.transpose(1, 2)[:, 2:6:2].mean(-1)
            return self.b(y * z.repeat(1, 4).unsqueeze(1)), best.float()

    rewrite = check(Odd(), torch.randn(2, 5, 6))
    assert ops(rewrite)["conv2d"] == 2


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("shvit_digits", {"attention": 4, "linear": 1}),
        ("care_digits", {"edgekit::kernel_linear_attention": 4, "linear": 1}),
        ("dynamicvis_digits", {"layer_norm": 6, "linear": 1}),
    ],
)
def test_zoo(name: str, changed: dict[str, int]) -> None:
    module = edgekit.fuse(edgekit.create_model(name))
    rewrite = check(module, torch.rand(1, 1, 32, 32))
    counted = Counter(change.op for change in rewrite.changes)
    assert all(counted[op] >= count for op, count in changed.items()), counted


def test_shvit_attention_needs_no_transpose_but_that_of_the_keys() -> None:
    found = ops(check(edgekit.fuse(edgekit.create_model("shvit_digits")), torch.rand(1, 1, 32, 32)))
    assert found["transpose"] == 4
    assert not found["permute"] + found["matmul"] + found["linear"]


def test_care_attention_has_the_channels_first() -> None:
    found = ops(check(edgekit.fuse(edgekit.create_model("care_digits")), torch.rand(1, 1, 32, 32)))
    assert not found["permute"] + found["kernel_linear_attention"] + found["linear"]


@pytest.mark.parametrize("rows", [1, 5])
def test_student_of_lighthgnn(rows: int) -> None:
    module = edgekit.fuse(edgekit.create_model("lighthgnn_digits"))
    features = next(iter(dict(module.named_parameters()).values())).shape[1]
    found = ops(check(module, torch.randn(rows, features)))
    assert found["conv2d"] == 2
    assert not found["linear"]


def test_dynamic_sizes_stay_dynamic() -> None:
    module = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 8)).eval()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    rewrite = to_ane(module, (torch.randn(1, 5, 12),), dynamic_shapes=({1: tokens},))
    assert ops(rewrite)["conv2d"] == 2
    x = torch.randn(1, 13, 12)
    with torch.no_grad():
        assert relative_error(module(x), rewrite.module(x)) <= ane_layout.TOLERANCE
        again = torch.export.export(rewrite.module, (torch.randn(1, 5, 12),), dynamic_shapes=({1: tokens},))
        assert relative_error(module(x), again.module()(x)) <= ane_layout.TOLERANCE


def test_the_module_is_not_changed() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    to_ane(module, (torch.randn(1, 3, 4),))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_model_that_gains_nothing_says_so() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    rewrite = to_ane(module, (torch.randn(1, 3, 8, 8),))
    assert not rewrite
    assert rewrite.summary.startswith("--layout ane changed nothing: it has no linear layer")
    assert isinstance(rewrite.module, nn.Sequential)


def test_a_model_that_cannot_be_traced() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="--layout ane cannot trace the model"):
        to_ane(Branch(), (torch.randn(2, 3),))


def test_a_wrong_rewrite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ane_layout, "TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="changed output 0"):
        to_ane(nn.Linear(4, 4), (torch.randn(1, 3, 4),))


def test_changes_name_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    rewrite: Any = to_ane(Vit().eval(), (torch.randn(1, 3, 12, 12),))
    assert "linear in attention.qkv: a 1x1 convolution on (B, C, 1, S)" in map(str, rewrite.changes)
    assert rewrite.summary == "--layout ane rewrote 3 layer_norm, 5 linear, 1 attention"
