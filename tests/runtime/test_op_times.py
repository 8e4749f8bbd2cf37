from __future__ import annotations

import pytest

from edgekit.runtime.op_times import TOP_NODES, Event, node_times, op_breakdown


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


# From a trace to nodes


def times(events: list[Event]) -> dict[str, tuple[str, list[float]]]:
    return {node["name"]: (node["op"], node["microseconds"]) for node in node_times(events, {"Op", "Op2"}, "edgekit")}


def test_calls_are_collected_in_order_of_time() -> None:
    events = [Event("b", "Relu", 20, 1), Event("a", "Conv", 10, 5), Event("b", "Relu", 2, 3), Event("a", "Conv", 0, 2)]
    assert times(events) == {"a": ("Conv", [2.0, 5.0]), "b": ("Relu", [3.0, 1.0])}
    assert node_times([], {"Op"}, "edgekit") == []


def test_native_nodes_carry_their_domain() -> None:
    assert times([Event("n", "Op", 0, 2), Event("m", "Op2", 2, 2)]) == {
        "n": ("edgekit::Op", [2.0]),
        "m": ("edgekit::Op2", [2.0]),
    }


@pytest.mark.parametrize("prefix", ["_inlfunc_Op2_", "_inlfunc_Op2_token_0_"])
def test_nodes_of_a_body_are_told_by_their_names(prefix: str) -> None:
    found = times(
        [Event(f"{prefix}matmul/MatMulScaleFusion/", "FusedMatMul", 0, 2), Event("Softmax_3", "Softmax", 2, 1)]
    )
    assert [op for op, _ in found.values()] == ["edgekit::Op2 (body)", "Softmax"]


def test_all_that_runs_in_a_loop_of_a_body_belongs_to_it() -> None:
    """The loop keeps the time that none of its nodes took, so that nothing counts twice and nothing is lost."""
    events = [
        Event("Softmax_2", "Softmax", 11, 3),
        Event("Softmax_2", "Softmax", 15, 3),
        Event("_inlfunc_Op_scan", "Scan", 10, 10),
        Event("Softmax_2", "Softmax", 31, 4),
        Event("loop", "Scan", 30, 6),
        Event("after", "Relu", 36, 1),
    ]
    entries = node_times(events, {"Op"}, "edgekit")
    assert [(node["name"], node["op"], node["microseconds"]) for node in entries] == [
        ("_inlfunc_Op_scan", "edgekit::Op (body)", [4.0]),
        ("Softmax_2", "edgekit::Op (body)", [3.0, 3.0]),
        ("loop", "Scan", [6.0]),
        ("Softmax_2", "Softmax", [4.0]),
        ("after", "Relu", [1.0]),
    ]
    ops, _ = op_breakdown(entries, runs=1, skip=0)
    assert {op.op: op.ms_per_run for op in ops} == pytest.approx(
        {"edgekit::Op (body)": 0.01, "Softmax": 0.004, "Relu": 0.001}
    )


def test_branches_inside_loops_of_a_body() -> None:
    events = [Event("_inlfunc_Op_scan", "Scan", 0, 10), Event("If_1", "If", 2, 6), Event("Add_1", "Add", 3, 4)]
    assert [microseconds for _, microseconds in times(events).values()] == [[4.0], [2.0], [4.0]]
