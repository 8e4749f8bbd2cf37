"""SelectiveScan on the CPU: the true recurrence, fused, with channels in the vector lanes.

One task is one batch and one tile of channels, as many as a vector has lanes. It walks over the sequence in chunks of
`_TIMES` steps. In a chunk the `[channels, times]` rows of u and delta are transposed in registers, so that one step
reads one vector of each; B and C are copied beside each other and broadcast. The states of a group stay in registers
over the whole chunk, and y is a sum of vectors: nothing is ever reduced across lanes. A chunk whose exponents are all
of moderate size, as they are but for odd data, takes a shorter exponential.

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
from edgekit.kernels.tvm.scan_math import (
    all_easy,
    easy_step,
    exact_step,
    flush,
    larger,
    nan_or_zero,
    silu,
    softplus,
)
from edgekit.kernels.tvm.scan_tiles import column_loading, row_loading, transposing
from edgekit.kernels.tvm.targets import Arch

__all__ = ["variants"]

_TIMES = 128
"""Steps per chunk: the transposed chunk and its rows of B and C stay in a 32 KiB first-level cache."""

_LINE = 16
"""Elements between two prefetches: a cache line of float32."""


def _prefetch(element: Any) -> Any:
    """Fetch the element's cache line. An address outside the buffer does no harm: prefetches never fault."""
    return T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(element), T.int32(0), T.int32(3), T.int32(1))


