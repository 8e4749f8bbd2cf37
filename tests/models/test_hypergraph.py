"""Hypergraphs from incidence lists: what is brought into order, what is refused, what a neighbourhood holds."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.models.hypergraph import Hypergraph
from edgekit.models.nearest import nearest_neighbours


def hyperedges(hypergraph):
    """As tuples of vertices, in order."""
    members = [[] for _ in range(hypergraph.num_hyperedges)]
    for v, e in zip(hypergraph.vertex, hypergraph.hyperedge, strict=True):
        members[e].append(int(v))
    return [tuple(each) for each in members]


def pairs_of(listed):
    """A list of hyperedges as two lists."""
    return [v for members in listed for v in members], [e for e, members in enumerate(listed) for _ in members]


incidence = st.integers(1, 9).flatmap(
    lambda count: st.tuples(st.just(count), st.lists(st.lists(st.integers(0, count - 1), max_size=6), max_size=12))
)


# bringing into order


def test_arrays_of_a_small_hypergraph():
    made = Hypergraph.from_incidence([3, 0, 2, 0, 1], [1, 0, 0, 1, 1], num_vertices=4)
    assert made.vertex.tolist() == [0, 2, 0, 1, 3]
    assert made.hyperedge.tolist() == [0, 0, 1, 1, 1]
    assert made.weight.tolist() == [1, 1]
    assert made.vertex_degree.tolist() == [2, 1, 1, 1]
    assert made.hyperedge_degree.tolist() == [2, 3]
    np.testing.assert_array_equal(made.member_weight, np.float32([1 / 2, 1 / 3]))
    dtypes = [a.dtype for a in (made.vertex, made.hyperedge, made.weight, made.vertex_degree, made.member_weight)]
    assert dtypes == [np.int64, np.int64, np.float32, np.float32, np.float32]


def test_repeated_vertices_count_once():
    assert hyperedges(Hypergraph.from_hyperedges([[1, 0, 1, 1]], num_vertices=2)) == [(0, 1)]


def test_equal_hyperedges_are_one_with_the_mean_weight():
    listed = [[0, 1], [2], [1, 0, 0], [1, 0]]
    made = Hypergraph.from_hyperedges(listed, num_vertices=3, weight=[1, 5, 2, 6])
    assert hyperedges(made) == [(0, 1), (2,)]
    assert made.weight.tolist() == [3, 5]
    apart = Hypergraph.from_hyperedges(listed, num_vertices=3, weight=[1, 5, 2, 6], merge=False)
    assert hyperedges(apart) == [(0, 1), (2,), (0, 1), (0, 1)]
    assert apart.weight.tolist() == [1, 5, 2, 6]


def test_hyperedges_of_equal_bytes_but_other_sizes_stay_apart():
    assert hyperedges(Hypergraph.from_hyperedges([[0], [0, 1], [0, 1, 2]], num_vertices=3)) == [
        (0,),
        (0, 1),
        (0, 1, 2),
    ]


def test_isolated_vertices():
    made = Hypergraph.from_hyperedges([[1, 3]], num_vertices=5, weight=[2])
    assert hyperedges(made) == [(1, 3), (0,), (2,), (4,)]
    assert made.weight.tolist() == [2, 1, 1, 1]
    kept = Hypergraph.from_hyperedges([[1, 3]], num_vertices=5, isolated="keep")
    assert hyperedges(kept) == [(1, 3)]
    assert kept.vertex_degree.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("empty", [[], np.empty(0, np.int32)], ids=["list", "array"])
def test_no_hyperedges_at_all(empty):
    made = Hypergraph.from_incidence(empty, empty, num_vertices=2)
    assert hyperedges(made) == [(0,), (1,)]
    bare = Hypergraph.from_incidence(empty, empty, num_vertices=2, isolated="keep")
    assert bare.num_hyperedges == 0
    assert bare.vertex_degree.tolist() == [0, 0]
    assert bare.member_weight.shape == bare.vertex.shape == (0,)
    assert bare.neighbourhood([1]).vertices.tolist() == [1]


def test_empty_hyperedges_are_dropped_with_their_weight():
    made = Hypergraph.from_hyperedges([[], [0, 1], []], num_vertices=2, weight=[7, 2, 9])
    assert hyperedges(made) == [(0, 1)]
    assert made.weight.tolist() == [2]
    gaps = Hypergraph.from_incidence([0, 1, 1], [5, 5, 2], num_vertices=2, weight=[1, 1, 3, 1, 1, 4])
    assert hyperedges(gaps) == [(1,), (0, 1)]
    assert gaps.weight.tolist() == [3, 4]


def test_huge_hyperedge_ids():
    made = Hypergraph.from_incidence([1, 0, 1, 1], [2**62, 2**62, 7, 2**62], num_vertices=3)
    assert hyperedges(made) == [(1,), (0, 1), (2,)]


def test_unsigned_and_small_integers_are_taken():
    made = Hypergraph.from_incidence(np.uint8([1, 0]), np.uint64([0, 0]), num_vertices=np.int32(2))
    assert hyperedges(made) == [(0, 1)]


@given(incidence, st.randoms())
def test_against_sets(case, random):
    count, listed = case
    v, e = pairs_of(listed)
    order = list(range(len(v)))
    random.shuffle(order)
    made = Hypergraph.from_incidence([v[i] for i in order], [e[i] for i in order], num_vertices=count)
    wanted = list(dict.fromkeys(tuple(sorted(set(members))) for members in listed if members))
    wanted += [(v,) for v in range(count) if not any(v in members for members in wanted)]
    assert hyperedges(made) == wanted
    assert made.vertex_degree.tolist() == [sum(v in members for members in wanted) for v in range(count)]
    assert made.hyperedge_degree.tolist() == [len(members) for members in wanted]
    Hypergraph(count, made.vertex, made.hyperedge, made.weight)  # in the order that the class checks


# what is refused

incident, listed, near = Hypergraph.from_incidence, Hypergraph.from_hyperedges, Hypergraph.from_neighbours

BAD = {
    "vertex too large": (
        lambda: incident([0, 5, 9], [0, 0, 1], num_vertices=5),
        r"0\.\.4; got 5 at pair 1, and at 1 more",
    ),
    "vertex negative": (lambda: incident([0, -1], [0, 0], num_vertices=5), r"0\.\.4; got -1 at pair 1"),
    "hyperedge negative": (lambda: incident([0], [-2], num_vertices=5), "0 or more; got -2 at pair 0"),
    "lengths differ": (lambda: incident([0, 1], [0], num_vertices=5), "per pair; got 2 and 1"),
    "float ids": (lambda: incident([0.0], [0], num_vertices=5), r"vertex ids are a list of integers; got float64"),
    "bool ids": (lambda: incident([0], [True], num_vertices=5), "hyperedge ids are a list of integers; got bool"),
    "matrix of ids": (lambda: incident([[0]], [0], num_vertices=5), r"integers; got int64 \[1, 1\]"),
    "uint64 beyond int64": (
        lambda: incident(np.uint64([2**63]), [0], num_vertices=5),
        "int64 numbers; got 9223372036854775808",
    ),
    "no vertices": (lambda: incident([], [], num_vertices=0), "at least one vertex; got num_vertices 0"),
    "vertices no integer": (lambda: incident([], [], num_vertices=2.0), r"num_vertices is an integer; got 2\.0"),
    "weight zero": (
        lambda: incident([0], [0], num_vertices=1, weight=[0]),
        "positive float32 number; hyperedge 0 has 0",
    ),
    "weight negative": (lambda: listed([[0], [0]], num_vertices=1, weight=[1, -2]), "hyperedge 1 has -2"),
    "weight NaN": (lambda: listed([[0]], num_vertices=1, weight=[np.nan]), "hyperedge 0 has nan"),
    "weight beyond float32": (lambda: listed([[0]], num_vertices=1, weight=[1e39]), r"hyperedge 0 has 1e\+39"),
    "weight below float32": (lambda: listed([[0]], num_vertices=1, weight=[1e-60]), "hyperedge 0 has 1e-60"),
    "weights too few": (
        lambda: incident([0], [3], num_vertices=1, weight=[1, 1]),
        r"2 weights, so hyperedge ids lie in 0\.\.1; got 3",
    ),
    "one weight per hyperedge": (
        lambda: listed([[0]], num_vertices=1, weight=[1, 1]),
        "one weight per hyperedge, 1; got 2",
    ),
    "weights as text": (lambda: listed([[0]], num_vertices=1, weight=["1"]), "a list of numbers"),
    "member no integer": (lambda: listed([[0], [0.5]], num_vertices=1), r"hyperedge 1 has 0\.5"),
    "member out of range": (lambda: listed([[0], [3]], num_vertices=3), r"0\.\.2; got 3 at pair 1"),
    "member beyond int64": (lambda: listed([[2**70]], num_vertices=3), "int64 numbers"),
    "k zero": (lambda: near(np.zeros((4, 2)), 0), r"1\.\.3 for 4; got 0"),
    "k too large": (lambda: near(np.zeros((4, 2)), 4), r"1\.\.3 for 4; got 4"),
    "features NaN": (
        lambda: near(np.array([[0.0], [np.nan], [np.inf]]), 1),
        "vertex 1 has nan in column 0, and 1 more",
    ),
    "features flat": (lambda: near(np.zeros(4), 1), r"numbers \[V, F\]; got float64 \[4\]"),
    "nobody asked": (lambda: listed([[0]], num_vertices=1).neighbourhood([]), "at least one vertex; got none"),
    "asked out of range": (lambda: listed([[0]], num_vertices=1).neighbourhood([0, 1]), "got 1 at asked vertex 1"),
    "no hops": (lambda: listed([[0]], num_vertices=1).neighbourhood([0], 0), "at least 1; got 0"),
    "kept twice": (lambda: listed([[0, 1]], num_vertices=2).restricted([1, 1]), "got none or one twice"),
    "fewer than no vertices": (
        lambda: listed([[0]], num_vertices=1).extended([], new_vertices=-1),
        "0 or more; got -1",
    ),
    "constructor unsorted": (
        lambda: Hypergraph(2, np.array([1, 0]), np.array([0, 0]), np.ones(1, np.float32)),
        "Use Hypergraph.from_incidence",
    ),
    "constructor with a gap": (
        lambda: Hypergraph(2, np.array([0, 1]), np.array([0, 2]), np.ones(3, np.float32)),
        "Use Hypergraph.from_incidence",
    ),
    "constructor dtype": (
        lambda: Hypergraph(2, np.array([0, 1]), np.array([0, 1]), np.ones(2)),
        "weight of a Hypergraph is float32",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hypergraph.from_hyperedges([[0]], num_vertices=1, isolated="drop"),
        lambda: Hypergraph.from_hyperedges([[0]], num_vertices=1).extended([[1]], new_vertices=1, isolated="drop"),
        lambda: Hypergraph.from_hyperedges([[0]], num_vertices=1).laplacian("gcn"),
    ],
    ids=["isolated", "extended", "smoothing"],
)
def test_unknown_names(make):
    with pytest.raises(UnknownNameError, match=r"known: |did you mean"):
        make()


FEATURES = {
    "NaN": (np.float32([[0, 1], [0, np.nan], [0, 0]]), "vertex 1 has nan in column 1. Fill or drop them"),
    "infinite": (np.float32([[0, 1], [0, 0], [np.inf, -np.inf]]), "vertex 2 has inf in column 0"),
    "too few rows": (np.zeros((2, 4), np.float32), r"\[3, F\] with F at least 1; got \[2, 4\]"),
    "no columns": (np.zeros((3, 0), np.float32), r"got \[3, 0\]"),
    "flat": (np.zeros(3, np.float32), r"got \[3\]"),
    "float64": (np.zeros((3, 2)), "float32 array; got float64. Convert"),
    "list": ([[0.0], [0.0], [0.0]], "float32 array; got list"),
}


@pytest.mark.parametrize(("features", "message"), FEATURES.values(), ids=FEATURES)
def test_features_refused(features, message):
    with pytest.raises(InputError, match=message):
        Hypergraph.from_hyperedges([[0, 1, 2]], num_vertices=3).inputs(features)


def summed(rows, chunks, count):
    """What each row of `SumTables` sums up, sorted."""
    listed = [[e for e in chunk if e < count] for chunk in chunks.tolist()]
    parts = [[[e] if e < count else [*listed, []][e - count] for e in row] for row in rows.tolist()]
    return [tuple(sorted(chain.from_iterable(each))) for each in parts]


def test_inputs_list_members_and_memberships():
    made = Hypergraph.from_hyperedges([list(range(1, 40)), [0, 1], [1]], num_vertices=41, weight=[2, 3, 4])
    features = np.ones((41, 2), np.float32)
    whole, near = made.neighbourhood([0, 40]), made.neighbourhood([0], hops=1)
    for part, features_of in ((made, features), (whole, features), (near, features[:2])):
        inputs = part.inputs(features)
        np.testing.assert_array_equal(inputs["features"], features_of)
        assert {str(inputs[name].dtype) for name in inputs if "member" in name and "weight" not in name} == {"int64"}
        v_count, e_count = len(features_of), len(part.member_weight)
        pairs = list(zip(part.vertex.tolist(), part.hyperedge.tolist(), strict=True))
        members = [tuple(v for v, e in pairs if e == each) for each in range(e_count)]
        memberships = [tuple(e for v, e in pairs if v == each) for each in range(v_count)]
        assert summed(inputs["members"], inputs["member_chunks"], v_count) == members
        assert summed(inputs["memberships"], inputs["membership_chunks"], e_count) == memberships
        np.testing.assert_array_equal(inputs["vertex_degree"], part.vertex_degree)
        np.testing.assert_array_equal(inputs["member_weight"], part.member_weight)
    assert made.inputs(features)["members"] is made.inputs(2 * features)["members"]


def test_without_hyperedges_there_is_one_that_weighs_nothing():
    bare = Hypergraph.from_incidence([], [], num_vertices=2, isolated="keep")
    for part in (bare, bare.neighbourhood([1, 0])):
        inputs = part.inputs(np.ones((2, 3), np.float32))
        assert inputs["member_weight"].tolist() == [0]
        assert summed(inputs["members"], inputs["member_chunks"], 2) == [()]
        assert summed(inputs["memberships"], inputs["membership_chunks"], 1) == [(), ()]


def test_a_neighbourhood_asks_only_for_its_own_rows():
    made = Hypergraph.from_hyperedges([[0, 1], [2, 3]], num_vertices=4)
    features = np.float32([[0], [1], [2], [np.nan]])
    assert made.neighbourhood([0]).inputs(features)["features"].tolist() == [[0], [1]]
    with pytest.raises(InputError, match="vertex 3 has nan"):
        made.neighbourhood([2]).inputs(features)
    with pytest.raises(InputError, match=r"\[4, F\]"):
        made.neighbourhood([2]).inputs(features[:3])


# nearest neighbours


@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 26], ids=["a row", "some rows", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_nearest_neighbours_by_brute_force(seed, block):
    """Small integers, so that there are ties, and far from 0, where the product form loses digits."""
    x = np.random.default_rng(seed).integers(0, 4, (37, 3)) + 10_000.0
    distances = ((x[:, None] - x[None]) ** 2).sum(-1)
    expected = [sorted(set(range(37)) - {v}, key=lambda u: (distances[v, u], u))[:5] for v in range(37)]
    assert nearest_neighbours(x, 5, block_bytes=block).tolist() == expected


def test_neighbours_of_equal_vertices():
    assert nearest_neighbours(np.full((5, 2), 3.5), 2).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


@pytest.mark.parametrize("scale", [1e-200, 1e200], ids=["tiny", "huge"])
def test_nearest_neighbours_of_extreme_values(scale):
    assert nearest_neighbours(scale * np.array([[0.0], [1], [3], [7]]), 1).tolist() == [[1], [0], [1], [2]]


def test_from_neighbours_merges_equal_neighbourhoods():
    line = np.array([[0.0], [1], [10], [11]])
    assert hyperedges(Hypergraph.from_neighbours(line, 1)) == [(0, 1), (2, 3)]
    assert hyperedges(Hypergraph.from_neighbours(line, 1, merge=False)) == [(0, 1), (0, 1), (2, 3), (2, 3)]


# neighbourhoods, extension, restriction


@given(incidence, st.data())
@settings(deadline=None)
def test_neighbourhood_against_sets(case, data):
    count, listed = case
    isolated = data.draw(st.sampled_from(["singleton", "keep"]))
    made = Hypergraph.from_incidence(*pairs_of(listed), num_vertices=count, isolated=isolated)
    asked = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
    hops = data.draw(st.integers(1, 3))
    members, found, chosen = hyperedges(made), set(asked), set()
    for _ in range(hops):
        chosen = {e for e, each in enumerate(members) if found & set(each)}
        found |= {v for e in chosen for v in members[e]}
    near = made.neighbourhood(asked, hops)
    assert near.vertices.tolist() == sorted(found)
    assert near.hyperedges.tolist() == sorted(chosen)
    assert near.vertices[near.positions].tolist() == asked
    np.testing.assert_array_equal(near.vertex_degree, made.vertex_degree[near.vertices])
    np.testing.assert_array_equal(near.member_weight, made.member_weight[near.hyperedges])
    pairs = list(zip(near.hyperedges[near.hyperedge].tolist(), near.vertices[near.vertex].tolist(), strict=True))
    assert pairs == [(e, v) for e in sorted(chosen) for v in members[e]]


@given(incidence, incidence, st.integers(0, 4), st.booleans(), st.sampled_from(["singleton", "keep"]))
@settings(deadline=None)
def test_extended_equals_building_anew(case, more, new, merge, isolated):
    """Where no weight is merged twice; hyperedges of lonely old vertices remain, so both start with them."""
    count, listed = case
    made = Hypergraph.from_incidence(*pairs_of(listed), num_vertices=count, merge=merge, isolated=isolated)
    made.neighbourhood([0])  # the index is there and has to be brought up to date
    further = [[v % (count + new) for v in members] for members in more[1]]
    longer = made.extended(further, new_vertices=new, merge=merge, isolated=isolated)
    anew = Hypergraph.from_hyperedges(
        hyperedges(made) + further, num_vertices=count + new, merge=merge, isolated=isolated
    )
    for name in ("vertex", "hyperedge", "weight", "vertex_degree", "hyperedge_degree"):
        np.testing.assert_array_equal(getattr(longer, name), getattr(anew, name))
    for vertex in (0, count + new - 1):
        ours, theirs = longer.neighbourhood([vertex]), anew.neighbourhood([vertex])
        np.testing.assert_array_equal(ours.vertices, theirs.vertices)
        np.testing.assert_array_equal(ours.hyperedge, theirs.hyperedge)
        np.testing.assert_array_equal(ours.vertex, theirs.vertex)


def test_extended_merges_with_what_is_there():
    made = Hypergraph.from_hyperedges([[0, 1]], num_vertices=2, weight=[2])
    longer = made.extended([[1, 0], [2, 0]], new_vertices=1, weight=[4, 1])
    assert hyperedges(longer) == [(0, 1), (0, 2)]
    assert longer.weight.tolist() == [3, 1]
    assert made.num_vertices == 2
    assert hyperedges(made) == [(0, 1)]


def test_restricted():
    made = Hypergraph.from_hyperedges([[0, 1, 2], [1, 2, 3], [3]], num_vertices=4, weight=[1, 3, 5])
    part = made.restricted([2, 0, 1])
    assert hyperedges(part) == [(0, 1, 2), (0, 2)]
    assert part.weight.tolist() == [1, 3]
    assert hyperedges(made.restricted([0, 3])) == [(0,), (1,)]  # what is left of the last two is the same
    assert made.restricted([0, 3]).weight.tolist() == [1, 4]


# the Laplacian


def dense_smoothing(count, listed, weight, smoothing):
    """Written out with float64 matrices, straight from the papers' formulas."""
    incidence = np.zeros((count, len(listed)))
    for e, members in enumerate(listed):
        incidence[list(members), e] = 1
    dv, de = incidence @ weight, incidence.sum(0)
    inverse = np.array([1 / d if d > 0 else 0 for d in dv])
    middle = incidence @ np.diag(weight / de) @ incidence.T
    if smoothing == "hgnn":
        return np.diag(np.sqrt(inverse)) @ middle @ np.diag(np.sqrt(inverse))
    return np.diag(inverse) @ middle


