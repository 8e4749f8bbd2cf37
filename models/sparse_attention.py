"""Which blocks of keys a query block reads: dynamic hierarchical sparse attention, and its plainer relatives.

Follows "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (Xiong et al. 2025,
arXiv:2510.24606): the keys of a pass are cut into chunks at predicted boundaries, a chunk stands for its keys by their
mean times the square root of its length, and a query block reads what the best chunks hold. The paper chooses tokens;
here whole blocks of keys are chosen, by the best chunk that has a token in them, because blocks are what a kernel
fetches. What is the same for every kind: the first block, the blocks just before a query block and its own are always
read, nothing that a query may not see has a say in what is read, and ties go to the earlier block, on every backend.

Words: a *slot* is a place in the key cache, with P slots of earlier passes before the N of this pass, T = P + N. A pass
is cut into *groups* of `block_size` tokens from its start; no chunk reaches beyond its group, and a group has room for
`chunks_per_block` chunks. The *chunk table* is the chunk keys `[B, Hm, C, D]`, and for each slot the number of its
chunk, `[B, T]`. Hm is the number of key heads, or 1 with `heads="shared"`.

All functions are pure, take and give tensors, and can be exported with B, N, P and C symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgekit.errors import InputError
from edgekit.models.sparse_config import SparseAttention, window_blocks

__all__ = [
    "SparseAttention",
    "chunk_ids",
    "chunk_keys",
    "dense_decode_attention",
    "select_blocks",
    "sparse_decode_attention",
    "token_chunk",
]

# Blocks that are always read come before all others, these in this order if the budget does not hold all of them.
_OWN, _FIRST, _LOCAL = 3.4e38, 3.3e38, 3.2e38
_HIDDEN = -torch.inf
_FAR = 1 << 40  # more than any slot


def chunk_ids(starts: torch.Tensor | None, valid: torch.Tensor, config: SparseAttention) -> torch.Tensor:
    """The chunk of each token of a pass: int64 `[B, N]`, counted from the first place of the pass.

    Args:
        starts: bool `[B, N]`: the first tokens of chunks (the first of each group is one anyway); at most
            `chunks_per_block` in a group. None where each group is one chunk (kind "block").
        valid: bool `[B, N]`, for the shape.
        config: block_size and the capacity of a group.
    """
    size = config.block_size
    group = torch.arange(valid.shape[1], device=valid.device) // size
    if starts is None or config.kind != "dhsa":
        return (group * config.capacity).expand(valid.shape[0], -1)
    inside = _groups(starts.to(torch.int64), size, dim=1)  # [B, G, size]
    first = torch.arange(size, device=valid.device) == 0
    place = torch.cumsum(torch.where(first, torch.ones_like(inside), inside), dim=2) - 1
    return group * config.capacity + place.flatten(1)[:, : valid.shape[1]]


def chunk_keys(keys: torch.Tensor, ids: torch.Tensor, valid: torch.Tensor, config: SparseAttention) -> torch.Tensor:
    """What stands for each chunk of a pass: float `[B, Hm, ceil(N / block_size) * capacity, D]`.

    The mean of a chunk's valid keys, for kind "dhsa" times the square root of their number. Zeros in places without a
    valid token.

    Args:
        keys: `[B, Hkv, N, D]`, the pass's keys after RoPE.
        ids: int64 `[B, N]` from `chunk_ids`.
        valid: bool `[B, N]`: False for padding.
        config: block_size, capacity, heads.
    """
    size, capacity = config.block_size, config.capacity
    if config.heads == "shared":
        keys = keys.mean(dim=1, keepdim=True)
    grouped = _groups(keys, size, dim=2)  # [B, Hm, G, size, D]
    place = _groups(torch.where(valid, ids % capacity, -1), size, dim=1, fill=-1)  # [B, G, size]
    member = (place.unsqueeze(2) == torch.arange(capacity, device=ids.device).unsqueeze(1)).to(keys.dtype)
    count = member.sum(dim=3, keepdim=True).clamp(min=1)
    weights = member / (count.sqrt() if config.kind == "dhsa" else count)  # [B, G, capacity, size]
    return (weights.unsqueeze(1) @ grouped).flatten(2, 3)


def token_chunk(keys: torch.Tensor, config: SparseAttention) -> torch.Tensor:
    """The chunk key `[B, Hm, 1, D]` of one generated token with keys `[B, Hkv, 1, D]`: a chunk of its own."""
    return keys.mean(dim=1, keepdim=True) if config.heads == "shared" else keys


def select_blocks(
    q: torch.Tensor,
    valid: torch.Tensor,
    config: SparseAttention,
    *,
    window: int = 0,
    keys: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The key blocks that each query block of a prefill pass reads: the `block_index` of BlockSparseAttention.

    Args:
        q: `[B, Hq, N, D]`, the pass's queries after RoPE, in the last N of the T slots.
        valid: bool `[B, T]`: False for padding, which stands behind all valid tokens of a row with valid queries.
        config: kind, budget and the rest.
        window: keys at this distance from the query or further are hidden; 0 for none.
        keys: chunk keys `[B, Hm, C, D]` of the cached and the new chunks; for kinds "block" and "dhsa".
        ids: int64 `[B, T]`: the chunk of each slot.

    Returns:
        int32 `[B, Hm or 1, ceil(N / block_size), K]`, -1 for none; no block twice.
    """
    rows = _Rows.of(q.shape[2], valid, config.block_size, window)
    if config.kind == "dense" or config.covers(window):
        return _all_in_reach(rows, q.shape[2], valid, config.block_size, window)
    if config.kind == "window":
        recent = torch.arange(rows.blocks.shape[0], device=q.device, dtype=q.dtype)
        scores = recent.expand(valid.shape[0], 1, rows.first.shape[0], -1)
    else:
        if keys is None or ids is None:
            raise InputError(f"attention of kind {config.kind!r} needs chunk keys and chunk ids")
        queries = _query_blocks(q, valid[:, valid.shape[1] - q.shape[2] :], config, keys.shape[1])
        scores = _block_scores(queries, keys, ids, valid, rows, config.block_size, window)
    ranked = torch.where(rows.reach.unsqueeze(1), _forced(scores, rows, config), _HIDDEN)
    order = torch.sort(ranked, dim=3, descending=True, stable=True)
    index = torch.where(order.values > _HIDDEN, order.indices, -1).to(torch.int32)
    if config.dense_last == 0:
        return F.pad(index, [0, config.blocks], value=-1)[..., : config.blocks]  # there may be fewer blocks
    rank = torch.arange(index.shape[3], device=q.device)
    return torch.where((rank < config.blocks) | _dense_rows(valid, q.shape[2], config)[:, None, :, None], index, -1)


