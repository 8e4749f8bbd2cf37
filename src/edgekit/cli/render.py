"""How results look: tables for people and the same content as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.cli.console import Output
from edgekit.cli.inspection import coreml_export_lines, coreml_lines, generation_lines, tensor_lines
from edgekit.errors import InputError
from edgekit.models.registry import ImageInput, ModelEntry, TokenInput
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_generation import prefill_sizes
from edgekit.runtime.datasets import load_dataset
from edgekit.runtime.images import is_image
from edgekit.runtime.kernel_library import bundle_kernels, kernel_lines
from edgekit.runtime.mac_report import mac_lines, read_mac_report
from edgekit.runtime.profiler import Profile, ProfileComparison
from edgekit.runtime.report import bytes_, comparison_lines, percent, profile_lines
from edgekit.runtime.session import Session
from edgekit.runtime.text import not_finite_rows
from edgekit.runtime.tvm_backend import read_build
from edgekit.runtime.verification import Check, LayerReport, Verification, finite, shown_outputs

if TYPE_CHECKING:
    from edgekit.devices import Diagnosis

LAYER_ROWS = 12
# A narrower terminal would break the words of `edgekit list`'s last column, so that it goes without it.
SUMMARY_WIDTH = 105


def models(output: Output) -> None:
    """`edgekit list`."""
    from edgekit.models import list_models, model_entry

    rows: list[tuple[str, ...]] = []
    data = []
    for name in list_models():
        entry = model_entry(name)
        accuracy = shipped_accuracy(name) if entry.weights else None
        if accuracy is not None:
            weights = f"shipped, {100 * accuracy:.1f} % on {entry.dataset}"
        else:
            weights = f"shipped, trained on {entry.dataset}" if entry.weights else "bring your own"
        shown, described, unit = _input_of(entry)
        macs = f"{entry.macs / 1e6:,.1f} M" if unit == "image" else f"{entry.macs / 1e3:,.1f} k/{unit}"
        rows.append((name, f"{entry.parameters:,}", macs, shown, weights, entry.summary))
        data.append(
            {
                "name": name,
                "family": entry.family,
                "parameters": entry.parameters,
                "macs": entry.macs,
                "macs_per": unit,
                "input": described,
                "classes": entry.num_classes,
                "weights": "shipped" if entry.weights else None,
                "accuracy": accuracy,
                "paper": entry.paper,
                "summary": entry.summary,
            }
        )
    columns: tuple[str, ...] = ("model", "parameters", "MACs", "input", "weights", "")
    if output.out.width < SUMMARY_WIDTH:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    output.table(columns, rows, right=columns[1:3], whole=columns[:1])
    output.line()
    output.line("MACs per token count the linear layers, not attention")
    output.line("next: edgekit export shvit_digits --target onnx -o out")
    output.json(data)


def _input_of(entry: ModelEntry) -> tuple[str, list[int] | list[dict[str, Any]], str]:
    """A model's input for the table and for JSON, and what its MACs count: one image, one row of its input, one token.

    The table shows the first of several tensors. JSON has channels, height and width of an image, else the tensors.
    """
    if isinstance(entry.input, ImageInput):
        sizes = [entry.input.channels, entry.input.size, entry.input.size]
        return "x".join(map(str, sizes)), sizes, "image"
    if isinstance(entry.input, TokenInput):
        ids = {"name": entry.input.name, "shape": ["B", "N"], "dtype": "int64", "index_of": str(entry.input.vocab_size)}
        return f"{entry.input.context:,} tokens", [{**ids, "context": entry.input.context}], "token"
    defaults = entry.arguments()
    tensors: list[dict[str, Any]] = []
    for tensor in entry.input.tensors:
        shape = [defaults.get(dim, dim) if isinstance(dim, str) else dim for dim in tensor.dims]
        tensors.append({"name": tensor.name, "shape": shape, "dtype": tensor.dtype, "index_of": tensor.index_of})
    first = "x".join(map(str, tensors[0]["shape"]))
    return f"{first}, .." if len(tensors) > 1 else first, tensors, entry.input.unit


def shipped_accuracy(name: str) -> float | None:
    """The measured test accuracy in the JSON beside a model's shipped weights, 0 to 1; None where it has none."""
    file = resources.files("edgekit.models") / "pretrained" / f"{name}.json"
    if not file.is_file():
        return None
    accuracy = json.loads(file.read_text(encoding="utf-8")).get("test_accuracy")
    return None if accuracy is None else float(accuracy)


