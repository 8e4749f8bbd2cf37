"""Verifications, predictions and raw outputs as lines of plain text, for `python -m edgekit.runtime`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgekit.runtime.kernel_library import kernel_lines
from edgekit.runtime.postprocess import Prediction
from edgekit.runtime.report import table
from edgekit.runtime.session import Array
from edgekit.runtime.verification import Verification, shown_outputs

_CHECK_COLUMNS = ("against", "output", "inputs", "max abs", "rel L2", "tolerance", "cosine", "PSNR", "same top-1", "")


def verification_lines(result: Verification) -> list[str]:
    """Every output's figures, the accuracy, what was left out, and the verdict."""
    rows = []
    for check in result.checks:
        for name, item in shown_outputs(check):
            figures = ["", "", f"{item.tolerance:.0e}", "", "", ""]
            if item.problem is None:
                agreement = "" if item.top1_agreement is None else f"{100 * item.top1_agreement:.0f} %"
                figures = [
                    f"{item.max_abs:.2e}",
                    f"{item.rel_l2:.2e}",
                    f"{item.tolerance:.0e}",
                    f"{item.cosine:.6f}",
                    f"{item.psnr_db:.0f} dB",
                    agreement,
                ]
            verdict = "ok" if item else (item.problem or "differs")
            rows.append((check.against, name, str(check.inputs), *figures, verdict))
    lines = table(rows, _CHECK_COLUMNS, "llrrrrrrrl").splitlines()
    if result.accuracy is not None:
        accuracy = result.accuracy
        lines.append(f"accuracy: {100 * accuracy.bundle:.2f} % of {accuracy.items} items of {accuracy.data}")
    lines += kernel_lines(result.kernels)
    lines += [f"not checked: {note}" for note in result.not_checked]
    return [*lines, f"{'PASSED' if result else 'FAILED'}: {result.bundle} ({result.precision})"]


def prediction_lines(title: str, predictions: Sequence[Prediction]) -> list[str]:
    """The likeliest classes of one image."""
    rows = [
        (str(item.index) if item.label is None else item.label, f"{100 * item.probability:.2f} %", f"{item.score:.4g}")
        for item in predictions
    ]
    return [title, *table(rows, ("class", "probability", "score"), "lrr").splitlines()]


def output_lines(title: str, outputs: Mapping[str, Array]) -> list[str]:
    """Shapes and ranges of raw outputs."""
    rows = []
    for name, array in outputs.items():
        ends = (f"{array.min():.4g}", f"{array.max():.4g}") if array.size else ("", "")
        rows.append((name, str(list(array.shape)), str(array.dtype), *ends))
    return [title, *table(rows, ("output", "shape", "dtype", "min", "max"), "lllrr").splitlines()]


def not_finite_rows(outputs: Mapping[str, Array]) -> dict[str, str]:
    """For each output that holds NaN or infinities, by name, a sentence that says in how many of its rows."""
    notes = {}
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            rows = np.atleast_1d(np.isfinite(array))
            bad = np.count_nonzero(~rows.reshape(len(rows), -1).all(axis=1))
            notes[name] = f"output {name!r} holds NaN or infinities, in {bad} of {len(rows)} rows"
    return notes
