"""How SelectiveScan's rows become columns: squares transposed in registers, tails element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.kernels.tvm.compat import T

__all__ = ["column_loading", "row_loading", "transposing"]


def transposing(lanes: int) -> Callable[..., Any]:
    """A macro that transposes a square in registers, whose rows are `top` and `bottom`.

    The result is in the same two, or for 8 lanes in `other_top` and `other_bottom`; the other two are scratch.

    First the 4x4 squares within the 128-bit parts of the vectors, then these parts: shuffles that x86 has without an
    index vector and that leave their operands as they are, so that nothing is spilled.
    """
    parts = range(0, lanes, 4)
    low, high = ([part + i for part in parts for i in (j, lanes + j, j + 1, lanes + j + 1)] for j in (0, 2))
    low_pair, high_pair = ([part + i for part in parts for i in (j, j + 1, lanes + j, lanes + j + 1)] for j in (0, 2))
    even, odd = ([start + i for start in range(first, 2 * lanes, 8) for i in range(4)] for first in (0, 4))

    @T.macro  # type: ignore[untyped-decorator]
    def exchange(x: Any, y: Any, to_x: Any, to_y: Any, i: Any, j: Any, to_i: Any, to_j: Any, masks: Any) -> None:
        to_x[to_i, T.ramp(0, 1, lanes)] = T.Shuffle([x[i, T.ramp(0, 1, lanes)], y[j, T.ramp(0, 1, lanes)]], masks[0])
        to_y[to_j, T.ramp(0, 1, lanes)] = T.Shuffle([x[i, T.ramp(0, 1, lanes)], y[j, T.ramp(0, 1, lanes)]], masks[1])

    @T.macro  # type: ignore[untyped-decorator]
    def within(rows: Any, other: Any) -> None:
        for i in T.unroll(lanes // 4):
            exchange(rows, rows, other, other, 2 * i, 2 * i + 1, 2 * i, 2 * i + 1, (low, high))
        for k in T.unroll(lanes // 8):
            for e in T.unroll(2):
                exchange(
                    other,
                    other,
                    rows,
                    rows,
                    4 * k + e,
                    4 * k + 2 + e,
                    4 * k + 2 * e,
                    4 * k + 2 * e + 1,
                    (low_pair, high_pair),
                )
        if lanes == 16:
            for j in T.unroll(4):
                exchange(rows, rows, other, other, j, 4 + j, j, 4 + j, (even, odd))

    @T.macro  # type: ignore[untyped-decorator]
    def transpose(top: Any, bottom: Any, other_top: Any, other_bottom: Any) -> None:
        within(top, other_top)
        within(bottom, other_bottom)
        for j in T.unroll(lanes // 2):
            if lanes == 16:
                exchange(other_top, other_bottom, top, bottom, j, j, j, j, (even, odd))
            else:
                exchange(top, bottom, other_top, other_bottom, j, j, j, j, (even, odd))

    return transpose  # type: ignore[no-any-return]


def column_loading(lanes: int) -> Callable[..., Any]:
    """A macro: `columns[first + j, i] = source[b, c0 + i, t0 + first + j]`, zero beyond the channels and the chunk."""
    transpose, half = transposing(lanes), lanes // 2
    wide = f"float32x{lanes}"

    @T.macro  # type: ignore[untyped-decorator]
    def load_columns(
        columns: Any,
        top: Any,
        bottom: Any,
        other_top: Any,
        other_bottom: Any,
        source: Any,
        b: Any,
        c0: Any,
        channels: Any,
        t0: Any,
        first: Any,
        steps: Any,
    ) -> None:
        if first + lanes <= steps:
            for i in T.unroll(half):
                top[i, T.ramp(0, 1, lanes)] = T.if_then_else(
                    c0 + i < channels,
                    T.Cast(wide, source[b, c0 + i, T.ramp(t0 + first, 1, lanes)]),
                    T.Broadcast(T.float32(0.0), lanes),
                )
            for i in T.unroll(half):
                bottom[i, T.ramp(0, 1, lanes)] = T.if_then_else(
                    c0 + half + i < channels,
                    T.Cast(wide, source[b, c0 + half + i, T.ramp(t0 + first, 1, lanes)]),
                    T.Broadcast(T.float32(0.0), lanes),
                )
            transpose(top, bottom, other_top, other_bottom)
            for i in T.unroll(half):
                columns[first + i, T.ramp(0, 1, lanes)] = (top if lanes == 16 else other_top)[i, T.ramp(0, 1, lanes)]
            for i in T.unroll(half):
                columns[first + half + i, T.ramp(0, 1, lanes)] = (bottom if lanes == 16 else other_bottom)[
                    i, T.ramp(0, 1, lanes)
                ]
        else:
            for j in T.serial(lanes):
                columns[first + j, T.ramp(0, 1, lanes)] = T.Broadcast(T.float32(0.0), lanes)
            for j, i in T.grid(steps - first, T.min(channels - c0, T.int64(lanes))):
                columns[first + j, i] = T.Cast("float32", source[b, c0 + i, t0 + first + j])

    return load_columns  # type: ignore[no-any-return]


def row_loading(lanes: int) -> Callable[..., Any]:
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
