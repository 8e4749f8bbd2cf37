"""Feature matrices: checked, and their nearest neighbours, in numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

BLOCK_BYTES = 64 << 20


def check_features(
    features: NDArray[Any], *, rows: int, finite: bool = True, ids: NDArray[np.int64] | None = None
) -> None:
    """Refuse what is not float32 `[rows, F]` with finite values. `ids` are the names of the rows in a message.

    Raises:
        InputError: the message names the first vertex with a NaN or infinite value.
    """
    if not isinstance(features, np.ndarray) or features.dtype != np.float32:
        kind = features.dtype if isinstance(features, np.ndarray) else type(features).__name__
        raise InputError(f"features are a float32 array; got {kind}. Convert them with numpy.asarray(x, numpy.float32)")
    if features.ndim != 2 or len(features) != rows or features.shape[1] == 0:
        raise InputError(f"features have one row per vertex, [{rows}, F] with F at least 1; got {list(features.shape)}")
    if finite:
        _check_finite(features, ids)


def nearest_neighbours(features: ArrayLike, k: int, *, block_bytes: int = BLOCK_BYTES) -> NDArray[np.int64]:
    """The `k` nearest other rows of each row, nearest first, int64 `[V, k]`; of equally near ones the lower row first.

    A matrix product gives all distances of a block of rows up to rounding; those within rounding of the k-th are then
    computed from the differences, so that ties are ties.

    Args:
        features: finite numbers `[V, F]`.
        k: 1..V-1.
        block_bytes: roughly the memory for distances.

    Raises:
        InputError: `k` out of range, or features that are no finite numbers `[V, F]`.
    """
    x = np.asarray(features)
    if x.ndim != 2 or x.dtype.kind not in "fiu" or x.shape[1] == 0:
        raise InputError(f"features are numbers [V, F]; got {x.dtype} {list(x.shape)}")
    count = len(x)
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k < count:
        raise InputError(f"k is the number of other vertices in a hyperedge, 1..{count - 1} for {count}; got {k}")
    _check_finite(x, None)
    x = x.astype(np.float64)
    x = np.ldexp(x, -int(np.frexp(np.abs(x).max())[1]))  # exact, and no square leaves float64
    centred = x - x.mean(axis=0)  # the same distances, with less to round
    squares = np.einsum("vf,vf->v", centred, centred)
    near = np.empty((count, k), np.int64)
    step = max(1, block_bytes // (16 * count))
    for first in range(0, count, step):
        block = slice(first, min(count, first + step))
        distances = squares[block, None] + squares - 2 * (centred[block] @ centred.T)
        rows = np.arange(len(distances))
        distances[rows, first + rows] = np.inf
        near[block] = _nearest_in_block(x, squares, distances, first, k, block_bytes)
    return near


def _nearest_in_block(
    x: NDArray[np.float64],
    squares: NDArray[np.float64],
    distances: NDArray[np.float64],
    first: int,
    k: int,
    block_bytes: int,
) -> NDArray[np.int64]:
    """Exact order among the candidates; `distances` `[b, V]` are approximate, infinite to the row itself."""
    width, size = x.shape[1], len(distances)
    # The rounding error of |a|^2 + |b|^2 - 2ab, generously.
    slack = 8 * (width + 4) * np.finfo(np.float64).eps * (squares[first : first + size] + squares.max())
    limit = np.partition(distances, k - 1, axis=1)[:, k - 1] + slack
    row, column = np.nonzero(distances <= limit[:, None])
    exact = np.empty(len(row))
    step = max(1, block_bytes // (16 * width))
    for start in range(0, len(row), step):
        part = slice(start, start + step)
        difference = x[first + row[part]] - x[column[part]]
        exact[part] = np.einsum("nf,nf->n", difference, difference)
    order = np.lexsort((column, exact, row))
    row_starts = np.searchsorted(row, np.arange(size))  # row is sorted, before and after
    chosen: NDArray[np.int64] = column[order][row_starts[:, None] + np.arange(k)]
    return chosen


def _check_finite(features: NDArray[Any], ids: NDArray[np.int64] | None) -> None:
    finite = np.isfinite(features)
    if finite.all():
        return
    row = int(np.flatnonzero(~finite.all(axis=1))[0])
    column = int(np.flatnonzero(~finite[row])[0])
    more = int((~finite.all(axis=1)).sum()) - 1
    also = f", and {more} more vertices have such values" if more else ""
    raise InputError(
        f"features are finite numbers; vertex {row if ids is None else ids[row]} has {features[row, column]} in column "
        f"{column}{also}. Fill or drop them"
    )
