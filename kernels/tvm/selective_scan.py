"""SelectiveScan on the CPU: the true recurrence, fused, with channels in the vector lanes.

One task is one batch and one tile of channels, as many as a vector has lanes. It walks over the sequence in chunks of
`_TIMES` steps. In a chunk the `[channels, times]` rows of u and delta are transposed in registers, so that one step
reads one vector of each; B and C are copied beside each other and broadcast. The states of a group stay in registers
over the whole chunk, and y is a sum of vectors: nothing is ever reduced across lanes.

    h[s] = exp2(delta * A2[s]) * h[s] + (delta * u) * B[s];  y += C[s] * h[s]        A2 = A * log2(e)

A state count that is no multiple of the group is padded with A = B = C = 0. Source of the recurrence: Gu and Dao,
"Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, eq. 2 with the simplified (Euler) B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from edgekit.kernels.tvm.compat import IRModule, T
from edgekit.kernels.tvm.exp2 import LOG2_E
from edgekit.kernels.tvm.kernel import Kernel
from edgekit.kernels.tvm.targets import Arch

__all__ = ["variants"]

_TIMES = 128
"""Steps per chunk: the transposed chunk and its rows of B and C stay in a 32 KiB first-level cache."""

_LINE = 16
"""Elements between two prefetches: a cache line of float32."""

# (2**f - 1) / f on [-0.5, 0.5], minimax (3e-7), highest power first. With the constant 1 fixed, the error of a slow
# decay (f near 0) is relative to the decay itself, so it does not build up over a long sequence.
_EXP2 = (0.00134004361, 0.00966637302, 0.0555033311, 0.240223482, 0.693147182)
# log1p(w) = s * P(s**2) with s = w / (w + 2), w in [0, 1], minimax (4e-9), highest power first.
_LOG1P = (0.281915456, 0.279576659, 0.40025115, 0.66666311, 2.0)
# 1.5 * 2**23: added to a float32 it leaves the rounded integer in the low bits.
_ROUND = 12582912.0
_FLUSH = 2.0**-100
"""A smaller state is set to 0 between chunks: the tail of a decay would otherwise end in slow denormals."""


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """`body(variable)` with `variable` bound to `value`, so that the expression tree holds `value` once."""
    variable = T.Var("value", value.ty)
    return T.Let(body(variable), {variable: value})


def _vector(value: float, lanes: int) -> Any:
    return T.float32(value) if lanes == 1 else T.Broadcast(T.float32(value), lanes)


def _exp2(x: Any, lanes: int) -> Any:
    """2**x for any float32 `x` of `lanes` lanes: infinite from 128 on, 2**-126 below -126 (no denormals).

    NaN gives an arbitrary value or NaN: the caller multiplies it with something that is NaN as well. The integer part
    is added to the exponent's bits, which is exact up to the largest finite float32.
    """
    kind = f"x{lanes}" if lanes > 1 else ""

    def assemble(rounded: Any, fraction: Any) -> Any:
        value = _vector(_EXP2[0], lanes)
        for coefficient in (*_EXP2[1:], 1.0):
            value = value * fraction + _vector(coefficient, lanes)
        shift = T.int32(23) if lanes == 1 else T.Broadcast(T.int32(23), lanes)
        bits = T.reinterpret(f"int32{kind}", value) + T.shift_left(rounded, shift)
        return T.reinterpret(f"float32{kind}", bits)

    def split(x: Any) -> Any:
        # The detour over the bits hides the addition from TVM's simplifier, which would drop it as x + c - c.
        rounded = T.reinterpret(f"int32{kind}", x + _vector(_ROUND, lanes))
        return _let(
            rounded,
            lambda r: _let(x - (T.reinterpret(f"float32{kind}", r) - _vector(_ROUND, lanes)), partial(assemble, r)),
        )

    low, high = _vector(-126.0, lanes), _vector(128.0, lanes)
    return _let(x, lambda x: _let(T.Select(x < low, low, x), lambda x: _let(T.Select(x > high, high, x), split)))


def _softplus(x: Any, lanes: int) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), accurate relative to the result; NaN for NaN."""

    def log1p(s: Any) -> Any:
        value = _vector(_LOG1P[0], lanes)
        for coefficient in _LOG1P[1:]:
            value = value * (s * s) + _vector(coefficient, lanes)
        return value * s

    zero, two = _vector(0.0, lanes), _vector(2.0, lanes)
    exp = _exp2(T.fabs(x) * _vector(-LOG2_E, lanes), lanes)
    return T.Select(x < zero, zero, x) + _let(exp, lambda w: _let(w / (w + two), log1p))


