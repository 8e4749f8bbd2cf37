"""Bundles through `edgekit.load` against the plain export of the same module in bare onnxruntime, on this CPU.

    python -m benchmarks.onnx_cpu [--models shvit_s1,care_s0] [--threads 1,2] [--rounds 21]

Subjects per model and thread count, batch 1:

plain   torch.onnx.export of the unfused module, in a bare onnxruntime session
fp32    our fp32 bundle (fused, simplified) through edgekit.load
bare    the file of our fp32 bundle in a bare onnxruntime session: what our session adds is fp32 against bare
int8    our int8 bundle through edgekit.load; models without shipped weights have random weights and calibration:
        their timing is real, their classes are not

Answers are compared before anything is timed; a model whose answers differ is not timed. Subjects take turns in random
order, with a pause between turns because idle onnxruntime threads go on spinning; medians and their ratios to `plain`
are reported with bootstrap intervals. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import edgekit
from edgekit.export.onnx import DEFAULT_OPSET, example_inputs, quiet
from edgekit.export.source import load_model
from edgekit.runtime.compare import compare_arrays
from edgekit.runtime.onnxruntime_backend import session_options
from edgekit.runtime.report import machine_line, table
from edgekit.runtime.system import load_average, this_machine
from edgekit.runtime.timing import Series, ratio_of_medians
from edgekit.runtime.tolerances import output_tolerance

MODELS = (
    "shvit_s1",
    "shvit_s2",
    "shvit_s3",
    "shvit_s4",
    "care_s0",
    "care_s1",
    "care_s2",
    "shvit_digits",
    "care_digits",
)
SUBJECTS = ("plain", "fp32", "bare", "int8")
RESULTS = Path(__file__).parent / "results"
SETTLING_RUNS, PAUSE_SECONDS = 3, 0.1
FEWEST_RUNS, MOST_RUNS, TURN_MS = 5, 100, 25.0  # a turn lasts about so long, within these numbers of runs

Array = np.ndarray[Any, Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@dataclass(frozen=True)
class Row:
    """One model at one thread count: medians in ms, and ratios (rival's median over plain's) with 95 % intervals."""

    model: str
    threads: int
    p50_ms: dict[str, float]
    ratio_to_plain: dict[str, tuple[float, float, float]]
    session_over_bare: tuple[float, float, float]
    rel_l2: dict[str, float]
    runs: int
    load_average: float | None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    title, facts = heading()  # before anything runs: the tree may change meanwhile
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        for model in options.models.split(","):
            files = _export(model, Path(folder))
            for threads in map(int, options.threads.split(",")):
                rows.append(_measure(model, threads, files, options.rounds))
                print(_markdown_row(rows[-1]), flush=True)
    _write(rows, options.out, options.rounds, title, facts)
    return 0


def _export(model: str, folder: Path) -> dict[str, Path]:
    """The plain export and both bundles, from one model object's weights."""
    print(f"{model}: export", file=sys.stderr, flush=True)
    plain = folder / f"{model}.plain.onnx"
    loaded = load_model(model)
    assert loaded.entry is not None
    args, kwargs, names = loaded.bind(example_inputs(loaded.defaults.shapes))
    with quiet():
        program = torch.onnx.export(
            loaded.module,
            args,
            kwargs=kwargs,
            input_names=names,
            output_names=["logits"],
            opset_version=DEFAULT_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(plain)
    fp32 = edgekit.export(model, "onnx", folder)
    calibration = "random" if loaded.entry.dataset is None else None
    int8 = edgekit.export(model, "onnx", folder, precision="int8", calibration=calibration)
    return {"plain": plain, "fp32": fp32.path, "bare": fp32.path / fp32.manifest.model_file, "int8": int8.path}


def _measure(model: str, threads: int, files: dict[str, Path], rounds: int) -> Row:
    runs = {name: _runner(path, threads) for name, path in files.items()}
    # A stored sample: int8 answers only inputs like those it was calibrated on, as its own samples are.
    inputs = next(iter(edgekit.load(files["int8"]).bundle.samples()))[0]
    errors = _verify(model, runs, inputs)
    load = load_average()
    count = min(MOST_RUNS, max(FEWEST_RUNS, round(TURN_MS / float(np.median(_turn(runs["plain"], inputs, 9))))))
    series: dict[str, list[Series]] = {name: [] for name in runs}
    order, generator = list(runs), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            time.sleep(PAUSE_SECONDS)
            series[name].append(_turn(runs[name], inputs, count))
    flat = {name: float(np.median(np.concatenate(turns))) for name, turns in series.items()}
    return Row(
        model,
        threads,
        {name: round(value, 4) for name, value in flat.items()},
        {name: _ratio(series["plain"], series[name]) for name in SUBJECTS if name != "plain"},
        _ratio(series["bare"], series["fp32"]),
        errors,
        rounds * count,
        load,
    )


def _runner(path: Path, threads: int) -> Run:
    if path.suffix == ".edge":
        return edgekit.load(path, threads=threads).run
    session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _verify(model: str, runs: Mapping[str, Run], inputs: Mapping[str, Array]) -> dict[str, float]:
    """Relative L2 errors against the plain export; refuses to go on where one is out of tolerance."""
    reference = runs["plain"](inputs)["logits"]
    errors = {}
    for name in SUBJECTS[1:]:
        tolerance = output_tolerance("int8" if name == "int8" else "fp32")
        result = compare_arrays(name, reference, runs[name](inputs)["logits"], tolerance=tolerance)
        if not result:
            raise SystemExit(
                f"{model}: {name} differs from the plain export (relative L2 {result.rel_l2:.2e}): not timed"
            )
        errors[name] = float(f"{result.rel_l2:.3g}")
    return errors


def _turn(run: Run, inputs: Mapping[str, Array], count: int) -> Series:
    for _ in range(SETTLING_RUNS):
        run(inputs)
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        run(inputs)
        times.append((time.perf_counter_ns() - start) / 1e6)
    return np.asarray(times)


def _ratio(base: list[Series], other: list[Series]) -> tuple[float, float, float]:
    ratio = ratio_of_medians(base, other)
    return round(ratio.value, 4), round(ratio.low, 4), round(ratio.high, 4)


def _markdown_row(row: Row) -> str:
    cells = [row.model, str(row.threads), f"{row.p50_ms['plain']:.2f}"]
    for name in ("fp32", "int8"):
        value, low, high = row.ratio_to_plain[name]
        cells.append(f"{row.p50_ms[name]:.2f}")
        cells.append(f"{value:.2f} ({low:.2f}-{high:.2f})")
    value, low, high = row.session_over_bare
    cells.append(f"{value:.3f} ({low:.3f}-{high:.3f})")
    return "| " + " | ".join(cells) + " |"


def heading() -> tuple[str, dict[str, Any]]:
    """Machine, versions, commit and time: as a line for Markdown, and as data."""
    machine = this_machine()
    versions = {"edgekit": edgekit.__version__, "onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__)}
    commit = _commit()
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    line = f"{machine_line(machine)}; {named}; commit {commit}; {when}."
    return line, {"when": when, "commit": commit, "machine": asdict(machine), "versions": versions}


def earlier_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run of a benchmark whose parts can be measured one by one; none where there is no file."""
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError):
        return []
    return rows


def _write(rows: list[Row], folder: Path, rounds: int, title: str, facts: dict[str, Any]) -> None:
    fewest = min(row.runs for row in rows)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": "onnx_cpu",
        **facts,
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
    }
    (folder / "onnx_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Bundles against the plain export in bare onnxruntime",
        "",
        title,
        "",
        f"Batch 1, medians of at least {fewest} runs in {rounds} interleaved turns; ratios are to the plain",
        "export (below 1 is faster), with 95 % intervals. Models without shipped weights have random weights and",
        "random calibration: their timing is real, their classes are not. The last column is our session over a bare",
        "onnxruntime session on the same file.",
        "",
        "| model | threads | plain, ms | fp32, ms | fp32 / plain | int8, ms | int8 / plain | session / bare |",
        "|---|---|---|---|---|---|---|---|",
        *map(_markdown_row, rows),
        "",
        "Made by `make bench`.",
    ]
    (folder / "onnx_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(table([[str(folder / name)] for name in ("onnx_cpu.md", "onnx_cpu.json")], ["written"]))


def _commit() -> str:
    """The commit, with a + where the tree has changes that are not committed, other than benchmark results."""
    root = Path(__file__).parent.parent
    try:
        commit = _git(root, "rev-parse", "--short", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+" if changed else commit


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=root).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
