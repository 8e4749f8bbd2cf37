"""The attention of a decoder's layers with a cache: one object per pass, which holds what the layers share.

It puts together the steps of `edgekit.models.sparse_attention`: chunks of the new keys, selection of blocks, attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgekit.custom_ops.block_sparse_attention.torch_op import block_sparse_attention
from edgekit.models.boundaries import BoundaryPredictor, boundary_starts
from edgekit.models.sparse_attention import (
    SparseAttention,
    chunk_ids,
    chunk_keys,
    dense_decode_attention,
    select_blocks,
    sparse_decode_attention,
    token_chunk,
)


@dataclass(frozen=True)
class LayerAttention:
    """A layer's attention apart from the selection: factor and cap of the scores, sliding window; 0 for none."""

    scale: float
    softcap: float
    window: int


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of one layer: their keys float32 `[B, Hm, C, D]`, and the chunk of each slot, int64 `[B, T]`."""

    keys: torch.Tensor
    ids: torch.Tensor


class Prefill:
    """One pass of N tokens per row; call `attend` for layers 0, 1, ... in turn.

    Args:
        sparse: which blocks are read.
        mask: int64 `[B, P + N]`, of cached and new tokens.
        predictor: of boundaries, for kind dhsa.
    """

    def __init__(self, sparse: SparseAttention, mask: torch.Tensor, predictor: BoundaryPredictor | None) -> None:
        self.sparse, self.valid, self.predictor = sparse, mask.bool(), predictor
        self._ids: tuple[torch.Tensor, torch.Tensor] | None = None
        self._index: dict[bool, torch.Tensor] = {}

    def attend(
        self, layer: LayerAttention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: ChunkTable | None
    ) -> tuple[torch.Tensor, ChunkTable | None]:
        """q `[B, Hq, N, D]` over cached and new keys `[B, Hkv, P + N, D]`, and the cached chunks.

        Returns:
            `[B, Hq, N, D]`, and the cached and new chunks.
        """
        sparse = self.sparse
        if table is not None:
            table = self._extended(keys[:, :, keys.shape[2] - q.shape[2] :], table)
        index = self._index.get(layer.window > 0)
        if index is None or not sparse.share_masks:
            index = select_blocks(
                q,
                self.valid,
                sparse,
                window=layer.window,
                keys=None if table is None else table.keys,
                ids=None if table is None else table.ids,
            )
            self._index[layer.window > 0] = index
        size = sparse.block_size
        out: torch.Tensor = block_sparse_attention(
            q, keys, values, index, size, size, True, layer.scale, layer.softcap, layer.window
        )
        return out, table

    def _extended(self, new_keys: torch.Tensor, table: ChunkTable) -> ChunkTable:
        """The cached chunks and those of the pass's keys `[B, Hkv, N, D]`."""
        valid = self.valid[:, self.valid.shape[1] - new_keys.shape[2] :]
        if self._ids is None or not self.sparse.shared_ids:
            new = chunk_ids(self._starts(new_keys, valid), valid, self.sparse)
            self._ids = new, torch.cat([table.ids, new + table.keys.shape[2]], dim=1)
        new, ids = self._ids
        return ChunkTable(torch.cat([table.keys, chunk_keys(new_keys, new, valid, self.sparse)], dim=2), ids)

    def _starts(self, new_keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor | None:
        """The first tokens of chunks, bool `[B, N]`, as the predictor sees them in the keys of all heads."""
        if self.predictor is None:
            return None
        return boundary_starts(self.predictor, new_keys, valid, self.sparse)


class Decode:
    """One generated token per row, behind P cached ones; call `attend` for layers 0, 1, ... in turn.

    Args:
        sparse: which blocks are read.
        mask: int64 `[B, P + 1]`; any padding.
    """

    def __init__(self, sparse: SparseAttention, mask: torch.Tensor) -> None:
        self.sparse, self.valid = sparse, mask.bool()
        self._ids: torch.Tensor | None = None

    def attend(
        self, layer: LayerAttention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, table: ChunkTable | None
    ) -> tuple[torch.Tensor, ChunkTable | None]:
        """As `Prefill.attend`, for one query; the new token becomes a chunk of its own."""
        sparse, scale, softcap, window = self.sparse, layer.scale, layer.softcap, layer.window
        if sparse.decode == "dense":
            out = dense_decode_attention(q, keys, values, self.valid, scale=scale, softcap=softcap, window=window)
            return out, None
        if table is not None:
            if self._ids is None or not sparse.shared_ids:
                new = torch.zeros_like(self.valid[:, :1], dtype=torch.int64) + table.keys.shape[2]
                self._ids = torch.cat([table.ids, new], dim=1)
            own = token_chunk(keys[:, :, keys.shape[2] - 1 :], sparse)
            table = ChunkTable(torch.cat([table.keys, own], dim=2), self._ids)
        out = sparse_decode_attention(
            q,
            keys,
            values,
            self.valid,
            sparse,
            scale=scale,
            softcap=softcap,
            window=window,
            keys=None if table is None else table.keys,
            ids=None if table is None else table.ids,
        )
        return out, table
