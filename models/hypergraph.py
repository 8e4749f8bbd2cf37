"""Hypergraphs as incidence lists, in numpy alone: what HGNN and HGNN+ take beside the features.

A hyperedge joins any number of vertices. A hypergraph is kept as its pairs (vertex, hyperedge), so that memory grows
with the pairs and not with the square of the vertices. The conventions are those of DeepHypergraph (dhg), with which
the authors of HGNN+ (Gao et al., doi 10.1109/TPAMI.2022.3182052) and LightHGNN (arXiv 2402.04296) work:

- a vertex that is named twice in a hyperedge counts once;
- hyperedges with the same vertices are one, whose weight is the mean (`merge=False` keeps them apart);
- a vertex without a hyperedge gets one of its own, of weight 1 (`isolated="keep"` leaves it without: after smoothing
  its row is 0).

Hyperedge ids without vertices are dropped, and the others renumbered 0..E-1 in their order. Everything else that does
not make sense raises `InputError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.models.incidence import (
    by_vertex,
    check_num_vertices,
    check_range,
    checked_pairs,
    checked_weights,
    distinct,
    flat,
    gather_rows,
    integer,
    integers,
    merged,
    sorted_distinct,
)
from edgekit.models.nearest import check_features, nearest_neighbours
from edgekit.models.sum_tables import SumTables

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Integers = NDArray[np.int64]
    Floats = NDArray[np.float32]

Isolated = Literal["singleton", "keep"]
Smoothing = Literal["hgnn", "hgnnp"]


@dataclass(frozen=True, eq=False)
class Hypergraph:
    """Vertices 0..V-1, hyperedges 0..E-1 and the P pairs of who belongs to what. Made by the `from_` methods.

    Attributes:
        num_vertices: V, at least 1.
        vertex: int64 `[P]`, the vertex of each pair.
        hyperedge: int64 `[P]`, the hyperedge of each pair. Pairs are sorted by hyperedge, then vertex; none is twice.
        weight: float32 `[E]`, positive.

    Raises:
        InputError: the arrays are not in this form; the `from_` methods bring them into it.
    """

    num_vertices: int
    vertex: Integers
    hyperedge: Integers
    weight: Floats

    def __post_init__(self) -> None:
        check_num_vertices(self.num_vertices)
        for name, dtype in (("vertex", np.int64), ("hyperedge", np.int64), ("weight", np.float32)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise InputError(f"{name} of a Hypergraph is {dtype.__name__}; use Hypergraph.from_incidence")
        v, e = checked_pairs(self.vertex, self.hyperedge, self.num_vertices)
        steps, rises = np.diff(e), np.diff(v) > 0
        complete = len(e) == 0 if len(self.weight) == 0 else len(e) > 0 and e[0] == 0 and e[-1] == len(self.weight) - 1
        if not complete or not (((steps == 0) & rises) | (steps == 1)).all():
            raise InputError(
                "the pairs of a Hypergraph are sorted by hyperedge, then vertex, none twice, and every hyperedge "
                f"0..{len(self.weight) - 1} has a vertex; these are not. Use Hypergraph.from_incidence"
            )
        checked_weights(self.weight, len(self.weight))

    @classmethod
    def from_incidence(
        cls,
        vertex: ArrayLike,
        hyperedge: ArrayLike,
        *,
        num_vertices: int,
        weight: ArrayLike | None = None,
        merge: bool = True,
        isolated: Isolated = "singleton",
    ) -> Hypergraph:
        """From pairs in any order.

        Args:
            vertex: integers `[n]`, each in 0..num_vertices-1.
            hyperedge: integers `[n]`, 0 or more. With `weight`, below its length.
            num_vertices: V.
            weight: positive numbers, one per hyperedge id. None: 1 each.
            merge: make hyperedges with the same vertices one, in the place of the first, with the mean weight.
            isolated: what becomes of vertices without a hyperedge: "singleton" or "keep".

        Raises:
            InputError: ids out of range, or no integers, or of different lengths; weights that are not positive finite
                numbers. The message names the first position.
            UnknownNameError: another `isolated`.
        """
        _check_isolated(isolated)
        v_count = check_num_vertices(num_vertices)
        v, e = checked_pairs(vertex, hyperedge, v_count)
        ids, e = np.unique(e, return_inverse=True)
        if weight is None:
            w = np.ones(len(ids), np.float32)
        else:
            given = checked_weights(weight, None)
            if len(ids) and ids[-1] >= len(given):
                raise InputError(
                    f"there are {len(given)} weights, so hyperedge ids lie in 0..{len(given) - 1}; got {ids[-1]}"
                )
            w = given[ids]
        v, e = sorted_distinct(v, e, v_count)
        if merge:
            v, e, w = merged(v, e, w)
        if isolated == "singleton":
            alone = np.flatnonzero(np.bincount(v, minlength=v_count) == 0)
            v, e = np.concatenate([v, alone]), np.concatenate([e, len(w) + np.arange(len(alone))])
            w = np.concatenate([w, np.ones(len(alone), np.float32)])
        return cls._in_order(v_count, v, e, w)

    @classmethod
    def from_hyperedges(
        cls,
        hyperedges: Iterable[Sequence[int]],
        *,
        num_vertices: int,
        weight: ArrayLike | None = None,
        merge: bool = True,
        isolated: Isolated = "singleton",
    ) -> Hypergraph:
        """From the vertices of each hyperedge, as in dhg; the rest as for `from_incidence`.

        An empty hyperedge is dropped together with its weight.

        Raises:
            InputError: as `from_incidence`; or not one weight per hyperedge.
        """
        listed = [list(members) for members in hyperedges]
        if weight is not None:
            weight = checked_weights(weight, len(listed))
        vertex = flat(listed)
        owner = np.repeat(np.arange(len(listed)), [len(members) for members in listed])
        return cls.from_incidence(
            vertex, owner, num_vertices=num_vertices, weight=weight, merge=merge, isolated=isolated
        )

    @classmethod
    def from_neighbours(cls, features: ArrayLike, k: int, *, merge: bool = True) -> Hypergraph:
        """One hyperedge per vertex: itself and its `k` nearest others, by Euclidean distance between rows.

        Of others at the same distance, those of lower id are nearer. Distances are float64 and computed in blocks of
        bounded memory; the time grows with the square of the vertices.

        Args:
            features: numbers `[V, F]`.
            k: 1..V-1.
            merge: as for `from_incidence`; two vertices may well have the same neighbours.

        Raises:
            InputError: `k` out of range, or features that are no finite numbers `[V, F]`.
        """
        near = nearest_neighbours(features, k)
        num_vertices = len(near)
        vertex = np.concatenate([np.arange(num_vertices)[:, None], near], axis=1).reshape(-1)
        owner = np.repeat(np.arange(num_vertices), near.shape[1] + 1)
        return cls.from_incidence(vertex, owner, num_vertices=num_vertices, merge=merge)

    @property
    def num_hyperedges(self) -> int:
        """E."""
        return len(self.weight)

    @cached_property
    def vertex_degree(self) -> Floats:
        """Float32 `[V]`: the sum of the weights of a vertex's hyperedges; 0 for an isolated one."""
        sums = np.bincount(self.vertex, weights=self.weight[self.hyperedge], minlength=self.num_vertices)
        return sums.astype(np.float32)

    @cached_property
    def hyperedge_degree(self) -> Integers:
        """Int64 `[E]`: the number of vertices of a hyperedge, at least 1."""
        return np.bincount(self.hyperedge, minlength=self.num_hyperedges)

    @cached_property
    def member_weight(self) -> Floats:
        """Float32 `[E]`: weight over number of vertices, the factor with which a hyperedge passes on its sum."""
        return (self.weight / self.hyperedge_degree.astype(np.float32)).astype(np.float32)

    def inputs(self, features: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The inputs of HGNN and HGNN+ for features float32 `[V, F]`, by name.

        These are the features; who belongs to what as `SumTables`, `members` and `member_chunks` for the vertices of
        each hyperedge, `memberships` and `membership_chunks` for the hyperedges of each vertex; and `vertex_degree` and
        `member_weight`. Where there is no hyperedge there is one without vertices and of weight 0, as no dimension of a
        bundle's inputs may be 0. The tables are made once.

        Raises:
            InputError: another dtype or shape, or a value that is NaN or infinite; the message names its vertex.
        """
        check_features(features, rows=self.num_vertices)
        return {"features": features, **self._tables}

    def neighbourhood(self, vertices: ArrayLike, hops: int = 2) -> Neighbourhood:
        """What a model of `hops` layers has to see in order to answer for some vertices exactly.

        These are the hyperedges within reach, with all their vertices, and the degrees of the whole hypergraph.

        Args:
            vertices: integers `[n]`, at least one; repeated ones are fine.
            hops: layers of the model, at least 1.

        Raises:
            InputError: no vertices, ids out of range, or `hops` below 1.
        """
        asked = integers(vertices, "vertices")
        check_range(asked, self.num_vertices, "vertex", "asked vertex")
        if len(asked) == 0:
            raise InputError("a neighbourhood is that of at least one vertex; got none")
        if integer(hops, "hops") < 1:
            raise InputError(f"hops is the number of layers, at least 1; got {hops}")
        found = distinct(asked, self.num_vertices)
        chosen = np.empty(0, np.int64)
        members = chosen
        for _ in range(hops):
            chosen = distinct(gather_rows(*self._hyperedges_of, found), self.num_hyperedges)
            members = gather_rows(self._starts, self.vertex, chosen)
            found = distinct(np.concatenate([members, asked]), self.num_vertices)
        position = np.empty(self.num_vertices, np.int64)
        position[found] = np.arange(len(found))
        return Neighbourhood(
            vertices=found,
            positions=position[asked],
            hyperedges=chosen,
            vertex=position[members],
            hyperedge=np.repeat(np.arange(len(chosen)), self.hyperedge_degree[chosen]),
            vertex_degree=self.vertex_degree[found],
            member_weight=self.member_weight[chosen],
            num_vertices=self.num_vertices,
        )

    def extended(
        self,
        hyperedges: Iterable[Sequence[int]],
        *,
        new_vertices: int,
        weight: ArrayLike | None = None,
        merge: bool = True,
        isolated: Isolated = "singleton",
    ) -> Hypergraph:
        """This hypergraph with further vertices V..V+new_vertices-1 and further hyperedges, which may join old and new.

        Hyperedges that are here stay, those of single vertices too. A further one that equals one of these is merged
        with it, where `merge` says so: the weight is the mean of the two. With further hyperedges that each hold a new
        vertex, as in a stream, this takes one copy of the arrays.

        Raises:
            InputError: as `from_hyperedges`; or `new_vertices` is negative.
        """
        if integer(new_vertices, "new_vertices") < 0:
            raise InputError(f"new_vertices is 0 or more; got {new_vertices}")
        _check_isolated(isolated)
        total = self.num_vertices + new_vertices
        added = type(self).from_hyperedges(hyperedges, num_vertices=total, weight=weight, merge=merge, isolated="keep")
        vertex = np.concatenate([self.vertex, added.vertex])
        hyperedge = np.concatenate([self.hyperedge, added.hyperedge + self.num_hyperedges])
        weights = np.concatenate([self.weight, added.weight])
        all_old = np.bincount(added.hyperedge, added.vertex < self.num_vertices) == added.hyperedge_degree
        seen = np.concatenate([self.vertex_degree > 0, np.zeros(new_vertices, np.bool_)])
        seen[added.vertex] = True
        if (merge and all_old.any()) or (isolated != "keep" and not seen.all()):
            return type(self).from_incidence(
                vertex, hyperedge, num_vertices=total, weight=weights, merge=merge, isolated=isolated
            )
        longer = self._in_order(total, vertex, hyperedge, weights)
        longer.__dict__["_hyperedges_of"] = self._lengthened_index(added, total)
        return longer

    def restricted(self, vertices: ArrayLike, *, isolated: Isolated = "singleton") -> Hypergraph:
        """The hypergraph that remains when only some vertices are known: what is left of each hyperedge.

        Vertex i of the answer is `vertices[i]`. Remainders that are equal are merged.

        Raises:
            InputError: no vertices, ids out of range, or one that is named twice.
        """
        kept = integers(vertices, "vertices")
        check_range(kept, self.num_vertices, "vertex", "kept vertex")
        position = np.full(self.num_vertices, -1)
        position[kept] = np.arange(len(kept))
        if len(kept) == 0 or len(np.unique(kept)) != len(kept):
            raise InputError("the vertices to keep are at least one, and each once; got none or one twice")
        local = position[self.vertex]
        return type(self).from_incidence(
            local[local >= 0],
            self.hyperedge[local >= 0],
            num_vertices=len(kept),
            weight=self.weight,
            isolated=isolated,
        )

    def laplacian(self, smoothing: Smoothing = "hgnn") -> tuple[Integers, Integers, Floats]:
        """The authors' form: one sparse matrix `[V, V]` as rows, columns (int64) and values (float32), sorted by row.

        "hgnn" is Dv^-1/2 H W De^-1 H^T Dv^-1/2, "hgnnp" is Dv^-1 H W De^-1 H^T; a degree of 0 gives factor 0. It has an
        entry for every two vertices that share a hyperedge, up to the sum of squared hyperedge sizes. Edgekit's models
        do without it; it is here to be compared with.

        Raises:
            MissingDependencyError: scipy, which comes with scikit-learn, is not installed.
            UnknownNameError: another `smoothing`.
        """
        if smoothing not in ("hgnn", "hgnnp"):
            raise UnknownNameError("smoothing", str(smoothing), ("hgnn", "hgnnp"))
        try:
            sparse: Any = importlib.import_module("scipy.sparse")
        except ModuleNotFoundError as error:
            raise MissingDependencyError("scipy", "train", "the sparse Laplacian") from error
        degree = self.vertex_degree.astype(np.float64)
        inverse = np.divide(1, degree, out=np.zeros_like(degree), where=degree > 0)
        outside, inside = (np.sqrt(inverse), np.sqrt(inverse)) if smoothing == "hgnn" else (inverse, None)
        size = (self.num_vertices, self.num_hyperedges)
        incidence = sparse.csr_array((np.ones(len(self.vertex)), (self.vertex, self.hyperedge)), shape=size)
        per_pair = incidence.T if inside is None else incidence.T * inside
        matrix = (incidence * self.member_weight.astype(np.float64)) @ per_pair
        matrix = sparse.csr_array(matrix)
        matrix.sort_indices()
        rows = np.repeat(np.arange(self.num_vertices), np.diff(matrix.indptr))
        values = (matrix.data * outside[rows]).astype(np.float32)
        return rows, matrix.indices.astype(np.int64), values

    @classmethod
    def _in_order(cls, num_vertices: int, vertex: Integers, hyperedge: Integers, weight: Floats) -> Hypergraph:
        """From arrays that are known to be as the class wants them: nothing is checked."""
        made = object.__new__(cls)
        values = {"num_vertices": num_vertices, "vertex": vertex, "hyperedge": hyperedge, "weight": weight}
        for name, value in values.items():
            object.__setattr__(made, name, value)
        return made

    def _lengthened_index(self, added: Hypergraph, total: int) -> tuple[Integers, Integers]:
        """`_hyperedges_of` with the pairs of further hyperedges, which come last at each vertex."""
        starts, ids = self._hyperedges_of
        starts = np.concatenate([starts, np.full(total - self.num_vertices, len(ids))])
        added_starts, added_ids = added._hyperedges_of
        owners = np.repeat(np.arange(total), np.diff(added_starts))
        longer = np.insert(ids, starts[owners + 1], added_ids + self.num_hyperedges)
        return starts + added_starts, longer

    @cached_property
    def _starts(self) -> Integers:
        """Int64 `[E + 1]`: where the pairs of each hyperedge begin."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.hyperedge_degree)])

    @cached_property
    def _hyperedges_of(self) -> tuple[Integers, Integers]:
        """The hyperedges by vertex: where each vertex begins, int64 `[V + 1]`, and their ids, int64 `[P]`."""
        return by_vertex(self.vertex, self.hyperedge, self.num_vertices, self.num_hyperedges)

    @cached_property
    def _tables(self) -> dict[str, NDArray[Any]]:
        return _tables(self.vertex, self._starts, self._hyperedges_of, self.vertex_degree, self.member_weight)


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """A part of a hypergraph that a model answers as it does the whole at `positions`; the other rows are by-products.

    Attributes:
        vertices: int64 `[n]`, sorted: the ids in the whole hypergraph of the rows here.
        positions: int64, one per asked vertex: its row here.
        hyperedges: int64 `[m]`, sorted: the ids in the whole hypergraph of the hyperedges here.
        vertex, hyperedge: int64 `[p]`, the pairs, in the numbering of here.
        vertex_degree: float32 `[n]`, in the whole hypergraph.
        member_weight: float32 `[m]`, in the whole hypergraph.
        num_vertices: of the whole hypergraph.
    """

    vertices: Integers
    positions: Integers
    hyperedges: Integers
    vertex: Integers
    hyperedge: Integers
    vertex_degree: Floats
    member_weight: Floats
    num_vertices: int

    def inputs(self, features: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The inputs of HGNN and HGNN+, by name, for the features float32 `[V, F]` of the whole hypergraph.

        Raises:
            InputError: another dtype or shape, or a value in the rows used that is NaN or infinite.
        """
        check_features(features, rows=self.num_vertices, finite=False)
        rows = features[self.vertices]
        check_features(rows, rows=len(rows), ids=self.vertices)
        return {"features": rows, **self._tables}

    @cached_property
    def _tables(self) -> dict[str, NDArray[Any]]:
        hyperedges_of = by_vertex(self.vertex, self.hyperedge, len(self.vertices), len(self.hyperedges))
        starts = np.searchsorted(self.hyperedge, np.arange(len(self.hyperedges) + 1))
        return _tables(self.vertex, starts, hyperedges_of, self.vertex_degree, self.member_weight)


def _check_isolated(isolated: str) -> None:
    if isolated not in ("singleton", "keep"):
        raise UnknownNameError("answer to isolated vertices", str(isolated), ("singleton", "keep"))


def _tables(
    vertex: Integers,
    starts: Integers,
    hyperedges_of: tuple[Integers, Integers],
    vertex_degree: Floats,
    member_weight: Floats,
) -> dict[str, NDArray[Any]]:
    """All inputs but the features: of vertices by hyperedge, where each hyperedge begins, and hyperedges by vertex."""
    if len(member_weight) == 0:
        starts, member_weight = np.zeros(2, np.int64), np.zeros(1, np.float32)
    members = SumTables.of(starts, vertex, len(vertex_degree))
    memberships = SumTables.of(*hyperedges_of, len(member_weight))
    return {
        "members": members.rows,
        "member_chunks": members.chunks,
        "memberships": memberships.rows,
        "membership_chunks": memberships.chunks,
        "vertex_degree": vertex_degree,
        "member_weight": member_weight,
    }
