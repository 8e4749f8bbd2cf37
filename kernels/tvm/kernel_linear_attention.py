"""KernelLinearAttention on the CPU: two matrix products around a `[D, E]` state, in register tiles.

    S = mean_j phi(k_j) v_j^T, s = mean_j phi(k_j)          parts of the keys in parallel, then their sum
    o_i = phi(q_i)^T S / (phi(q_i)^T s + eps)               blocks of queries in parallel

phi is applied once, while a block of rows is packed into scratch; the mean's 1/N goes in there too, so that no sum of
N terms can overflow before it is divided. v is read in place where its rows are whole vectors of float32, and packed
otherwise. In both products the lanes hold columns of v or out: nothing but the denominator is reduced across lanes.
Source: Katharopoulos et al., "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgekit.kernels.tvm.compat import IRModule, T
from edgekit.kernels.tvm.exp2 import LOG2_E, exp2
from edgekit.kernels.tvm.kernel import Kernel
from edgekit.kernels.tvm.targets import Arch

__all__ = ["variants"]

_RELU, _ELU1 = 0, 1
"""The runtime argument `feature_map`; anything else is the identity."""
_BLOCK = 64
"""Rows that are packed at a time."""
_LINE = 16
"""Elements between two prefetches: a cache line of float32."""
_TASKS = 64
"""The keys of a head are cut into parts until about this many tasks exist: enough for any phone's or board's cores."""
_PART_ROWS = 256
"""Fewer keys than this are never cut: the parts' states must be added up again."""


@dataclass(frozen=True)
class _Tiles:
    """Register tiles: what one innermost loop keeps in vector registers."""

    state_rows: int
    """Rows of S in the first product."""
    query_rows: int
    """Queries in the second."""
    vectors: int
    """Vectors of columns in both."""


def _tiles(arch: Arch, head_dim: int | None) -> _Tiles:
    """Tiles that fit the arch's registers and waste nothing at this head dimension (None: any)."""
    if arch.name == "x86-64-v4":
        return _Tiles(8, 8, 2) if head_dim in (32, 64) else _Tiles(8, 8, 1)
    if arch.name == "x86-64-v3":
        return _Tiles(4, 6, 2)
    return _Tiles(4, 6, 4) if head_dim else _Tiles(8, 8, 2)


def _feature(x: Any, feature_map: int) -> Any:
    """phi of a float32 expression; NaN for NaN. elu(x) + 1 is x + 1 above 0 and exp(x) below, exactly 1 at 0.

    exp(x) is 0 for x < -44.3, and its relative error is at most about |x| times 6e-8 before.
    """
    zero, one = T.float32(0.0), T.float32(1.0)
    if feature_map == _RELU:
        return T.Select(x < zero, zero, x)
    if feature_map == _ELU1:
        return T.Select(x > zero, x + one, exp2(T.Select(x > zero, zero, x) * T.float32(LOG2_E)))
    return x


def _lane_sum(vector: Any, lanes: int) -> Any:
    """The sum over the lanes, by halves."""
    if lanes == 1:
        return T.Shuffle([vector], [0])
    half = lanes // 2
    variable = T.Var("lanes", vector.ty)
    halves = T.Shuffle([variable], list(range(half))) + T.Shuffle([variable], list(range(half, lanes)))
    return T.Let(_lane_sum(halves, half), {variable: vector})


def _round_up(size: Any, multiple: int) -> Any:
    return (size + multiple - 1) // multiple * multiple


def _prefetch(element: Any) -> Any:
    """Fetch the element's cache line. An address outside the buffer does no harm: prefetches never fault."""
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(element), T.int32(0), T.int32(3), T.int32(1))


def _share(column_tiles: Any, row_tiles: Any) -> Any:
    """Rows of the next block that each tile fetches."""
    return (_BLOCK + column_tiles * row_tiles - 1) // (column_tiles * row_tiles)