def _run(lanes: int, count: int, step: Callable[..., Any]) -> Callable[..., Any]:
    """A macro: all steps of a chunk for `count` states from `first` on, whose h stay in registers.

    `step(x, h, drive)` is 2**x * h + drive. The first states' pass fetches one line per step of what follows at `ahead`
    of each tensor: the rows are too many and too far apart for the CPU's own prefetcher.
    """

    @T.macro  # type: ignore[untyped-decorator]
    def run(
        h: Any,
        state: Any,
        a2: Any,
        delta_t: Any,
        input_t: Any,
        b_rows: Any,
        c_rows: Any,
        y_t: Any,
        first: Any,
        steps: Any,
        delta: Any,
        u: Any,
        z: Any,
        b: Any,
        c0: Any,
        ahead: Any,
    ) -> None:
        for s in T.unroll(count):
            h[s, T.ramp(0, 1, lanes)] = state[first + s, T.ramp(0, 1, lanes)]
        for t in T.serial(steps):
            if first == 0:
                T.evaluate(_prefetch(delta[b, c0 + t % lanes, ahead + t // lanes * _LINE]))
                T.evaluate(_prefetch(u[b, c0 + t % lanes, ahead + t // lanes * _LINE]))
                T.evaluate(_prefetch(z[b, c0 + t % lanes, ahead + t // lanes * _LINE]))
            for s in T.unroll(count):
                h[s, T.ramp(0, 1, lanes)] = step(
                    delta_t[t, T.ramp(0, 1, lanes)] * a2[first + s, T.ramp(0, 1, lanes)],
                    h[s, T.ramp(0, 1, lanes)],
                    input_t[t, T.ramp(0, 1, lanes)] * T.Broadcast(b_rows[first + s, t], lanes),
                )
                y_t[t, T.ramp(0, 1, lanes)] = y_t[t, T.ramp(0, 1, lanes)] + h[s, T.ramp(0, 1, lanes)] * T.Broadcast(
                    c_rows[first + s, t], lanes
                )
        for s in T.unroll(count):
            state[first + s, T.ramp(0, 1, lanes)] = flush(h[s, T.ramp(0, 1, lanes)], lanes)

    return run  # type: ignore[no-any-return]


def _build(arch: Arch, *, symbol: str, dtype: str, lanes: int, group: int) -> IRModule:
    """The kernel for any shape: `lanes` channels per task, `group` states in registers."""
    half = lanes // 2
    align = 4 if dtype == "float32" else 2
    load_columns, load_rows, transpose = column_loading(lanes), row_loading(lanes), transposing(lanes)
    table = arch.name == "x86-64-v4"  # the only one with a lookup in a table of 32
    run_easy = _run(lanes, group, partial(easy_step, lanes=lanes, table=table))
    run = _run(lanes, group, partial(exact_step, lanes=lanes))

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
                b = T.bind(vtask // ((channels + lanes - 1) // lanes))
                c0 = T.bind(vtask % ((channels + lanes - 1) // lanes) * lanes)
                valid = T.bind(T.min(channels - c0, T.int64(lanes)))
                groups = T.bind((states + group - 1) // group)
                a2 = T.sblock_alloc_buffer(((states + group - 1) // group * group, lanes))
                state = T.sblock_alloc_buffer(((states + group - 1) // group * group, lanes))
                b_rows = T.sblock_alloc_buffer(((states + group - 1) // group * group, _TIMES))
                c_rows = T.sblock_alloc_buffer(((states + group - 1) // group * group, _TIMES))
                d_lanes = T.sblock_alloc_buffer((1, lanes))
                delta_t = T.sblock_alloc_buffer((_TIMES, lanes))
                input_t = T.sblock_alloc_buffer((_TIMES, lanes))
                y_t = T.sblock_alloc_buffer((_TIMES, lanes))
                y_rows = T.sblock_alloc_buffer((lanes, lanes))
                fastest = T.sblock_alloc_buffer((1, lanes))
                largest = T.sblock_alloc_buffer((1, lanes))
                # Registers. Without scope="local" and below 1 KiB each: what TVM puts on the heap stays in memory.
                h = T.sblock_alloc_buffer((group, lanes))
                top = T.sblock_alloc_buffer((half, lanes))
                bottom = T.sblock_alloc_buffer((half, lanes))
                other_top = T.sblock_alloc_buffer((half, lanes))
                other_bottom = T.sblock_alloc_buffer((half, lanes))
                d_lanes[0, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for i in T.serial(valid):
                    d_lanes[0, i] = T.Cast("float32", skip[c0 + i])
                fastest[0, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for s in T.serial(groups * group):
                    a2[s, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    if s < states:
                        for i in T.serial(valid):
                            a2[s, i] = T.Cast("float32", decay[c0 + i, s]) * T.float32(LOG2_E)
                    fastest[0, T.ramp(0, 1, lanes)] = larger(
                        fastest[0, T.ramp(0, 1, lanes)], a2[s, T.ramp(0, 1, lanes)]
                    )
                    # A NaN in A may get lost in exp2's bits; from the state it cannot.
                    state[s, T.ramp(0, 1, lanes)] = nan_or_zero(a2[s, T.ramp(0, 1, lanes)], lanes)
                for s, block in T.grid(groups * group - states, _TIMES // lanes):
                    b_rows[states + s, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    c_rows[states + s, T.ramp(block * lanes, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                for chunk in T.serial((length + _TIMES - 1) // _TIMES):
                    t0 = T.bind(chunk * _TIMES)
                    steps = T.bind(T.min(length - t0, T.int64(_TIMES)))
                    load_rows(b_rows, b_in, b, states, t0, steps)
                    load_rows(c_rows, c_in, b, states, t0, steps)
                    for block in T.serial((steps + lanes - 1) // lanes):
                        load_columns(
                            delta_t,
                            top,
                            bottom,
                            other_top,
                            other_bottom,
                            delta,
                            b,
                            c0,
                            channels,
                            t0,
                            block * lanes,
                            steps,
                        )
                        load_columns(
                            input_t, top, bottom, other_top, other_bottom, u, b, c0, channels, t0, block * lanes, steps
                        )
                    if delta_softplus != 0:
                        for t in T.serial(steps):
                            delta_t[t, T.ramp(0, 1, lanes)] = softplus(delta_t[t, T.ramp(0, 1, lanes)], lanes)
                    largest[0, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
                    for t in T.serial(steps):
                        largest[0, T.ramp(0, 1, lanes)] = larger(
                            largest[0, T.ramp(0, 1, lanes)], delta_t[t, T.ramp(0, 1, lanes)]
                        )
                        y_t[t, T.ramp(0, 1, lanes)] = input_t[t, T.ramp(0, 1, lanes)] * d_lanes[0, T.ramp(0, 1, lanes)]
                        input_t[t, T.ramp(0, 1, lanes)] = (
                            input_t[t, T.ramp(0, 1, lanes)] * delta_t[t, T.ramp(0, 1, lanes)]
                        )
                    easy = T.bind(all_easy(largest[0, T.ramp(0, 1, lanes)] * fastest[0, T.ramp(0, 1, lanes)], lanes))
                    if easy:
                        for g in T.serial(groups):
                            run_easy(
                                h,
                                state,
                                a2,
                                delta_t,
                                input_t,
                                b_rows,
                                c_rows,
                                y_t,
                                g * group,
                                steps,
                                delta,
                                u,
                                z,
                                b,
                                c0,
                                t0 + _TIMES,
                            )
                    else:
                        for g in T.serial(groups):
                            run(
                                h,
                                state,
                                a2,
                                delta_t,
                                input_t,
                                b_rows,
                                c_rows,
                                y_t,
                                g * group,
                                steps,
                                delta,
                                u,
                                z,
                                b,
                                c0,
                                t0 + _TIMES,
                            )
                    for block in T.serial((steps + lanes - 1) // lanes):
                        for i in T.unroll(half):
                            top[i, T.ramp(0, 1, lanes)] = y_t[block * lanes + i, T.ramp(0, 1, lanes)]
                        for i in T.unroll(half):
                            bottom[i, T.ramp(0, 1, lanes)] = y_t[block * lanes + half + i, T.ramp(0, 1, lanes)]
                        transpose(top, bottom, other_top, other_bottom)
                        first = T.bind(t0 + block * lanes)
                        if T.And(T.And(valid == lanes, block * lanes + lanes <= steps), has_z == 0):
                            for i in T.unroll(half):
                                out[b, c0 + i, T.ramp(first, 1, lanes)] = T.Cast(
                                    f"{dtype}x{lanes}", (top if lanes == 16 else other_top)[i, T.ramp(0, 1, lanes)]
                                )
                            for i in T.unroll(half):
                                out[b, c0 + half + i, T.ramp(first, 1, lanes)] = T.Cast(
                                    f"{dtype}x{lanes}",
                                    (bottom if lanes == 16 else other_bottom)[i, T.ramp(0, 1, lanes)],
                                )
                        else:
                            for i in T.unroll(half):
                                y_rows[i, T.ramp(0, 1, lanes)] = (top if lanes == 16 else other_top)[
                                    i, T.ramp(0, 1, lanes)
                                ]
                            for i in T.unroll(half):
                                y_rows[half + i, T.ramp(0, 1, lanes)] = (bottom if lanes == 16 else other_bottom)[
                                    i, T.ramp(0, 1, lanes)
                                ]
                            for i in T.serial(valid):
                                if block * lanes + lanes <= steps:
                                    if has_z != 0:
                                        y_rows[i, T.ramp(0, 1, lanes)] = y_rows[i, T.ramp(0, 1, lanes)] * silu(
                                            T.Cast(f"float32x{lanes}", z[b, c0 + i, T.ramp(first, 1, lanes)]), lanes
                                        )
                                    out[b, c0 + i, T.ramp(first, 1, lanes)] = T.Cast(
                                        f"{dtype}x{lanes}", y_rows[i, T.ramp(0, 1, lanes)]
                                    )
                                else:
                                    for j in T.serial(steps - block * lanes):
                                        if has_z != 0:
                                            y_rows[i, j] = y_rows[i, j] * silu(
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
