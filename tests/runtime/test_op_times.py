from __future__ import annotations

import pytest

from edgekit.runtime.op_times import TOP_NODES, op_breakdown


def node(name: str, op: str, microseconds: list[float]) -> dict[str, object]:
    return {"name": name, "op": op, "microseconds": microseconds}


def test_sums_by_op_and_picks_the_costliest_nodes() -> None:
    entries = [node("c1", "Conv", [3000.0] * 4), node("c2", "Conv", [2000.0] * 4), node("r", "Relu", [5000.0 / 3] * 4)]
    ops, nodes = op_breakdown(entries, runs=4, skip=0)
    assert [(op.op, op.count) for op in ops] == [("Conv", 2), ("Relu", 1)]
    assert [op.ms_per_run for op in ops] == pytest.approx([5, 5 / 3])
    assert [op.share for op in ops] == pytest.approx([0.75, 0.25])
    assert [item.name for item in nodes] == ["c1", "c2", "r"]
    assert (nodes[0].ms_per_run, nodes[0].share) == pytest.approx((3.0, 0.45))


def test_first_runs_and_interruptions_do_not_count() -> None:
    ops, _ = op_breakdown([node("a", "Add", [900.0, 10.0, 10.0, 700.0, 10.0])], runs=5, skip=1)
    assert ops[0].ms_per_run == pytest.approx(0.01)


def test_a_node_in_a_loop_counts_all_its_calls_and_the_loop_itself_none() -> None:
    entries = [node("loop", "Scan", [40.0] * 3), node("inner", "MatMul", [10.0] * 9)]
    ops, nodes = op_breakdown(entries, runs=3, skip=0)
    assert [op.op for op in ops] == [item.op for item in nodes] == ["MatMul"]
    assert (ops[0].ms_per_run, ops[0].share) == pytest.approx((0.03, 1.0))


def test_a_node_in_a_branch_that_is_not_always_taken_gets_its_mean() -> None:
    ops, _ = op_breakdown([node("a", "Add", [8.0, 8.0])], runs=4, skip=0)
    assert ops[0].ms_per_run == pytest.approx(0.004)


def test_only_the_top_nodes_are_listed() -> None:
    entries = [node(f"n{index}", "Conv", [float(index)] * 2) for index in range(TOP_NODES + 5)]
    assert len(op_breakdown(entries, runs=2, skip=0)[1]) == TOP_NODES


@pytest.mark.parametrize(
    "entries", [[], [node("loop", "Loop", [1.0])], [node("a", "Add", [0.0])]], ids=["none", "loop-only", "zero-time"]
)
def test_nothing_measurable_has_finite_shares(entries: list[dict[str, object]]) -> None:
    ops, _ = op_breakdown(entries, runs=1, skip=0)
    assert all(op.share == 0.0 for op in ops)
