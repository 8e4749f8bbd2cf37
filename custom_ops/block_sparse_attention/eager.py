"""BlockSparseAttention in PyTorch with memory linear in the length, forward and backward.

Rows are query blocks of one head. A chunk of rows with about as many listed blocks gathers the keys and values of those
blocks alone and attends to them at once, so that time follows the density and the memory of a chunk is bounded.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edgekit.custom_ops.block_sparse_attention.contract import Attributes

# Entries of a chunk's largest tensor (scores, or gathered keys): 1 MiB in float32, so that it stays in the cache. One
# row may need more.
CHUNK = 1 << 18


@dataclass(frozen=True)
class _Chunk:
    """R rows: which tokens of the flattened q `[B Hq N, D]` and k `[B Hkv M, D]` they read, and who sees whom."""

    queries: torch.Tensor  # int64 [R, block_q]; behind the end of the sequence the last query, again
    keys: torch.Tensor  # int64 [R, J]; behind the end of the sequence the last key, again
    seen: torch.Tensor  # bool [R, block_q, J]
    first: torch.Tensor  # bool [R, block_q]: False for the repeats of the last query


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_index: torch.Tensor, attributes: Attributes
) -> torch.Tensor:
    """The answer for checked arguments: `[B, Hq, N, D]` in the dtype of `q`, contiguous."""
    flat_q, flat_k, flat_v = (tensor.reshape(-1, tensor.shape[3]) for tensor in (q, k, v))
    out = torch.zeros_like(flat_q, memory_format=torch.contiguous_format)
    for chunk in _chunks(q, k, block_index, attributes):
        q_, k_, v_ = _take(flat_q, chunk.queries), _take(flat_k, chunk.keys), _take(flat_v, chunk.keys)
        result = _attend(q_, k_, v_, chunk.seen, attributes)
        out[chunk.queries] = result.to(q.dtype)  # repeats of the last query write what it wrote
    return out.view(q.shape)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    attributes: Attributes,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v for the gradient of the output; recomputes the weights chunk by chunk."""
    flat_q, flat_k, flat_v, flat_grad = (tensor.reshape(-1, q.shape[3]) for tensor in (q, k, v, grad))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32  # the sums over chunks are rounded at the end
    dq, dk, dv = (torch.zeros(flat.shape, dtype=wide, device=q.device) for flat in (flat_q, flat_k, flat_v))
    for chunk in _chunks(q, k, block_index, attributes):
        places = (flat_q, chunk.queries), (flat_k, chunk.keys), (flat_v, chunk.keys)
        q_, k_, v_ = (_take(flat, at).to(wide) for flat, at in places)
        weights, tanh = _weights(q_, k_, chunk.seen, attributes)
        weights.masked_fill_(~chunk.seen.any(dim=2, keepdim=True), 0)
        # Repeats of the last query gave nothing.
        g = _take(flat_grad, chunk.queries).to(wide).masked_fill(~chunk.first.unsqueeze(2), 0)
        d_weights = g @ v_.transpose(1, 2)
        d_scores = weights * (d_weights - (weights * d_weights).sum(dim=2, keepdim=True)) * attributes.scale
        if tanh is not None:
            d_scores = d_scores * (1 - tanh * tanh)
        dq.index_add_(0, chunk.queries.flatten(), (d_scores @ k_).flatten(0, 1))
        dk.index_add_(0, chunk.keys.flatten(), (d_scores.transpose(1, 2) @ q_).flatten(0, 1))
        dv.index_add_(0, chunk.keys.flatten(), (weights.transpose(1, 2) @ g).flatten(0, 1))
    return dq.to(q.dtype).view(q.shape), dk.to(q.dtype).view(k.shape), dv.to(q.dtype).view(v.shape)


