"""Whole models as tvm bundles against onnx bundles of the same models, both through `edgekit.load`, on this CPU.

    python -m benchmarks.tvm_cpu [--models shvit_s1,care_s0] [--threads 1,2] [--rounds 15] [--tune 64]

Subjects per model and thread count, fp32, batch 1:

onnxruntime  our onnx bundle
tvm          our tvm bundle, compiled for this processor with the likeliest tiles
tuned        the same with `--tune N` candidates measured; for one model, see --tune-model

Answers are compared with onnxruntime's before anything is timed; a model whose answers differ is not timed. Subjects
take turns in random order, with a pause before each turn: idle threads of onnxruntime go on spinning, and would take
the processors from TVM's. Medians and their ratios to onnxruntime are reported with bootstrap intervals. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import edgekit
from benchmarks.onnx_cpu import RESULTS, heading
from benchmarks.turns import median, take_turns
from edgekit.kernels.tvm.compat import versions
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.compare import compare_arrays
from edgekit.runtime.session import Array, Session
from edgekit.runtime.system import load_average
from edgekit.runtime.timing import ratio_of_medians
from edgekit.runtime.tolerances import output_tolerance
from edgekit.runtime.tvm_backend import read_build

MODELS = ("shvit_digits", "care_digits", "shvit_s1", "care_s0")
ONNXRUNTIME, TVM, TUNED = "onnxruntime", "tvm", "tuned"
TRIALS = 64


@dataclass(frozen=True)
class Row:
    """One model at one thread count: medians in ms, and ratios (each over onnxruntime's) with 95 % intervals."""

    model: str
    threads: int
    arch: str
    p50_ms: dict[str, float]
    ratio_to_onnxruntime: dict[str, tuple[float, float, float]]
    rel_l2: dict[str, float]
    fewest_runs: int
    load_average: float | None
    tuning: dict[str, Any] | None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tune", type=int, default=TRIALS, metavar="N", help="candidates to measure; 0 for none")
    parser.add_argument("--tune-model", default="shvit_s1", help="the model to tune, if it is one of --models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    title, facts = heading()  # before anything runs: the tree may change meanwhile
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        for model in options.models.split(","):
            bundles = _export(model, Path(folder), options.tune if model == options.tune_model else 0)
            for threads in map(int, options.threads.split(",")):
                rows.append(_measure(model, threads, bundles, options.rounds))
                print(_markdown_row(rows[-1]), flush=True)
    _write(rows, options.out, options.rounds, title, facts)
    return 0


def _export(model: str, folder: Path, tune: int) -> dict[str, Bundle]:
    print(f"{model}: export", file=sys.stderr, flush=True)
    bundles = {
        ONNXRUNTIME: edgekit.export(model, "onnx", folder),
        TVM: edgekit.export(model, "tvm", folder, kernels=[]),
    }
    if tune:
        print(f"{model}: tune, {tune} candidates", file=sys.stderr, flush=True)
        bundles[TUNED] = edgekit.export(model, "tvm", folder / "tuned", kernels=[], tune=tune)
    return bundles


def _measure(model: str, threads: int, bundles: Mapping[str, Bundle], rounds: int) -> Row:
    sessions = {
        name: edgekit.load(bundle, backend="onnxruntime" if name == ONNXRUNTIME else "tvm", threads=threads)
        for name, bundle in bundles.items()
    }
    inputs = next(iter(bundles[ONNXRUNTIME].samples()))[0]
    errors = _verify(model, sessions, inputs)
    load = load_average()
    subjects = {name: partial(session.run, inputs) for name, session in sessions.items()}
    series = take_turns(subjects, rounds=rounds, settling_runs=3)
    ratios = {}
    for name in errors:
        ratio = ratio_of_medians(series[ONNXRUNTIME], series[name])
        ratios[name] = (round(ratio.value, 3), round(ratio.low, 3), round(ratio.high, 3))
    return Row(
        model,
        threads,
        read_build(bundles[TVM])["arch"],
        {name: round(median(turns), 4) for name, turns in series.items()},
        ratios,
        errors,
        min(sum(map(len, turns)) for turns in series.values()),
        load,
        _tuning(bundles.get(TUNED)),
    )


def _verify(model: str, sessions: Mapping[str, Session], inputs: Mapping[str, Array]) -> dict[str, float]:
    """Relative L2 errors against onnxruntime; refuses to go on where one is out of tolerance."""
    reference = sessions[ONNXRUNTIME].run(inputs)
    errors = {}
    for name, session in sessions.items():
        if name == ONNXRUNTIME:
            continue
        results = [
            compare_arrays(output, reference[output], answer, tolerance=output_tolerance("fp32"))
            for output, answer in session.run(inputs).items()
        ]
        worst = max(result.rel_l2 for result in results)
        if not all(results):
            raise SystemExit(f"{model}: {name} differs from onnxruntime (relative L2 {worst:.2e}): not timed")
        errors[name] = float(f"{worst:.3g}")
    return errors


def _tuning(bundle: Bundle | None) -> dict[str, Any] | None:
    """What the search did: candidates measured, seconds, and how many functions it made faster."""
    if bundle is None:
        return None
    tuning = bundle.report()["tuning"]
    kept = sum(record["kept"] for record in tuning["records"])
    return {key: tuning[key] for key in ("trials", "measured", "seconds")} | {"functions_changed": kept}


def _markdown_row(row: Row) -> str:
    cells = [row.model, str(row.threads), f"{row.p50_ms[ONNXRUNTIME]:.2f}"]
    for name in (TVM, TUNED):
        if name in row.p50_ms:
            value, low, high = row.ratio_to_onnxruntime[name]
            cells += [f"{row.p50_ms[name]:.2f}", f"{value:.2f} ({low:.2f}-{high:.2f})"]
        else:
            cells += ["", ""]
    return "| " + " | ".join(cells) + " |"


def _write(rows: list[Row], folder: Path, rounds: int, title: str, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tools = versions()
    document = {
        "benchmark": "tvm_cpu",
        **facts,
        "versions": facts["versions"] | tools,
        "rounds": rounds,
        "rows": [asdict(row) for row in rows],
    }
    (folder / "tvm_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    named = ", ".join(f"{name} {version}" for name, version in tools.items())
    fewest = min(row.fewest_runs for row in rows)
    lines = [
        "# tvm bundles against onnx bundles in onnxruntime",
        "",
        title,
        "",
        f"{named}; compiled for {', '.join(sorted({row.arch for row in rows}))}. fp32, batch 1, both through",
        f"`edgekit.load`; medians of at least {fewest} runs in {rounds} interleaved turns. Ratios are times over",
        "onnxruntime's (below 1 is faster), with 95 % intervals. Models without shipped weights have random weights:",
        "their timing is real, their classes are not.",
        "",
        "| model | threads | onnxruntime, ms | tvm, ms | tvm / onnxruntime | tuned, ms | tuned / onnxruntime |",
        "|---|---|---|---|---|---|---|",
        *map(_markdown_row, rows),
        "",
    ]
    searches = {row.model: row.tuning for row in rows if row.tuning is not None}
    for model, tuning in searches.items():
        lines += [
            f"Tuning {model} measured {tuning['measured']} candidates in {tuning['seconds']:.0f} s and changed "
            f"{tuning['functions_changed']} functions.",
            "",
        ]
    lines.append("Made by `python -m benchmarks.tvm_cpu`.")
    (folder / "tvm_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {folder / 'tvm_cpu.md'}, {folder / 'tvm_cpu.json'}")


if __name__ == "__main__":
    sys.exit(main())
