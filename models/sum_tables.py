"""Which rows make up each sum, as two dense tables: what lets a runtime sum by group with gathers alone.

ONNX has no segment sum. Scattering with addition is one, but onnxruntime (up to 1.31) splits a large
`ScatterND(reduction="add")` over its threads without a lock, so that additions get lost (onnxruntime issue 18048). A
gather of whole rows and a sum over an axis is right with any number of threads, and fast. It needs groups of one size,
hence the tables: short groups are padded, and of long ones, part is summed beforehand, in chunks. In numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]

CHUNK_PRICE = 4  # what a chunk costs beside its entries, in entries
_WIDTHS = 32  # how many widths a search compares at once


@dataclass(frozen=True, eq=False)
class SumTables:
    """The members of S groups out of n items, numbered 0..n-1.

    Attributes:
        rows: int64 `[S, W]`, what each group's sum adds up: e below n is item e; n <= e < n + Q is chunk e - n, and
            n + Q is nothing.
        chunks: int64 `[Q, L]`, what each chunk adds up: e below n is item e, and n + Q is nothing. Q and L are at least
            2, where need be with chunks of nothing, because torch.export takes a size of 1 for a constant.
    """

    rows: Integers
    chunks: Integers

    @staticmethod
    def of(starts: Integers, items: Integers, count: int) -> SumTables:
        """The tables of the groups `items[starts[i]:starts[i + 1]]`, for items 0..count-1.

        A group of at most W members has them in its row. A longer one has its last members in chunks of L. W and L are
        those that `table_sizes` finds.
        """
        sizes = np.diff(starts)
        width, length = table_sizes(sizes)
        per_group = chunks_needed(sizes, width, length)
        total = int(per_group.sum())
        nothing = count + max(2, total)
        chunks = np.full((max(2, total), length), nothing)
        direct = np.minimum(sizes, width - per_group)[:, None]
        place = np.arange(width)
        rows = np.full((len(sizes), width), nothing)
        if total == 0:
            rows[place < direct] = items
            return SumTables(rows, chunks)
        taken = np.arange(len(items)) - np.repeat(starts[:-1], sizes) < np.repeat(direct[:, 0], sizes)
        rows[place < direct] = items[taken]
        rows[(place >= direct) & (place < direct + per_group[:, None])] = count + np.arange(total)
        # Of a group's chunks all are full but the last.
        lengths = np.full(total, length)  # of the chunks, without what fills them up
        ends = np.cumsum(per_group)[per_group > 0]
        lengths[ends - 1] -= (per_group * length - (sizes - direct[:, 0]))[per_group > 0]
        chunks[:total][np.arange(length) < lengths[:, None]] = items[~taken]
        return SumTables(rows, chunks)


def chunks_needed(sizes: Integers, width: Integers | int, length: Integers | int) -> Integers:
    """How many chunks of `length` (2 or more) a group of each size needs beside a row of `width`; they take a place."""
    needed: Integers = -(np.minimum(width - sizes, 0) // np.maximum(length - 1, 1))
    return needed


def table_sizes(sizes: Integers) -> tuple[int, int]:
    """The width W of the rows and the length L of the chunks that make the least work for groups of these sizes.

    Work is the number of entries of both tables, and `CHUNK_PRICE` for each chunk. Two rounds of search: widths from 1
    to the largest size in geometric steps, then in finer ones around the best. For each width, the least length with
    which W chunks hold the largest group, and some around the one that would be best if chunks could be divided. L is 2
    where no chunk is needed.
    """
    histogram = np.bincount(sizes, minlength=2)
    largest = len(histogram) - 1
    distinct = np.flatnonzero(histogram)
    counts = histogram[distinct]
    if largest <= _WIDTHS:
        return _cheapest(distinct, counts, np.arange(1, largest + 1))
    widths = np.unique(np.geomspace(1, largest, _WIDTHS).astype(np.int64))
    best = int(np.searchsorted(widths, _cheapest(distinct, counts, widths)[0]))
    low, high = widths[max(0, best - 1)], widths[min(len(widths) - 1, best + 1)]
    around = np.linspace(low, high, _WIDTHS).astype(np.int64)
    return _cheapest(distinct, counts, np.union1d(around, widths[best]))


def _cheapest(distinct: Integers, counts: Integers, widths: Integers) -> tuple[int, int]:
    """Out of these widths, for sizes with their counts."""
    beyond = np.maximum(distinct - widths[:, None], 0)
    long = (beyond > 0) @ counts
    # c groups with b members in chunks have about b / (L - 1) + c / 2 chunks of L.
    ideal = np.sqrt(2 * (beyond @ counts) / np.maximum(long, 1))
    least = np.maximum(2, -(-distinct[-1] // widths))[:, None]
    lengths = np.maximum(least, 1 + (ideal[:, None] * (0, 0.5, 0.7, 1, 1.4, 2)).astype(np.int64))
    chunks = chunks_needed(distinct, widths[:, None, None], lengths[:, :, None]) @ counts
    work = (counts.sum() * widths)[:, None] + chunks * (lengths + CHUNK_PRICE)
    width, length = np.unravel_index(int(work.argmin()), work.shape)
    return int(widths[width]), int(lengths[width, length]) if chunks[width, length] else 2
