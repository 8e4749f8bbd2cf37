"""Where a text falls into chunks: the boundary predictor of DHSA, and boundaries of a fixed capacity.

The predictor follows "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (Xiong et
al. 2025, arXiv:2510.24606) and has the keys of its authors' checkpoints: for the gap behind each token, the `window`
tokens on either side attend to each other, and the two sides' means are compared. Tokens are the key states of a layer
after RoPE, all key heads side by side.

The authors then suppress neighbours one after the other, best first, with a number of boundaries that depends on the
text. Here every choice is local, so that it has a fixed size and can be exported: a boundary is the likeliest within
`nms_radius` tokens, the best few in each group of `block_size` tokens stay, and each group begins with one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import InputError
from edgekit.models.sparse_config import SparseAttention

_TILE = 32  # gaps whose windows are attended to in one matrix product
_NONE = -torch.inf  # the logit of what is no candidate


class WindowEncoder(nn.Module):
    """The attention within a window, and the norm behind it, under the authors' names."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)


class WindowPool(nn.Module):
    """A learned weighting of the tokens of a side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, 1, bias=False)


class BoundaryPredictor(nn.Module):
    """Logits of a chunk ending behind each token.

    What the authors' code does for each window of 2 * `window` tokens, tokens beyond the ends of the text being zeros,
    is computed here with the projections of each token made once, and one row of the windows at a time.

    Args:
        channels: of the key states: key heads times head_dim.
        heads: attention heads within a window; divides `channels`.
        hidden: width of the hidden layer.
        window: tokens on either side of a gap.
        window_pool: weight the tokens of a side by a learned gate in place of their mean.

    Raises:
        InputError: heads that do not divide the channels.
    """

    def __init__(
        self, channels: int, *, heads: int = 8, hidden: int = 256, window: int = 4, window_pool: bool = False
    ) -> None:
        super().__init__()
        if channels % heads:
            raise InputError(f"the boundary predictor needs heads that divide its {channels} channels; got {heads}")
        self.window, self.hidden = window, hidden
        self.enc = WindowEncoder(channels, heads)
        self.mlp = nn.Sequential(nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.pool = WindowPool(channels) if window_pool else None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Key states `[B, channels, N]` to logits float32 `[B, N]`: entry i is for the gap behind token i."""
        return self.logits(features.transpose(1, 2))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """`forward` for key states `[B, N, channels]`."""
        side, tokens = self.window, tokens.float()
        count, tile = tokens.shape[1], max(_TILE, 2 * side)
        tiles = (count + tile - 1) // tile
        # Zeros before and behind the text, and up to a whole tile more than there are.
        padded = F.pad(tokens, [0, 0, side - 1, (tiles + 1) * tile - count - (side - 1)])
        attention = self.enc.mha
        projected = F.linear(padded, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (self._tiled(part, tile) for part in projected.chunk(3, dim=2))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(3, 4)  # [B, tiles, heads, reach, reach], reach = tile + 2w - 1
        # Gap i of a tile has the tokens i .. i + 2w - 1 of it in its window, of which token i + r is the row r.
        offset = (
            torch.arange(scores.shape[-1], device=tokens.device) - torch.arange(tile, device=tokens.device)[:, None]
        )
        inside = (offset >= 0) & (offset < 2 * side)

        def row(r: int) -> torch.Tensor:
            weights = torch.softmax(torch.where(inside, scores[:, :, :, r : r + tile], -torch.inf), dim=4)
            mixed = (weights @ v).transpose(2, 3).flatten(3).flatten(1, 2)  # [B, tiles * tile, channels]
            out: torch.Tensor = self.enc.norm(attention.out_proj(mixed[:, :count]))
            return out

        left = self._pooled(row(r) for r in range(side))
        right = self._pooled(row(r) for r in range(side, 2 * side))
        return self._compared(left, right)

    def _tiled(self, part: torch.Tensor, tile: int) -> torch.Tensor:
        """`[B, (tiles + 1) * tile, C]` to `[B, tiles, heads, tile + 2w - 1, C / heads]`: tiles with what follows."""
        groups = torch.unflatten(part, 1, (part.shape[1] // tile, tile))
        reach = torch.cat([groups[:, :-1], groups[:, 1:, : 2 * self.window - 1]], dim=2)
        return torch.unflatten(reach, 3, (self.enc.mha.num_heads, -1)).transpose(2, 3)

    def _pooled(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        """The rows of one side, each `[B, N, channels]`, to one."""
        if self.pool is None:
            return reduce(torch.add, rows) / self.window
        stacked = torch.stack(list(rows), dim=2)
        pooled: torch.Tensor = (torch.softmax(self.pool.gate(stacked), dim=2) * stacked).sum(dim=2)
        return pooled

    def _compared(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The MLP on left, right, |left - right|, left * right and their cosine, without joining them: `[B, N]`."""
        first, last = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        channels = left.shape[2]
        parts = torch.split(first.weight, [channels] * 4 + [1], dim=1)
        cosine = F.cosine_similarity(left, right, dim=2, eps=1e-6).unsqueeze(2)
        hidden = F.linear(left, parts[0], first.bias) + F.linear(right, parts[1])
        hidden = hidden + F.linear((left - right).abs(), parts[2]) + F.linear(left * right, parts[3])
        out: torch.Tensor = last(torch.relu(hidden + cosine * parts[4].squeeze(1))).squeeze(2)
        return out


def boundary_starts(
    predictor: BoundaryPredictor, keys: torch.Tensor, valid: torch.Tensor, config: SparseAttention
) -> torch.Tensor:
    """The first tokens of the chunks of a pass: bool `[B, N]`.

    Args:
        predictor: of boundaries.
        keys: `[B, Hkv, N, D]`, the pass's keys after RoPE.
        valid: bool `[B, N]`: False for padding, behind the valid tokens of each row.
        config: block_size, chunks_per_block, nms_radius, boundary_threshold, window.
    """
    present = torch.where(valid[:, None, :, None], keys, 0)  # padding is as good as the end of the text
    logits = predictor.logits(present.transpose(1, 2).flatten(2))
    return chunk_starts(logits, valid, config)


def chunk_starts(logits: torch.Tensor, valid: torch.Tensor, config: SparseAttention) -> torch.Tensor:
    """The first tokens of chunks, at most `chunks_per_block` in a group: bool `[B, N]`.

    A token begins a chunk if its group of `block_size` tokens begins with it, or if the logit of the gap before it is
    the greatest within `nms_radius` gaps (of equal ones the earliest), exceeds the threshold, and is among the
    `chunks_per_block - 1` best of the group (of equal ones the earliest). Gaps without `window` tokens on both sides
    are no boundaries.

    Args:
        logits: `[B, N]`; entry i is for the gap behind token i.
        valid: bool `[B, N]`: False for padding, behind the valid tokens of each row.
        config: block_size, chunks_per_block, nms_radius, boundary_threshold, window.
    """
    count = valid.to(torch.int64).sum(dim=1, keepdim=True)
    token = torch.arange(logits.shape[1], device=logits.device)
    # The logit of a token is that of the gap before it.
    scores = F.pad(logits, [1, 0], value=_NONE)[:, :-1]
    scores = torch.where((token >= config.window) & (token <= count - config.window), scores, _NONE)
    best = scores > _NONE if config.boundary_threshold is None else scores > config.boundary_threshold
    if config.nms_radius > 0:
        radius, length = config.nms_radius, scores.shape[1]
        around = F.pad(scores, [radius, radius], value=_NONE)
        before, behind = (
            torch.stack([around[:, at : at + length] for at in range(first, first + radius)]).amax(dim=0)
            for first in (0, radius + 1)
        )
        best = best & (scores > before) & (scores >= behind)
    size = config.block_size
    groups = (logits.shape[1] + size - 1) // size
    grouped = torch.where(best & (token % size != 0), scores, _NONE)
    grouped = F.pad(grouped, [0, groups * size - logits.shape[1]], value=_NONE)
    grouped = torch.unflatten(grouped, 1, (groups, size))
    mine, other = grouped.unsqueeze(3), grouped.unsqueeze(2)
    place = torch.arange(size, device=logits.device)
    better = (other > mine) | ((other == mine) & (place < place.unsqueeze(1)))
    chosen = (grouped > _NONE) & (better.to(torch.int64).sum(dim=3) < config.chunks_per_block - 1)
    return (chosen | (place == 0)).flatten(1)[:, : logits.shape[1]]
