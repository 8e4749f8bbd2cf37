"""Schedules for the functions of a whole model: a register tile for every convolution, matrix product and reduction.

TVM 0.27 has no schedules of its own for CPUs: an unscheduled convolution runs at a few percent of the processor's peak.
One rule covers what FuseOps leaves: a function with one reduction, the elementwise work before it inlined, that after
it computed on each finished tile. The last axis of the output (channels, in NHWC) runs over vector lanes, the axes
before it over rows; the tile of rows and lanes stays in registers while the reduction runs.

The rule's one decision is which tile; `tvm_tuning` lets meta_schedule search them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import ScheduleError

SCHEDULED = "tirx.is_scheduled"

_SPATIAL, _REDUCTION = tirx.IterVar.DataPar, tirx.IterVar.CommReduce
# A tile may be this many vectors wide; wider ones leave too few registers for rows.
_MOST_VECTORS = 4
_MOST_TILES = 12
# More rows fit the registers, but LLVM spills some of them, above all in 3x3 convolutions of stride 2.
_MOST_ROWS = 8
# Below this many multiply-adds, waking the threads costs more than they save.
_PARALLEL_WORK = 50_000


@dataclass(frozen=True)
class Registers:
    """The vector unit: float32 lanes per register, and how many registers there are."""

    lanes: int
    count: int


@dataclass(frozen=True)
class Tile:
    """How much of each spatial axis one tile takes; the last is the vector axis."""

    rows: tuple[int, ...]
    lanes: int


def schedule_module(mod: tvm.IRModule, registers: Registers) -> tvm.IRModule:
    """Schedule every function of `mod` that the rule covers and that nobody scheduled before."""
    for variable, function in mod.functions_items():
        if not isinstance(function, tirx.PrimFunc) or (function.attrs and SCHEDULED in function.attrs):
            continue
        scheduled = schedule_function(function, registers)
        if scheduled is not None:
            mod.update_func(variable, scheduled.with_attr(SCHEDULED, True))
    return mod


def schedule_function(function: tirx.PrimFunc, registers: Registers) -> tirx.PrimFunc | None:
    """The function with the likeliest tile; None where the rule does not cover it."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}), error_render_level="none")
    try:
        covered = apply_rule(schedule, registers)
    except ScheduleError:  # a shape that TVM cannot transform so: the function runs as it is
        return None
    return schedule.mod["main"] if covered else None


def apply_rule(schedule: s_tir.Schedule, registers: Registers, choice: int = 0) -> int:
    """Schedule the function `main` in place with the tile number `choice`.

    Returns how many tiles there are to choose from; 0, and nothing done, where the rule does not cover the function.
    """
    blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    reductions = [block for block in blocks if _REDUCTION in _kinds(schedule, block)]
    if len(reductions) > 1 or any(not set(_kinds(schedule, block)) <= {_SPATIAL, _REDUCTION} for block in blocks):
        return 0
    if not reductions:
        return int(_schedule_elementwise(schedule, blocks))
    names = [schedule.get(block).name_hint for block in blocks]
    middle = names.index(schedule.get(reductions[0]).name_hint)
    return _schedule_reduction(schedule, blocks[:middle], blocks[middle], blocks[middle + 1 :], registers, choice)


