"""LightHGNN's student against its teacher on synthetic hypergraphs, on this CPU.

    python -m benchmarks.lighthgnn_cpu [--parts race,all,one,stream,vertices,size,features] [--threads 1,2] [--rounds 9]

The teacher is HGNN with 32 hidden units, the student an MLP with 128, 7 classes, float32. A hypergraph has as many
hyperedges as vertices, each of one vertex and random others; the reference point has 55,000 vertices, hyperedges of 10
and 300 features. All forms of the teacher give the same logits: each is compared with the definition in float64, and is
not timed where it differs. Subjects then take turns in random order, with a pause between turns; runs above half a
second are made three times, the others as often as fits. Ratios are a form's median over that of the student in a bare
onnxruntime session, with bootstrap intervals of 95 %. Both include what the calls from Python take.

race    how often answers are wrong on 2 threads: onnxruntime 1.31's ScatterND loses sums where threads add to one
        row (its issues 18048 and 23396). For this reason all graphs with one run on 1 thread in the other parts, and
        our export has none
all     logits of all vertices in one run
one     logits of one vertex: the teacher over the neighbourhood that determines them, which is looked up in each run,
        or with `prepared` before the timing; the student takes one row. The Laplacian is that of the neighbourhood,
        and is built in the look-up: a run of the authors' code, which knows no neighbourhoods, takes what `all` takes
stream  vertices arrive, alone or 100 at a time, each with features and one hyperedge to vertices that are there: the
        teacher's hypergraph is extended, the neighbourhood looked up, the new vertices answered

vertices, size, features: the three above with one of the reference point's numbers changed, on one thread.

zoo         our export: Gather and ReduceSum on padded tables. `library`: with the look-ups of
            edgekit.models.hypergraph, else with faster ones that are written for hyperedges of one size
Laplacian   one sparse matrix [V, V]. In torch as COO, which is what the authors' code runs, and as CSR; in onnxruntime
            as a sparse input of SparseToDenseMatMul, or as Gather, Mul and ScatterND. `rows`: only those needed, from a
            stored matrix
factored    sums over the vertices of each hyperedge, then over the hyperedges of each vertex: embedding_bag or CSR in
            torch; SparseToDenseMatMul, Gather and ScatterND, or a Gather per place in the hyperedge and ScatterND, in
            onnxruntime
pruned      factored, the first layer only for vertices that share a hyperedge with an asked one, the second only for
            the asked ones. theta, the first layer's linear map, runs first, or last, behind the sums, or never:
            `theta cached` keeps its results for all old vertices
whole graph factored in torch as in `all`: cheaper than any look-up where an answer depends on nearly all vertices
kept sums   a stream's best case: also the first layer's sum over each hyperedge is kept, and corrected where the
            degrees of a hyperedge's vertices change. It works only in order of arrival, and while weights stay

The paper (arXiv 2402.04296) says up to 100x. Where a hypergraph does not change, the best teacher is a table of its
answers, and no model is needed at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks import lighthgnn_local_subjects as local
from benchmarks import lighthgnn_stream_subjects as streams
from benchmarks import lighthgnn_subjects as whole
from benchmarks.lighthgnn_graph_subjects import Graph, find_blocks
from benchmarks.lighthgnn_report import AUTHORS, STUDENT, ZOO, Row, markdown, row_line
from benchmarks.lighthgnn_subjects import Answer, Array, Problem, Setting
from benchmarks.onnx_cpu import RESULTS, earlier_rows, heading
from benchmarks.turns import PAUSE_SECONDS, median, milliseconds, speedup, take_turns
from edgekit.custom_ops.tolerances import relative_l2
from edgekit.runtime.timing import Series

REFERENCE = Setting()
SWEEPS: dict[str, tuple[int, ...]] = {
    "vertices": (5_000, 20_000, 55_000, 200_000),
    "size": (3, 5, 10, 20, 30, 40, 100),
    "features": (32, 100, 300, 1433),
}
BATCHES = (1, 100)
ARRIVALS = {1: 200, 100: 500}  # vertices that come before a stream starts again
ASKED = 8
WORST_ERROR = 1e-5  # relative L2 against float64; a form that is further off is a fault, not a rival
RACE_THREADS, RACE_RUNS = 2, 20
SLOW_MS, SLOW_ROUNDS, SWEEP_ROUNDS = 500.0, 3, 4
MOST_ENTRIES, MOST_LOCAL_ENTRIES, MOST_BYTES = 100_000_000, 30_000_000, 2**30

Make = Callable[[], Answer]


class TooLargeError(Exception):
    """A form would take more memory or time than its figure is worth; the message says how much."""


@dataclass
class Case:
    """Subjects of one regime, checked one by one as they are made."""

    row: Row
    truth: Array
    student_truth: Array
    checks: int  # so many successive calls make up the truth
    subjects: dict[str, Answer] = field(default_factory=dict)
    cost_ms: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, make: Make) -> None:
        """Make a subject and compare its answers; note why it is left out where it is too large."""
        try:
            run = make()
        except TooLargeError as reason:
            self.row.unavailable[name] = str(reason)
            return
        answers = []
        for _ in range(self.checks):
            start = time.perf_counter()
            answers.append(run())
            self.cost_ms[name] = 1e3 * (time.perf_counter() - start)
        truth = self.student_truth if name.startswith(STUDENT) else self.truth
        error = relative_l2(torch.from_numpy(np.concatenate(answers)), torch.from_numpy(truth))
        self.row.errors[name] = float(f"{error:.3g}")
        if not error <= WORST_ERROR:
            raise SystemExit(f"{self.row.name}: {name} is off by {error:.2e}: not timed")
        self.subjects[name] = run

    def time(self, rounds: int, turn_ms: float) -> Row:
        """Time the subjects, and note each one's median and its ratio to the student."""
        slow = [name for name, cost in self.cost_ms.items() if cost > SLOW_MS]
        fast = {name: run for name, run in self.subjects.items() if name not in slow}
        series = take_turns(fast, rounds=rounds, turn_ms=turn_ms) | _slow_turns({n: self.subjects[n] for n in slow})
        students = [name for name in self.subjects if name.startswith(STUDENT)]
        for name, turns in series.items():
            self.row.p50_ms[name] = float(f"{median(turns):.4g}")
            for student in students:
                count = min(len(turns), len(series[student]))
                ratios = self.row.over.setdefault(student, {})
                ratios[name] = speedup(turns[:count], series[student][:count])
        return self.row


