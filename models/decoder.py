"""Decoder-only language models: Gemma 2, Llama and Qwen2, with dense or sparse attention and a key-value cache.

Gemma 2: arXiv 2408.00118; Llama 3: arXiv 2407.21783; Qwen2: arXiv 2407.10671. The keys of the weights are those of
their checkpoints in Hugging Face's format. Which keys a query reads is the business of
`edgekit.models.sparse_attention`, among them DHSA (arXiv 2510.24606), whose boundary predictor is part of the model.

Padding stands on the right: in each row of a mask the ones come first. With a cache, the padding of an earlier pass may
lie between a row's tokens, but only tokens of `decode` stand behind such a gap. A token's position counts the valid
tokens before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import InputError
from edgekit.models.boundaries import BoundaryPredictor
from edgekit.models.decoder_attention import ChunkTable, Decode, LayerAttention, Prefill
from edgekit.models.decoder_checks import check_forward, check_pass
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.dense_attention import DenseAttention
from edgekit.models.rotary import Rotary, rotate

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, q `[B, Hq, N, D]`, k and v `[B, Hkv, N, D]` of the new tokens) to the attention's output `[B, Hq, N, D]`."""


@dataclass(frozen=True)
class Cache:
    """What the passes before have left: P tokens per row, padding included.

    Attributes:
        keys, values: per layer float32 `[B, Hkv, P, D]`, keys after their rotation.
        chunk_keys: per layer float32 `[B, Hm, C, D]`, the representations of C chunks; empty for kinds without chunks.
        chunk_ids: int64 `[B, P]`, the chunk of each cached token: one that all layers share, or one per layer.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    chunk_keys: list[torch.Tensor] = field(default_factory=list)
    chunk_ids: list[torch.Tensor] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """P, the padding included."""
        return self.keys[0].shape[2]

    def table(self, layer: int) -> ChunkTable | None:
        """The chunks of one layer; None where there are none."""
        if not self.chunk_keys:
            return None
        return ChunkTable(self.chunk_keys[layer], self.chunk_ids[layer if len(self.chunk_ids) > 1 else 0])


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight), in float32; Gemma's offset is 1, the others' 0."""

    def __init__(self, dim: int, eps: float, offset: float) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` to the same shape and dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        scale = self.weight.float() + self.offset if self.offset else self.weight.float()
        return (normed * scale).to(x.dtype)


class SelfAttention(nn.Module):
    """The projections around the attention; which keys are read is the caller's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner, outer = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, outer, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, outer, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.output_bias)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, layer: int
    ) -> torch.Tensor:
        """`[B, N, hidden]` to the same shape; `cos` and `sin` `[B, 1, N, D / 2]` or `[1, 1, N, D / 2]`."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        # A copy anyway; left to flatten, torch.export would make a condition on N of the question whether it is one.
        merged = attended.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
        out: torch.Tensor = self.o_proj(merged)
        return out


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, or GeGLU with the tanh approximation (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        out: torch.Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input; Gemma normalises what it adds, too."""

    pre_feedforward_layernorm: RMSNorm | None
    post_feedforward_layernorm: RMSNorm | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config)
        self.input_layernorm = _norm(config)
        # The checkpoints of Llama and Qwen2 call the norm before the MLP so; Gemma's of that name stands where it says.
        self.post_attention_layernorm = _norm(config)
        gemma = config.family == "gemma2"
        self.pre_feedforward_layernorm = _norm(config) if gemma else None
        self.post_feedforward_layernorm = _norm(config) if gemma else None

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, layer: int
    ) -> torch.Tensor:
        """As `SelfAttention`."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, attend, layer)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            wide: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
            return wide
        x = x + self.post_attention_layernorm(attended)
        out: torch.Tensor = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return out


class Trunk(nn.Module):
    """Embedding, blocks and the last norm: all but the logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding_scale = config.embedding_scale
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Token ids `[B, N]` at int64 positions `[B, N]` or `[1, N]` to normalised states `[B, N, hidden]`."""
        x = self.embed_tokens(input_ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        cos, sin = self.rotary(positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend, index)
        out: torch.Tensor = self.norm(x)
        return out


class Decoder(nn.Module):
    """A decoder-only language model. See the module's docstring for padding and positions.

    `forward` is for training and scoring, without a cache; `prefill` and `decode` generate with one. The cache passed
    in is not changed.

    Raises:
        InputError, ShapeError: by all three, for token ids, a mask or a cache that do not fit, or more tokens than
            `config.context`; nothing is checked while torch.export traces.
    """

    lm_head: nn.Linear | None
    boundary_predictor: BoundaryPredictor | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = None if config.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        sparse = config.attention
        self.boundary_predictor = None
        if sparse.kind == "dhsa":
            self.boundary_predictor = BoundaryPredictor(
                config.num_kv_heads * config.head_dim,
                heads=sparse.predictor_heads,
                hidden=sparse.predictor_hidden,
                window=sparse.window,
            )
        self.layer_attention = [
            LayerAttention(config.query_scale, config.attention_softcap, config.window(layer))
            for layer in range(config.num_layers)
        ]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token ids int64 `[B, N]` to logits `[B, N, vocab_size]`; meaningless where the mask is 0.

        Args:
            input_ids: at least one token per row.
            attention_mask: int64 `[B, N]`, ones first; None: all tokens are valid.
            position_ids: int64 `[B, N]` or `[1, N]`, rising in each row; for training that skips positions (arXiv
                2309.10400). The window of a sliding layer then counts in these. Only with dense attention.
        """
        check_forward(self.config, input_ids, attention_mask, position_ids)
        batch, count = input_ids.shape
        if self.config.attention.kind == "dense":
            dense = DenseAttention(self.layer_attention, count, position_ids, input_ids.device)
            positions = torch.arange(count, device=input_ids.device).unsqueeze(0)
            return self.logits(self.model(input_ids, positions if position_ids is None else position_ids, dense))
        if position_ids is not None:
            raise InputError(f"position_ids go with dense attention; this model attends {self.config.attention.kind}")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.prefill(input_ids, mask, self.empty_cache(batch), logits="all")[0]

    def prefill(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        cache: Cache,
        *,
        logits: Literal["last", "all"] = "last",
    ) -> tuple[torch.Tensor, Cache]:
        """Take N tokens per row behind the P cached ones.

        Sparse attention counts its blocks of queries from the start of a pass: where several passes should read what
        one would, all but the last take a multiple of `block_size` tokens. The boundaries of chunks are predicted from
        one pass, as if the text ended with it, and `dense_last` is of each pass.

        Args:
            input_ids: int64 `[B, N]`.
            attention_mask: int64 `[B, P + N]`.
            cache: of P tokens; `empty_cache` at first.
            logits: of each row's last valid token of this pass, or of all tokens.

        Returns:
            logits `[B, 1, vocab_size]` or `[B, N, vocab_size]`, meaningless for rows or tokens that are padding; and
            the cache of P + N tokens.
        """
        check_pass(self.config, input_ids, attention_mask, cache)
        passes = Prefill(self.config.attention, attention_mask, self.boundary_predictor)
        hidden, grown = self._extend(input_ids, attention_mask, cache, passes)
        if logits == "last":
            last = (attention_mask.narrow(1, cache.tokens, input_ids.shape[1]).sum(1) - 1).clamp(min=0)
            hidden = hidden.gather(1, last.view(-1, 1, 1).expand(-1, 1, hidden.shape[2]))
        return self.logits(hidden), grown

    def decode(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Take one token per row, int64 `[B, 1]`, behind the P cached ones; the mask is int64 `[B, P + 1]`.

        With `decode="dense"` in the configuration, chunks of the cache are neither read nor kept.

        Returns:
            logits `[B, 1, vocab_size]` and the cache of P + 1 tokens.
        """
        check_pass(self.config, input_ids, attention_mask, cache, single=True)
        step = Decode(self.config.attention, attention_mask)
        if self.config.attention.decode == "dense":
            cache = Cache(cache.keys, cache.values)
        hidden, grown = self._extend(input_ids, attention_mask, cache, step)
        return self.logits(hidden), grown

    def empty_cache(self, batch: int) -> Cache:
        """A cache of no tokens for `batch` rows."""
        config, sparse = self.config, self.config.attention
        device = self.model.embed_tokens.weight.device

        def empty(heads: int) -> list[torch.Tensor]:
            shape = (batch, heads, 0, config.head_dim)
            return [torch.zeros(shape, device=device) for _ in range(config.num_layers)]

        if not sparse.has_chunks:
            return Cache(empty(config.num_kv_heads), empty(config.num_kv_heads))
        ids = 1 if sparse.shared_ids else config.num_layers
        return Cache(
            empty(config.num_kv_heads),
            empty(config.num_kv_heads),
            empty(sparse.mask_heads(config.num_kv_heads)),
            [torch.zeros(batch, 0, dtype=torch.int64, device=device) for _ in range(ids)],
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalised states `[..., hidden]` to logits `[..., vocab_size]`."""
        weight = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        scores = F.linear(hidden, weight)
        cap = self.config.final_softcap
        return cap * torch.tanh(scores / cap) if cap else scores

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint without what this model does not need.

        That is: the logits' matrix where it is tied to the embedding, the boundary predictor where the attention has
        none, and the rotary frequencies that old checkpoints hold.
        """
        unneeded = ["lm_head.weight"] if self.lm_head is None else []
        prefix = "boundary_predictor."
        return {
            key: value
            for key, value in tensors.items()
            if key not in unneeded
            and not key.endswith("rotary_emb.inv_freq")
            and not (self.boundary_predictor is None and key.startswith(prefix))
        }

    def _extend(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache, step: Prefill | Decode
    ) -> tuple[torch.Tensor, Cache]:
        """Run the trunk on the new tokens: their states `[B, N, hidden]` and the longer cache."""
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        tables: list[ChunkTable] = []

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys.append(torch.cat([cache.keys[layer], k], dim=2))
            values.append(torch.cat([cache.values[layer], v], dim=2))
            out, table = step.attend(self.layer_attention[layer], q, keys[-1], values[-1], cache.table(layer))
            if table is not None:
                tables.append(table)
            return out

        positions = (attention_mask.cumsum(1).narrow(1, cache.tokens, input_ids.shape[1]) - 1).clamp(min=0)
        hidden = self.model(input_ids, positions, attend)
        shared = tables[:1] if self.config.attention.shared_ids else tables
        return hidden, Cache(keys, values, [table.keys for table in tables], [table.ids for table in shared])


def _norm(config: DecoderConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.norm_eps, 1.0 if config.family == "gemma2" else 0.0)
