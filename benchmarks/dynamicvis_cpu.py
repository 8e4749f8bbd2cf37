"""DynamicVis base on this CPU: against its own token loop in PyTorch, and against plain ViT-B/16.

    python -m benchmarks.dynamicvis_cpu --models FOLDER [--parts export,loop,vit,memory] [--sizes 512,1024,2048]
                                        [--threads 1,2] [--rounds 5]

Float32, batch 1, random weights: the answers mean nothing, the time and memory are real. Answers are compared, and
where they differ nothing is written. Subjects take turns in random order, with a pause between turns; runs are long, so
that a turn is one run. Medians and ratios with bootstrap intervals of 95 % go to benchmarks/results/. FOLDER keeps the
exports, which take minutes, from one part to the next; empty it when the code changes.

export  makes the exports, measures nothing
loop    512 x 512: our export in onnxruntime with the native kernels (`edgekit kernels build`) and with function bodies,
        and the PyTorch model, against two PyTorch models that scan one token after the other. `reference`: the same
        one with the op's reference. `transformers`: the same one with the mixer of the transformers library, which is
        what the authors' code runs on a CPU; it projects each direction for itself, and lays out exp(delta A) and
        delta B u of all tokens before its loop slices them. With more than one thread both loops are also timed in
        processes of their own, not in turns, with PyTorch's default for threads that wait: they spin. That is the
        faster way on idle cores, and by far the slower one where anything else runs. The turns have threads that sleep
vit     latency in onnxruntime. `all tokens` is DynamicVis without token selection. ViT-B/16 (the transformers library)
        is there as MatMul, Softmax and MatMul (`plain`), with ONNX's op Attention, and with onnxruntime's
        MultiHeadAttention (`fused`), which works in blocks and holds no matrix of all scores
memory  what one run adds to resident memory at its peak, each in a process of its own: with onnxruntime's arena, its
        default, which keeps and rounds up what it takes, and without. At 2048 x 2048 these processes give the latency
        too, of few runs and not in turns. A process may map so many GiB as --limit-gib says
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.custom_ops_subjects import native_library
from benchmarks.dynamicvis_loop import command as loop_command
from benchmarks.dynamicvis_loop import environment as loop_environment
from benchmarks.dynamicvis_report import LIBRARY_LOOP, LOOP, NATIVE_OURS, SPINNING, Row, markdown, row_line
from benchmarks.dynamicvis_subjects import (
    ALL_TOKENS,
    ATTENTION,
    FUSED,
    MODEL,
    OURS,
    PLAIN,
    model_file,
    session_run,
    torch_loop_run,
    torch_run,
    transformers_loop_run,
)
from benchmarks.onnx_cpu import RESULTS, earlier_rows, heading
from benchmarks.turns import Subject, median, speedup, take_turns
from edgekit.models import model_entry
from edgekit.runtime.compare import compare_arrays
from edgekit.runtime.tolerances import output_tolerance

LOOP_SIZE = 512
LOOP_SECONDS = 60.0  # for the runs of a loop in a process of its own
LARGE = 2048  # from this size on, latency comes from the processes that measure memory
BODIES, IN_TORCH = "dynamicvis, function bodies", "dynamicvis, PyTorch"


@dataclass(frozen=True)
class Task:
    """What to measure."""

    sizes: tuple[int, ...]
    loop_size: int
    threads: tuple[int, ...]
    rounds: int
    models: Path
    limit_gib: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sizes", default="512,1024,2048")
    parser.add_argument("--loop-size", type=int, default=LOOP_SIZE, help="smaller to try things out")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--limit-gib", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    title, facts = heading()  # before anything runs: the tree may change meanwhile
    options.models.mkdir(parents=True, exist_ok=True)
    sizes, threads = (tuple(map(int, text.split(","))) for text in (options.sizes, options.threads))
    task = Task(sizes, options.loop_size, threads, options.rounds, options.models, options.limit_gib)
    rows: list[Row] = []
    for part in options.parts.split(","):
        for row in PARTS[part](task):
            rows.append(row)
            print(row_line(row), flush=True)
            _write(_merged(rows, options.out), options.out, title, facts)
    return 0


def _merged(rows: list[Row], folder: Path) -> list[Row]:
    """The rows of an earlier run, with those measured now in their place; so parts can be measured one by one."""
    earlier = earlier_rows(folder / "dynamicvis_cpu.json")
    known = {row.key: row for row in (*(Row(**each) for each in earlier), *rows)}
    order = list(PARTS)
    return sorted(known.values(), key=lambda row: (order.index(row.part), row.size, row.threads))


def _write(rows: list[Row], folder: Path, title: str, facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "dynamicvis_cpu", **facts, "rows": [asdict(row) for row in rows]}
    (folder / "dynamicvis_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "dynamicvis_cpu.md").write_text(markdown(rows, title, __doc__ or ""), encoding="utf-8")


def _export(task: Task) -> Iterator[Row]:
    for size in task.sizes:
        for subject in (OURS, *(() if size >= LARGE else (ALL_TOKENS,)), PLAIN, ATTENTION, FUSED):
            start = time.perf_counter()
            path = model_file(subject, size, task.models)
            print(f"{path.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    yield from ()


def _loop(task: Task) -> Iterator[Row]:
    size = task.loop_size
    path = model_file(OURS, size, task.models)
    for threads in task.threads:
        torch.set_num_threads(threads)
        row = Row("loop", size, threads)
        subjects = {
            NATIVE_OURS: session_run(path, size, threads, str(native_library().path)),
            BODIES: session_run(path, size, threads),
            IN_TORCH: torch_run(size),
            LOOP: torch_loop_run(size),
            LIBRARY_LOOP: transformers_loop_run(size),
        }
        expected = subjects[LOOP]()
        _check(row, {name: run for name, run in subjects.items() if name != LOOP}, expected)
        series = take_turns(subjects, rounds=task.rounds, turn_ms=0, settling_runs=0)
        row.p50_ms = {name: float(f"{median(turns):.4g}") for name, turns in series.items()}
        row.ratios = {
            f"{loop} over {name}": speedup(series[loop], series[name])
            for loop in (LOOP, LIBRARY_LOOP)
            for name in (NATIVE_OURS, BODIES, IN_TORCH)
        }
        if threads > 1:
            for name, subject in ((LOOP, "reference"), (LIBRARY_LOOP, "library")):
                _spinning_loop(row, name, loop_command(subject, size, threads, LOOP_SECONDS), expected)
        yield row


def _spinning_loop(row: Row, loop: str, command: Sequence[str], expected: Any) -> None:
    """Time a loop in a process of its own, whose answer must be `expected`, that of the loop in this process."""
    name = f"{loop}{SPINNING}"
    answer = _child(command, loop_environment(os.environ))
    if failed := answer.get("failed"):
        row.failed[name] = failed
        return
    _compare(row, name, expected, np.asarray(answer["logits"]).reshape(expected.shape))
    row.p50_ms[name] = float(f"{1e3 * float(np.median(answer['seconds'])):.4g}")
    row.runs[name] = len(answer["seconds"])
    least, most = (float(f"{1e3 * each(answer['seconds']):.4g}") for each in (min, max))
    row.range_ms[name] = least, most


def _vit(task: Task) -> Iterator[Row]:
    library = str(native_library().path)
    for size in (size for size in task.sizes if size < LARGE):
        for threads in task.threads:
            row = Row("vit", size, threads)
            files = {name: model_file(name, size, task.models) for name in (OURS, ALL_TOKENS, PLAIN, FUSED)}
            ours = {
                NATIVE_OURS: session_run(files[OURS], size, threads, library),
                BODIES: session_run(files[OURS], size, threads),
            }
            _check(row, {BODIES: ours[BODIES]}, ours[NATIVE_OURS]())
            vits = {name: session_run(files[name], size, threads) for name in (PLAIN, FUSED)}
            if size <= LOOP_SIZE:
                vits[ATTENTION] = session_run(model_file(ATTENTION, size, task.models), size, threads)
            _check(row, {name: run for name, run in vits.items() if name != PLAIN}, vits[PLAIN]())
            all_tokens = session_run(files[ALL_TOKENS], size, threads, library)
            subjects = {**ours, ALL_TOKENS: all_tokens, **vits}
            series = take_turns(subjects, rounds=task.rounds, turn_ms=0, settling_runs=0)
            row.p50_ms = {name: float(f"{median(turns):.4g}") for name, turns in series.items()}
            row.ratios = {
                f"{one} over {vit}": speedup(series[one], series[vit])
                for vit in vits
                for one in (NATIVE_OURS, BODIES, ALL_TOKENS)
            }
            yield row


def _check(row: Row, subjects: Mapping[str, Subject], expected: Any) -> None:
    """Note each subject's relative L2 error; refuse to go on where one is out of bounds."""
    for name, run in subjects.items():
        _compare(row, name, expected, run())