def tiles(extents: Sequence[int | None], registers: Registers) -> list[Tile]:
    """The tiles worth trying for an output of these extents (None: known at run time), the likeliest first.

    A tile of r rows and v vectors loads r + v values for r * v multiply-adds, so that ratio ranks it; it must fit the
    registers, with room for one row of the other operand and a broadcast value. Tiles whose lanes are no multiple of a
    register come last: LLVM makes poor code of such vectors.
    """
    *rows, last = extents
    assert last is not None
    ranked: list[tuple[bool, float, Tile]] = []
    for lanes in _divisors(last):
        vectors = -(-lanes // registers.lanes)
        if vectors > _MOST_VECTORS:
            break
        whole = lanes % registers.lanes == 0
        most = min(_MOST_ROWS, (registers.count - 1) // vectors - 1)
        for chosen in _row_tiles(rows, max(1, most)):
            count = math.prod(chosen)
            ranked.append((whole, lanes / registers.lanes * count / (count + vectors), Tile(chosen, lanes)))
    ranked.sort(key=lambda item: (-item[0], -item[1], -item[2].lanes))
    return [tile for *_, tile in ranked[:_MOST_TILES]]


def _row_tiles(extents: Sequence[int | None], most: int) -> Iterator[tuple[int, ...]]:
    """Tiles of at most `most` rows: whole inner axes before any part of an outer one."""
    choices = [[1] if extent is None else [d for d in _divisors(extent) if d <= most] for extent in extents]
    for chosen in itertools.product(*choices):
        inner_done = True
        for size, extent in zip(reversed(chosen), reversed(extents), strict=True):
            if size > 1 and not inner_done:
                break
            inner_done = inner_done and size == extent
        else:
            if math.prod(chosen) <= most:
                yield chosen


def _schedule_reduction(
    schedule: s_tir.Schedule, before: list[Any], block: Any, after: list[Any], registers: Registers, choice: int
) -> int:
    loops, kinds = schedule.get_loops(block), _kinds(schedule, block)
    count = kinds.count(_SPATIAL)
    if len(loops) != len(kinds) or not count or kinds != sorted(kinds):  # spatial axes come first in all of topi's
        return 0
    extents = [_extent(schedule, loop) for loop in loops]
    if extents[count - 1] is None:
        return 0
    for producer in before:
        if _is_padding(schedule, producer):
            _run_parallel(schedule, schedule.get_loops(producer)[:-1])
        else:
            schedule.compute_inline(producer)
    for consumer in after[:-1]:
        schedule.compute_inline(consumer)
    candidates = tiles(extents[:count], registers)
    tile = candidates[choice]

    *row_loops, lane_loop = loops[:count]
    lanes_outer, lanes = schedule.split(lane_loop, [None, tile.lanes])
    split = [schedule.split(loop, [None, size]) for loop, size in zip(row_loops, tile.rows, strict=True)]
    # Lanes outermost: the operand that a column of tiles shares, mostly weights, stays in the cache for all rows.
    schedule.reorder(lanes_outer, *[outer for outer, _ in split], *loops[count:], *[inner for _, inner in split], lanes)
    tile_loop = schedule.fuse(lanes_outer, *[outer for outer, _ in split])
    finish = after[-1] if after else schedule.cache_write(block, 0, "local")
    schedule.reverse_compute_at(finish, tile_loop)
    # Every index into the tile must be a constant once loops are unrolled: only then does it live in registers.
    for loops_in_tile in ([inner for _, inner in split] + [lanes], schedule.get_loops(finish)[1:]):
        for loop in loops_in_tile[:-1]:
            schedule.unroll(loop)
        for loop in loops_in_tile[-1:]:  # a tile of one value has no loop
            _vectorize(schedule, loop, registers.lanes)
    if None in extents or math.prod(size for size in extents if size is not None) >= _PARALLEL_WORK:
        schedule.parallel(tile_loop)
    schedule.decompose_reduction(block, loops[count])
    return len(candidates)


def _vectorize(schedule: s_tir.Schedule, loop: Any, lanes: int) -> None:
    extent = _extent(schedule, loop)
    if extent is not None and extent > lanes and extent % lanes == 0:
        # LLVM rounds wide vectors up to a power of two: three registers would take the place of four.
        vectors, loop = schedule.split(loop, [None, lanes])
        schedule.unroll(vectors)
    schedule.vectorize(loop)


def _schedule_elementwise(schedule: s_tir.Schedule, blocks: list[Any]) -> bool:
    if not blocks or any(schedule.get_consumers(block) == [] for block in blocks[:-1]):  # several outputs
        return False
    for block in blocks[:-1]:
        schedule.compute_inline(block)
    _run_parallel(schedule, schedule.get_loops(blocks[-1])[:-1])
    return True


def _run_parallel(schedule: s_tir.Schedule, loops: list[Any]) -> None:
    extents = [_extent(schedule, loop) for loop in loops]
    if loops and (None in extents or math.prod(size for size in extents if size is not None) >= _PARALLEL_WORK // 64):
        schedule.parallel(schedule.fuse(*loops))


def _kinds(schedule: s_tir.Schedule, block: Any) -> list[int]:
    return [int(variable.iter_type) for variable in schedule.get(block).iter_vars]


def _extent(schedule: s_tir.Schedule, loop: Any) -> int | None:
    extent = schedule.get(loop).extent
    return int(extent) if isinstance(extent, tirx.IntImm) else None


def _is_padding(schedule: s_tir.Schedule, block: Any) -> bool:
    """Whether a block chooses between its input and a border: inlined, the choice would be made in the inner loop."""
    value = getattr(schedule.get(block).body, "value", None)
    return getattr(getattr(value, "op", None), "name", "") == "tirx.if_then_else"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
