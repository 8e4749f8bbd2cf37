"""The PyTorch reference of BlockSparseAttention. It defines the answer; it is written to be read, not to be fast."""

from __future__ import annotations

import torch

from edgekit.custom_ops.block_sparse_attention.contract import (
    Attributes,
    check_dtypes,
    check_range,
    check_shapes,
    resolve,
)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Softmax attention in which each block of queries reads only the blocks of keys that it lists.

    Args:
        q: queries `[B, Hq, N, D]`, float32, float16, bfloat16 or float64. Query i sits at position i + M - N.
        k: keys `[B, Hkv, M, D]`, dtype of `q`; Hq is a multiple of Hkv, M >= N. Key j sits at position j.
        v: values `[B, Hkv, M, D]`, dtype of `q`.
        block_index: int32 `[B, Hm, ceil(N / block_q), K]`, Hm in {1, Hkv, Hq}: the key blocks that each query block
            reads, in any order; -1 is none, a repeated block counts once.
        block_q: queries per block; the last may be shorter.
        block_k: keys per block; the last may be shorter.
        causal: a query sees no key behind its position.
        scale: factor of the scores, finite and not 0; None takes D^-0.5.
        softcap: c > 0 turns a score s into c tanh(s / c); c is a normal number of float32.
        window: w > 0 hides keys that are w or more positions before the query, or, if not causal, behind it.

    Returns:
        `[B, Hq, N, D]` in the dtype of `q`. A query that may see no key gets zeros. Where the listed blocks hold only
        finite numbers, nothing but the keys that a query may see has any influence, whatever other blocks hold; see
        `contract` for the rest. float16 and bfloat16 are computed in float32.

    Raises:
        ShapeError: shapes that do not fit together, or an empty axis.
        InputError: a dtype, an attribute or a block index outside the contract.
    """
    attributes = check(q, k, v, block_index, block_q, block_k, causal, scale, softcap, window)
    if q.dtype in (torch.float16, torch.bfloat16):
        return _attention(q.float(), k.float(), v.float(), block_index, attributes).to(q.dtype)
    return _attention(q, k, v, block_index, attributes)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_index: torch.Tensor, attributes: Attributes
) -> torch.Tensor:
    batch, heads, queries, head_dim = q.shape
    key_heads, index_heads = k.shape[1], block_index.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h * key_heads // heads], v[b, h * key_heads // heads]
            lists = block_index[b, h * index_heads // heads]
            for i in range(queries):
                seen = visible_keys(lists[i // attributes.block_q], i + len(keys) - queries, len(keys), attributes)
                scores = attributes.scale * (keys[seen] @ q[b, h, i])
                if attributes.softcap > 0:
                    scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
                rows.append(torch.softmax(scores, dim=0) @ values[seen])  # no key seen: an empty sum, zeros
    return torch.stack(rows).reshape(batch, heads, queries, head_dim)


def visible_keys(blocks: torch.Tensor, position: int, keys: int, attributes: Attributes) -> torch.Tensor:
    """Which of `keys` keys the query at `position` may see whose block lists `blocks` (int32 `[K]`): int64, rising."""
    j = torch.arange(keys, device=blocks.device)
    seen = torch.isin(j // attributes.block_k, blocks)
    if attributes.causal:
        seen &= j <= position
    if attributes.window > 0:
        seen &= j > position - attributes.window
        if not attributes.causal:
            seen &= j < position + attributes.window
    return seen.nonzero().squeeze(1)


def check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None,
    softcap: float,
    window: int,
) -> Attributes:
    """The resolved attributes of a call on real tensors. Raises as `block_sparse_attention` does."""
    check_without_values(q, k, v, block_index, block_q, block_k, causal, scale, softcap, window)
    smallest, largest = block_index.aminmax()
    if block_index.device.type == "cpu":
        check_range(int(smallest), int(largest), k.shape[2], block_k)
    else:  # looking at the values would wait for the device: it stops by itself
        torch._assert_async((smallest >= -1) & (largest < -(-k.shape[2] // block_k)))
    return resolve(q.shape[3], block_q, block_k, causal, scale, softcap, window)


def check_without_values(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None,
    softcap: float,
    window: int,
) -> None:
    """As `check`, for tensors that may be fake: all but the values of `block_index`."""
    check_dtypes(*(str(tensor.dtype).removeprefix("torch.") for tensor in (q, k, v, block_index)))
    resolve(1, block_q, block_k, causal, scale, softcap, window)  # head_dim may be 0 or a symbol here
    check_shapes(q.shape, k.shape, v.shape, block_index.shape, block_q)