def _compare(row: Row, name: str, expected: Any, answer: Any) -> None:
    # DynamicVis' own answer moves by more than the usual tolerance when rounding differs; its entry says by how much.
    tolerance = model_entry(MODEL).tolerance if name.startswith(OURS) else None
    result = compare_arrays(name, expected, answer, tolerance=tolerance or output_tolerance("fp32"))
    if not result:
        raise SystemExit(f"{row.part} {row.size}: {name} is off by {result.rel_l2:.2e}: not timed")
    row.errors[name] = float(f"{result.rel_l2:.3g}")


def _memory(task: Task) -> Iterator[Row]:
    threads = max(task.threads)
    library = str(native_library().path)
    for size in task.sizes:
        row = Row("memory", size, threads, limit_gib=task.limit_gib)
        # Each with its kernels, and the runs of its process.
        subjects: dict[str, tuple[str, str | None, int]] = {
            NATIVE_OURS: (OURS, library, 3),
            BODIES: (OURS, None, 1),
            ALL_TOKENS: (ALL_TOKENS, library, 1),
            FUSED: (FUSED, None, 1),
            PLAIN: (PLAIN, None, 1),
        }
        if size >= LARGE:  # the export alone takes many minutes
            del subjects[ALL_TOKENS]
        answers: dict[str, Any] = {}
        seconds: dict[str, list[float]] = {}
        for name, (subject, kernels, runs) in subjects.items():
            file, large = model_file(subject, size, task.models), size >= LARGE
            for arena in (True, False):
                # At the largest size each run takes a minute or two: both ways only where the report compares them.
                if large and not arena and name in (BODIES, ALL_TOKENS) and name not in row.failed:
                    continue
                command = [sys.executable, "-m", "benchmarks.session_peak", str(file), f"--size={size}"]
                command += [f"--threads={threads}", f"--runs={runs if large and arena else 1}"]
                command += [f"--limit-gib={task.limit_gib}", *(() if arena else ("--no-arena",))]
                command += [f"--library={kernels}"] if kernels else []
                answer = _child(command)
                _note(row, name, arena, answer)
                if "failed" not in answer:
                    answers.setdefault(name, answer["logits"])
                    # A first run also takes the memory from the system; where there are others, they count. Without
                    # the arena every run does, so that it counts only where there is no run with it.
                    seconds.setdefault(name, answer["seconds"][1:] or answer["seconds"])
        if size >= LARGE:
            row.p50_ms = {name: float(f"{1e3 * float(np.median(each)):.4g}") for name, each in seconds.items()}
            row.runs = {name: len(each) for name, each in seconds.items()}
        for name, (subject, _, _) in subjects.items():
            reference = PLAIN if subject == FUSED else NATIVE_OURS
            if name in answers and reference in answers and subject in (OURS, FUSED) and name != reference:
                _compare(row, name, np.asarray(answers[reference]), np.asarray(answers[name]))
        yield row


def _child(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the process says; a process that the system ended is a result too."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines()
        return {"failed": f"the process ended with {done.returncode}: {lines[-1][:200] if lines else 'no message'}"}
    return answer


def _note(row: Row, name: str, arena: bool, answer: Mapping[str, Any]) -> None:
    if failed := answer.get("failed"):
        row.failed[name if arena else f"{name}, no arena"] = failed
        return
    added, peak = (round(answer[key] / 2**20, 1) for key in ("added_bytes", "peak_bytes"))
    if arena:
        row.added_mib[name], row.peak_mib[name] = added, peak
    else:
        row.added_no_arena_mib[name] = added


PARTS: dict[str, Callable[[Task], Iterator[Row]]] = {"export": _export, "loop": _loop, "vit": _vit, "memory": _memory}


if __name__ == "__main__":
    sys.exit(main())