def _parts(batch_heads: Any, length: Any) -> Any:
    """Into how many parts the keys of every head are cut."""
    return T.max(T.min(_TASKS // batch_heads, (length + _PART_ROWS - 1) // _PART_ROWS), T.int64(1))


def _pack(lanes: int) -> Callable[..., Any]:
    """A macro: `packed[r, :] = phi(source[bh, first + r, :]) * scale` for `rows` rows, columns beyond D untouched."""

    @T.macro  # type: ignore[untyped-decorator]
    def pack_with(
        packed: Any, source: Any, b: Any, h: Any, first: Any, rows: Any, width: Any, scale: Any, feature_map: int
    ) -> None:
        for r in T.serial(rows):
            for block in T.serial(width // lanes):
                for lane in T.vectorized(lanes):
                    packed[r, block * lanes + lane] = (
                        _feature(T.Cast("float32", source[b, h, first + r, block * lanes + lane]), feature_map) * scale
                    )
            for c in T.serial(width % lanes):
                packed[r, width // lanes * lanes + c] = (
                    _feature(T.Cast("float32", source[b, h, first + r, width // lanes * lanes + c]), feature_map)
                    * scale
                )

    @T.macro  # type: ignore[untyped-decorator]
    def pack(
        packed: Any, source: Any, b: Any, h: Any, first: Any, rows: Any, width: Any, scale: Any, feature_map: Any
    ) -> None:
        if feature_map == _RELU:
            pack_with(packed, source, b, h, first, rows, width, scale, _RELU)
        else:
            if feature_map == _ELU1:
                pack_with(packed, source, b, h, first, rows, width, scale, _ELU1)
            else:
                pack_with(packed, source, b, h, first, rows, width, scale, 2)

    return pack  # type: ignore[no-any-return]


def _build(arch: Arch, *, symbol: str, dtype: str, head_dim: int | None) -> IRModule:
    """The kernel for D = E = `head_dim`, or for any D and E."""
    lanes, tiles = arch.lanes, _tiles(arch, head_dim)
    state_rows, query_rows, vectors = tiles.state_rows, tiles.query_rows, tiles.vectors
    columns = vectors * lanes
    query_block = _BLOCK // query_rows * query_rows
    align = 4 if dtype == "float32" else 2
    in_place = dtype == "float32" and head_dim is not None and head_dim % columns == 0
    pack = _pack(lanes)
    pad = max(lanes, state_rows)  # both powers of two
    dim, width = (T.int64(head_dim) if head_dim else T.Var(name, "int64") for name in ("dim", "width"))

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def attention(
        q_handle: T.handle,
        k_handle: T.handle,
        v_handle: T.handle,
        out_handle: T.handle,
        eps: T.float32,
        feature_map: T.int64,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        batch, heads, length = T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_handle, (batch, heads, length, dim), dtype, align=align)
        k = T.match_buffer(k_handle, (batch, heads, length, dim), dtype, align=align)
        v = T.match_buffer(v_handle, (batch, heads, length, width), dtype, align=align)
        out = T.match_buffer(out_handle, (batch, heads, length, width), dtype, align=align)
        state = T.sblock_alloc_buffer(
            (batch * heads * _parts(batch * heads, length), _round_up(dim, pad), _round_up(width, columns))
        )
        norm = T.sblock_alloc_buffer((batch * heads * _parts(batch * heads, length), _round_up(dim, pad)))
        dims = _round_up(dim, pad)
        widths = _round_up(width, columns)
        parts = _parts(batch * heads, length)
        for task in T.parallel(batch * heads * parts):
            with T.sblock("keys"):
                vtask = T.axis.spatial(batch * heads * parts, task)
                T.reads()
                T.writes()
                k_packed = T.sblock_alloc_buffer((_BLOCK, _round_up(dim, pad)))
                v_packed = T.sblock_alloc_buffer((1 if in_place else _BLOCK, _round_up(width, columns)))
                acc = T.sblock_alloc_buffer((state_rows, vectors, lanes), scope="local")
                b = vtask // parts // heads
                h = vtask // parts % heads
                part_rows = (length + parts - 1) // parts
                begin = T.min(vtask % parts * part_rows, length)
                end = T.min(begin + part_rows, length)
                scale = T.float32(1.0) / T.Cast("float32", length)
                for d, block in T.grid(dims, widths // lanes):
                    state[vtask, d, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for block in T.serial(dims // lanes):
                    norm[vtask, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for r, d in T.grid(_BLOCK, dims - dim):
                    k_packed[r, dim + d] = T.float32(0.0)
                if not in_place:
                    for r, e in T.grid(_BLOCK, widths - width):
                        v_packed[r, width + e] = T.float32(0.0)
                for block in T.serial((end - begin + _BLOCK - 1) // _BLOCK):
                    first = begin + block * _BLOCK
                    rows = T.min(end - first, T.int64(_BLOCK))
                    pack(k_packed, k, b, h, first, rows, dim, scale, feature_map)
                    if not in_place:
                        pack(v_packed, v, b, h, first, rows, width, T.float32(1.0), T.int64(2))
                    for d in T.serial(dims // lanes):
                        acc[0, 0, T.ramp(0, 1, lanes)] = norm[vtask, T.ramp(d * lanes, 1, lanes)]
                        for r in T.serial(rows):
                            acc[0, 0, T.ramp(0, 1, lanes)] = (
                                acc[0, 0, T.ramp(0, 1, lanes)] + k_packed[r, T.ramp(d * lanes, 1, lanes)]
                            )
                        norm[vtask, T.ramp(d * lanes, 1, lanes)] = acc[0, 0, T.ramp(0, 1, lanes)]
                    for eo, do in T.grid(widths // columns, (dim + state_rows - 1) // state_rows):
                        # Each tile fetches its share of the next block, which would otherwise miss the cache at once.
                        for r in T.serial(_share(widths // columns, (dim + state_rows - 1) // state_rows)):
                            ahead = (
                                first
                                + _BLOCK
                                + (eo * ((dim + state_rows - 1) // state_rows) + do)
                                * _share(widths // columns, (dim + state_rows - 1) // state_rows)
                                + r
                            )
                            for line in T.serial((dim + _LINE - 1) // _LINE):
                                T.evaluate(_prefetch(k[b, h, ahead, line * _LINE]))
                            for line in T.serial((width + _LINE - 1) // _LINE):
                                T.evaluate(_prefetch(v[b, h, ahead, line * _LINE]))
                        for i in T.unroll(state_rows):
                            for j in T.unroll(vectors):
                                acc[i, j, T.ramp(0, 1, lanes)] = state[
                                    vtask, do * state_rows + i, T.ramp(eo * columns + j * lanes, 1, lanes)
                                ]
                        for r in T.serial(rows):
                            for i in T.unroll(state_rows):
                                for j in T.unroll(vectors):
                                    acc[i, j, T.ramp(0, 1, lanes)] = acc[i, j, T.ramp(0, 1, lanes)] + T.Broadcast(
                                        k_packed[r, do * state_rows + i], lanes
                                    ) * (
                                        v[b, h, first + r, T.ramp(eo * columns + j * lanes, 1, lanes)]
                                        if in_place
                                        else v_packed[r, T.ramp(eo * columns + j * lanes, 1, lanes)]
                                    )
                        for i in T.unroll(state_rows):
                            for j in T.unroll(vectors):
                                state[vtask, do * state_rows + i, T.ramp(eo * columns + j * lanes, 1, lanes)] = acc[
                                    i, j, T.ramp(0, 1, lanes)
                                ]
        if parts > 1:
            for head in T.parallel(batch * heads):
                with T.sblock("sum"):
                    vhead = T.axis.spatial(batch * heads, head)
                    T.reads()
                    T.writes()
                    for part in T.serial(parts - 1):
                        for d, block in T.grid(dims, widths // lanes):
                            state[vhead * parts, d, T.ramp(block * lanes, 1, lanes)] = (
                                state[vhead * parts, d, T.ramp(block * lanes, 1, lanes)]
                                + state[vhead * parts + part + 1, d, T.ramp(block * lanes, 1, lanes)]
                            )
                        for block in T.serial(dims // lanes):
                            norm[vhead * parts, T.ramp(block * lanes, 1, lanes)] = (
                                norm[vhead * parts, T.ramp(block * lanes, 1, lanes)]
                                + norm[vhead * parts + part + 1, T.ramp(block * lanes, 1, lanes)]
                            )
        blocks = (length + query_block - 1) // query_block
        for task in T.parallel(batch * heads * blocks):
            with T.sblock("queries"):
                vtask = T.axis.spatial(batch * heads * blocks, task)
                T.reads()
                T.writes()
                q_packed = T.sblock_alloc_buffer((query_block, _round_up(dim, pad)))
                inverse = T.sblock_alloc_buffer((query_rows,))
                row = T.sblock_alloc_buffer((columns,))
                dot = T.sblock_alloc_buffer((query_rows, lanes), scope="local")
                sums = T.sblock_alloc_buffer((query_rows, vectors, lanes), scope="local")
                b = vtask // blocks // heads
                h = vtask // blocks % heads
                part = vtask // blocks * parts
                first = vtask % blocks * query_block
                rows = T.min(length - first, T.int64(query_block))
                pack(q_packed, q, b, h, first, rows, dim, T.float32(1.0), feature_map)
                for r, d in T.grid(rows, dims - dim):
                    q_packed[r, dim + d] = T.float32(0.0)
                for r, d in T.grid((rows + query_rows - 1) // query_rows * query_rows - rows, dims):
                    q_packed[rows + r, d] = T.float32(0.0)
                for tile in T.serial((rows + query_rows - 1) // query_rows):
                    for line in T.serial((dim + _LINE - 1) // _LINE):
                        for i in T.unroll(query_rows):
                            T.evaluate(_prefetch(q[b, h, first + query_block + tile * query_rows + i, line * _LINE]))
                    for i in T.unroll(query_rows):
                        dot[i, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    for d in T.serial(dims // lanes):
                        for i in T.unroll(query_rows):
                            dot[i, T.ramp(0, 1, lanes)] = (
                                dot[i, T.ramp(0, 1, lanes)]
                                + q_packed[tile * query_rows + i, T.ramp(d * lanes, 1, lanes)]
                                * norm[part, T.ramp(d * lanes, 1, lanes)]
                            )
                    for i in T.unroll(query_rows):
                        inverse[i] = T.float32(1.0) / (_lane_sum(dot[i, T.ramp(0, 1, lanes)], lanes) + eps)
                    for eo in T.serial(widths // columns):
                        for i in T.unroll(query_rows):
                            for j in T.unroll(vectors):
                                sums[i, j, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                        for d in T.serial(dim):
                            for i in T.unroll(query_rows):
                                for j in T.unroll(vectors):
                                    sums[i, j, T.ramp(0, 1, lanes)] = (
                                        sums[i, j, T.ramp(0, 1, lanes)]
                                        + T.Broadcast(q_packed[tile * query_rows + i, d], lanes)
                                        * state[part, d, T.ramp(eo * columns + j * lanes, 1, lanes)]
                                    )
                        if tile * query_rows + query_rows <= rows and eo * columns + columns <= width:
                            for i in T.unroll(query_rows):
                                for j in T.unroll(vectors):
                                    out[
                                        b, h, first + tile * query_rows + i, T.ramp(eo * columns + j * lanes, 1, lanes)
                                    ] = T.Cast(
                                        f"{dtype}x{lanes}",
                                        sums[i, j, T.ramp(0, 1, lanes)] * T.Broadcast(inverse[i], lanes),
                                    )
                        else:
                            for i in T.unroll(query_rows):
                                if tile * query_rows + i < rows:
                                    for j in T.unroll(vectors):
                                        row[T.ramp(j * lanes, 1, lanes)] = sums[
                                            i, j, T.ramp(0, 1, lanes)
                                        ] * T.Broadcast(inverse[i], lanes)
                                    for e in T.serial(T.min(width - eo * columns, T.int64(columns))):
                                        out[b, h, first + tile * query_rows + i, eo * columns + e] = T.Cast(
                                            dtype, row[e]
                                        )

    return IRModule({symbol: attention})


_HEAD_DIMS = (16, 32, 64)
"""D = E that have a kernel of their own."""


def variants(arch: Arch) -> tuple[Kernel, ...]:
    """The kernels of KernelLinearAttention for `arch`: per dtype, specialised ones for D = E and one for any D and E.

    Their functions take (q, k, v, out, eps: float32, feature_map: int64) with compact row-major tensors as in the op's
    contract; feature_map is 0 for relu, 1 for elu1, 2 for the identity.
    """
    found = []
    for dtype, short in (("float32", "f32"), ("float16", "f16")):
        for head_dim in (*_HEAD_DIMS, None):
            symbol = f"edgekit_kla_{short}" + (f"_d{head_dim}" if head_dim else "")
            parameters = (("head_dim", head_dim), ("value_dim", head_dim)) if head_dim else ()
            build = partial(_build, symbol=symbol, dtype=dtype, head_dim=head_dim)
            found.append(Kernel("KernelLinearAttention", dtype, symbol, parameters, build=build))
    return tuple(found)