def exported(output: Output, bundles: Sequence[Bundle]) -> None:
    """`edgekit export`: where the bundles are, how they compare with PyTorch, and what to type next."""
    rows = []
    for bundle in bundles:
        manifest = bundle.manifest
        figures = manifest.verification.get("outputs") or []
        error = f"{max(item['rel_l2'] or 0.0 for item in figures):.1e}" if figures else "not checked"
        weights = manifest.model.weights
        origin = f"random (seed {weights.seed})" if weights.source == "random" else weights.source
        rows.append((str(bundle.path), manifest.precision, origin, bytes_(_size_on_disk(bundle)), error))
    output.table(("bundle", "precision", "weights", "size", "relative error"), rows, right=("size", "relative error"))
    for bundle in bundles:
        against = bundle.report().get("against_fp32", {})
        for part, figures in against.items():
            output.line(
                f"{part}: logits of int4 differ from those of the weights before by {figures['logits_rel_l2']:.2g} "
                f"(relative L2), the same next token in {percent(figures['top1_agreement'])} of a few texts"
            )
        cost = bundle.report().get("precision")
        if cost:
            for line in cost_lines(bundle, cost):
                output.line(line)
    output.line()
    first = bundles[0]
    where = ", on the bundle's device" if first.manifest.verification.get("reason") else ""
    backend = " --backend tvm" if first.manifest.target == "tvm" else ""
    for bundle in bundles:
        if bundle.path.is_dir():  # a packed one holds what the folder beside it says
            for line in coreml_export_lines(bundle):
                output.line(line)
    output.line(f"next{where}: edgekit verify {first.path}{backend}")
    output.json([_bundle_json(bundle) for bundle in bundles])


def cost_lines(bundle: Bundle, cost: dict[str, Any]) -> list[str]:
    """What a lower precision cost and gained, in words."""
    precision = bundle.manifest.precision
    lines = [
        f"{cost['speed']['verdict']} ({cost['speed'][f'{precision}_p50_ms']:.3g} ms against "
        f"{cost['speed']['fp32_p50_ms']:.3g} ms); the model file is {percent(cost['size_ratio'])} of fp32's"
    ]
    accuracy, agreement = cost.get("accuracy"), cost.get("agreement")
    if accuracy:
        lines.append(
            f"accuracy: PyTorch {percent2(accuracy['pytorch'])}, fp32 {percent2(accuracy['fp32'])}, "
            f"{precision} {percent2(accuracy[precision])} on {accuracy['data']}"
        )
    elif agreement:
        lines.append(
            f"same top-1 class as fp32 on {percent2(agreement['top1'])} of {agreement['items']} items of "
            f"{agreement['data']}; measure the real cost with: edgekit verify {bundle.path} --data LABELLED"
        )
    return lines


def percent2(share: float) -> str:
    """A share in percent with two digits: accuracies differ in those."""
    return f"{100 * share:.2f} %"


def verification(output: Output, result: Verification) -> None:
    """`edgekit verify`."""
    rows, styles = [], []
    for check in result.checks:
        for row, good in _check_rows(check):
            rows.append(row)
            styles.append(None if good else "red")
    columns = ("against", "output", "inputs", "max abs", "rel L2", "tolerance", "cosine", "PSNR", "same top-1", "")
    output.table(columns, rows, right=columns[2:-1], styles=styles)
    if result.accuracy:
        accuracy = result.accuracy
        reference = f"PyTorch {percent2(accuracy.pytorch)}, " if accuracy.pytorch is not None else ""
        output.line(f"accuracy: {reference}bundle {percent2(accuracy.bundle)} on {accuracy.data}")
    if result.layers is not None:
        _layers(output, result.layers)
    for line in kernel_lines(result.kernels):
        output.line(line)
    for note in result.not_checked:
        output.line(f"not checked: {note}")
    output.line(
        f"{'PASSED' if result else 'FAILED'}: {result.bundle} ({result.precision})",
        "bold green" if result else "bold red",
    )
    output.json(result.to_json())


def _check_rows(check: Check) -> list[tuple[tuple[str, ...], bool]]:
    rows: list[tuple[tuple[str, ...], bool]] = []
    for name, item in shown_outputs(check):
        verdict = "ok" if item else (item.problem or "differs")
        agreement = "" if item.top1_agreement is None else f"{100 * item.top1_agreement:.0f} %"
        row = (
            check.against,
            name,
            str(check.inputs),
            f"{item.max_abs:.2e}",
            f"{item.rel_l2:.2e}",
            f"{item.tolerance:.2g}",
            f"{item.cosine:.6f}",
            f"{item.psnr_db:.0f} dB",
            agreement,
            verdict,
        )
        rows.append((row, bool(item)))
    return rows


