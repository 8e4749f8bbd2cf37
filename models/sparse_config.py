"""How a decoder attends: the settings of dense and sparse attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgekit.errors import InputError

Kind = Literal["dense", "window", "block", "dhsa"]
DecodeKind = Literal["sparse", "dense"]
Heads = Literal["kv", "shared"]


@dataclass(frozen=True)
class SparseAttention:
    """How a decoder's layers attend. Making one checks it.

    Attributes:
        kind: "dense" reads all blocks; "window" the first and the last ones; "block" the blocks whose mean key fits the
            query block best; "dhsa" those with the best chunk.
        budget: tokens that a query block reads at most, the first, local and own blocks included; rounded down to
            blocks. A layer with a sliding window that fits into the budget reads the whole window.
        block_size: queries and keys per block.
        local: tokens before a query block that are always read, rounded up to blocks.
        decode: "sparse" selects blocks for each generated token as well; "dense" reads the whole cache.
        share_boundaries: layer 0's keys decide on the boundaries of all layers.
        share_masks: layers of one type (sliding or not) read what the first of the type has selected.
        heads: "kv" selects for each key head with the mean query of its group; "shared" once, with means over heads.
        dense_last: so many of the last queries of a pass read everything (with their whole query blocks).
        chunks_per_block: chunks that a block of tokens is cut into, at most.
        nms_radius: of boundaries so near to each other only the likeliest stays.
        boundary_threshold: logit that a boundary must exceed; None for none.
        predictor_heads: attention heads of the boundary predictor; its weights do not tell. The authors' programs that
            use their checkpoint have 8.
        predictor_hidden: its hidden width.
        window: tokens on either side of a gap that it looks at.

    Raises:
        InputError: a value outside of its range, or a budget that does not hold what is always read.
    """

    kind: Kind = "dense"
    budget: int = 2048
    block_size: int = 64
    local: int = 64
    decode: DecodeKind = "sparse"
    share_boundaries: bool = True
    share_masks: bool = False
    heads: Heads = "kv"
    dense_last: int = 0
    chunks_per_block: int = 8
    nms_radius: int = 8
    boundary_threshold: float | None = None
    predictor_heads: int = 8
    predictor_hidden: int = 256
    window: int = 4

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(Kind)), ("decode", get_args(DecodeKind)), ("heads", get_args(Heads))):
            if getattr(self, name) not in known:
                raise InputError(f"sparse attention needs {name} of {', '.join(known)}; got {getattr(self, name)!r}")
        smallest = {"local": 0, "dense_last": 0, "nms_radius": 0}
        counts = ("block_size", "local", "dense_last", "chunks_per_block", "nms_radius", "predictor_heads")
        for name in (*counts, "predictor_hidden", "window", "budget"):
            if getattr(self, name) < smallest.get(name, 1):
                raise InputError(
                    f"sparse attention needs {name} of at least {smallest.get(name, 1)}, got {getattr(self, name)}"
                )
        if self.chunks_per_block > self.block_size:
            raise InputError(
                f"a block of {self.block_size} tokens cannot have {self.chunks_per_block} chunks; "
                f"choose chunks_per_block of at most {self.block_size}"
            )
        if self.kind != "dense" and self.budget < self.least_budget:
            raise InputError(
                f"budget below {self.least_budget}: the first block, {self.local} local tokens and a query block's own "
                f"take {self.least_budget} tokens in blocks of {self.block_size}; got a budget of {self.budget}"
            )

    @property
    def blocks(self) -> int:
        """Key blocks in the budget."""
        return self.budget // self.block_size

    @property
    def least_budget(self) -> int:
        """Tokens of the blocks that are always read: first, local and own."""
        return (2 + -(-self.local // self.block_size)) * self.block_size

    @property
    def has_chunks(self) -> bool:
        """Whether there is a chunk table."""
        return self.kind in ("block", "dhsa")

    @property
    def capacity(self) -> int:
        """Places for chunks in a group."""
        return self.chunks_per_block if self.kind == "dhsa" else 1

    @property
    def shared_ids(self) -> bool:
        """Whether all layers cut a text into the same chunks."""
        return self.kind == "block" or self.share_boundaries

    def mask_heads(self, key_heads: int) -> int:
        """Hm: heads of the chunk keys and of the selection."""
        return key_heads if self.heads == "kv" else 1

    def covers(self, window: int) -> bool:
        """Whether the budget holds every block that a query block may see of a sliding window (0: no window)."""
        return window > 0 and window_blocks(window, self.block_size) <= self.blocks


def window_blocks(window: int, block_size: int) -> int:
    """Key blocks that the queries of one block see at most, its own included, wherever the blocks begin."""
    return -(-(window + block_size - 2) // block_size) + 1
