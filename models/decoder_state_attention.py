"""Attention over a key-value state of fixed size: the sums of `decoder_attention`, with every size a number.

One text, no batch, and a pass that begins with an empty state, so that blocks of queries and of keys are the same cuts
of the text: what `edgekit.models.sparse_attention` finds with gathers and symbols is a reshape or a constant here. All
figures stay within fp16's range: masks and ranks are finite. What a mask needs of the text's length is computed when
the graph runs, and numbers are masked by products: a table of N x N constants would outweigh the model, and Core ML
Tools makes one of each number that `torch.where` spreads over a tensor.

Ties between blocks go to the earlier one as far as the runtime's sort is stable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.custom_ops.block_sparse_attention.torch_op import block_sparse_attention
from edgekit.models.boundaries import BoundaryPredictor, boundary_starts
from edgekit.models.decoder_attention import LayerAttention
from edgekit.models.sparse_attention import SparseAttention

# Taken from the scores of keys that a query may not see. Within fp16, and far more than any score.
_MASKED = 30_000.0
# The ranks of blocks that are always read, and of those that never are: finite in fp16, where 3.4e38 is infinite.
_ALWAYS, _NEVER = 60_000.0, -60_000.0
_READ = -50_000.0  # ranks above it are read


def bias(position: torch.Tensor, keys: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """What masks the scores of keys 0..keys-1 for queries at int `position` `[N]`: `[1, 1, N, keys]` of `dtype`.

    A query sees the keys up to its own position, of a sliding window (0: none) the last `window` of them.
    """
    slot = torch.arange(keys, dtype=position.dtype, device=position.device)
    place = position.unsqueeze(1)
    seen = slot <= place
    if 0 < window < keys:
        seen = seen & (slot > place - window)
    return ((seen.to(dtype) - 1.0) * _MASKED)[None, None]


def attend(
    layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Attention of q `[1, Hq, N, D]` to all keys `[1, Hkv, M, D]`; `masked` from `bias`. Returns the shape of q."""
    key_heads = k.shape[1]
    stacked = (q * layer.scale).reshape(1, key_heads, -1, q.shape[3])  # the query heads of a key head one below another
    scores = (stacked @ k.transpose(2, 3)).reshape(1, q.shape[1], q.shape[2], k.shape[2])
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    weights = torch.softmax(scores + masked, dim=3).reshape(1, key_heads, -1, k.shape[2])
    return (weights @ v).reshape(q.shape)


