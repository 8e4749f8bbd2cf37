"""The `coreml` target as a bundle: convert, check on the reference runtime, and write what a Mac needs next."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import ExportError, InputError, MissingDependencyError
from edgekit.export import coreml as coreml_target
from edgekit.export.calling import tensor_leaves
from edgekit.export.coreml_compress import SMALL, facts
from edgekit.export.coreml_options import CoreMLOptions
from edgekit.export.coreml_package import describe, write_package
from edgekit.export.coreml_tools import quiet_tools, tools
from edgekit.export.coreml_trace import Traced, bounded, check_listed, outer_shapes, trace
from edgekit.export.data import load_labelled
from edgekit.export.language_model import LanguagePlan
from edgekit.export.onnx import example_inputs
from edgekit.export.pixels import takes_pixels, with_dtypes, with_pixels
from edgekit.export.plan import Plan
from edgekit.export.samples import batch_size, samples_of
from edgekit.export.steps import compare_with_torch, manifest_of, recorded_tolerance, with_check
from edgekit.export.zoo import NAMED
from edgekit.models.registry import ImageInput
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples, bundle_stem
from edgekit.runtime.coreml_info import CoreMLInfo
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.session import load
from edgekit.runtime.verification import Check, classify, score_output, share_correct

BACKEND = "coreml-reference"
NOT_RUN = "Apple's Core ML and the Neural Engine, which run on Apple's systems alone"


@dataclass(frozen=True)
class _Job:
    """One export: `plan` is what PyTorch takes, `outer` the same for the package, on which everything is compared."""

    plan: Plan
    outer: Plan
    options: CoreMLOptions
    recipe: ImagePreprocessing | None
    labels: tuple[str, ...] | None


def export_coreml(plan: Plan, options: CoreMLOptions, destination: Path) -> Bundle:
    """Trace, convert, check against PyTorch on the reference runtime, compress, check again, and write the bundle.

    Raises:
        ExportError: it could not be converted, or the result differs from PyTorch. Nothing is left behind.
        InputError: an image input where there can be none, or a deployment target that is too old.
        ShapeError: dynamic sizes that Core ML has not.
    """
    job = _job(plan, options)
    with BundleWriter(destination) as writer:
        started = time.perf_counter()
        traced = trace(job.plan, job.recipe, options.layout, probabilities=job.labels is not None)
        plan.step("convert to Core ML")
        report: dict[str, Any] = {}
        if options.precision in SMALL and plan.check:
            report["precision_before"] = _checked_in_fp16(job, traced)
            plan.step(f"convert to Core ML with weights as {options.precision}")
        exported = _convert(job, traced)
        if options.layout == "ane":
            report["layout"] = _layout_gain(job, exported)
        samples = samples_of(job.outer, list(traced.names))
        bundle, check = _write(writer, job, exported, samples, options.precision)
        manifest = checked_manifest(bundle.manifest, check, recorded_tolerance(job.outer, options.precision, "coreml"))
        report["export"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "ops": sum(exported.ops.values()),
            "lowered": exported.lowered,
            "layout_changes": list(traced.changes),
        }
        if plan.check and (accuracy := _accuracy(job, bundle)):
            report["accuracy"] = accuracy
        return writer.finish(manifest, report)


def _layout_gain(job: _Job, exported: coreml_target.CoreMLExport) -> str:
    """What the layout changed in the eyes of the lint: the model is converted a second time, in the standard layout."""
    from edgekit.export.lint import layout_scores, lint_model

    job.plan.step("compare with the standard layout")
    before = _convert(job, trace(job.plan, job.recipe, "standard", probabilities=job.labels is not None))
    return layout_scores(lint_model(before.model), lint_model(exported.model))


def export_language(
    plan: LanguagePlan, options: CoreMLOptions, destination: Path, given: dict[str, object | None]
) -> Bundle:
    """A language model as a package with a state; see `edgekit.export.coreml_language`."""
    from edgekit.export.coreml_language import export_language_coreml

    try:
        return export_language_coreml(plan, options, destination, given)
    except OSError as error:
        raise ExportError(f"writing {destination} failed: {error.strerror or error}; nothing was left there") from error


def checked_manifest(manifest: Manifest, check: Check | None, tolerance: float | None) -> Manifest:
    """The manifest with the figures of the check, and with what checked it: never Apple's runtime."""
    manifest = with_check(manifest, check, tolerance)
    ran = {"runtime": BACKEND} if check is not None else {}
    return replace(manifest, verification={**manifest.verification, **ran, "not_run": NOT_RUN})


def add_companions(writer: BundleWriter, manifest: Manifest, tolerance: float | None) -> None:
    """The Swift package and the script for a Mac, which know the model from the manifest."""
    from edgekit.export.coreml_swift import write_swift
    from edgekit.export.mac_check import write_check

    write_swift(writer, manifest, tolerance=tolerance)
    write_check(writer, manifest, tolerance=tolerance)


def _job(plan: Plan, options: CoreMLOptions) -> _Job:
    plan = replace(plan, shapes=bounded(plan.shapes))
    check_listed(plan.shapes, options.deployment_target)
    recipe = _pixels(plan, options)
    shapes = outer_shapes(plan.shapes, pixels=recipe is not None)
    changed = {p.name: p.dtype for p, s in zip(plan.shapes, shapes, strict=True) if p.dtype == "int64" != s.dtype}
    loaded = with_dtypes(plan.loaded, changed) if changed else plan.loaded
    if recipe is not None:
        loaded = with_pixels(loaded, recipe)
    outer = replace(plan, loaded=loaded, shapes=shapes, preprocessing=recipe or plan.preprocessing)
    return _Job(plan, outer, options, recipe, _labels(plan))