def _take(flat: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of `flat` `[T, D]` at `tokens` `[R, J]`: `[R, J, D]`; faster than indexing."""
    return flat.index_select(0, tokens.flatten()).view(*tokens.shape, -1)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, attributes: Attributes
) -> torch.Tensor:
    """Attention of q `[R, block_q, D]` to k, v `[R, J, D]` where `seen`: float64 for float64, otherwise float32."""
    if q.dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    weights, _ = _weights(q, k, seen, attributes)
    return (weights @ v).masked_fill(~seen.any(dim=2, keepdim=True), 0)


def _weights(
    q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor, attributes: Attributes
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The softmax `[R, block_q, J]`, NaN for a query that sees nothing; and the softcap's tanh."""
    scores, tanh = (q * attributes.scale) @ k.transpose(1, 2), None
    if attributes.softcap > 0:
        tanh = torch.tanh(scores / attributes.softcap)
        scores = attributes.softcap * tanh
    return torch.softmax(scores.masked_fill_(~seen, -torch.inf), dim=2), tanh


def _chunks(q: torch.Tensor, k: torch.Tensor, block_index: torch.Tensor, attributes: Attributes) -> Iterator[_Chunk]:
    """The rows that see any block, in chunks."""
    heads, queries, head_dim = q.shape[1:]
    key_heads, keys = k.shape[1:3]
    block_q, block_k, device = min(attributes.block_q, queries), min(attributes.block_k, keys), q.device
    offset = keys - queries
    blocks, counts = _listed(block_index, offset, attributes)  # [B, Hm, NQ, K], [B, Hm, NQ]
    index_heads, row_blocks = blocks.shape[1:3]

    per_row = counts.repeat_interleave(heads // index_heads, dim=1).flatten()
    order = per_row.argsort(stable=True)
    for start, end, count in _slices(per_row[order].tolist(), CHUNK // (block_k * max(block_q, head_dim))):
        rows = order[start:end]
        head = rows // row_blocks  # b * Hq + h
        row_block, b, h = rows % row_blocks, head // heads, head % heads
        listed = blocks[b, h * index_heads // heads, row_block, :count].long()  # [R, count]
        i = row_block.unsqueeze(1) * block_q + torch.arange(block_q, device=device)  # [R, block_q]
        j = (listed.unsqueeze(2) * block_k + torch.arange(block_k, device=device)).flatten(1)  # [R, J]
        # Shorter lists are filled with their own first block: a filler reads nothing that the row does not list.
        filler = torch.arange(count, device=device) >= counts[b, h * index_heads // heads, row_block].unsqueeze(1)
        seen = ((j < keys) & ~filler.repeat_interleave(block_k, dim=1)).unsqueeze(1)
        first = i < queries
        i, j = i.clamp(max=queries - 1), j.clamp(max=keys - 1)
        position = (i + offset).unsqueeze(2)  # compared with j, not subtracted: no integers as large as the scores
        lowest, stop = attributes.visible()
        if lowest is not None:
            seen = seen & (position - lowest >= j.unsqueeze(1))
        if stop is not None:
            seen = seen & (position - stop < j.unsqueeze(1))
        yield _Chunk(
            queries=head.unsqueeze(1) * queries + i,
            keys=((b * key_heads + h * key_heads // heads) * keys).unsqueeze(1) + j,
            seen=seen.expand(-1, block_q, -1),
            first=first,
        )


def _slices(counts: list[int], limit: int) -> Iterator[tuple[int, int, int]]:
    """Slices of rising `counts`, without the zeros, whose length times largest count stays within `limit`, or of one.

    Yields: start, end, the largest count.
    """
    start = bisect.bisect_right(counts, 0)
    while start < len(counts):
        end = start + 1
        while end < len(counts) and (end + 1 - start) * counts[end] <= limit:
            end += 1
        yield start, end, counts[end - 1]
        start = end


def _listed(block_index: torch.Tensor, offset: int, attributes: Attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's blocks, every one once and those out of its reach left out, first in the row; and how many there are.

    Returns:
        int32 `[B, Hm, NQ, K]`, each row filled up with its first block, and int64 `[B, Hm, NQ]`.
    """
    blocks = block_index.sort(dim=3).values
    listed = blocks >= 0
    listed[..., 1:] &= blocks[..., 1:] != blocks[..., :-1]
    # Distance p - j from the first query of the row to the first key of the block.
    first = torch.arange(blocks.shape[2], device=blocks.device).unsqueeze(1) * attributes.block_q + offset
    distance = first - blocks.long() * attributes.block_k
    lowest, stop = attributes.visible()
    if lowest is not None:
        listed &= distance + attributes.block_q > lowest
    if stop is not None:
        listed &= distance - attributes.block_k + 1 < stop
    counts = listed.sum(dim=3)
    position = torch.where(listed, 0, 1).argsort(dim=3, stable=True)
    blocks = blocks.gather(3, position)
    filler = torch.arange(blocks.shape[3], device=blocks.device) >= counts.unsqueeze(3)
    return torch.where(filler, blocks[..., :1], blocks), counts