@pytest.mark.parametrize("smoothing", ["hgnn", "hgnnp"])
@pytest.mark.parametrize("isolated", ["singleton", "keep"])
def test_laplacian(smoothing, isolated):
    listed, weight = [(0, 1, 4), (1, 2), (0, 1, 2, 4)], [0.5, 2, 3]
    made = Hypergraph.from_hyperedges(listed, num_vertices=6, weight=weight, isolated=isolated)
    rows, columns, values = made.laplacian(smoothing)
    assert values.dtype == np.float32
    assert (np.diff(rows * 6 + columns) > 0).all()
    matrix = np.zeros((6, 6))
    matrix[rows, columns] = values
    alone = [(3,), (5,)] if isolated == "singleton" else []
    expected = dense_smoothing(6, listed + alone, np.array(weight + [1] * len(alone)), smoothing)
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)
    if smoothing == "hgnnp":  # means of means: every row that has a hyperedge sums to 1
        np.testing.assert_allclose(matrix.sum(1), (made.vertex_degree > 0).astype(float), rtol=1e-6)


def test_laplacian_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(MissingDependencyError, match=r"needs scipy.*edgekit\[train\]"):
        Hypergraph.from_hyperedges([[0]], num_vertices=1).laplacian()


def test_needs_neither_torch_nor_scikit_learn():
    code = (
        "import sys; from edgekit.models.hypergraph import Hypergraph; "
        "import numpy; x = numpy.float32([[0], [1], [3]]); "
        "Hypergraph.from_neighbours(x, 1).neighbourhood([0]).inputs(x); "
        "print([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