def _silu(x: Any, lanes: int) -> Any:
    """x / (1 + exp(-x)); NaN for NaN."""
    return x / (_exp2(x * _vector(-LOG2_E, lanes), lanes) + _vector(1.0, lanes))


def _prefetch(element: Any) -> Any:
    """Fetch the element's cache line. An address outside the buffer does no harm: prefetches never fault."""
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(element), T.int32(0), T.int32(3), T.int32(1))


def _flush(x: Any, lanes: int) -> Any:
    return T.Select(T.fabs(x) < _vector(_FLUSH, lanes), _vector(0.0, lanes), x)


def _nan_or_zero(x: Any, lanes: int) -> Any:
    """x where it is NaN, else 0; on the bits, since TVM simplifies x != x to false."""
    magnitude = T.reinterpret(f"int32x{lanes}", x) & T.Broadcast(T.int32(0x7FFFFFFF), lanes)
    return T.Select(magnitude > T.Broadcast(T.int32(0x7F800000), lanes), x, _vector(0.0, lanes))


def _transpose(lanes: int) -> Callable[..., Any]:
    """A macro that transposes the square `tile[0]` into `tile[log2(lanes)]`, both in registers.

    Interleaving row i with row i + lanes/2 rotates the bits of an element's address (row bits, column bits) by one
    place; after log2(lanes) rounds rows and columns have changed places.
    """
    half, stages = lanes // 2, lanes.bit_length() - 1
    low = [column for i in range(half) for column in (i, lanes + i)]
    high = [column for i in range(half, lanes) for column in (i, lanes + i)]

    @T.macro  # type: ignore[untyped-decorator]
    def transpose(tile: Any) -> None:
        for stage in T.unroll(stages):
            for i in T.unroll(half):
                tile[stage + 1, 2 * i, T.ramp(0, 1, lanes)] = T.Shuffle(
                    [tile[stage, i, T.ramp(0, 1, lanes)], tile[stage, i + half, T.ramp(0, 1, lanes)]], low
                )
                tile[stage + 1, 2 * i + 1, T.ramp(0, 1, lanes)] = T.Shuffle(
                    [tile[stage, i, T.ramp(0, 1, lanes)], tile[stage, i + half, T.ramp(0, 1, lanes)]], high
                )

    return transpose  # type: ignore[no-any-return]