def sparse_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    config: SparseAttention,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    keys: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one new token to the best blocks of its cache.

    What lies in the blocks of the first slot, of the new one and of the `local` tokens before it is always read.
    Positions count valid tokens, so that padding of earlier passes takes nothing from `local` and `window`.

    Args:
        q: `[B, Hq, 1, D]`.
        k, v: `[B, Hkv, T, D]`, the new token's last.
        valid: bool `[B, T]`: False for padding, anywhere.
        config: kind, budget and the rest; kind "dense" reads all.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        window: keys at this distance from the query or further are hidden; 0 for none.
        keys: chunk keys `[B, Hm, C, D]`, the new token's included; for kinds "block" and "dhsa".
        ids: int64 `[B, T]`: the chunk of each slot.

    Returns:
        `[B, Hq, 1, D]`.
    """
    if config.kind == "dense":
        return dense_decode_attention(q, k, v, valid, scale=scale, softcap=softcap, window=window)
    size, slots = config.block_size, k.shape[2]
    # Blocks are counted in valid tokens, as if the row stood alone: the n-th of them lies in slot place[n].
    position = torch.cumsum(valid.to(torch.int64), dim=1) - 1
    place = _places(valid, position)
    count = position[:, -1:] + 1
    rank = torch.arange(slots, device=q.device).unsqueeze(0)
    seen = rank < count
    if window:
        seen = seen & (rank > count - 1 - window)
    if config.kind == "window":
        token_scores = (rank // size).to(q.dtype).unsqueeze(1)
    else:
        if keys is None or ids is None:
            raise InputError(f"attention of kind {config.kind!r} needs chunk keys and chunk ids")
        query = _head_means(q, keys.shape[1])
        scores = (query @ keys.transpose(2, 3)).squeeze(2)  # [B, Hm, C]
        chunk = torch.gather(ids, 1, place).unsqueeze(1)
        token_scores = torch.gather(scores, 2, chunk.expand(-1, keys.shape[1], -1))
    near = rank >= count - 1 - config.local
    forced = torch.where(near, _LOCAL, torch.zeros_like(near, dtype=q.dtype))
    forced = torch.where(rank < size, _FIRST, forced)
    forced = torch.where(rank // size == (count - 1) // size, _OWN, forced).unsqueeze(1)
    token_scores = torch.where(forced > 0, forced, token_scores)
    token_scores = torch.where(seen.unsqueeze(1), token_scores, _HIDDEN)
    ranked = _groups(token_scores, size, dim=2, fill=_HIDDEN).amax(dim=3)  # [B, Hm, NB]
    order = torch.sort(ranked, dim=2, descending=True, stable=True)
    best = torch.arange(
        torch.sym_min(config.blocks, ranked.shape[2]),  # type: ignore[no-untyped-call]
        device=q.device,
    )
    chosen, read = order.indices.index_select(2, best), order.values.index_select(2, best) > _HIDDEN

    inside = torch.arange(size, device=q.device)
    at = (chosen.unsqueeze(3) * size + inside).flatten(2)  # [B, Hm, S]
    read = (read.unsqueeze(3) & torch.unflatten(at < slots, 2, (-1, size))).flatten(2)
    at = at.clamp(max=slots - 1)
    read = read & torch.gather(seen.unsqueeze(1).expand(-1, at.shape[1], -1), 2, at)
    at = torch.gather(place.unsqueeze(1).expand(-1, at.shape[1], -1), 2, at)
    heads = torch.arange(valid.shape[0] * k.shape[1], device=q.device).view(valid.shape[0], -1, 1)
    rows = (heads * slots + at).flatten()  # of the heads' tokens one below the other
    k, v = (tensor.flatten(0, 2).index_select(0, rows).view(*k.shape[:2], -1, k.shape[3]) for tensor in (k, v))
    return _attend_one(q, k, v, read, scale, softcap)


def _places(valid: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The slots of a row's valid tokens in their order, int64 `[B, T]`; behind the last one any slot."""
    slots = valid.shape[1]
    slot = torch.arange(slots, device=valid.device).expand(valid.shape[0], -1)
    room = F.pad(torch.zeros_like(slot), (0, 1))  # the last place takes the padding
    return room.scatter(1, torch.where(valid, position, slots), slot)[:, :slots]