def _layers(output: Output, report: LayerReport) -> None:
    """The worst layers and the first bad one; all layers are in the JSON."""
    ranked = sorted(report.layers, key=lambda layer: -np.nan_to_num(layer.comparison.rel_l2, nan=np.inf))
    worst = set(map(id, ranked[:LAYER_ROWS]))
    if report.first_bad is not None:
        worst.add(id(report.first_bad))
    rows, styles = [], []
    for index, layer in enumerate(report.layers, 1):
        if id(layer) not in worst:
            continue
        shape = "x".join(map(str, layer.shape))
        figures = layer.comparison
        mark = "ok" if layer else (figures.problem or "differs")
        rows.append(
            (
                str(index),
                layer.layer,
                layer.module,
                layer.op,
                shape,
                f"{figures.max_abs:.2e}",
                f"{figures.rel_l2:.2e}",
                f"{figures.cosine:.6f}",
                mark,
            )
        )
        styles.append(None if layer else "red")
    output.table(
        ("#", "layer", "module", "op", "shape", "max abs", "rel L2", "cosine", ""),
        rows,
        title=f"The {len(rows)} worst of {len(report.layers)} layers, in order (tolerance {report.tolerance:.2g})",
        right=("#", "max abs", "rel L2", "cosine"),
        styles=styles,
    )
    bad = report.first_bad
    if bad is None:
        output.line(f"all {len(report.layers)} layers are within the tolerance")
    else:
        output.line(
            f"first layer out of tolerance: {bad.layer} ({bad.op} in {bad.module or 'the top module'}), "
            f"relative L2 error {bad.comparison.rel_l2:.2e}"
        )


def measured(output: Output, result: Profile | ProfileComparison) -> None:
    """`edgekit profile`, alone and with `--vs`."""
    for line in profile_lines(result) if isinstance(result, Profile) else comparison_lines(result):
        output.line(line)
    output.json(result.to_json())


def run(output: Output, session: Session, paths: Sequence[Path], *, top: int, save: Path | None) -> None:
    """`edgekit run`: classes with probabilities for images, shapes and ranges for arrays."""
    data: list[dict[str, Any]] = []
    raw: dict[str, np.ndarray[Any, Any]] = {}
    for path in paths:
        if is_image(path):
            spec = session.inputs[0]
            if spec.preprocessing is None:
                raise InputError(
                    f"{session.bundle.name} has no image preprocessing; give it arrays (.npy, .npz), or export it "
                    "again with --preprocessing"
                )
            answers = session.run({spec.name: spec.preprocessing(path)})
            predictions = session.predict(path, k=top)
            rows = [(p.label or str(p.index), f"{100 * p.probability:.2f} %", f"{p.score:.4g}") for p in predictions]
            output.table(("class", "probability", "score"), rows, title=str(path), right=("probability", "score"))
            found = [
                {"index": p.index, "label": p.label, "probability": p.probability, "score": p.score}
                for p in predictions
            ]
            data.append({"input": str(path), "predictions": found})
        else:
            answers = _run_arrays(session, path)
            ranges = [
                (name, str(list(a.shape)), str(a.dtype), f"{a.min():.4g}", f"{a.max():.4g}")
                for name, a in answers.items()
            ]
            output.table(("output", "shape", "dtype", "min", "max"), ranges, title=str(path), right=("min", "max"))
            data.append({"input": str(path), "outputs": {name: array.tolist() for name, array in answers.items()}})
        prefix = f"{path.stem}/" if len(paths) > 1 else ""
        raw.update({f"{prefix}{name}": array for name, array in answers.items()})
        for note in (not_finite := not_finite_rows(answers)).values():
            output.line(f"note: {note}")
        if not_finite:
            data[-1]["not_finite"] = not_finite
    for note in filter(None, (session.kernels_note, session.threads_note)):
        output.line(f"note: {note}")
    weights = session.bundle.manifest.model.weights
    if weights.source == "random":
        output.line(f"note: this bundle has random weights (seed {weights.seed}); its classes mean nothing")
    if save is not None:
        try:
            np.savez(save, **raw)  # type: ignore[arg-type]  # numpy types the keywords as its own options
        except OSError as error:
            raise InputError(f"cannot write {save}: {error.strerror or error}") from error
        output.line(f"outputs written to {save}")
    output.json(finite(data))


