"""The contract of BlockSparseAttention: which shapes, dtypes and attributes it takes, and what it says of others.

Plain Python: sizes are ints, dtypes are names. A size that is not an int (a symbol while torch.export traces) is not
checked here; the op checks it again when it runs. Each rule's text is also the name of a guard in the ONNX body.

What holds of NaN, infinities and large numbers:

* A row whose listed blocks hold only finite q, k and v is exact, whatever stands elsewhere. Within a listed block, what
  a query may not see can still make its row NaN where it is not finite.
* A row that may see a NaN, or only scores of -infinity, gives NaN or infinities, never the zeros of a row without keys.
* The native kernels multiply scores with log2(e): one beyond 2.3e38 in size is infinite to them. Beside a larger score
  a negative one counts nothing, as it should; otherwise the row gives NaN.

The ONNX body holds masks of block_q x block_k, at most 2^26 entries in all, and is made from the attributes alone. An
exporter that knows the number of keys cuts longer blocks to it; where it is dynamic, such blocks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import InputError, ShapeError

NAME = "BlockSparseAttention"
DTYPES = ("float32", "float16", "bfloat16", "float64")

RANK = f"{NAME} takes q [B, Hq, N, D], k and v [B, Hkv, M, D], block_index [B, Hm, ceil(N / block_q), K]"
EMPTY = f"{NAME} needs every axis of q, k, v and block_index to be at least 1"
SAME = f"{NAME} needs k and v of one shape, and the batch and head_dim of q"
RATIO = f"{NAME} needs a number of query heads that is a multiple of the number of key heads"
LENGTH = f"{NAME} needs at least as many keys as queries (M >= N): the last query sits at the last key"
INDEX = f"{NAME} needs block_index [B, Hm, ceil(N / block_q), K] with Hm one of 1, Hkv, Hq"
RANGE = f"{NAME} needs every block index in -1..ceil(M / block_k) - 1, -1 for none"

SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The positive normal numbers of float32, in which ONNX and the kernels have the attributes."""

FARTHEST = 2**40
"""More than any distance between two positions: a larger window hides no more than this one."""


@dataclass(frozen=True)
class Attributes:
    """The attributes, resolved. Making one checks them.

    `block_q`, `block_k`: queries and keys per block. `scale`: factor of the scores. `softcap`: 0 for none, otherwise a
    positive normal number of float32 by which the scale can be divided in float32. `window`: keys at this distance from
    the query or further are hidden; 0 for none.

    Raises:
        InputError: an attribute outside the contract.
    """

    block_q: int
    block_k: int
    causal: bool
    scale: float
    softcap: float
    window: int

    def __post_init__(self) -> None:
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size < 1:
                raise InputError(f"{NAME} needs {name} of at least 1, got {size}")
        if not math.isfinite(self.scale) or self.scale == 0.0:
            raise InputError(f"{NAME} needs a scale that is finite and not 0, got {self.scale}")
        if not math.isfinite(self.softcap) or self.softcap < 0.0:
            raise InputError(f"{NAME} needs a softcap that is finite and at least 0 (0 for none), got {self.softcap}")
        if self.softcap > 0.0 and not SMALLEST <= self.softcap <= LARGEST:
            raise InputError(
                f"{NAME} needs a softcap of 0 (none) or a normal float32 number ({SMALLEST:g} to {LARGEST:g}), "
                f"got {self.softcap:g}"
            )
        if self.softcap > 0.0 and abs(self.scale / self.softcap) > LARGEST:
            raise InputError(
                f"{NAME} needs a scale / softcap that float32 can hold, got {self.scale:g} / {self.softcap:g}"
            )
        if self.window < 0:
            raise InputError(f"{NAME} needs a window of at least 0 (0 for none), got {self.window}")
        # A position plus the window must stay in 64 bits.
        object.__setattr__(self, "window", min(self.window, FARTHEST))

    def visible(self) -> tuple[int | None, int | None]:
        """The range `first <= p - j < end` in which a query at position p may see key j; None for no bound."""
        end = self.window or None
        if self.causal:
            return 0, end
        return (1 - self.window if self.window else None), end


def resolve(
    head_dim: int,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> Attributes:
    """The attributes of a call; `scale` None becomes head_dim^-0.5. Raises `InputError`."""
    return Attributes(block_q, block_k, causal, head_dim**-0.5 if scale is None else scale, softcap, window)


def check_shapes(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], block_index: Sequence[int], block_q: int
) -> None:
    """Raise `ShapeError` unless the shapes fit together; `block_q` must be at least 1."""

    def fail(rule: str) -> ShapeError:
        shapes = zip(("q", "k", "v", "block_index"), (q, k, v, block_index), strict=True)
        return ShapeError(f"{rule}; got " + ", ".join(f"{name} {list(shape)}" for name, shape in shapes))

    if not len(q) == len(k) == len(v) == len(block_index) == 4:
        raise fail(RANK)
    if any(isinstance(size, int) and size < 1 for size in (*q, *k, *v, *block_index)):
        raise fail(EMPTY)
    if any(map(_differ, k, v)) or _differ(q[0], k[0]) or _differ(q[3], k[3]):
        raise fail(SAME)
    heads, kv_heads, queries, keys = q[1], k[1], q[2], k[2]
    if _known(heads, kv_heads) and heads % kv_heads:
        raise fail(RATIO)
    if _known(queries, keys) and keys < queries:
        raise fail(LENGTH)
    batch, index_heads, rows, _ = block_index
    if _differ(batch, q[0]) or (_known(queries, rows) and rows != -(-queries // block_q)):
        raise fail(INDEX)
    if _known(heads, kv_heads, index_heads) and index_heads not in (1, kv_heads, heads):
        raise fail(INDEX)


def check_dtypes(q: str, k: str, v: str, block_index: str) -> None:
    """Raise `InputError` unless q, k, v share one of `DTYPES` and block_index is int32."""
    if q not in DTYPES or k != q or v != q:
        raise InputError(f"{NAME} takes q, k, v of one dtype of {', '.join(DTYPES)}; got {q}, {k}, {v}")
    if block_index != "int32":
        raise InputError(f"{NAME} takes block_index as int32, got {block_index}; convert it")


def check_range(smallest: int, largest: int, keys: int, block_k: int) -> None:
    """Raise `InputError` unless the values of block_index, given by their extremes, are blocks of `keys` keys or -1."""
    blocks = -(-keys // block_k)
    for index in (smallest, largest):
        if not -1 <= index < blocks:
            raise InputError(
                f"{NAME} got block index {index} out of range -1..{blocks - 1}: {keys} keys make {blocks} blocks of "
                f"{block_k}; -1 stands for none"
            )


def _known(*sizes: int) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _differ(a: int, b: int) -> bool:
    return _known(a, b) and a != b