def _pixels(plan: Plan, options: CoreMLOptions) -> ImagePreprocessing | None:
    """The recipe of an image input, None for an array."""
    recipe, first = plan.preprocessing, plan.shapes[0]
    fits = takes_pixels(recipe) and all(isinstance(dim, int) for dim in first.dims) and first.dims[0] == 1
    if options.input == "tensor" or not fits:
        if options.input == "image":
            reason = "it has no preprocessing" if recipe is None else f"its first input is {first}"
            raise InputError(
                f"{plan.loaded.name} can take no Core ML image, which is one image of fixed size with a preprocessing "
                f"in NCHW ({reason}); leave --input out"
            )
        return None
    return None if recipe is None else replace(recipe, pixels=True)


def _labels(plan: Plan) -> tuple[str, ...] | None:
    """The names of the classes where the package can tell them: one row of scores, each class with its own name."""
    labels = plan.labels
    if labels is None or len(set(labels)) < len(labels) or plan.shapes[0].dims[:1] != (1,):
        return None
    answer = tensor_leaves(plan.loaded.call(example_inputs(plan.shapes, seed=plan.seed)))
    return labels if [tuple(leaf.shape) for leaf in answer] == [(1, len(labels))] else None


def _manifest(job: _Job, exported: coreml_target.CoreMLExport, precision: str) -> Manifest:
    options, spec = job.options, exported.spec
    manifest = manifest_of(job.outer, exported, precision, None)
    dtypes = zip(job.plan.shapes, job.outer.shapes, strict=True)
    info = CoreMLInfo(
        deployment_target=options.deployment_target,
        specification_version=spec.specificationVersion,
        layout=options.layout,
        compute_precision=options.compute_precision,
        image_input=exported.inputs[0].name if job.recipe is not None else None,
        input_dtypes={before.name: before.dtype for before, after in dtypes if before.dtype == "int64" != after.dtype},
        label_outputs=exported.label_outputs,
        compression=facts(spec, precision) if precision in SMALL else {},
    )
    return replace(
        manifest,
        target="coreml",
        opsets={"coreml": spec.specificationVersion},
        ops=exported.ops,
        tools=tools(),
        coreml=info,
    )


def _write(
    writer: BundleWriter, job: _Job, exported: coreml_target.CoreMLExport, samples: Samples, precision: str
) -> tuple[Bundle, Check | None]:
    manifest = _manifest(job, exported, precision)
    assert manifest.coreml is not None  # just made
    spec = exported.spec
    describe(
        spec,
        job.plan.loaded,
        manifest.coreml,
        precision,
        manifest.inputs,
        manifest.outputs,
        labels=manifest.labels,
    )
    with quiet_tools():
        weights = exported.model.weights_dir
    write_package(writer, spec, weights)
    samples.save(writer.add(SAMPLES, "samples"))
    add_companions(writer, manifest, recorded_tolerance(job.outer, precision, "coreml"))
    bundle = writer.preview(manifest)
    return bundle, compare_with_torch(job.outer, bundle, BACKEND) if job.plan.check else None


def _convert(job: _Job, traced: Traced, *, compressed: bool = True) -> coreml_target.CoreMLExport:
    return coreml_target.convert(
        traced, job.outer.shapes, job.options, recipe=job.recipe, labels=job.labels, compressed=compressed
    )


def _checked_in_fp16(job: _Job, traced: Traced) -> dict[str, Any]:
    """Size and error before the weights lose bits, held to the tolerance of fp16: what is lost later is then theirs."""
    exported = _convert(job, traced, compressed=False)
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        name = f"{bundle_stem(job.plan.loaded.name, 'coreml', 'fp16')}.edge"
        with BundleWriter(Path(folder) / name) as writer:
            bundle, check = _write(writer, job, exported, samples_of(job.outer, list(traced.names)), "fp16")
            return {"size": bundle.size_of_model, "rel_l2": _worst(check)}


def _worst(check: Check | None) -> float | None:
    return None if check is None else max(output.rel_l2 for output in check.outputs)


def _accuracy(job: _Job, bundle: Bundle) -> dict[str, Any] | None:
    """Accuracy of PyTorch and of the package on all of the data that shipped weights were trained for.

    Images of another size than the zoo's are left out: the reference runtime would take long for them.
    """
    loaded, entry, manifest = job.outer.loaded, job.outer.loaded.entry, bundle.manifest
    if entry is None or entry.dataset not in NAMED or loaded.weights.source != "shipped":
        return None
    if isinstance(entry.input, ImageInput) and manifest.model.macs is None:
        return None
    try:
        data = load_labelled(entry.dataset, manifest.inputs, manifest.dims, manifest.labels, entry=entry)
        session = load(bundle, backend=BACKEND)
        output = score_output(session)
    except (InputError, MissingDependencyError):  # no labelled data for these shapes, or no scikit-learn here
        return None
    job.plan.step("measure accuracy")
    size = batch_size(job.outer)
    run = loaded.runner([spec.name for spec in manifest.outputs])
    return {
        "data": data.source,
        "items": len(data),
        "pytorch": share_correct(classify(run, data, output=output, batch=size), data),
        manifest.precision: share_correct(classify(session.run, data, output=output, batch=size), data),
        "runtime": session.backend,
    }