def _slow_turns(subjects: Mapping[str, Answer]) -> dict[str, list[Series]]:
    """One run a turn, in fewer rounds: for runs so long that what a pause does to their start does not show."""
    series: dict[str, list[Series]] = {name: [] for name in subjects}
    for _ in range(SLOW_ROUNDS):
        for name, run in subjects.items():
            time.sleep(PAUSE_SECONDS)
            series[name].append(np.asarray([milliseconds(run)]))
    return series


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the numbers of vertices: below 1 to try things out"
    )
    options = parser.parse_args(arguments)
    title, facts = heading()  # before anything runs: the tree may change meanwhile
    rows: list[Row] = []
    for part in options.parts.split(","):
        threads = [int(each) for each in options.threads.split(",")]
        for row in PARTS[part](part, threads, options.rounds, options.scale):
            rows.append(row)
            print(row_line(row), flush=True)
            merged = _merged(rows, options.out)
            options.out.mkdir(parents=True, exist_ok=True)
            document = {"benchmark": "lighthgnn_cpu", **facts, "rows": [asdict(each) for each in merged]}
            (options.out / "lighthgnn_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            text = markdown(merged, title, __doc__ or "")
            (options.out / "lighthgnn_cpu.md").write_text(text, encoding="utf-8")
    return 0


def _merged(rows: list[Row], folder: Path) -> list[Row]:
    """The rows of an earlier run, with those measured now in their place; so parts can be measured one by one."""
    earlier = earlier_rows(folder / "lighthgnn_cpu.json")
    known = {row.key: row for row in (*(Row(**each) for each in earlier), *rows)}
    order = list(PARTS)
    return sorted(known.values(), key=lambda row: (order.index(row.part), row.threads, row.regime, *row.key[1:]))


def _reference(part: str, threads: Sequence[int], rounds: int, scale: float) -> Iterator[Row]:
    problem = whole.make_problem(_scaled(REFERENCE, scale))
    for count in threads:
        torch.set_num_threads(count)
        for batch in BATCHES if part == "stream" else (0,):
            yield _case(part, part, problem, batch, count, full=True).time(rounds, 60.0)


def _sweep(part: str, threads: Sequence[int], rounds: int, scale: float) -> Iterator[Row]:
    """On one thread, with fewer rounds and without the forms that only repeat others."""
    del threads
    torch.set_num_threads(1)
    for value in SWEEPS[part]:
        setting = _scaled(replace(REFERENCE, **{part: value}), scale)
        problem = whole.make_problem(setting)
        for regime, batch in (("all", 0), ("one", 0), *(("stream", batch) for batch in BATCHES)):
            yield _case(part, regime, problem, batch, 1, full=False).time(min(rounds, SWEEP_ROUNDS), 20.0)


def _race(part: str, threads: Sequence[int], rounds: int, scale: float) -> Iterator[Row]:
    """The reference point's teacher, all vertices, in sessions on two threads."""
    del threads, rounds
    problem = whole.make_problem(_scaled(REFERENCE, scale))
    setting = problem.setting
    row = Row(part, "all", setting.vertices, setting.size, setting.features, 0, RACE_THREADS)
    truth, inputs = torch.from_numpy(problem.truth), problem.hypergraph.inputs(problem.features)
    session = whole.bare("hgnn", setting.features, RACE_THREADS)
    loaded = whole.load("hgnn", setting.features, RACE_THREADS)
    runs: dict[str, Answer] = {
        "ScatterND in a bare onnxruntime session": whole.ort_scatters(problem, RACE_THREADS),
        "our export in a bare onnxruntime session": lambda: np.asarray(session.run(None, inputs)[0]),
        "our export through edgekit.load": lambda: next(iter(loaded.run(inputs).values())),
    }
    for name, run in runs.items():
        errors = [float(relative_l2(torch.from_numpy(run()), truth)) for _ in range(RACE_RUNS)]
        row.wrong_runs[name] = (sum(not error <= WORST_ERROR for error in errors), RACE_RUNS, max(errors))
    yield row


PARTS: dict[str, Callable[[str, Sequence[int], int, float], Iterator[Row]]] = {
    "race": _race,
    **dict.fromkeys(("all", "one", "stream"), _reference),
    **dict.fromkeys(SWEEPS, _sweep),
}


def _scaled(setting: Setting, scale: float) -> Setting:
    return replace(setting, vertices=max(4 * setting.size, round(setting.vertices * scale)))


def _case(part: str, regime: str, problem: Problem, batch: int, threads: int, *, full: bool) -> Case:
    setting = problem.setting
    row = Row(part, regime, setting.vertices, setting.size, setting.features, batch, threads)
    if regime == "all":
        return _all(row, problem, full)
    return _one(row, problem, full) if regime == "one" else _stream(row, problem, full)


def _all(row: Row, problem: Problem, full: bool) -> Case:
    threads, features = row.threads, problem.features
    case = Case(row, problem.truth, whole.student_truth(features), checks=1)
    _add_students(case, features, [np.arange(len(features))], full)
    case.add(ZOO, lambda: whole.zoo_teacher(problem, threads))

    def laplacian(make: Callable[[Problem], Answer]) -> Make:
        def checked() -> Answer:
            _limit(problem.laplacian_entries, MOST_ENTRIES, "entries of the Laplacian")
            return make(problem)

        return checked

    case.add(AUTHORS, laplacian(whole.torch_laplacian))
    case.add("Laplacian torch CSR", laplacian(whole.torch_laplacian_csr))
    case.add("Laplacian ort sparse", laplacian(lambda p: whole.ort_sparse_laplacian(p, threads)))
    case.add("factored torch bags", lambda: whole.torch_bags(problem))
    case.add("factored torch CSR", lambda: whole.torch_csr(problem))
    case.add("factored ort sparse", lambda: whole.ort_sparse_factored(problem, threads))
    if full:
        case.add("Laplacian ort ScatterND", laplacian(whole.ort_laplacian))
        case.add("factored ort gathers", lambda: whole.ort_gathers(problem))
        case.add("factored ort scatters", lambda: whole.ort_scatters(problem))
    return case


def _one(row: Row, problem: Problem, full: bool) -> Case:
    generator = np.random.default_rng(2)
    # Large neighbourhoods resemble each other, and those that are prepared take memory.
    count = ASKED if problem.setting.size < 20 else 2
    asked = [np.array([vertex]) for vertex in generator.choice(problem.setting.vertices, count, replace=False)]
    graph, ids = Graph(problem), np.concatenate(asked)
    _note_sizes(row, graph, asked)
    case = Case(row, problem.truth[ids], whole.student_truth(problem.features[ids]), checks=count)
    _add_students(case, problem.features, asked, full=True)
    for name, make in _local_forms(graph, row).items():
        form = _made(make)
        case.add(name, lambda form=form: local.asking(form(), asked, prepared=False))  # type: ignore[misc]
        if full:
            case.add(f"{name}, prepared", lambda form=form: local.asking(form(), asked, prepared=True))  # type: ignore[misc]
    if full:
        case.add("zoo ort library", lambda: local.asking(local.Library(graph), asked, prepared=False))
    return case


def _stream(row: Row, problem: Problem, full: bool) -> Case:
    graph, batch, first = Graph(problem, ARRIVALS[row.batch]), row.batch, problem.setting.vertices
    ends = [first + batch, first + 2 * batch]
    asked = [np.arange(end - batch, end) for end in ends]
    truth = [
        whole.teacher_truth(graph.members[:end], graph.features[:end], problem.weights, rows)
        for end, rows in zip(ends, asked, strict=True)
    ]
    trial = graph.sharing()
    _note_sizes(row, trial, [trial.add(batch)])
    student = whole.student_truth(graph.features[first : ends[-1]])
    case = Case(row, np.concatenate(truth), student, checks=2)
    batches = np.arange(first, len(graph.features)).reshape(-1, batch)
    _add_students(case, graph.features, list(batches), full=True)
    forms = _local_forms(graph, row, stream=True)
    for name, make in forms.items():
        case.add(name, lambda make=make: streams.Stream(make(), batch))  # type: ignore[misc]
    case.add("kept sums torch", lambda: streams.Stream(streams.Incremental(graph.sharing()), batch))
    if full and batch == 1:
        # Each arrival is answered on the first hypergraph alone, so that only the first has the stream's answer.
        only_first = Case(row, truth[0], student, checks=1, subjects=case.subjects, cost_ms=case.cost_ms)
        only_first.add("zoo ort library", lambda: streams.LibraryStream(graph, batch))
    return case


def _local_forms(graph: Graph, row: Row, *, stream: bool = False) -> dict[str, Callable[[], local.Form]]:
    """The forms of the teacher for single vertices; each on a graph of its own where it is to grow."""
    size, features = row.size, row.features
    pairs = row.sizes["hyperedges"] * size

    def own() -> Graph:
        return graph.sharing() if stream else graph

    def authors() -> local.Form:
        _limit(round(pairs * size), MOST_LOCAL_ENTRIES, "entries of the neighbourhood's Laplacian")
        return local.Authors(own())

    def in_onnxruntime(theta: local.Theta, width: int) -> local.Form:
        _limit(round(4 * pairs * width), MOST_BYTES, "bytes of gathered rows")
        return local.PrunedOnnx(own(), theta)

    def stored(theta: Literal["last", "cached"]) -> local.Form:
        _limit(graph.problem.laplacian_entries, MOST_ENTRIES, "entries of the Laplacian")
        return local.LaplacianRows(own(), theta)

    forms: dict[str, Callable[[], local.Form]] = {
        ZOO: lambda: local.Zoo(own()),
        AUTHORS: authors,
        "whole graph torch": lambda: local.WholeGraph(own(), "first"),
        "whole graph torch, theta cached": lambda: local.WholeGraph(own(), "cached"),
        "pruned torch, theta first": lambda: local.Pruned(own(), "first"),
        "pruned torch, theta last": lambda: local.Pruned(own(), "last"),
        "pruned torch, theta cached": lambda: local.Pruned(own(), "cached"),
        "pruned ort, theta first": lambda: in_onnxruntime("first", 32),
        "pruned ort, theta last": lambda: in_onnxruntime("last", features),
        "pruned ort, theta cached": lambda: in_onnxruntime("cached", 32),
    }
    if not stream:
        forms["Laplacian rows torch, theta last"] = lambda: stored("last")
        forms["Laplacian rows torch, theta cached"] = lambda: stored("cached")
    return forms


def _made(make: Callable[[], local.Form]) -> Callable[[], local.Form]:
    """`make`, but one form for all callers."""
    made: list[local.Form] = []

    def once() -> local.Form:
        if not made:
            made.append(make())
        return made[0]

    return once


def _limit(count: int, most: int, what: str) -> None:
    if count > most:
        raise TooLargeError(f"{count:,} {what}")


def _note_sizes(row: Row, graph: Graph, asked: Sequence[Array]) -> None:
    """How many vertices and hyperedges determine an answer, on average."""
    blocks = [find_blocks(graph, vertices) for vertices in asked]
    row.sizes = {
        "near": float(np.mean([len(each.near) for each in blocks])),
        "hyperedges": float(np.mean([len(each.first_members) for each in blocks])),
        "vertices": float(np.mean([len(np.unique(each.first_members)) for each in blocks])),
    }


def _add_students(case: Case, features: Array, asked: Sequence[Array], full: bool) -> None:
    """The student on the rows of one group of vertices after the other."""
    width, threads = case.row.features, case.row.threads
    groups = [np.ascontiguousarray(features[ids]) for ids in asked]

    def in_bare_session() -> Answer:
        session, rows = whole.bare("lighthgnn", width, threads), cycle(groups)
        return lambda: np.asarray(session.run(None, {"features": next(rows)})[0])

    def in_ours() -> Answer:
        session, rows = whole.load("lighthgnn", width, threads), cycle(groups)
        return lambda: next(iter(session.run({"features": next(rows)}).values()))

    case.add(STUDENT, in_bare_session)
    if full:
        case.add(f"{STUDENT}, edgekit", in_ours)


if __name__ == "__main__":
    sys.exit(main())