def dense_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    valid: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Attention of one new token to its whole cache; arguments as of `sparse_decode_attention`."""
    position = torch.cumsum(valid.to(torch.int64), dim=1) - 1
    return _attend_one(q, k, v, _seen(valid, position, window).unsqueeze(1), scale, softcap)


@dataclass(frozen=True)
class _Rows:
    """The query blocks (rows) of a pass and the key blocks."""

    first: torch.Tensor  # int64 [NQ, 1]: slot of the first query
    end: torch.Tensor  # int64 [NQ, 1]: behind the slot of the last query
    blocks: torch.Tensor  # int64 [NB]
    reach: torch.Tensor  # bool [B, NQ, NB]: some query of the row's range may see some valid key of the block

    @staticmethod
    def of(queries: int, valid: torch.Tensor, size: int, window: int) -> _Rows:
        slots, device = valid.shape[1], valid.device
        first = (torch.arange((queries + size - 1) // size, device=device) * size + (slots - queries)).unsqueeze(1)
        end = first + size
        # Of a block's valid keys the first and the last decide: a row's range is no shorter than a block.
        slot = torch.arange(slots, device=device)
        earliest = _groups(torch.where(valid, slot, _FAR), size, dim=1, fill=_FAR).amin(dim=2).unsqueeze(1)
        reach = earliest < torch.clamp(end, max=slots)
        if window > 0:
            latest = _groups(torch.where(valid, slot, -_FAR), size, dim=1, fill=-_FAR).amax(dim=2).unsqueeze(1)
            reach = reach & (latest > first - window)
        return _Rows(first, end, torch.arange(earliest.shape[2], device=device), reach)


def _all_in_reach(rows: _Rows, queries: int, valid: torch.Tensor, size: int, window: int) -> torch.Tensor:
    """An index of every block in reach, nearest first where there is a window: int32 `[B, 1, NQ, K]`."""
    if window == 0:
        block = rows.blocks.expand(rows.first.shape[0], -1)
        seen = rows.reach
    else:
        last = torch.clamp(rows.end, max=valid.shape[1]) - 1
        block = last // size - torch.arange(window_blocks(window, size), device=valid.device)  # [NQ, K]
        inside = (block >= 0).expand(valid.shape[0], -1, -1)
        block = block.clamp(min=0)
        seen = inside & torch.gather(rows.reach, 2, block.expand(valid.shape[0], -1, -1))
    return torch.where(seen, block, -1).unsqueeze(1).to(torch.int32)


def _forced(scores: torch.Tensor, rows: _Rows, config: SparseAttention) -> torch.Tensor:
    """`scores` `[B, Hm, NQ, NB]` with those of the blocks that are always read raised above all others."""
    size = config.block_size
    begin = rows.blocks * size
    behind = begin + size
    own = (behind > rows.first) & (begin < rows.end)  # [NQ, NB]
    local = (behind > rows.first - config.local) & (begin < rows.end)
    first = rows.blocks == 0
    level = torch.where(own, _OWN, torch.where(first, _FIRST, torch.where(local, _LOCAL, 0.0)))
    return torch.where(level > 0, level.to(scores.dtype), scores)


def _block_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    ids: torch.Tensor,
    valid: torch.Tensor,
    rows: _Rows,
    size: int,
    window: int,
) -> torch.Tensor:
    """The best score of a chunk with a valid token in the block, and within the window: `[B, Hm, NQ, NB]`.

    Causality needs no mask here: a block that a row sees in part holds queries of the row, so it is read anyway. The
    scores by slot are the one tensor here that grows with T * N: it is as large as a matrix of attention weights of
    Hm heads divided by the block size.
    """
    batch, heads, count = queries.shape[:3]
    scores = (keys @ queries.transpose(2, 3)).transpose(1, 2).flatten(2)  # [B, C, Hm * NQ]
    scores = torch.cat([scores, torch.full_like(scores[:, :1], _HIDDEN)], dim=1)  # the last place: padding's score
    places = scores.shape[1]
    place = _groups(torch.where(valid, ids, -1), size, dim=1, fill=-1)  # [B, NB, size]
    place = torch.where(place < 0, places - 1, place)
    place = place + (torch.arange(batch, device=ids.device) * places).view(-1, 1, 1)
    by_slot = scores.flatten(0, 1).index_select(0, place.flatten())  # whole rows: what copies fast
    by_slot = by_slot.view(*place.shape, heads, count)
    if window > 0:
        slot = (rows.blocks * size).unsqueeze(1) + torch.arange(size, device=ids.device)
        seen = slot.unsqueeze(2) > rows.first.squeeze(1) - window  # [NB, size, NQ]
        by_slot = torch.where(seen.unsqueeze(2), by_slot, _HIDDEN)
    return by_slot.amax(dim=2).permute(0, 2, 3, 1)


def _query_blocks(q: torch.Tensor, valid: torch.Tensor, config: SparseAttention, heads: int) -> torch.Tensor:
    """The mean of each block's valid queries, and of the heads that select together: `[B, Hm, NQ, D]`."""
    member = _groups(valid.to(q.dtype), config.block_size, dim=1)  # [B, NQ, size]
    weights = member / member.sum(dim=2, keepdim=True).clamp(min=1)
    grouped = _groups(_head_means(q, heads), config.block_size, dim=2)  # [B, Hm, NQ, size, D]
    return (weights[:, None, :, None] @ grouped).squeeze(3)


