"""Sums by group as tables: every member once, nothing else, and no more work than can be reckoned beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekit.models.segment_sums import table_sums
from edgekit.models.sum_tables import CHUNK_PRICE, SumTables, chunks_needed, table_sizes

POISSON = np.random.default_rng(0).poisson(10, 4000)
SIZES = {
    "regular": np.full(500, 10),
    "Poisson": POISSON,
    "a hub": np.concatenate([POISSON, [10_000]]),
    "Zipf": np.maximum(1, 10_000 // np.arange(1, 10_001)),
    "no members": np.zeros(7, np.int64),
    "one large group": np.array([5000]),
    "two large ones among small ones": np.array([1] * 90 + [33, 700]),
}


def tables_of(groups, count):
    starts = np.concatenate([[0], np.cumsum([len(group) for group in groups], dtype=np.int64)])
    items = np.array([item for group in groups for item in group], np.int64)
    return SumTables.of(starts, items, count)


def check_members(tables, groups, count):
    """The table of rows, with chunks written out, has the members of each group, as often as they are in it."""
    rows, chunks = tables.rows, tables.chunks
    assert rows.dtype == chunks.dtype == np.int64
    assert rows.shape[1] >= 1
    assert min(chunks.shape) >= 2
    nothing = count + len(chunks)
    assert (((chunks >= 0) & (chunks < count)) | (chunks == nothing)).all()
    assert rows.min(initial=0) >= 0
    used = []
    for row, group in zip(rows.tolist(), groups, strict=True):
        found = [entry for entry in row if entry < count]
        for entry in row:
            if count <= entry < nothing:
                used.append(entry - count)
                found += [item for item in chunks[entry - count].tolist() if item < count]
            assert entry <= nothing
        assert sorted(found) == sorted(group)
    assert sorted(used) == list(range(len(used)))
    assert (chunks[len(used) :] == nothing).all()
    assert len(chunks) == max(2, len(used))


groups_of_items = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.just(count), st.lists(st.lists(st.integers(0, count - 1), max_size=60), min_size=1, max_size=15)
    )
)


@given(groups_of_items)
@example((1, [[]]))
@example((1, [[0] * 300]))
@example((3, [[0], [], [2, 1, 0] * 40, [1]]))
@settings(deadline=None)
def test_every_member_once(case):
    count, groups = case
    check_members(tables_of(groups, count), groups, count)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_member_once_in_large_tables(sizes):
    generator = np.random.default_rng(1)
    groups = [generator.integers(0, 1000, size).tolist() for size in sizes]
    check_members(tables_of(groups, 1000), groups, 1000)


def reckoned_work(sizes):
    """An upper bound for the best width, with the least length L whose W chunks hold the largest group.

    A group of d > W members needs at most 1 + (d - W) / (L - 1) chunks.
    """
    widths = np.arange(1, sizes.max() + 1)[:, None]
    lengths = np.maximum(2, -(-sizes.max() // widths))
    beyond = np.maximum(sizes - widths, 0)
    chunks = (beyond > 0) + beyond / (lengths - 1)
    return (len(sizes) * widths[:, 0] + chunks.sum(1) * (lengths[:, 0] + CHUNK_PRICE)).min()


@pytest.mark.parametrize("name", ["regular", "Poisson", "two large ones among small ones"])
def test_work_is_bounded(name):
    """One part in 20 is for the steps between the widths that are compared."""
    sizes = SIZES[name]
    tables = SumTables.of(np.concatenate([[0], np.cumsum(sizes)]), np.zeros(sizes.sum(), np.int64), 1)
    assert (
        sizes.sum() <= tables.rows.size + tables.chunks.size <= 1.05 * reckoned_work(sizes) + 4
    )  # the chunks of nothing


def test_work_for_zipf_and_a_hub():
    """Written out for one width W each, which a search may only better: L = D / W for the largest of D members.

    Zipf, W 25 and L 400: 384 groups need chunks, at most 384 + 93,668 / 399 < 619. A hub among Poisson, W 25 and L 400:
    25 chunks for the hub and one for each of the few others beyond 25.
    """
    zipf, hub = SIZES["Zipf"], SIZES["a hub"]
    assert (zipf.sum(), (zipf > 25).sum()) == (93_668, 384)
    assert (POISSON > 25).sum() <= 3
    for sizes, bound in ((zipf, 250_000 + 619 * 404), (hub, 4001 * 25 + 28 * 404)):
        width, length = table_sizes(sizes)
        chunks = chunks_needed(sizes, width, length).sum()
        assert len(sizes) * width + chunks * length <= 1.05 * bound
        assert width * length >= sizes.max()


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40))
@settings(deadline=None)
def test_the_largest_group_fits_and_chunks_pay(sizes):
    sizes = np.array(sizes)
    width, length = table_sizes(sizes)
    chunks = chunks_needed(sizes, width, length)
    assert (chunks <= width).all()
    assert ((width - chunks) + chunks * length >= sizes).all()
    assert len(sizes) * width + chunks.sum() * (length + CHUNK_PRICE) <= len(sizes) * max(1, sizes.max())


# what PyTorch sums with them


def looped_sums(x, groups):
    return torch.stack([x[group].sum(0) if group else 0 * x.sum(0) for group in groups])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "groups",
    [[[0]], [[], []], [[1, 2], [], [0, 0, 1]], [[0, 1, 2] * 50, [1], [2, 0], []]],
    ids=["one", "empty", "short", "with chunks"],
)
def test_sums_and_gradients(groups, dtype):
    tables = tables_of(groups, 3)
    rows, chunks = torch.from_numpy(tables.rows), torch.from_numpy(tables.chunks)
    generator, results = torch.Generator().manual_seed(0), []
    x = torch.randn(3, 4, dtype=dtype, generator=generator)
    weight = torch.randn(len(groups), 4, dtype=dtype, generator=generator)
    for form in (lambda x: table_sums(x, rows, chunks), lambda x: looped_sums(x, groups)):
        leaf = x.clone().requires_grad_()
        sums = form(leaf)
        (sums * weight).sum().backward()
        results.append((sums.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_chunk_adds_nothing_for_any_entry_beyond_the_items():
    x = torch.tensor([[1.0], [10.0]])
    chunks = torch.tensor([[0, 2, 3], [1, 4, 0]])  # 2 items and 2 chunks: 2, 3 and 4 are no items
    assert table_sums(x, torch.tensor([[2, 3], [4, 1]]), chunks).tolist() == [[12], [10]]


def test_not_a_number_stays_in_its_group():
    tables = tables_of([[0], [1, 2]], 3)
    sums = table_sums(torch.tensor([[float("nan")], [1.0], [2.0]]), *map(torch.from_numpy, vars(tables).values()))
    assert sums[0].isnan()
    assert sums[1].tolist() == [3]


def test_export_and_eager_agree():
    """The two forms of the sums are one graph's answer and eager PyTorch's."""

    class Sums(torch.nn.Module):
        def forward(self, x, rows, chunks):
            return table_sums(x, rows, chunks)

    tables = tables_of([[0, 1, 2] * 50, [1], [2, 0], []], 3)
    args = (torch.randn(3, 4), torch.from_numpy(tables.rows), torch.from_numpy(tables.chunks))
    program = torch.export.export(Sums(), args)
    assert not any("bag" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*args), Sums()(*args))
