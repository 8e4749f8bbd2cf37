"""What each precision costs in accuracy, on real images: PyTorch and our bundles on scikit-learn's digits.

    python -m benchmarks.digits_accuracy

Every bundle answers all 360 images of the test part, whose labels neither training nor calibration saw. Where `export`
refuses a bundle because it differs too much from PyTorch, it is made with --no-check, measured, and marked.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import edgekit
from benchmarks.onnx_cpu import RESULTS, heading
from edgekit.errors import ExportError
from edgekit.runtime.tolerances import PRECISIONS
from edgekit.runtime.verification import Accuracy

MODELS = ("shvit_digits", "care_digits", "dynamicvis_digits", "hgnn_digits", "lighthgnn_digits")


@dataclass(frozen=True)
class Row:
    model: str
    precision: str
    model_bytes: int
    rel_l2: float
    accuracy: Accuracy
    refused: bool


def main() -> int:
    title, facts = heading()
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        for model in MODELS:
            for precision in PRECISIONS["onnx"]:
                print(f"{model} {precision}", file=sys.stderr, flush=True)
                refused = False
                try:
                    bundle = edgekit.export(model, "onnx", Path(folder), precision=precision)
                except ExportError:
                    refused = True
                    bundle = edgekit.export(model, "onnx", Path(folder), precision=precision, check=False)
                result = edgekit.verify(bundle, data="digits")
                if bool(result) == refused or result.accuracy is None:
                    raise SystemExit(f"{bundle.name}: export and verify disagree: {result}")
                outputs = result.checks[0].outputs
                rel_l2 = max(item.rel_l2 for item in outputs)
                rows.append(Row(model, precision, bundle.size_of_model, rel_l2, result.accuracy, refused))
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "digits_accuracy", **facts, "rows": [asdict(row) for row in rows]}
    (RESULTS / "digits_accuracy.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# Digits: accuracy of PyTorch and of the bundles",
        "",
        title,
        "",
        "360 test images of scikit-learn's handwritten digits, whose labels were never seen in training or",
        "calibration. For hgnn_digits and lighthgnn_digits an image is a vertex; the teacher answers with all 1,797 in",
        "its hypergraph.",
        "",
        "refused: the error is above the tolerance, so `edgekit export` writes such a bundle with --no-check alone.",
        "",
        "| model | precision | model file, KiB | relative L2 error | PyTorch | bundle |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mark = " (refused)" if row.refused else ""
        lines.append(
            f"| {row.model} | {row.precision} | {row.model_bytes / 1024:.0f} | {row.rel_l2:.1e}{mark} | "
            f"{100 * (row.accuracy.pytorch or 0):.2f} % | {100 * row.accuracy.bundle:.2f} % |"
        )
    lines += ["", "Made by `make bench`."]
    (RESULTS / "digits_accuracy.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