def _run_arrays(session: Session, path: Path) -> dict[str, np.ndarray[Any, Any]]:
    data = load_dataset(
        path,
        input_name=session.inputs[0].name,
        preprocessing=session.inputs[0].preprocessing,
        input_shapes={spec.name: spec.shape for spec in session.inputs},
        labels=session.bundle.manifest.labels,
    )
    return session.run(data.inputs)


def inspect(output: Output, bundle: Bundle, kernels: str = "auto") -> None:
    """`edgekit inspect`; `kernels` as for `edgekit.load`."""
    manifest = bundle.manifest
    compiled = read_build(bundle) if manifest.target == "tvm" else None
    nodes = [item for part in bundle.parts().values() for item in bundle_kernels(part, kernels)]
    model, weights = manifest.model, manifest.model.weights
    in_words = (
        "" if not model.macs else f"{model.macs / 1e6:,.1f} M" if model.macs > 1e5 else f"{model.macs / 1e3:,.1f} k"
    )
    per = " per token" if manifest.generation is not None else ""
    macs = f", {in_words} MACs{per}" if in_words else ""
    origin = {"random": f"random, seed {weights.seed}", "file": f"from {weights.file}"}.get(
        weights.source, weights.source
    )
    opsets = ", ".join(f"{domain} {version}" for domain, version in manifest.opsets.items())
    versions = f", opset {opsets}, IR {manifest.ir_version}" if opsets else ""
    if manifest.coreml is not None:
        versions = ""
    if compiled is not None:
        versions = f", native code for {compiled['arch']}"
    output.line(f"{bundle.name}: {model.source}, {model.parameters:,} parameters{macs}", "bold")
    output.line(f"weights    {origin} (SHA-256 {weights.sha256[:16]}..)")
    output.line(f"target     {manifest.target}, {manifest.precision}{versions}")
    for line in coreml_lines(manifest):
        output.line(line)
    if manifest.calibration:
        output.line(f"calibrated on {manifest.calibration}")
    if manifest.generation is not None:
        for line in generation_lines(manifest.generation, list(prefill_sizes(bundle))):
            output.line(line)
    for name, part in bundle.parts().items():
        if name:
            output.line(f"graph      {name}, in {part.manifest.model_file}")
        for line in tensor_lines(part.manifest):
            output.line(line)
    if manifest.labels:
        shown = ", ".join(manifest.labels[:8]) + (", .." if len(manifest.labels) > 8 else "")
        output.line(f"labels     {len(manifest.labels)}: {shown}")
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    output.line(f"made with  {tools}")
    output.line()
    counts = {name: part.manifest.ops for name, part in bundle.parts().items()}
    every = list(dict.fromkeys(op for ops in counts.values() for op in ops))
    ranked = sorted(every, key=lambda op: -max(ops.get(op, 0) for ops in counts.values()))
    columns = ("op", "nodes") if len(counts) == 1 else ("op", *(f"nodes of {name}" for name in counts))
    rows = [(op, *(str(ops.get(op, 0)) for ops in counts.values())) for op in ranked]
    output.table(columns, rows, right=columns[1:])
    output.line()
    if nodes:
        served = [(item.node, item.op, item.kernel) for item in nodes]
        output.table(("node", "custom op", "kernel on this machine"), served)
        for reason in dict.fromkeys(item.reason for item in nodes):
            output.line(f"{'from ' if nodes[0].native else ''}{reason}")
        output.line()
    if compiled is not None and compiled["kernels"]:
        served = [(entry["node"], entry["op"], entry["symbol"]) for entry in compiled["kernels"]]
        output.table(("node", "custom op", "kernel in the library"), served)
        output.line()
    if (measured_on_mac := read_mac_report(bundle)) is not None:
        for line in mac_lines(measured_on_mac):
            output.line(line)
        output.line()
    files = [(name, entry.role, bytes_(entry.size), entry.sha256) for name, entry in manifest.files.items()]
    output.table(("file", "role", "size", "SHA-256 (checked)"), files, right=("size",))
    listed = compiled["kernels"] if compiled is not None else [vars(item) for item in nodes]
    output.json(_bundle_json(bundle) | {"kernels": listed})


def diagnosis(output: Output, result: Diagnosis) -> None:
    """`edgekit doctor`."""
    from edgekit.devices.report import diagnosis_lines

    for line in diagnosis_lines(result):
        output.line(line)
    output.json(result.to_json())


def _bundle_json(bundle: Bundle) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(bundle.manifest.to_json())
    return {"path": str(bundle.path), "manifest": manifest, "report": bundle.report()}


def _size_on_disk(bundle: Bundle) -> int:
    return bundle.path.stat().st_size if bundle.packed else bundle.size