class StaticPrefill:
    """One pass of N tokens into an empty state; call `attend` for layers 0, 1, ... in turn.

    Args:
        sparse: which blocks are read.
        count: N.
        length: int32 `[1]`, how many of the tokens are valid: at least one.
        predictor: of boundaries, for kind dhsa.
    """

    def __init__(
        self, sparse: SparseAttention, count: int, length: torch.Tensor, predictor: BoundaryPredictor | None
    ) -> None:
        self.sparse, self.count, self.length, self.predictor = sparse, count, length, predictor
        self.blocks = -(-count // sparse.block_size)
        slot = torch.arange(count, dtype=length.dtype, device=length.device)
        self.valid = (slot < length).unsqueeze(0)
        # Queries of padding, whose answers nobody reads, count as the last valid one.
        self.position = torch.minimum(slot, length - 1)
        self._bias: dict[int, torch.Tensor] = {}
        self._index: dict[bool, torch.Tensor] = {}
        self._place: torch.Tensor | None = None

    def attend(self, layer: LayerAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[1, Hq, N, D]` over keys and values `[1, Hkv, N, D]` of the same tokens; returns the shape of q."""
        sparse = self.sparse
        if sparse.kind == "dense" or self.blocks <= sparse.blocks:  # then it reads all that it sees
            window = layer.window if layer.window < self.count else 0
            if window not in self._bias:
                self._bias[window] = bias(self.position, self.count, window, q.dtype)
            return attend(layer, q, k, v, self._bias[window])
        if sparse.kind == "dhsa" and sparse.shared_ids and self._place is None:
            self._place = self._places(k)  # the first layer's, whether it selects or not
        index = self._index.get(layer.window > 0)
        if index is None or not sparse.share_masks:
            index = self._select(layer, q, k)
            self._index[layer.window > 0] = index
        size = sparse.block_size
        out: torch.Tensor = block_sparse_attention(
            q, k, v, index, size, size, True, layer.scale, layer.softcap, layer.window
        )
        return out

    def _select(self, layer: LayerAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The `block_index` of one layer: what `select_blocks` gives, int32 `[1, Hm or 1, NB, K]`."""
        sparse, device = self.sparse, q.device
        if sparse.covers(layer.window):
            return _window_index(self.blocks, layer.window, sparse.block_size, device)
        scores = self._recency() if sparse.kind == "window" else self._scores(layer, q, k)
        row, block = torch.arange(self.blocks, device=device).unsqueeze(1), torch.arange(self.blocks, device=device)
        size = sparse.block_size
        always = (block == row) | (block == 0) | ((block + 1) * size > row * size - sparse.local)
        reach = block <= row
        if layer.window:
            reach = reach & ((block + 1) * size > row * size - layer.window + 1)
        ranked = torch.where(reach, torch.where(always, _ALWAYS, scores), _NEVER)
        order = torch.sort(ranked, dim=3, descending=True)
        index = torch.where(order.values > _READ, order.indices.to(torch.int32), -1)
        if sparse.dense_last == 0:
            return index[..., : sparse.blocks]
        return torch.where((block < sparse.blocks) | self._dense_rows().unsqueeze(1), index, -1)

    def _recency(self) -> torch.Tensor:
        """Ranks of kind "window": later blocks first, float32 `[1, 1, 1, NB]`."""
        return torch.arange(self.blocks, dtype=torch.float32, device=self.length.device)[None, None, None]

    def _dense_rows(self) -> torch.Tensor:
        """The query blocks with one of the last `dense_last` valid queries: bool `[NB]`."""
        begin = torch.arange(self.blocks, dtype=self.length.dtype, device=self.length.device) * self.sparse.block_size
        return (begin + self.sparse.block_size > self.length - self.sparse.dense_last) & (begin < self.length)

    def _scores(self, layer: LayerAttention, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The best score of a chunk within each block, for each block of queries: `[1, Hm, NB, NB]`.

        Scaled like the attention's scores, which changes no order and keeps long sums within fp16.
        """
        sparse, size = self.sparse, self.sparse.block_size
        heads = sparse.mask_heads(k.shape[1])
        valid = _blocks(self.valid.to(torch.int32), size, dim=1) > 0  # [1, NB, size]
        member = self._members(k, valid)
        k = k.squeeze(0).mean(dim=0, keepdim=True) if heads == 1 else k.squeeze(0)
        q = q.reshape(heads, -1, *q.shape[2:]).mean(dim=1) * layer.scale
        queries = (_shares(valid, q.dtype).unsqueeze(2) @ _blocks(q, size, dim=1)).squeeze(2)  # [Hm, NB, D]
        chunks = _shares(member, k.dtype, root=sparse.kind == "dhsa") @ _blocks(k, size, dim=1)
        scores = queries @ chunks.flatten(1, 2).transpose(1, 2)  # [Hm, NB, NB * chunks]
        slot = torch.arange(self.blocks * size, dtype=torch.int32, device=q.device).reshape(self.blocks, 1, size)
        last = ((slot + 1) * member.to(torch.int32)).amax(dim=3).reshape(1, 1, -1) - 1  # of a chunk's tokens; -1: none
        least = torch.zeros(1, 1, dtype=torch.int32, device=q.device)
        if layer.window:
            first = torch.arange(self.blocks, dtype=torch.int32, device=q.device).unsqueeze(1) * size
            least = torch.maximum(first - layer.window + 1, least)
        seen = (last >= least).to(scores.dtype)
        masked = scores * seen + (1.0 - seen) * _NEVER
        return masked.reshape(*masked.shape[:2], self.blocks, -1).amax(dim=3).unsqueeze(0)

    def _members(self, k: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """The valid tokens of each chunk: bool `[1, NB, chunks, size]`, of a chunk that is none not one."""
        if self.sparse.kind != "dhsa":
            return valid.unsqueeze(2)
        place = self._places(k) if self._place is None else self._place
        chunk = torch.arange(self.sparse.capacity, dtype=torch.int32, device=k.device).unsqueeze(1)
        return valid.unsqueeze(2) & (place.unsqueeze(2) == chunk)

    def _places(self, k: torch.Tensor) -> torch.Tensor:
        """Which chunk of its block each token is in, by the keys `[1, Hkv, N, D]` of a layer: int32 `[1, NB, size]`."""
        assert self.predictor is not None  # a decoder of kind dhsa has one
        starts = boundary_starts(self.predictor, k, self.valid, self.sparse)  # each block begins with one
        return torch.cumsum(_blocks(starts.to(torch.int32), self.sparse.block_size, dim=1), dim=2).to(torch.int32) - 1


def _window_index(blocks: int, window: int, size: int, device: torch.device) -> torch.Tensor:
    """All blocks that each block of queries sees of a sliding window: int32 `[1, 1, NB, K]`, nearest first."""
    reach = 1 + -(-(window - 1) // size)
    row = torch.arange(blocks, dtype=torch.int32, device=device).unsqueeze(1)
    block = row - torch.arange(min(reach, blocks), dtype=torch.int32, device=device)
    return torch.maximum(block, torch.full_like(block, -1))[None, None]  # clamp would make floats of them in Core ML


def _shares(member: torch.Tensor, dtype: torch.dtype, *, root: bool = False) -> torch.Tensor:
    """Each row of bool `[.., size]` divided by how many are true, or by the root of that; zeros where none is."""
    weights = member.to(dtype)
    count = weights.sum(dim=-1, keepdim=True).clamp(min=1.0)
    return weights / (count.sqrt() if root else count)


def _blocks(tensor: torch.Tensor, size: int, *, dim: int) -> torch.Tensor:
    """Axis `dim`, of N, as two, `[.., ceil(N / size), size, ..]`: filled up with zeros."""
    length = tensor.shape[dim]
    missing = -length % size
    if missing:
        tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1 - dim) + [0, missing])
    return torch.unflatten(tensor, dim, (-1, size))
