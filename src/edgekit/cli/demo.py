"""`edgekit demo`: the whole job on real input, in about a minute, with one table at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgekit
from edgekit.cli.console import Output
from edgekit.cli.render import percent2
from edgekit.errors import MissingDependencyError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.report import bytes_, ms
from edgekit.runtime.verification import Verification

SMALL, LARGE = "shvit_digits", "shvit_s1"
PRECISIONS = ("fp32", "fp16", "int8")
PICTURE_SIZE = 128


@dataclass(frozen=True)
class _Row:
    bundle: Bundle
    verification: Verification
    p50_ms: float
    stability: str

    def cells(self) -> tuple[str, ...]:
        check = self.verification.checks[0]
        accuracy = self.verification.accuracy
        both = "no trained weights"
        if accuracy is not None and accuracy.pytorch is not None:
            both = f"{percent2(accuracy.pytorch)} -> {percent2(accuracy.bundle)}"
        return (
            self.bundle.path.name,
            bytes_(self.bundle.size_of_model),
            f"{max(item.rel_l2 for item in check.outputs):.1e}",
            both,
            ms(self.p50_ms),
            self.stability,
            "passed" if self.verification else "FAILED",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": str(self.bundle.path),
            "model_bytes": self.bundle.size_of_model,
            "verification": self.verification.to_json(),
            "p50_ms": self.p50_ms,
            "stability": self.stability,
        }


def demo(output: Output, out: Path) -> bool:
    """Export, verify, profile and run; True where every check passed.

    Raises `MissingDependencyError` without scikit-learn, whose digits are the real input.
    """
    rows = []
    for precision in PRECISIONS:
        rows.append(_bundle(output, SMALL, precision, out, data="digits"))
    right, shown, picture = _read_digits(output, rows[0].bundle, out)
    rows.append(_bundle(output, LARGE, "fp32", out, data=None))
    passed = all(row.verification for row in rows)
    columns = ("bundle", "model", "rel. error", "accuracy: PyTorch -> bundle", "p50, 1 thread", "timing", "check")
    output.line()
    output.table(columns, [row.cells() for row in rows], right=columns[1:3] + columns[4:5])
    output.line()
    output.line(
        f"{SMALL} read {right} of these {shown} handwritten digits right; the accuracy is that on all test images."
    )
    output.line(f"{LARGE} has random weights here: its speed and its agreement are real, its classes mean nothing.")
    output.line(f"next: edgekit run {rows[0].bundle.path} {picture}")
    output.json({"passed": passed, "digits_right": right, "digits_shown": shown, "rows": [r.to_json() for r in rows]})
    return passed


def _bundle(output: Output, model: str, precision: str, out: Path, *, data: str | None) -> _Row:
    with output.steps(f"{model} {precision}: export, verify, measure", detail=False) as step:
        bundle = edgekit.export(model, "onnx", out, precision=precision, progress=step)
        verification = edgekit.verify(bundle, data=data, progress=step)
        step("measure")
        profile = edgekit.profile(bundle, threads=1, max_seconds=2.0, ops=False)
    return _Row(bundle, verification, profile.latency_ms.p50, profile.stability.verdict)


def _read_digits(output: Output, bundle: Bundle, out: Path) -> tuple[int, int, Path]:
    """Write one picture of each digit as a PNG, read them back through the bundle, and count the right ones."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("Pillow", "cli", "writing the demo's pictures") from error
    from edgekit.models.digits import load_digits_split

    images, labels = load_digits_split("test")
    folder = out / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    session = edgekit.load(bundle)
    rows, right, path = [], 0, folder
    for digit in range(10):
        index = int((labels == digit).nonzero()[0][-1])
        path = folder / f"digit-{digit}.png"
        # Enlarged for the eye; the bundle's preprocessing brings it to its own size.
        Image.fromarray(images[index]).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BILINEAR).save(path)
        best = session.predict(path, k=1)[0]
        right += best.label == str(digit)
        rows.append((str(path), str(digit), best.label or "", f"{100 * best.probability:.1f} %"))
    output.line()
    output.table(("picture", "is", "read as", "probability"), rows, right=("probability",))
    return right, len(rows), path