def _load_columns(lanes: int) -> Callable[..., Any]:
    """A macro: `columns[first + j, i] = source[b, c0 + i, t0 + first + j]`, zero beyond the channels and the chunk."""
    transpose, stages = _transpose(lanes), lanes.bit_length() - 1
    wide = f"float32x{lanes}"

    @T.macro  # type: ignore[untyped-decorator]
    def load_columns(
        columns: Any, tile: Any, source: Any, b: Any, c0: Any, channels: Any, t0: Any, first: Any, steps: Any
    ) -> None:
        if first + lanes <= steps:
            for i in T.unroll(lanes):
                tile[0, i, T.ramp(0, 1, lanes)] = T.if_then_else(
                    c0 + i < channels,
                    T.Cast(wide, source[b, c0 + i, T.ramp(t0 + first, 1, lanes)]),
                    T.Broadcast(T.float32(0.0), lanes),
                )
            transpose(tile)
            for i in T.unroll(lanes):
                columns[first + i, T.ramp(0, 1, lanes)] = tile[stages, i, T.ramp(0, 1, lanes)]
        else:
            for j in T.serial(lanes):
                columns[first + j, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
            for j, i in T.grid(steps - first, T.min(channels - c0, T.int64(lanes))):
                columns[first + j, i] = T.Cast("float32", source[b, c0 + i, t0 + first + j])

    return load_columns  # type: ignore[no-any-return]


def _load_rows(lanes: int) -> Callable[..., Any]:
    """A macro: `rows[s, j] = source[b, s, t0 + j]` for the `count` rows and `steps` steps that exist."""

    @T.macro  # type: ignore[untyped-decorator]
    def load_rows(rows: Any, source: Any, b: Any, count: Any, t0: Any, steps: Any) -> None:
        for s in T.serial(count):
            for block in T.serial(steps // lanes):
                rows[s, T.ramp(block * lanes, 1, lanes)] = T.Cast(
                    f"float32x{lanes}", source[b, s, T.ramp(t0 + block * lanes, 1, lanes)]
                )
            for j in T.serial(steps % lanes):
                rows[s, steps // lanes * lanes + j] = T.Cast("float32", source[b, s, t0 + steps // lanes * lanes + j])

    return load_rows  # type: ignore[no-any-return]


def _build(arch: Arch, *, symbol: str, dtype: str, lanes: int, group: int) -> IRModule:
    """The kernel for any shape: `lanes` channels per task, `group` states in registers."""
    stages = lanes.bit_length() - 1
    align = 4 if dtype == "float32" else 2
    load_columns, load_rows, transpose = _load_columns(lanes), _load_rows(lanes), _transpose(lanes)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def scan(
        u_handle: T.handle,
        delta_handle: T.handle,
        a_handle: T.handle,
        b_handle: T.handle,
        c_handle: T.handle,
        d_handle: T.handle,
        z_handle: T.handle,
        out_handle: T.handle,
        delta_softplus: T.int64,
        has_z: T.int64,
    ) -> None:
        T.func_attr({"tirx.noalias": True, "global_symbol": symbol})
        batch, channels, length, states = T.int64(), T.int64(), T.int64(), T.int64()
        u = T.match_buffer(u_handle, (batch, channels, length), dtype, align=align)
        delta = T.match_buffer(delta_handle, (batch, channels, length), dtype, align=align)
        decay = T.match_buffer(a_handle, (channels, states), dtype, align=align)
        b_in = T.match_buffer(b_handle, (batch, states, length), dtype, align=align)
        c_in = T.match_buffer(c_handle, (batch, states, length), dtype, align=align)
        skip = T.match_buffer(d_handle, (channels,), dtype, align=align)
        z = T.match_buffer(z_handle, (batch, channels, length), dtype, align=align)
        out = T.match_buffer(out_handle, (batch, channels, length), dtype, align=align)
        for task in T.parallel(batch * ((channels + lanes - 1) // lanes)):
            with T.sblock("task"):
                vtask = T.axis.spatial(batch * ((channels + lanes - 1) // lanes), task)
                T.reads()
                T.writes()
                b = vtask // ((channels + lanes - 1) // lanes)
                c0 = vtask % ((channels + lanes - 1) // lanes) * lanes
                valid = T.min(channels - c0, T.int64(lanes))
                groups = (states + group - 1) // group
                a2 = T.sblock_alloc_buffer(((states + group - 1) // group * group, lanes))
                state = T.sblock_alloc_buffer(((states + group - 1) // group * group, lanes))
                b_rows = T.sblock_alloc_buffer(((states + group - 1) // group * group, _TIMES))
                c_rows = T.sblock_alloc_buffer(((states + group - 1) // group * group, _TIMES))
                d_lanes = T.sblock_alloc_buffer((1, lanes))
                delta_t = T.sblock_alloc_buffer((_TIMES, lanes))
                input_t = T.sblock_alloc_buffer((_TIMES, lanes))
                y_t = T.sblock_alloc_buffer((_TIMES, lanes))
                y_rows = T.sblock_alloc_buffer((lanes, lanes))
                h = T.sblock_alloc_buffer((group, lanes), scope="local")
                tile = T.sblock_alloc_buffer((stages + 1, lanes, lanes), scope="local")
                d_lanes[0, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for i in T.serial(valid):
                    d_lanes[0, i] = T.Cast("float32", skip[c0 + i])
                for s in T.serial(groups * group):
                    a2[s, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    if s < states:
                        for i in T.serial(valid):
                            a2[s, i] = T.Cast("float32", decay[c0 + i, s]) * T.float32(LOG2_E)
                    # A NaN in A may get lost in exp2's bits; from the state it cannot.
                    state[s, T.ramp(0, 1, lanes)] = _nan_or_zero(a2[s, T.ramp(0, 1, lanes)], lanes)
                for s, block in T.grid(groups * group - states, _TIMES // lanes):
                    b_rows[states + s, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    c_rows[states + s, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for chunk in T.serial((length + _TIMES - 1) // _TIMES):
                    t0 = chunk * _TIMES
                    steps = T.min(length - t0, T.int64(_TIMES))
                    load_rows(b_rows, b_in, b, states, t0, steps)
                    load_rows(c_rows, c_in, b, states, t0, steps)
                    for block in T.serial((steps + lanes - 1) // lanes):
                        load_columns(delta_t, tile, delta, b, c0, channels, t0, block * lanes, steps)
                        load_columns(input_t, tile, u, b, c0, channels, t0, block * lanes, steps)
                    if delta_softplus != 0:
                        for t in T.serial(steps):
                            delta_t[t, T.ramp(0, 1, lanes)] = _softplus(delta_t[t, T.ramp(0, 1, lanes)], lanes)
                    for t in T.serial(steps):
                        y_t[t, T.ramp(0, 1, lanes)] = input_t[t, T.ramp(0, 1, lanes)] * d_lanes[0, T.ramp(0, 1, lanes)]
                        input_t[t, T.ramp(0, 1, lanes)] = (
                            input_t[t, T.ramp(0, 1, lanes)] * delta_t[t, T.ramp(0, 1, lanes)]
                        )
                    for g in T.serial(groups):
                        for s in T.unroll(group):
                            h[s, T.ramp(0, 1, lanes)] = state[g * group + s, T.ramp(0, 1, lanes)]
                        for t in T.serial(steps):
                            # One line of the next chunk per step and tensor: its rows are too many and too far apart
                            # for the CPU's own prefetcher.
                            T.evaluate(_prefetch(delta[b, c0 + t % lanes, t0 + _TIMES + t // lanes * _LINE]))
                            T.evaluate(_prefetch(u[b, c0 + t % lanes, t0 + _TIMES + t // lanes * _LINE]))
                            T.evaluate(_prefetch(z[b, c0 + t % lanes, t0 + _TIMES + t // lanes * _LINE]))
                            for s in T.unroll(group):
                                h[s, T.ramp(0, 1, lanes)] = _exp2(
                                    delta_t[t, T.ramp(0, 1, lanes)] * a2[g * group + s, T.ramp(0, 1, lanes)], lanes
                                ) * h[s, T.ramp(0, 1, lanes)] + input_t[t, T.ramp(0, 1, lanes)] * T.Broadcast(
                                    b_rows[g * group + s, t], lanes
                                )
                                y_t[t, T.ramp(0, 1, lanes)] = y_t[t, T.ramp(0, 1, lanes)] + h[
                                    s, T.ramp(0, 1, lanes)
                                ] * T.Broadcast(c_rows[g * group + s, t], lanes)
                        for s in T.unroll(group):
                            state[g * group + s, T.ramp(0, 1, lanes)] = _flush(h[s, T.ramp(0, 1, lanes)], lanes)
                    for block in T.serial((steps + lanes - 1) // lanes):
                        for i in T.unroll(lanes):
                            tile[0, i, T.ramp(0, 1, lanes)] = y_t[block * lanes + i, T.ramp(0, 1, lanes)]
                        transpose(tile)
                        for i in T.unroll(lanes):
                            y_rows[i, T.ramp(0, 1, lanes)] = tile[stages, i, T.ramp(0, 1, lanes)]
                        first = t0 + block * lanes
                        for i in T.serial(valid):
                            if block * lanes + lanes <= steps:
                                if has_z != 0:
                                    y_rows[i, T.ramp(0, 1, lanes)] = y_rows[i, T.ramp(0, 1, lanes)] * _silu(
                                        T.Cast(f"float32x{lanes}", z[b, c0 + i, T.ramp(first, 1, lanes)]), lanes
                                    )
                                out[b, c0 + i, T.ramp(first, 1, lanes)] = T.Cast(
                                    f"{dtype}x{lanes}", y_rows[i, T.ramp(0, 1, lanes)]
                                )
                            else:
                                for j in T.serial(steps - block * lanes):
                                    if has_z != 0:
                                        y_rows[i, j] = y_rows[i, j] * _silu(
                                            T.Cast("float32", z[b, c0 + i, first + j]), 1
                                        )
                                    out[b, c0 + i, first + j] = T.Cast(dtype, y_rows[i, j])

    return IRModule({symbol: scan})


def _module(arch: Arch, *, symbol: str, dtype: str) -> IRModule:
    lanes, group = _TILES[arch.name]
    return _build(arch, symbol=symbol, dtype=dtype, lanes=lanes, group=group)


# Channels per task and states in registers.
_TILES = {"x86-64-v4": (16, 8), "x86-64-v3": (8, 8), "aarch64": (8, 4)}


def variants(arch: Arch) -> tuple[Kernel, ...]:
    """The kernels of SelectiveScan for `arch`: one per dtype, which serves every shape.

    Their functions take (u, delta, A, B, C, D, z, out, delta_softplus: int64, has_z: int64) with compact row-major
    tensors as in the op's contract; without a gate, pass u as z and has_z = 0.
    """
    return tuple(
        Kernel("SelectiveScan", dtype, symbol, build=partial(_module, symbol=symbol, dtype=dtype))
        for dtype, symbol in (("float32", "edgekit_scan_f32"), ("float16", "edgekit_scan_f16"))
    )