def _head_means(q: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, Hq, N, D]` to the means over each group of query heads: `[B, heads, N, D]`."""
    return q if q.shape[1] == heads else torch.unflatten(q, 1, (heads, -1)).mean(dim=2)


def _dense_rows(valid: torch.Tensor, queries: int, config: SparseAttention) -> torch.Tensor:
    """The query blocks with one of the last `dense_last` valid queries of each text: bool `[B, NQ]`."""
    size = config.block_size
    count = valid[:, valid.shape[1] - queries :].to(torch.int64).sum(dim=1, keepdim=True)
    begin = torch.arange((queries + size - 1) // size, device=valid.device) * size
    return (begin + size > count - config.dense_last) & (begin < count)


def _seen(valid: torch.Tensor, position: torch.Tensor, window: int) -> torch.Tensor:
    """The keys that a token behind all others may see: bool `[B, T]`."""
    return valid & (position > position[:, -1:] - window) if window > 0 else valid


def _attend_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """Attention of one query `[B, Hq, 1, D]` to the keys `[B, Hkv, S, D]` that are `seen`, bool `[B, Hm or 1, S]`."""
    scores = (torch.unflatten(q, 1, (k.shape[1], -1)).squeeze(3) * scale) @ k.transpose(2, 3)  # [B, Hkv, group, S]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    # Not -inf: a row without any valid token, which nobody reads, should not be NaN.
    scores = torch.where(seen.unsqueeze(2), scores, torch.finfo(scores.dtype).min)
    return (torch.softmax(scores, dim=3) @ v).flatten(1, 2).unsqueeze(2)


def _groups(tensor: torch.Tensor, size: int, *, dim: int, fill: float = 0) -> torch.Tensor:
    """Axis `dim`, of n, as two: `[.., ceil(n / size), size, ..]`, the last group filled up with `fill`."""
    length = tensor.shape[dim]
    groups = (length + size - 1) // size
    padding = [0, 0] * (tensor.ndim - 1 - dim) + [0, groups * size - length]
    return torch.unflatten(F.pad(tensor, padding, value=fill), dim, (groups, size))
