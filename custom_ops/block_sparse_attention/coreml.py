"""BlockSparseAttention in MIL: gather the listed blocks, two matrix products around a masked softmax.

Work. All query blocks of a list's heads gather their K blocks of keys and values at once and attend to K block_k keys
each, whatever the list holds: -1 and repeats are masked, not skipped, because shapes are fixed. Where K blocks hold all
keys, nothing is gathered: every query attends to all keys under a mask made of the lists (then a key or value that is
not finite reaches all rows, also those that do not list it).

Memory. The scores are `[B Hq, N, K block_k]`, linear in N where K is fixed. Query blocks are cut into parts of at most
`ENTRIES` scores or gathered numbers, one after the other in the program, so that about 3 x 32 MiB in half precision are
alive at a time however long the sequence; one query block of all heads is the least.

Masks come from integers: positions of the listed keys, int32 `[L, NQ, 1, K block_k]`, are compared with the bounds of
each query, which are constants. From iOS 18 on scaled_dot_product_attention takes that as a boolean mask, unless there
is a softcap; a query that sees nothing is then let see everything, so that its softmax is no 0 / 0. Otherwise hidden
scores are replaced by `HIDDEN`, which half precision holds; a row whose visible scores all lie below -59,900 would mix
in hidden keys. In both forms a query that sees nothing gets zeros in the end.

Half precision: q is scaled before the product, except with scaled_dot_product_attention, which divides by D^0.5 itself.

The batch may be dynamic (where blocks are gathered, from iOS 17 on); lengths may not. The Neural Engine does not take
int32 comparisons, and gathers at best in part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.custom_ops.block_sparse_attention.contract import NAME, Attributes, resolve
from edgekit.custom_ops.coreml_graph import Graph, arguments, at_least, fixed, number
from edgekit.errors import ExportError

PARAMETERS = ("q", "k", "v", "block_index", "block_q", "block_k", "causal", "scale", "softcap", "window")

ENTRIES = 1 << 24
"""The most scores, or gathered entries of keys or values, in a part of the program: 32 MiB in half precision."""

HIDDEN = -6e4
"""Score of a key that a query may not see: less than what scores are, and a float16."""

FAR = 1 << 30
"""A position behind all keys, for the keys of entries that list nothing."""


@dataclass(frozen=True)
class _Sizes:
    """Sizes as the program uses them.

    A *row* is a query block of one of the `row_heads` heads that have a list of their own, or share keys; it has
    `group` query heads of `block_q` queries. Blocks longer than the sequence are cut to it. `batch` is None where it is
    dynamic.
    """

    batch: int | None
    heads: int
    key_heads: int
    row_heads: int
    index_heads: int
    queries: int
    keys: int
    head_dim: int
    listed: int
    block_q: int
    block_k: int

    @staticmethod
    def of(q: Any, k: Any, index: Any, block_q: int, block_k: int) -> _Sizes:
        sizes = [fixed(size) for size in (*q.shape[1:], *k.shape[1:3], *index.shape[1:])]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            raise ExportError(
                f"{NAME} needs fixed lengths and heads in Core ML (the batch may vary); got q {list(q.shape)}, "
                f"k {list(k.shape)}, block_index {list(index.shape)}. Export one bundle, or one function, per length"
            )
        heads, queries, head_dim, key_heads, keys, index_heads, _, listed = known
        return _Sizes(
            batch=fixed(q.shape[0]),
            heads=heads,
            key_heads=key_heads,
            row_heads=heads if index_heads == heads else key_heads,
            index_heads=index_heads,
            queries=queries,
            keys=keys,
            head_dim=head_dim,
            listed=listed,
            block_q=min(block_q, queries),
            block_k=min(block_k, keys),
        )

    @property
    def group(self) -> int:
        return self.heads // self.row_heads

    @property
    def rows(self) -> int:
        """Query blocks of a head."""
        return -(-self.queries // self.block_q)

    @property
    def blocks(self) -> int:
        """Key blocks of a head."""
        return -(-self.keys // self.block_k)

    @property
    def dense(self) -> bool:
        """Whether rows read all keys, listed or not."""
        return self.listed >= self.blocks

    @property
    def one_list(self) -> bool:
        """Whether all heads of the only image or text share their lists."""
        return self.batch == 1 and self.index_heads == 1

    @property
    def rows_at_once(self) -> int:
        """Query blocks of a part."""
        width = min(self.listed, self.blocks) * self.block_k * max(self.group * self.block_q, self.head_dim)
        return max(1, ENTRIES // ((self.batch or 1) * self.row_heads * width))


@dataclass(frozen=True)
class _Lists:
    """Lists of blocks; L is 1 where all heads share one list, otherwise B row_heads.

    `first`: position of the first key of each block, int32 `[L, NQ, W, 1]`, `FAR` where nothing is listed. `read`: the
    block to gather, int32 `[L, NQ, K]`, K = W; None where W is all blocks and nothing is gathered.
    """

    first: Any
    read: Any | None


@dataclass(frozen=True)
class _Bounds:
    """The keys that each query of a row may see: int32 `[1, NQ or 1, group block_q or 1, 1]`, both ends included."""

    low: npt.NDArray[np.int32] | None
    high: npt.NDArray[np.int32]

    @staticmethod
    def of(sizes: _Sizes, attributes: Attributes) -> _Bounds:
        """`low` is None where no query has a lowest key but 0."""
        inside = np.tile(np.arange(sizes.block_q), sizes.group)
        position = np.arange(sizes.rows)[:, None] * sizes.block_q + inside + (sizes.keys - sizes.queries)
        position = position[None, :, :, None]
        nearest, end = attributes.visible()
        high = np.full((1, 1, 1, 1), sizes.keys - 1) if nearest is None else position - nearest
        low = None if end is None or end >= sizes.keys else np.maximum(position - end + 1, 0).astype(np.int32)
        return _Bounds(low, np.minimum(high, sizes.keys - 1).astype(np.int32))

    def part(self, start: int, end: int) -> _Bounds:
        """Those of the query blocks from `start` to `end`."""
        low, high = (x if x is None or x.shape[1] == 1 else x[:, start:end] for x in (self.low, self.high))
        assert high is not None
        return _Bounds(low, high)


def lower(context: Any, node: Any) -> None:
    """Lower one node.

    Raises:
        ExportError: a symbolic length or number of heads; on iOS 16 a symbolic batch of sparse lists.
        InputError: attributes outside the contract.
    """
    given = arguments(context, node, PARAMETERS, PARAMETERS[:4])
    q, k, v, index = (given[name] for name in PARAMETERS[:4])
    options = {name: given[name] for name in PARAMETERS[4:] if name in given}
    head_dim = fixed(q.shape[3])
    attributes = resolve(head_dim or 1, **options)
    sizes = _Sizes.of(q, k, index, attributes.block_q, attributes.block_k)
    g = Graph(node.name)

    fused = at_least("iOS18") and attributes.softcap == 0
    factor = attributes.scale / attributes.softcap if attributes.softcap else attributes.scale
    factor *= math.sqrt(sizes.head_dim) if fused else 1.0
    q = _rows(g, sizes, g.scaled(q, 1.0 if math.isclose(factor, 1.0, rel_tol=1e-12) else factor))
    k, v = (_blocks(g, sizes, x) for x in (k, v))
    lists, bounds = _lists(g, sizes, index), _Bounds.of(sizes, attributes)
    parts = []
    for start in range(0, sizes.rows, sizes.rows_at_once):
        end = min(start + sizes.rows_at_once, sizes.rows)
        read = None if lists.read is None else g.sliced(lists.read, 1, start, end)
        part = _Lists(g.sliced(lists.first, 1, start, end), read)
        rows = g.sliced(q, 1, start, end)
        parts.append(_attend(g, sizes, attributes, fused, rows, k, v, part, bounds.part(start, end)))
    out = parts[0] if len(parts) == 1 else g.op("concat", values=parts, axis=1)
    context.add(_tokens(g, sizes, out, node.name))


def _rows(g: Graph, sizes: _Sizes, q: Any) -> Any:
    """q `[B, Hq, N, D]` as `[B row_heads, NQ, group block_q, D]`."""
    q = g.padded(q, 2, sizes.rows * sizes.block_q - sizes.queries)
    if sizes.group > 1:
        q = g.reshape(q, -1, sizes.group, sizes.rows, sizes.block_q * sizes.head_dim)
        q = g.op("transpose", x=q, perm=[0, 2, 1, 3])
    return g.reshape(q, -1, sizes.rows, sizes.group * sizes.block_q, sizes.head_dim)


def _tokens(g: Graph, sizes: _Sizes, out: Any, name: str) -> Any:
    """The reverse of `_rows`."""
    if sizes.group > 1:
        out = g.reshape(out, -1, sizes.rows, sizes.group, sizes.block_q * sizes.head_dim)
        out = g.op("transpose", x=out, perm=[0, 2, 1, 3])
    length = sizes.rows * sizes.block_q
    out = g.reshape(out, -1, sizes.heads, length, sizes.head_dim, name=name if length == sizes.queries else None)
    return out if length == sizes.queries else g.sliced(out, 2, 0, sizes.queries, name=name)


def _blocks(g: Graph, sizes: _Sizes, x: Any) -> Any:
    """Keys or values `[B, Hkv, M, D]` as `[B Hkv, blocks, block_k D]`, the last block filled up with zeros."""
    x = g.padded(x, 2, sizes.blocks * sizes.block_k - sizes.keys)
    return g.reshape(x, -1, sizes.blocks, sizes.block_k * sizes.head_dim)


def _lists(g: Graph, sizes: _Sizes, index: Any) -> _Lists:
    if index.shape[1] == 1 and sizes.row_heads > 1 and not sizes.one_list:
        index = g.op("tile", x=index, reps=[1, sizes.row_heads, 1, 1])
    index = g.reshape(index, -1, sizes.rows, sizes.listed)
    column = g.reshape(index, -1, sizes.rows, sizes.listed, 1)
    if sizes.dense:
        every = np.arange(sizes.blocks, dtype=np.int32)
        found = g.cast(g.op("equal", x=column, y=every.reshape(1, 1, 1, -1)), "int32")  # [L, NQ, K, W]
        found = g.op("reduce_max", x=found, axes=[2], keep_dims=False)  # 1 or 0
        near = g.op("mul", x=found, y=(FAR - every * sizes.block_k).reshape(1, 1, -1))
        first = g.op("sub", x=np.int32(FAR), y=near)
        return _Lists(g.reshape(first, -1, sizes.rows, sizes.blocks, 1), None)
    none = g.op("less", x=index, y=np.int32(0))
    # Entries without a block read one that the row lists, so that nothing else has any influence.
    filler = g.op("maximum", x=g.op("reduce_max", x=index, axes=[2], keep_dims=True), y=np.int32(0))
    read = g.op("select", cond=none, a=filler, b=index)
    hidden = none
    if sizes.listed > 1:
        same = g.cast(g.op("equal", x=column, y=g.reshape(index, -1, sizes.rows, 1, sizes.listed)), "int32")
        earlier = np.tril(np.ones((sizes.listed, sizes.listed), np.int32), -1)
        repeats = g.op("reduce_max", x=g.op("mul", x=same, y=earlier[None, None]), axes=[3], keep_dims=False)
        hidden = g.op("logical_or", x=none, y=g.op("greater", x=repeats, y=np.int32(0)))
    first = g.op("select", cond=hidden, a=np.int32(FAR), b=g.op("mul", x=index, y=np.int32(sizes.block_k)))
    return _Lists(g.reshape(first, -1, sizes.rows, sizes.listed, 1), read)


def _attend(
    g: Graph, sizes: _Sizes, attributes: Attributes, fused: bool, q: Any, k: Any, v: Any, lists: _Lists, bounds: _Bounds
) -> Any:
    """The answer for the rows of a part, `[B row_heads, R, group block_q, D]`, from q of that shape."""
    sees = _sees_any(g, sizes, lists, bounds)
    visible = _visible(g, sizes, lists, bounds, sees if fused else None)
    if lists.read is None:
        k, v = (g.reshape(x, -1, sizes.blocks * sizes.block_k, sizes.head_dim) for x in (k, v))
        # All rows of a key head below one another: [B Hkv, rows, D].
        rows, keys = q.shape[1] * sizes.row_heads // sizes.key_heads * q.shape[2], sizes.blocks * sizes.block_k
        result = _softmax(
            g, attributes, fused, g.reshape(q, -1, rows, sizes.head_dim), k, v, _flat(g, visible, q, rows, keys)
        )
        result = g.reshape(result, -1, *q.shape[1:])
    else:
        k, v = (_gathered(g, sizes, x, lists.read) for x in (k, v))
        result = _softmax(g, attributes, fused, q, k, v, visible)
    return g.op("select", cond=sees, a=result, b=number(0.0, result))


def _flat(g: Graph, visible: Any, q: Any, rows: int, keys: int) -> Any:
    """`visible` for the rows of a key head below one another; as it is where all queries are alike."""
    if fixed(visible.shape[2]) == 1 and q.shape[2] != 1:
        visible = g.op("tile", x=visible, reps=[1, 1, q.shape[2], 1])
    return g.reshape(visible, -1, rows, keys)


def _softmax(g: Graph, attributes: Attributes, fused: bool, q: Any, k: Any, v: Any, visible: Any) -> Any:
    if fused:
        return g.op("scaled_dot_product_attention", query=q, key=k, value=v, attn_mask=visible)
    scores = g.op("matmul", x=q, y=k, transpose_y=True)
    if attributes.softcap:
        scores = g.scaled(g.op("tanh", x=scores), attributes.softcap)
    scores = g.op("select", cond=visible, a=scores, b=number(HIDDEN, scores))
    return g.op("matmul", x=g.op("softmax", x=scores, axis=-1), y=v)


def _gathered(g: Graph, sizes: _Sizes, x: Any, read: Any) -> Any:
    """The blocks of `x` `[B Hkv, blocks, block_k D]` that `read` `[L, R, K]` lists: `[B row_heads, R, K block_k, D]`.

    From iOS 17 on each head's own blocks are gathered with `batch_dims`; before, rows of one matrix of all heads.
    """
    rows = read.shape[1]
    per_head = sizes.row_heads // sizes.key_heads * rows * sizes.listed
    if sizes.one_list or (sizes.batch or 0) * sizes.key_heads == 1:
        found = g.gather(x, g.reshape(read, -1), axis=1)
    elif at_least("iOS17"):
        found = g.gather(x, g.reshape(read, -1, per_head), axis=1, batch_dims=1)
    elif sizes.batch is None:
        raise ExportError(f"{NAME} with a dynamic batch needs iOS 17 or newer; fix the batch or raise the target")
    else:
        heads = np.arange(sizes.batch * sizes.key_heads, dtype=np.int32)[:, None] * sizes.blocks
        flat = g.op("add", x=g.reshape(read, -1, per_head), y=heads)
        found = g.gather(g.reshape(x, -1, x.shape[2]), g.reshape(flat, -1), axis=0)
    return g.reshape(found, -1, rows, sizes.listed * sizes.block_k, sizes.head_dim)


def _sees_any(g: Graph, sizes: _Sizes, lists: _Lists, bounds: _Bounds) -> Any:
    """Whether each query sees any key: bool `[L, R, group block_q or 1, 1]`."""
    if bounds.low is None:
        return g.op("less_equal", x=g.op("reduce_min", x=lists.first, axes=[2], keep_dims=True), y=bounds.high)
    first = g.reshape(lists.first, -1, lists.first.shape[1], 1, lists.first.shape[2])
    last = g.op("add", x=first, y=np.int32(sizes.block_k - 1))
    begin = g.op("maximum", x=first, y=bounds.low)
    some = g.op("less_equal", x=begin, y=g.op("minimum", x=last, y=bounds.high))  # [L, R, group block_q, W]
    some = g.op("reduce_max", x=g.cast(some, "int32"), axes=[3], keep_dims=True)
    return g.op("greater", x=some, y=np.int32(0))


def _visible(g: Graph, sizes: _Sizes, lists: _Lists, bounds: _Bounds, sees: Any | None) -> Any:
    """Which keys each query sees: bool `[L, R, group block_q or 1, W block_k]`; all of them where `sees` is given and
    false."""
    key = g.op("add", x=lists.first, y=np.arange(sizes.block_k, dtype=np.int32).reshape(1, 1, 1, -1))
    key = g.reshape(key, -1, key.shape[1], 1, key.shape[2] * sizes.block_k)
    high: Any = bounds.high
    low: Any = bounds.low
    if sees is not None:
        # No select: coremltools 9.0 declares its result without the shape of the condition.
        blind = g.cast(g.op("logical_not", x=sees), "int32")
        high = g.op("maximum", x=g.op("mul", x=blind, y=np.int32(2 * FAR - 1)), y=high)
        low = None if low is None else g.op("mul", x=g.cast(sees, "int32"), y=low)
    visible = g.op("less_equal", x=key, y=high)
    if low is not None:
        visible = g.op("logical_and", x=visible, y=g.op("greater_equal", x=key, y=low))
    return visible
