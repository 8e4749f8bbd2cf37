"""What each precision costs in a Core ML package: size, error against PyTorch and accuracy, on the reference runtime.

    python -m benchmarks.coreml_accuracy [--models NAMES] [--precisions NAMES]

Every package is run op by op by edgekit's reference runtime (`coreml-reference`): values rounded to fp16 where the
program says so, sums in fp32. `fp16sum` is the same program with sums in fp16, the pessimistic end; it is slow, and
asked of fp16 packages of up to a billion multiply-accumulates alone. Apple's runtime was not asked. Digits models
answer all 360 test images (hgnn_digits all 1,797 vertices, of which 360 count). Rows of other models and precisions
stay as they are in the results.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import edgekit
from benchmarks.onnx_cpu import RESULTS, heading
from edgekit.errors import ExportError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.tolerances import PRECISIONS
from edgekit.runtime.verification import verify_samples

DIGITS = ("shvit_digits", "care_digits", "dynamicvis_digits", "hgnn_digits", "lighthgnn_digits")
MODELS = (*DIGITS, "dhsa_bytes", "shvit_s1", "care_s0", "dynamicvis_base")
NAME = "coreml_accuracy"
_RUNS = 3
_MOST_MACS = 1_000_000_000


@dataclass(frozen=True)
class Row:
    """One package. Errors are relative L2, the largest of all outputs; of `logits` alone for a language model.

    `seconds` is one run of the reference runtime, the median of a few; `refused` says why the export takes --no-check.
    """

    model: str
    precision: str
    package_bytes: int
    rel_l2: float | None
    rel_l2_fp16sum: float | None
    asked_fp16sum: bool
    top1: float | None
    pytorch: float | None
    bundle: float | None
    seconds: float
    refused: bool


def measure(model: str, precision: str, folder: Path) -> Row:
    """Export, verify in both modes, and measure accuracy where there are labels."""
    refused = False
    try:
        bundle = edgekit.export(model, "coreml", folder, precision=precision)
    except ExportError as error:
        print(f"{model} {precision}: {error}", file=sys.stderr, flush=True)
        refused = True
        bundle = edgekit.export(model, "coreml", folder, precision=precision, check=False)
    typed, top1, seconds = _errors(bundle, "coreml-reference")
    if cost := bundle.report().get("against_fp32"):  # a language model's samples are of the weights as stored
        typed = max(part["logits_rel_l2"] for part in cost.values())
        top1 = min(part["top1_agreement"] for part in cost.values())
    macs = bundle.manifest.model.macs
    asked = precision == "fp16" and (macs or 0) <= _MOST_MACS
    pessimistic = _errors(bundle, "coreml-reference-fp16sum")[0] if asked else None
    accuracy = edgekit.verify(bundle, data="digits").accuracy if model in DIGITS else None
    return Row(
        model,
        precision,
        bundle.size_of_model,
        typed,
        pessimistic,
        asked,
        top1,
        accuracy.pytorch if accuracy else None,
        accuracy.bundle if accuracy else None,
        seconds,
        refused,
    )


def _errors(bundle: Bundle, backend: str) -> tuple[float | None, float | None, float]:
    """The largest error, the share of equal best classes or next tokens, and the seconds of one run."""
    worst, shares, seconds = 0.0, [], 0.0
    for part in bundle.parts().values():
        session = edgekit.load(part, backend=backend)
        outputs = verify_samples(session).outputs
        if bundle.manifest.generation is not None:
            outputs = tuple(item for item in outputs if item.name == "logits")
        worst = max(worst, *(math.inf if item.problem else item.rel_l2 for item in outputs))
        shares += [item.top1_agreement for item in outputs if item.top1_agreement is not None]
        inputs = next(iter(part.samples()))[0]
        times = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            session.run(inputs)
            times.append(time.perf_counter() - start)
        seconds = max(seconds, sorted(times)[_RUNS // 2])
    return (worst if math.isfinite(worst) else None), (min(shares) if shares else None), seconds


def report(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown."""

    def error(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.1e}"

    def share(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.2f} %"

    lines = [
        "# Core ML packages: size, error and accuracy by precision",
        "",
        title,
        "",
        "Run by edgekit's reference runtime, not by Apple's: fp16 values are rounded as the program says, sums are in",
        "fp32; under `with fp16 sums` they are in fp16 too, which is the pessimistic end. Errors are relative L2",
        "against PyTorch in fp32 over the stored samples, the largest of all outputs (of dhsa_bytes: the logits of all",
        "functions, with few bits on other texts against the weights before). Accuracy: 360 test images of",
        "scikit-learn's digits. All but fp32 compute in fp16; int8, int4 and palette4 to palette8 say how the weights",
        "are stored. seconds: one run of the reference runtime, on a busy machine.",
        "",
        "refused: the error is above the tolerance, so `edgekit export` writes such a bundle with --no-check alone.",
        "",
        "| model | precision | package, KiB | error | with fp16 sums | same best class | PyTorch | package | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " (refused)" if row["refused"] else ""
        pessimistic = error(row["rel_l2_fp16sum"]) if row["asked_fp16sum"] else ""
        lines.append(
            f"| {row['model']} | {row['precision']} | {row['package_bytes'] / 1024:,.0f} | "
            f"{error(row['rel_l2'])}{mark} | {pessimistic} | {share(row['top1'])} | {share(row['pytorch'])} | "
            f"{share(row['bundle'])} | {row['seconds']:.3f} |"
        )
    return "\n".join([*lines, "", f"Made by `python -m benchmarks.{NAME}`."]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS["coreml"]))
    options = parser.parse_args(arguments)
    title, facts = heading()
    path = RESULTS / f"{NAME}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = {(row["model"], row["precision"]): row for row in before}
    for model in options.models.split(","):
        for precision in options.precisions.split(","):
            print(f"{model} {precision}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
                rows[model, precision] = asdict(measure(model, precision, Path(folder)))
            ordered = [rows[m, p] for m in MODELS for p in PRECISIONS["coreml"] if (m, p) in rows]
            RESULTS.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"benchmark": NAME, **facts, "rows": ordered}, indent=2) + "\n", "utf-8")
            path.with_suffix(".md").write_text(report(title, ordered), "utf-8")
    print(report(title, ordered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
