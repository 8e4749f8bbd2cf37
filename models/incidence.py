"""Incidence lists: checked and brought into order, and looked up by rows. The working parts of `Hypergraph`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float32]


def checked_pairs(vertex: ArrayLike, hyperedge: ArrayLike, num_vertices: int) -> tuple[Integers, Integers]:
    """Both as int64 `[n]`, vertices in 0..num_vertices-1 and hyperedges at least 0.

    Raises:
        InputError: otherwise; the message names the first bad pair.
    """
    v, e = integers(vertex, "vertex ids"), integers(hyperedge, "hyperedge ids")
    if len(v) != len(e):
        raise InputError(f"an incidence list has one vertex and one hyperedge per pair; got {len(v)} and {len(e)}")
    check_range(v, num_vertices, "vertex", "pair")
    negative = np.flatnonzero(e < 0)
    if len(negative):
        raise InputError(f"hyperedge ids are 0 or more; got {e[negative[0]]} at pair {negative[0]}")
    return v, e


def checked_weights(weight: ArrayLike, count: int | None) -> Floats:
    """As float32 `[count]`, each positive and finite.

    Raises:
        InputError: otherwise; the message names the first bad hyperedge.
    """
    given = np.asarray(weight)
    if given.ndim != 1 or (given.dtype.kind not in "fiu" and given.size):
        raise InputError(f"weights are a list of numbers, one per hyperedge; got {given.dtype} {list(given.shape)}")
    if count is not None and len(given) != count:
        raise InputError(f"there is one weight per hyperedge, {count}; got {len(given)}")
    with np.errstate(over="ignore"):
        weights = given.astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights > 0)))
    if len(bad):
        raise InputError(
            f"the weight of a hyperedge is a positive float32 number; hyperedge {bad[0]} has {given[bad[0]]}"
        )
    return weights


def check_num_vertices(num_vertices: int) -> int:
    """At least one.

    Raises:
        InputError: otherwise.
    """
    count = integer(num_vertices, "num_vertices")
    if count < 1:
        raise InputError(f"a hypergraph has at least one vertex; got num_vertices {count}")
    return count


def check_range(ids: Integers, count: int, kind: str, place: str) -> None:
    """Refuse ids outside of 0..count-1.

    Raises:
        InputError: the message names the first one and its place.
    """
    bad = np.flatnonzero((ids < 0) | (ids >= count))
    if len(bad):
        more = f", and at {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(f"{kind} ids lie in 0..{count - 1}; got {ids[bad[0]]} at {place} {bad[0]}{more}")


def integer(value: Any, name: str) -> int:
    """A Python or numpy integer, as int.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InputError(f"{name} is an integer; got {value!r}")
    return int(value)


def integers(values: ArrayLike, name: str) -> Integers:
    """One-dimensional, as int64.

    Raises:
        InputError: another shape, no integers, or beyond int64.
    """
    given = np.asarray(values)
    if given.ndim == 1 and given.size == 0:
        return np.empty(0, np.int64)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise InputError(f"{name} are a list of integers; got {given.dtype} {list(given.shape)}")
    if given.dtype == np.uint64 and given.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} are int64 numbers; got {given.max()}")
    return given.astype(np.int64)


def flat(members: Sequence[Sequence[int]]) -> Integers:
    """The members of all hyperedges, one after the other, as int64.

    Raises:
        InputError: a member is no integer; the message names its hyperedge.
    """
    for index, each in enumerate(members):
        for member in each:
            if isinstance(member, bool) or not isinstance(member, int | np.integer):
                raise InputError(
                    f"a hyperedge is a list of vertex ids, which are integers; hyperedge {index} has {member!r}"
                )
    try:
        return np.fromiter(chain.from_iterable(members), np.int64)
    except OverflowError as error:
        raise InputError("vertex ids are int64 numbers; a hyperedge has a larger one") from error


def sorted_distinct(vertex: Integers, hyperedge: Integers, num_vertices: int) -> tuple[Integers, Integers]:
    """The pairs by hyperedge (ids 0..n-1 of those that occur), then vertex, each once."""
    highest = int(hyperedge.max(initial=0))
    if (highest + 1) * num_vertices < 2**63:
        keys = np.sort(hyperedge * num_vertices + vertex)
        keys = keys[np.concatenate([np.ones(min(1, len(keys)), np.bool_), np.diff(keys) > 0])]
        return keys % num_vertices, keys // num_vertices
    order = np.lexsort((vertex, hyperedge))  # ids too large for one key
    v, e = vertex[order], hyperedge[order]
    new = np.concatenate([np.ones(min(1, len(v)), np.bool_), (np.diff(v) != 0) | (np.diff(e) != 0)])
    return v[new], e[new]


def merged(vertex: Integers, hyperedge: Integers, weight: Floats) -> tuple[Integers, Integers, Floats]:
    """Equal hyperedges as one, in the place of the first, with the mean weight. For pairs in order."""
    ends = np.cumsum(np.bincount(hyperedge, minlength=len(weight)))
    places: dict[bytes, int] = {}
    place = np.empty(len(weight), np.int64)
    start = 0
    for index, end in enumerate(ends.tolist()):
        place[index] = places.setdefault(vertex[start:end].tobytes(), len(places))
        start = end
    if len(places) == len(weight):
        return vertex, hyperedge, weight
    means = np.bincount(place, weights=weight.astype(np.float64)) / np.bincount(place)
    first = np.zeros(len(weight), np.bool_)
    first[np.unique(place, return_index=True)[1]] = True
    kept = first[hyperedge]
    return vertex[kept], place[hyperedge[kept]], means.astype(np.float32)


def distinct(ids: Integers, count: int) -> Integers:
    """The distinct ids of 0..count-1, sorted: by marks where there are many, by sorting where there are few."""
    if 8 * len(ids) < count:
        return np.unique(ids)
    marks = np.zeros(count, np.bool_)
    marks[ids] = True
    return np.flatnonzero(marks)


def gather_rows(starts: Integers, values: Integers, rows: Integers) -> Integers:
    """The rows of a ragged array one after the other, where row i is `values[starts[i]:starts[i + 1]]`."""
    lengths = starts[rows + 1] - starts[rows]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    picked: Integers = values[np.arange(total) + np.repeat(starts[rows] - (ends - lengths), lengths)]
    return picked


def by_vertex(vertex: Integers, hyperedge: Integers, vertices: int, hyperedges: int) -> tuple[Integers, Integers]:
    """The hyperedges by vertex: where each vertex begins, int64 `[V + 1]`, and their ids, sorted for each."""
    count = max(1, hyperedges)
    keys = np.sort(vertex * count + hyperedge)  # much faster than a stable argsort
    starts = np.cumsum(np.bincount(vertex, minlength=vertices))
    return np.concatenate([np.zeros(1, np.int64), starts]), keys % count
