"""The ONNX function body of BlockSparseAttention: one `Scan` over the query blocks of all heads.

A step gathers the key and value blocks of its row and attends to them with two matrix products, so that cost follows
the density and memory the length. What a step does besides is kept small: the products take some 50 microseconds.

* Lists are sorted once, all rows together; repeats, -1 and blocks out of reach are dropped by one `Compress` per step.
* Which keys of a block a query may see depends on the distance of the two blocks alone, and at most distances it is all
  or none. So the masks of the distances that differ are made once, and a step gathers them into the bias of its `Gemm`.
* A row that reads nothing gets one block all the same, because runtimes disagree on empty tensors; what comes of it, as
  of every query that sees no key, is replaced by zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgekit.custom_ops.block_sparse_attention import contract
from edgekit.custom_ops.block_sparse_attention.contract import Attributes
from edgekit.custom_ops.onnx_function import BOOL, FLOAT, INT64, Function, Subgraph
from edgekit.errors import InputError

MASK_LIMIT = 1 << 26
"""Entries of all masks, of five bytes each while the body runs."""


@dataclass(frozen=True)
class _Sizes:
    """The checked sizes, int64 `[1]` each, and the checked block_index, int64 `[B, Hm, NQ, K]`."""

    batch: str
    heads: str
    key_heads: str
    index_heads: str
    queries: str
    keys: str
    head_dim: str
    row_blocks: str  # NQ = ceil(N / block_q)
    key_blocks: str  # ceil(M / block_k)
    listed: str  # K
    index: str


@dataclass(frozen=True)
class _Rows:
    """What a step reads of its row, for all R = B * Hq * NQ of them.

    `block`: which of the B * Hkv * ceil(M / block_k) blocks, int64 `[R, K]`. `read`: whether to, bool `[R, K]`, true at
    least once per row. `mask`: which mask, int64 `[R, K]`. `sees`: which queries see a key, bool `[R, block_q, 1]` or
    `[R, 1, 1]`; None where only the masks know.
    """

    block: str
    read: str
    mask: str
    sees: str | None


def fitting(attributes: Attributes, keys: int) -> tuple[int, int]:
    """block_q and block_k, cut where the masks would pass `MASK_LIMIT`, so that no call with `keys` keys changes.

    A block longer than the sequence is as good as one of any length that holds it; a multiple of the other block's
    size needs the fewest masks.
    """
    if _entries(attributes) <= MASK_LIMIT:
        return attributes.block_q, attributes.block_k
    unit = min(attributes.block_q, attributes.block_k, keys)
    longest = -(-keys // unit) * unit
    return min(attributes.block_q, longest), min(attributes.block_k, longest)


def _entries(attributes: Attributes) -> int:
    """Entries of all masks."""
    return attributes.block_q * attributes.block_k * _Distances.of(attributes).count


def body(f: Function, attributes: Attributes) -> str:
    """Append all nodes of the body to `f`; returns the output, in the dtype of q.

    Raises:
        InputError: the masks would have more than `MASK_LIMIT` entries.
    """
    distances = _Distances.of(attributes)
    if _entries(attributes) > MASK_LIMIT:
        raise InputError(
            f"the portable body of {contract.NAME} holds {distances.count} masks of block_q x block_k = "
            f"{attributes.block_q} x {attributes.block_k}, more than {MASK_LIMIT} entries, however short the sequence "
            "is at run time; choose smaller blocks, sizes with a larger common divisor, or a fixed number of keys, to "
            "which the exporter cuts longer blocks"
        )
    sizes = _checked(f, attributes)
    return f.op("CastLike", _scan(f, sizes, _rows(f, sizes, distances, attributes), distances, attributes), "q")


def _checked(f: Function, attributes: Attributes) -> _Sizes:
    """The guards of the contract, each before what it protects."""
    one = f.constant([1])
    shapes = [f.op("Shape", name) for name in ("q", "k", "v", "block_index")]
    rank = f.all_of(*(f.op("Equal", f.op("Shape", shape), f.constant([4])) for shape in shapes))
    passed = f.guard(rank, contract.RANK)
    shapes = [f.op("Add", shape, passed) for shape in shapes]
    passed = f.guard(f.all_of(*(f.op("GreaterOrEqual", shape, one) for shape in shapes)), contract.EMPTY)
    q, k, v, index = (f.op("Add", shape, passed) for shape in shapes)

    batch, heads, queries, head_dim = (f.dim(q, axis) for axis in range(4))
    key_heads, keys = f.dim(k, 1), f.dim(k, 2)
    index_heads, row_blocks, listed = (f.dim(index, axis) for axis in (1, 2, 3))
    same = f.all_of(f.op("Equal", k, v), f.op("Equal", batch, f.dim(k, 0)), f.op("Equal", head_dim, f.dim(k, 3)))
    # A runtime may compute Mod while it loads, before any guard: a divisor of 0 would end the process.
    ratio = f.op("Equal", f.op("Mod", heads, f.op("Max", key_heads, one)), f.constant([0]))
    fits = f.all_of(
        f.op("Equal", batch, f.dim(index, 0)), f.op("Equal", row_blocks, _ceil(f, queries, attributes.block_q))
    )
    which = [f.op("Equal", index_heads, allowed) for allowed in (one, key_heads, heads)]
    fits = f.op("And", fits, f.op("Or", which[0], f.op("Or", which[1], which[2])))
    for condition, rule in (
        (same, contract.SAME),
        (ratio, contract.RATIO),
        (f.op("GreaterOrEqual", keys, queries), contract.LENGTH),
        (fits, contract.INDEX),
    ):
        passed = f.guard(condition, rule, passed)

    blocks = f.op("Reshape", f.op("Cast", "block_index", to=INT64), f.op("Add", index, passed))
    key_blocks = _ceil(f, keys, attributes.block_k)
    lowest, highest = (f.op(kind, blocks, keepdims=0) for kind in ("ReduceMin", "ReduceMax"))
    in_range = f.op("And", f.op("GreaterOrEqual", lowest, f.constant(-1)), f.op("Less", highest, key_blocks))
    passed = f.guard(in_range, contract.RANGE, passed)
    q, index = f.op("Add", q, passed), f.op("Add", index, passed)
    return _Sizes(
        batch=f.dim(q, 0),
        heads=f.dim(q, 1),
        key_heads=key_heads,
        index_heads=index_heads,
        queries=f.dim(q, 2),
        keys=keys,
        head_dim=f.dim(q, 3),
        row_blocks=row_blocks,
        key_blocks=key_blocks,
        listed=listed,
        index=f.op("Reshape", blocks, index),
    )


@dataclass(frozen=True)
class _Distances:
    """The distances p - j between a query block's first position and a key block's first key whose masks differ.

    A distance is `unit` * m + rest with the same rest for all pairs of blocks. `spans` are the ranges of m, rising and
    apart, in which the mask changes with m: around the lower end of what a query may see, around the upper end, or one
    range where these meet. Before the first span nothing is seen, between the spans everything.
    """

    unit: int
    spans: tuple[tuple[int, int], ...]

    @staticmethod
    def of(attributes: Attributes) -> _Distances:
        bq, bk = attributes.block_q, attributes.block_k
        unit = math.gcd(bq, bk)
        spans: list[tuple[int, int]] = []
        for end in attributes.visible():
            if end is not None:
                low, high = (end - bq) // unit - 1, -((1 - bk - end) // unit)
                if spans and low <= spans[-1][1]:
                    low = spans.pop()[0]
                spans.append((low, high))
        return _Distances(unit, tuple(spans))

    @property
    def count(self) -> int:
        """How many masks there are."""
        return 1 + sum(high - low for low, high in self.spans)

    def representatives(self) -> list[int]:
        """An m for each mask, in the order of `number`."""
        first, *others = self.spans
        result = list(range(first[0], first[1] + 1))
        for low, high in others:
            result.extend(range(low + 1, high + 1))
        return result

    def number(self, f: Function, m: str) -> str:
        """The number of the mask at `m`: how far it has come through the spans."""
        parts = [
            f.op("Sub", f.op("Min", f.op("Max", m, f.constant(low)), f.constant(high)), f.constant(low))
            for low, high in self.spans
        ]
        return parts[0] if len(parts) == 1 else f.op("Add", *parts)


def _rows(f: Function, sizes: _Sizes, distances: _Distances, attributes: Attributes) -> _Rows:
    zero, one = f.constant(0), f.constant(1)
    lowest, end = attributes.visible()
    blocks, _ = f.ops("TopK", sizes.index, sizes.listed, outputs=2, axis=-1, largest=0, sorted=1)
    # Each entry's left neighbour; the first gets one that differs.
    first = f.op("Slice", blocks, f.constant([0]), f.constant([1]), f.constant([3]))
    others = f.op("Slice", blocks, f.constant([0]), f.constant([-1]), f.constant([3]))
    left = f.op("Concat", f.op("Sub", first, one), others, axis=3)
    listed = f.op("And", f.op("GreaterOrEqual", blocks, zero), f.op("Not", f.op("Equal", blocks, left)))

    # Positions of the first query of each row, and distances to the first key of each block.
    offset = f.op("Sub", sizes.keys, sizes.queries)
    row = f.op("Range", zero, _scalar(f, sizes.row_blocks), one)
    position = f.op("Add", f.op("Mul", row, f.constant(attributes.block_q)), offset)  # [NQ]
    position = f.op("Reshape", position, f.constant([-1, 1]))
    distance = f.op("Sub", position, f.op("Mul", blocks, f.constant(attributes.block_k)))  # [B, Hm, NQ, K]
    if lowest is not None:
        listed = f.op("And", listed, f.op("Greater", distance, f.constant(lowest - attributes.block_q)))
    if end is not None:
        listed = f.op("And", listed, f.op("Less", distance, f.constant(end + attributes.block_k - 1)))
    last = f.constant([-1])
    some = f.op("Cast", f.op("ReduceMax", f.op("Cast", listed, to=INT64), last, keepdims=1), to=BOOL)

    mask = None
    if distances.spans:
        # Floor division: distances may be negative.
        m = f.op(
            "Div", f.op("Sub", distance, f.op("Mod", distance, f.constant(distances.unit))), f.constant(distances.unit)
        )
        mask = distances.number(f, m)
    if not attributes.causal:
        is_last = f.op("Cast", f.op("Equal", blocks, f.op("Sub", sizes.key_blocks, one)), to=INT64)
        mask = is_last if mask is None else f.op("Add", mask, f.op("Mul", is_last, f.constant(distances.count)))
    assert mask is not None  # causal attention has a span
    mask = f.op("Where", listed, mask, zero)

    sees: str | None
    if end is not None:
        sees = None
    elif lowest is not None:
        # The first key of the first block that is listed decides.
        far = f.constant(np.iinfo(np.int64).max // 2)
        nearest = f.op("ReduceMax", f.op("Where", listed, distance, f.op("Neg", far)), last, keepdims=1)
        inner = f.constant(np.arange(attributes.block_q))
        sees = f.op("GreaterOrEqual", f.op("Add", nearest, inner), zero)  # [B, Hm, NQ, block_q]
    else:
        sees = some

    only_first = f.op("Equal", f.op("Range", zero, _scalar(f, sizes.listed), one), zero)
    read = f.op("Or", listed, f.op("And", f.op("Not", some), only_first))

    # From lists to rows: heads that share lists or keys are told apart here.
    head = f.op("Range", zero, _scalar(f, sizes.heads), one)
    index_head = f.op("Div", head, f.op("Div", sizes.heads, sizes.index_heads))
    key_head = f.op("Div", head, f.op("Div", sizes.heads, sizes.key_heads))
    batch = f.op("Reshape", f.op("Range", zero, _scalar(f, sizes.batch), one), f.constant([-1, 1, 1, 1]))
    key_head = f.op("Reshape", key_head, f.constant([-1, 1, 1]))
    base = f.op("Mul", f.op("Add", f.op("Mul", batch, sizes.key_heads), key_head), sizes.key_blocks)  # [B, Hq, 1, 1]
    per_head = [f.op("Gather", tensor, index_head, axis=1) for tensor in (f.op("Max", blocks, zero), read, mask)]
    per_head[0] = f.op("Add", per_head[0], base)
    rows = f.op("Concat", f.constant([-1]), sizes.listed, axis=0)
    block, read, mask = (f.op("Reshape", tensor, rows) for tensor in per_head)
    if sees is not None:
        width = attributes.block_q if lowest is not None else 1
        sees = f.op("Reshape", f.op("Gather", sees, index_head, axis=1), f.constant([-1, width, 1]))
    return _Rows(block, read, mask, sees)


def _masks(f: Function, sizes: _Sizes, distances: _Distances, attributes: Attributes) -> tuple[str, str | None]:
    """The masks as biases, and whether a query sees any key of a block under each.

    Returns:
        float32 `[block_q, T, block_k]` or, where all queries are alike, `[1, T, block_k]`: 0 or -infinity; and int64
        `[block_q, T]`, 0 or 1, with a window only.
    """
    lowest, end = attributes.visible()
    block_q, block_k = attributes.block_q, attributes.block_k
    key = f.constant(np.arange(block_k))
    visible = None
    if distances.spans:
        rest = f.op("Mod", f.op("Sub", sizes.keys, sizes.queries), f.constant(distances.unit))
        relative = np.arange(block_q)[:, None] + np.array(distances.representatives()) * distances.unit
        position = f.op("Add", f.constant(relative[:, :, None]), rest)  # p minus the block's first key: [block_q, T, 1]
        ends = []
        if lowest is not None:
            ends.append(f.op("GreaterOrEqual", f.op("Sub", position, f.constant(lowest)), key))
        if end is not None:
            ends.append(f.op("Less", f.op("Sub", position, f.constant(end)), key))
        visible = f.all_of(*ends)
    if not attributes.causal:
        # A second set for the last block, whose tail may lie behind the last key.
        keys_before = f.op("Mul", f.op("Sub", sizes.key_blocks, f.constant(1)), f.constant(block_k))
        inside = f.op("Less", key, f.op("Sub", sizes.keys, keys_before))  # [block_k]
        if visible is None:
            every = f.constant(np.ones((1, 1, block_k)), np.bool_)
            visible = f.op("Concat", every, f.op("And", every, inside), axis=1)
        else:
            visible = f.op("Concat", visible, f.op("And", visible, inside), axis=1)
    assert visible is not None
    bias = f.op("Where", visible, f.constant(0.0, np.float32), f.constant(-np.inf, np.float32))
    if end is None:
        return bias, None
    return bias, f.op("ReduceMax", f.op("Cast", visible, to=INT64), f.constant([2]), keepdims=0)


def _scan(f: Function, sizes: _Sizes, rows: _Rows, distances: _Distances, attributes: Attributes) -> str:
    block_q, block_k = attributes.block_q, attributes.block_k
    bias, any_seen = _masks(f, sizes, distances, attributes)
    q_blocks = _blocks(f, "q", sizes.queries, sizes.row_blocks, block_q, sizes.head_dim)
    k_blocks, v_blocks = (_blocks(f, name, sizes.keys, sizes.key_blocks, block_k, sizes.head_dim) for name in "kv")
    flat = f.op("Concat", f.constant([-1]), sizes.head_dim, axis=0)
    wide = f.constant([block_q if distances.spans else 1, -1])
    nothing = f.constant(0.0, np.float32)
    window_axis = f.constant([1])

    step = Subgraph(f)
    q, block, read, mask = (
        step.input(name, dtype) for name, dtype in (("q", FLOAT), ("block", INT64), ("read", BOOL), ("mask", INT64))
    )
    block, mask = (step.op("Compress", tensor, read, axis=0) for tensor in (block, mask))
    keys, values = (step.op("Reshape", step.op("Gather", all_, block), flat) for all_ in (k_blocks, v_blocks))
    hidden = step.op("Reshape", step.op("Gather", bias, mask, axis=1), wide)
    if attributes.softcap > 0:
        scores = step.op("Gemm", q, keys, alpha=attributes.scale / attributes.softcap, transB=1)
        cap = f.constant(attributes.softcap, np.float32)
        scores = step.op("Add", step.op("Mul", step.op("Tanh", scores), cap), hidden)
    else:
        scores = step.op("Gemm", q, keys, hidden, alpha=attributes.scale, transB=1)
    result = step.op("MatMul", step.op("Softmax", scores, axis=-1), values)
    if rows.sees is not None:
        sees = step.input("sees", BOOL)
    else:
        assert any_seen is not None
        seen = step.op("ReduceMax", step.op("Gather", any_seen, mask, axis=1), window_axis, keepdims=1)
        sees = step.op("Cast", seen, to=BOOL)
    result = step.op("Where", sees, result, nothing)

    inputs = [q_blocks, rows.block, rows.read, rows.mask] + ([rows.sees] if rows.sees is not None else [])
    out = f.op("Scan", *inputs, body=step.proto("row", [(result, FLOAT)]), num_scan_inputs=len(inputs))
    padded = f.op("Concat", sizes.batch, sizes.heads, f.constant([-1]), sizes.head_dim, axis=0)
    return f.op("Slice", f.op("Reshape", out, padded), f.constant([0]), sizes.queries, f.constant([2]))


def _blocks(f: Function, tensor: str, length: str, blocks: str, size: int, head_dim: str) -> str:
    """`tensor` `[B, H, length, D]` in float32 as `[B * H * blocks, size, D]`, the last block filled up with zeros."""
    missing = f.op("Sub", f.op("Mul", blocks, f.constant([size])), length)
    pads = f.op("Concat", f.constant([0] * 6), missing, f.constant([0]), axis=0)
    padded = f.op("Pad", f.op("Cast", tensor, to=FLOAT), pads)
    return f.op("Reshape", padded, f.op("Concat", f.constant([-1, size]), head_dim, axis=0))


def _ceil(f: Function, length: str, size: int) -> str:
    return f.op("Div", f.op("Add", length, f.constant([size - 1])), f.constant([size]))


def _scalar(f: Function, size: str) -> str:
    return f.op("Reshape", size, f.constant(np.empty(0, np.int64)))
