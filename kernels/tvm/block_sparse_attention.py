# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# TVMScript is parsed, not run: its annotations are TVM's.
"""BlockSparseAttention on a CPU: online softmax over the listed key blocks, queries in the vector lanes.

The contract is in `edgekit.custom_ops.block_sparse_attention`. The arithmetic follows FlashAttention's online softmax
(Dao et al. 2022, arXiv:2205.14135), transposed: a lane tile is `lanes` queries, its scores are S^T = K Q^T and its
output is O^T += V^T P^T. Keys and value columns are then broadcast scalars, and the running maximum and sum are
plain vectors: no horizontal reduction, and no packing of K and V. Both products are register tiles of rows x lanes
accumulators, which is where the time goes; `_schedule` orders, vectorizes and unrolls them.

One kernel per dtype serves every head dim, block size, length and head ratio: they are trip counts of the loops around
the register tiles, and in the cases that were measured, kernels specialised to them were at most 3 % faster. A tile
that would reach beyond the last key or value column reads that last one again, so nothing outside the buffers is
touched and no tail needs code of its own.

For each lane tile the keys of a block are first cut to those that any of its queries may see: a block in the future
or outside the window costs a comparison, one on the diagonal half a block, and only blocks that some query sees in
part are masked. Which queries saw a key is kept beside the running sum: one that saw only scores of -inf has a sum of
0 too, but its softmax is NaN. float16 tensors are widened to float32 step by step; all arithmetic is float32.

Two notes for whoever edits the script: scalars are plain assignments (mutable locals), not `T.let`, which TVM
substitutes into every use until its region analysis takes minutes; and the query blocks of a head are taken from
both ends in turn, so that any contiguous share of the parallel loop has its part of the causal triangle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from edgekit.kernels.tvm.compat import IRModule, PrimFunc, Schedule, T
from edgekit.kernels.tvm.exp2 import LOG2_E, exp2, tanh
from edgekit.kernels.tvm.kernel import Kernel
from edgekit.kernels.tvm.targets import Arch

_LOWEST = -3.4028234663852886e38  # the running maximum before the first key; finite, so that -inf minus it is -inf
_FAR = 1 << 40  # more than any position, small enough to add positions to
_SYMBOLS = {"float32": "edgekit_bsa_f32", "float16": "edgekit_bsa_f16"}


@dataclass(frozen=True)
class Tiles:
    """How the work is cut."""

    lanes: int
    """Queries of a lane tile: a power of two times the vector width."""
    rows: int
    """Keys (of the scores) or columns (of the output) of a register tile, which has rows x lanes accumulators."""
    group: int
    """Lane tiles that one item of the parallel loop takes through the keys together."""
    step: int
    """Keys of one step of the online softmax."""


# Accumulators, the lanes they are multiplied with and one broadcast fill the vector registers; four to six products
# must be in flight for each of two multipliers. Lane tiles of 16 and 32 divide the usual block sizes.
_TILES = {
    "x86-64-v3": Tiles(lanes=16, rows=6, group=4, step=64),
    "x86-64-v4": Tiles(lanes=32, rows=8, group=2, step=64),
    "aarch64": Tiles(lanes=16, rows=4, group=4, step=64),
}


def _element(tensor: Any, staged: Any, at: tuple[Any, Any, Any, Any], origin: Any) -> Any:
    """`tensor[at]` as float32: from its widened copy, whose first row is key `origin`, where the dtype is float16."""
    batch, head, row, column = at
    return tensor[batch, head, row, column] if tensor.ty.dtype == "float32" else staged[row - origin, column]


@T.inline
def _start(q, qt, acc, top, total, sees, b, h, first, queries, factor, dim, lanes):
    """Q^T times `factor` for each lane tile (surplus lanes repeat the last query); nothing accumulated yet."""
    for t in range(T.ceildiv(queries, T.int64(lanes))):
        for i in range(lanes):
            for d in range(dim):
                qt[t, d, i] = T.Cast("float32", q[b, h, first + T.min(t * lanes + i, queries - 1), d]) * factor
        for d in range(dim):
            for i in T.vectorized(lanes):
                acc[t, d, i] = T.float32(0)
        for i in T.vectorized(lanes):
            top[t, i] = T.float32(_LOWEST)
        for i in T.vectorized(lanes):
            total[t, i] = T.float32(0)
        for i in T.vectorized(lanes):
            sees[t, i] = T.float32(0)


@T.inline
def _note(sees, t, begin, end, p0, low, high, lanes):
    """1 for the queries that see one of the keys begin..end, which are at least one; lane i is at position p0 + i."""
    first_lane = T.Cast("int32", T.max(T.min(begin - p0 - high, T.int64(lanes)), T.int64(0)))
    last_lane = T.Cast("int32", T.max(T.min(end - 1 - p0 - low, T.int64(lanes)), T.int64(-1)))
    for i in T.vectorized(lanes):
        sees[t, i] = T.Select(i >= first_lane and i <= last_lane, T.float32(1), sees[t, i])


@T.inline
def _mask(scores, begin, end, p0, low, high, lanes):
    """-inf for the queries that must not see a key: row j is key begin + j, lane i the query at position p0 + i."""
    for j in range(end - begin):
        first_lane = T.Cast("int32", T.max(T.min(begin + j - p0 - high, T.int64(lanes)), T.int64(0)))
        last_lane = T.Cast("int32", T.max(T.min(begin + j - p0 - low, T.int64(lanes)), T.int64(-1)))
        for i in T.vectorized(lanes):
            scores[j, i] = T.Select(i >= first_lane and i <= last_lane, scores[j, i], T.float32(float("-inf")))


@T.inline
def _softmax(scores, top, total, new, alpha, t, count, lanes):
    """One step of the online softmax: scores become weights, `alpha` what the earlier ones are multiplied with."""
    for i in T.vectorized(lanes):
        new[i] = top[t, i]
    for j in range(count):
        for i in T.vectorized(lanes):
            new[i] = T.max(scores[j, i], new[i])  # a NaN score loses here and comes back through its weight
    for i in T.vectorized(lanes):
        alpha[i] = exp2(top[t, i] - new[i])
    for i in T.vectorized(lanes):
        top[t, i] = new[i]
    for i in T.vectorized(lanes):
        total[t, i] = total[t, i] * alpha[i]
    for j in range(count):
        for i in T.vectorized(lanes):
            scores[j, i] = exp2(scores[j, i] - new[i])
        for i in T.vectorized(lanes):
            total[t, i] = total[t, i] + scores[j, i]


@T.inline
def _finish(out, acc, total, sees, alpha, b, h, first, queries, dim, lanes, dtype):
    """O = acc / total, zeros where no key was seen; only the lanes that are queries are written."""
    for t in range(T.ceildiv(queries, T.int64(lanes))):
        for i in T.vectorized(lanes):
            alpha[i] = T.Select(sees[t, i] == T.float32(0), T.float32(0), T.float32(1) / total[t, i])
        for i in range(T.min(T.int64(lanes), queries - t * lanes)):
            for d in range(dim):
                out[b, h, first + t * lanes + i, d] = T.Cast(dtype, acc[t, d, i] * alpha[i])


@T.inline
def _widen(tensor, staged, b, kv, begin, end, dim):
    """A float32 copy of the keys begin..end of a float16 tensor."""
    for j in range(end - begin):
        for d in range(dim):
            staged[j, d] = T.Cast("float32", tensor[b, kv, begin + j, d])


def _prim_func(symbol: str, dtype: str, tiles: Tiles) -> PrimFunc:
    lanes, rows, group, step = tiles.lanes, tiles.rows, tiles.group, tiles.step
    score_rows = -(-step // rows) * rows
    align = 4 if dtype == "float32" else 2
    half = dtype == "float16"

    @T.prim_func(s_tir=True)
    def attention(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        index_handle: T.handle,
        out_handle: T.handle,
        scale: T.float32,
        softcap: T.float32,
        causal: T.int64,
        window: T.int64,
        block_q: T.int64,
        block_k: T.int64,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        batch = T.int64()
        heads = T.int64()
        kv_heads = T.int64()
        index_heads = T.int64()
        n = T.int64()
        m = T.int64()
        dim = T.int64()
        query_blocks = T.int64()
        listed = T.int64()
        q = T.match_buffer(q_handle, (batch, heads, n, dim), dtype, align=align)
        k = T.match_buffer(k_handle, (batch, kv_heads, m, dim), dtype, align=align)
        v = T.match_buffer(v_handle, (batch, kv_heads, m, dim), dtype, align=align)
        index = T.match_buffer(index_handle, (batch, index_heads, query_blocks, listed), "int32", align=4)
        out = T.match_buffer(out_handle, (batch, heads, n, dim), dtype, align=align)
        for item in range(batch * heads * query_blocks * T.ceildiv(block_q, T.int64(lanes * group))):
            with T.sblock("item"):
                vitem = T.axis.spatial(batch * heads * query_blocks * T.ceildiv(block_q, T.int64(lanes * group)), item)
                T.reads()
                T.writes()
                qt = T.alloc_buffer((group, dim, lanes))
                acc = T.alloc_buffer((group, T.ceildiv(dim, T.int64(rows)) * rows, lanes))
                scores = T.alloc_buffer((score_rows, lanes))
                seen = T.alloc_buffer((T.ceildiv(m, block_k),), "int8")
                k_wide = T.alloc_buffer((step if half else 1, dim))
                v_wide = T.alloc_buffer((step if half else 1, dim))
                tile = T.alloc_buffer((rows, lanes))
                top = T.alloc_buffer((group, lanes))
                total = T.alloc_buffer((group, lanes))
                sees = T.alloc_buffer((group, lanes))
                new = T.alloc_buffer((lanes,))
                alpha = T.alloc_buffer((lanes,))

                groups = T.ceildiv(block_q, T.int64(lanes * group))
                part = T.truncmod(vitem, groups) * (lanes * group)
                turn = T.truncmod(T.truncdiv(vitem, groups), query_blocks)
                head = T.truncdiv(T.truncdiv(vitem, groups), query_blocks)
                b = T.truncdiv(head, heads)
                h = T.truncmod(head, heads)
                kv = T.truncdiv(h, T.truncdiv(heads, kv_heads))
                ih = T.Select(index_heads == 1, T.int64(0), T.Select(index_heads == heads, h, kv))
                from_end = query_blocks - 1 - T.truncdiv(turn, T.int64(2))
                row = T.Select(T.truncmod(turn, T.int64(2)) == 0, T.truncdiv(turn, T.int64(2)), from_end)
                first = row * block_q + part
                queries = T.min(T.min(block_q - part, n - first), T.int64(lanes * group))
                # A query at position p may see the keys p + low .. p + high.
                reach = T.min(window, T.int64(_FAR)) - 1
                low = T.Select(window > 0, 0 - reach, T.int64(-_FAR))
                high = T.Select(causal != 0, T.int64(0), T.Select(window > 0, reach, T.int64(_FAR)))
                # Scores are in powers of two; with a softcap, q k^T / softcap comes first.
                factor = T.Select(softcap > T.float32(0), scale / softcap, scale * T.float32(LOG2_E))
                if queries > 0:
                    _start(q, qt, acc, top, total, sees, b, h, first, queries, factor, dim, lanes)
                    for x in range(T.ceildiv(m, block_k)):
                        seen[x] = T.int8(0)
                    for x in range(listed):
                        block = T.Cast("int64", index[b, ih, row, x])
                        fresh = T.bool(False)
                        if block >= 0 and block * block_k < m:
                            fresh = seen[block] == T.int8(0)
                            seen[block] = T.int8(1)
                        if fresh:
                            for s in range(T.ceildiv(block_k, T.int64(step))):
                                start = block * block_k + s * step
                                p_first = first + m - n
                                p_last = p_first + queries - 1
                                start = T.max(start, p_first + low)
                                stop = T.min(
                                    T.min(block * block_k + T.min(s * step + step, block_k), m), p_last + high + 1
                                )
                                if half:
                                    _widen(k, k_wide, b, kv, start, stop, dim)
                                    _widen(v, v_wide, b, kv, start, stop, dim)
                                for t in range(T.ceildiv(queries, T.int64(lanes))):
                                    p0 = p_first + t * lanes
                                    p1 = T.min(p0 + (lanes - 1), p_last)
                                    begin = T.max(start, p0 + low)
                                    end = T.min(stop, p1 + high + 1)
                                    for jt in range(T.ceildiv(end - begin, T.int64(rows))):
                                        with T.sblock("score_tile"):
                                            vt = T.axis.opaque(group, t)
                                            vjt = T.axis.opaque(T.ceildiv(end - begin, T.int64(rows)), jt)
                                            T.reads()
                                            T.writes()
                                            for j, i, d in T.grid(rows, lanes, dim):
                                                with T.sblock("score"):
                                                    vj, vi, vd = T.axis.remap("SSR", [j, i, d])
                                                    with T.init():
                                                        tile[vj, vi] = T.float32(0)
                                                    tile[vj, vi] = (
                                                        tile[vj, vi]
                                                        + _element(
                                                            k,
                                                            k_wide,
                                                            (b, kv, T.min(begin + vjt * rows + vj, end - 1), vd),
                                                            start,
                                                        )
                                                        * qt[vt, vd, vi]
                                                    )
                                            for j in T.unroll(rows):
                                                for i in T.vectorized(lanes):
                                                    scores[vjt * rows + j, i] = tile[j, i]
                                    if begin < end:
                                        if softcap > T.float32(0):
                                            for j in range(end - begin):
                                                for i in T.vectorized(lanes):
                                                    scores[j, i] = tanh(scores[j, i]) * (softcap * T.float32(LOG2_E))
                                        if end - 1 > p0 + high or begin < p1 + low:
                                            _mask(scores, begin, end, p0, low, high, lanes)
                                        _note(sees, t, begin, end, p0, low, high, lanes)
                                        _softmax(scores, top, total, new, alpha, t, end - begin, lanes)
                                        for et in range(T.ceildiv(dim, T.int64(rows))):
                                            with T.sblock("value_tile"):
                                                vt = T.axis.opaque(group, t)
                                                vet = T.axis.opaque(T.ceildiv(dim, T.int64(rows)), et)
                                                T.reads()
                                                T.writes()
                                                for e, i, j in T.grid(rows, lanes, end - begin):
                                                    with T.sblock("value"):
                                                        ve, vi, vj = T.axis.remap("SSR", [e, i, j])
                                                        with T.init():
                                                            tile[ve, vi] = T.float32(0)
                                                        tile[ve, vi] = (
                                                            tile[ve, vi]
                                                            + _element(
                                                                v,
                                                                v_wide,
                                                                (b, kv, begin + vj, T.min(vet * rows + ve, dim - 1)),
                                                                start,
                                                            )
                                                            * scores[vj, vi]
                                                        )
                                                for e in T.unroll(rows):
                                                    for i in T.vectorized(lanes):
                                                        acc[vt, vet * rows + e, i] = (
                                                            acc[vt, vet * rows + e, i] * alpha[i] + tile[e, i]
                                                        )
                    _finish(out, acc, total, sees, alpha, b, h, first, queries, dim, lanes, dtype)

    return attention


def _schedule(function: PrimFunc, symbol: str) -> IRModule:
    """Register tiles for the two products, and the items in parallel."""
    schedule = Schedule(IRModule({symbol: function}))
    for name in ("score", "value"):
        product = schedule.get_sblock(name, func_name=symbol)
        row, lane, reduction = schedule.get_loops(product)[-3:]
        schedule.reorder(reduction, row, lane)
        schedule.vectorize(lane)
        schedule.unroll(row)
        schedule.decompose_reduction(product, reduction)  # last: it makes the zeroing a nest of its own
    schedule.parallel(schedule.get_loops(schedule.get_sblock("item", func_name=symbol))[0])
    return schedule.mod


def _build(arch: Arch, dtype: str) -> IRModule:
    symbol = _SYMBOLS[dtype]
    return _schedule(_prim_func(symbol, dtype, _TILES[arch.name]), symbol)


def variants(arch: Arch) -> tuple[Kernel, ...]:
    """The kernels of BlockSparseAttention for `arch`: one per dtype, which serves every call of that dtype."""
    return tuple(
        Kernel(op="BlockSparseAttention", dtype=dtype, symbol=symbol, build=partial(_build, dtype=dtype))
        for dtype, symbol in _SYMBOLS.items()
        if arch.name in _TILES
    )
