"""From a model to a finished bundle: load, trace, convert, reduce precision, check, measure, move into place."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from edgekit import models
from edgekit.errors import ExportError, InputError, UnknownNameError
from edgekit.export import TARGETS
from edgekit.export import onnx as onnx_target
from edgekit.export.bundling import add_kernels, metadata_of, tools, with_figures
from edgekit.export.calling import output_names, tensor_leaves
from edgekit.export.cost import measure_cost
from edgekit.export.custom_ops import custom_ops
from edgekit.export.data import load_calibration
from edgekit.export.language_model import LanguagePlan, export_language_model, is_language_model, refuse_options
from edgekit.export.plan import Plan, make_plan
from edgekit.export.samples import batch_size, first_items, record_answers, samples_of
from edgekit.export.shapes import InputShape
from edgekit.export.source import LoadedModel, load_model
from edgekit.export.verification import check_other_sizes, why_refused
from edgekit.kernels.build import ARCH_NAMES
from edgekit.models.registry import ImageInput
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples, bundle_stem
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.manifest import Manifest, TensorSpec
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.session import load
from edgekit.runtime.tolerances import PRECISIONS
from edgekit.runtime.verification import Check, tolerance_for, verify_samples

if TYPE_CHECKING:
    from edgekit.export.tvm import TvmExport


def export_model(
    model: str | Path | torch.nn.Module,
    target: str,
    out: Path,
    *,
    precision: str = "fp32",
    shapes: str | Sequence[str] | None = None,
    weights: str | Path | None = None,
    calibration: str | Path | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | ImagePreprocessing | None = None,
    name: str | None = None,
    opset: int | None = None,
    seed: int = 0,
    check: bool = True,
    tolerance: float | None = None,
    arch: str | None = None,
    tune: int = 0,
    kernels: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Bundle:
    """See `edgekit.export`."""
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if calibration is not None and precision != "int8":
        raise InputError(f"calibration data is for --precision int8; this export is {precision}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"a bundle's name has letters, digits, '.', '_' and '-' and starts with one of the first two; got {name!r}"
        )
    if target == "tvm":
        _check_tvm_options(precision, opset, tune)
    elif arch is not None or tune:
        raise InputError(f"arch and tune are for the target tvm; this export is to {target}")
    for each in (*(kernels or ()), *((arch,) if arch is not None else ())):
        if each not in ARCH_NAMES:
            raise UnknownNameError("kernel arch", each, ARCH_NAMES)
    opset = onnx_target.choose_opset(opset)
    step = progress or (lambda _: None)
    step("load the model")
    loaded = load_model(model, weights=weights, seed=seed, overrides=overrides)
    if name is not None:
        loaded = replace(loaded, name=name)
    destination = out / f"{bundle_stem(loaded.name, target, precision)}.edge"
    if is_language_model(loaded):
        return _export_language(
            LanguagePlan(
                loaded, precision, opset, seed, check, tolerance, step, tuple(kernels) if kernels is not None else None
            ),
            target,
            destination,
            {"--shape": shapes, "--calibration": calibration, "--labels": labels, "--preprocessing": preprocessing},
        )
    if precision == "int4":
        raise InputError(f"int4 is for language models, and {loaded.name} is none; choose fp16 or int8")
    plan = make_plan(loaded, shapes, labels, preprocessing, opset, seed, check, tolerance, step)
    plan = replace(plan, kernels=tuple(kernels) if kernels is not None else None)
    data = None
    if precision == "int8":
        step("read calibration data")
        data = load_calibration(
            calibration, plan.shapes, plan.preprocessing, loaded.entry, loaded.options, batch=batch_size(plan)
        )
    try:
        if target == "tvm":
            return _export_tvm(plan, destination, arch, tune)
        if precision == "fp32":
            return _export_fp32(plan, destination)
        return _export_reduced(plan, destination, precision, data)
    except OSError as error:
        raise ExportError(f"writing {destination} failed: {error.strerror or error}; nothing was left there") from error


def _export_language(plan: LanguagePlan, target: str, destination: Path, given: dict[str, object | None]) -> Bundle:
    refuse_options(plan.loaded, target, plan.precision, given)
    try:
        return export_language_model(plan, destination)
    except OSError as error:
        raise ExportError(f"writing {destination} failed: {error.strerror or error}; nothing was left there") from error


def _export_fp32(plan: Plan, destination: Path) -> Bundle:
    with BundleWriter(destination) as writer:
        started = time.perf_counter()
        exported, names = _convert(plan)
        samples = samples_of(plan, names)
        manifest = _manifest(plan, exported, "fp32", None)
        graph = onnx_target.finalize(exported.model, metadata=metadata_of(plan.loaded, "fp32"))
        bundle, check = _write(writer, plan, manifest, graph, samples)
        report = {"export": {"seconds": round(time.perf_counter() - started, 3), "nodes": len(graph.graph.node)}}
        return writer.finish(_with_figures(bundle.manifest, check, _tolerance(plan, "fp32")), report)


def _tolerance(plan: Plan, precision: str) -> float | None:
    """The tolerance to record: the caller's, or the zoo's for a model that is sensitive to rounding by itself."""
    entry = plan.loaded.entry
    return entry.tolerance if plan.tolerance is None and entry is not None and precision == "fp32" else plan.tolerance


def _check_tvm_options(precision: str, opset: int | None, tune: int) -> None:
    if precision != "fp32":
        raise InputError(f"the target tvm computes in fp32; for {precision}, export to onnx")
    if opset is not None:
        raise InputError("a tvm bundle has no opset; leave it out")
    if not isinstance(tune, int) or tune < 0:
        raise InputError(f"tune is how many candidates to measure, at least 0; got {tune!r}")


def _export_tvm(plan: Plan, destination: Path, arch_name: str | None, tune: int) -> Bundle:
    from edgekit.export import tvm as tvm_target

    arch = tvm_target.choose_arch(arch_name)
    runs_here = tvm_target.runs_on_this_machine(arch)
    if tune and not runs_here:
        raise InputError(f"tuning measures on this machine, which is no {arch.name}; leave tune out")
    with BundleWriter(destination) as writer:
        started = time.perf_counter()
        program, shapes, names = _trace(plan)
        plan.step("convert to TVM")
        exported = tvm_target.convert(program, shapes, names=names, arch=arch, tune=tune, step=plan.step)
        samples = samples_of(plan, names)
        versions = tools() | tvm_target.tools()
        manifest = replace(
            _manifest(plan, exported, "fp32", None),
            target="tvm",
            ops=exported.ops,
            custom_ops=exported.custom_ops,
            tools=versions,
        )
        plan.step("link")
        tvm_target.write_library(exported, writer.add(tvm_target.LIBRARY, "model"))
        tvm_target.write_description(exported, writer.add(tvm_target.BUILD, "build"))
        samples.save(writer.add(SAMPLES, "samples"))
        archs = plan.kernels if plan.kernels is not None else (arch.name,) if manifest.custom_ops else None
        add_kernels(writer, plan.loaded.name, archs, manifest.custom_ops, step=plan.step)
        bundle, check = writer.preview(manifest), None
        if plan.check and runs_here:
            check = _compare(plan, bundle, "tvm")
        manifest = _with_figures(bundle.manifest, check, _tolerance(plan, "fp32"))
        if plan.check and not runs_here:
            reason = f"compiled for {arch.name}, which this machine is not; verify the bundle on its device"
            plan.step(f"not checked: {reason}")
            manifest = replace(manifest, verification={**manifest.verification, "reason": reason})
        report: dict[str, Any] = {"export": {"seconds": round(time.perf_counter() - started, 3)}}
        if exported.tuning is not None:
            report["tuning"] = exported.tuning
        return writer.finish(manifest, report)


def _export_reduced(plan: Plan, destination: Path, precision: str, data: Dataset | None) -> Bundle:
    """fp16 and int8 start from a verified fp32 bundle, which is also the rival for accuracy and speed."""
    with BundleWriter(destination) as writer, tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        started = time.perf_counter()
        reference = _export_fp32(plan, Path(folder) / f"{bundle_stem(plan.loaded.name, 'onnx', 'fp32')}.edge")
        graph = onnx.load_from_string(reference.read(reference.manifest.model_file))
        plan.step(f"convert to {precision}")
        if precision == "fp16":
            from edgekit.export.fp16 import to_fp16

            graph = to_fp16(graph)
        else:
            from edgekit.export.int8 import to_int8

            assert data is not None  # export_model reads it for int8
            graph = to_int8(graph, data, batch=batch_size(plan))
        graph = onnx_target.finalize(graph, metadata=metadata_of(plan.loaded, precision))
        calibration = data.source if data is not None else None
        manifest = replace(reference.manifest, precision=precision, calibration=calibration, files={}, verification={})
        samples = (
            reference.samples()
            if data is None
            else record_answers(plan, [spec.name for spec in reference.manifest.outputs], first_items(plan, data))
        )
        bundle, check = _write(writer, plan, manifest, graph, samples)
        plan.step(f"compare {precision} with fp32")
        cost = measure_cost(plan.loaded, reference, bundle, data)
        report = {
            "export": {"seconds": round(time.perf_counter() - started, 3), "nodes": len(graph.graph.node)},
            "precision": cost,
        }
        return writer.finish(_with_figures(bundle.manifest, check, plan.tolerance), report)


def _trace(plan: Plan) -> tuple[torch.export.ExportedProgram, list[InputShape], list[str]]:
    """The traced program, the shapes of its inputs in its order, and the names of its outputs."""
    tensors = onnx_target.example_inputs(plan.shapes, seed=plan.seed)
    names = _check_answers(plan.loaded, tensors)
    order = plan.loaded.bind(tensors)[2]
    if plan.loaded.entry is not None and names == ["output"]:
        names = ["logits"]
    by_name = {shape.name: shape for shape in plan.shapes}
    if plan.loaded.program is not None:
        program = plan.loaded.program
    else:
        plan.step("fuse and trace")
        program = onnx_target.trace(models.fuse(plan.loaded.module), plan.shapes, seed=plan.seed)
    return program, [by_name[key] for key in order], names


def _convert(plan: Plan) -> tuple[onnx_target.OnnxExport, list[str]]:
    program, shapes, names = _trace(plan)
    plan.step("convert to ONNX")
    return onnx_target.convert(program, shapes, names=names, opset=plan.opset), names


def _check_answers(loaded: LoadedModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the outputs. Raises `ExportError` where the model is no function of its inputs alone."""
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    state = {name: buffer.clone() for name, buffer in loaded.module.named_buffers()}
    outputs = loaded.call(tensors)
    names = output_names(outputs, tensors)
    answers = [leaf.clone() for leaf in tensor_leaves(outputs)]
    if changed := [name for name, tensor in tensors.items() if not _equal(tensor, given[name])]:
        raise ExportError(f"{loaded.name} changes its input {changed[0]!r} in place; let forward work on a copy of it")
    if changed := [name for name, buffer in loaded.module.named_buffers() if not _equal(buffer, state[name])]:
        raise ExportError(
            f"{loaded.name} changes its buffer {changed[0]!r} when it runs; a bundle keeps no state between runs: make "
            "it an input and an output"
        )
    if not all(map(_equal, answers, tensor_leaves(loaded.call(tensors)))):
        raise ExportError(
            f"{loaded.name} answers the same input differently each time, so that nothing can be compared; take the "
            "random numbers out of forward, or make them an input"
        )
    return names


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return np.array_equal(a.cpu().numpy(), b.cpu().numpy(), equal_nan=a.is_floating_point())


def _manifest(
    plan: Plan, exported: onnx_target.OnnxExport | TvmExport, precision: str, calibration: str | None
) -> Manifest:
    inputs = list(exported.inputs)
    labels = _fitting_labels(plan, exported.outputs)
    if plan.preprocessing is not None:
        inputs[0] = replace(inputs[0], preprocessing=plan.preprocessing)
    return Manifest(
        name=plan.loaded.name,
        model=plan.loaded.info(_macs(plan)),
        target="onnx",
        precision=precision,
        inputs=tuple(inputs),
        outputs=exported.outputs,
        dims={key: limits for shape in plan.shapes for key, limits in shape.ranges.items()},
        labels=labels,
        tools=tools(),
        calibration=calibration,
    )


def _macs(plan: Plan) -> int | None:
    """The registry's figure where it holds: for one image of the zoo's size, or for a fixed number of rows."""
    entry, dims = plan.loaded.entry, plan.shapes[0].dims
    if entry is None or entry.changed(plan.loaded.options):
        return None
    if isinstance(entry.input, ImageInput):
        return entry.macs if dims[2:] == (entry.input.size, entry.input.size) else None
    return entry.macs * dims[0] if isinstance(dims[0], int) else None


def _fitting_labels(plan: Plan, outputs: Sequence[TensorSpec]) -> tuple[str, ...] | None:
    """The labels, checked against the outputs; those of the zoo fall away where an option leaves no class scores."""
    labels = plan.labels
    classes = [spec.shape[-1] for spec in outputs if len(spec.shape) == 2 and isinstance(spec.shape[-1], int)]
    if labels is None or len(labels) in classes:
        return labels
    if not classes:
        return None if plan.loaded.entry is not None and labels == plan.loaded.defaults.labels else labels
    raise InputError(f"there are {len(labels)} labels for the model's {classes[0]} classes; name each class once")


def _write(
    writer: BundleWriter, plan: Plan, manifest: Manifest, graph: onnx.ModelProto, samples: Samples
) -> tuple[Bundle, Check | None]:
    """Write the model and its samples, load them back through the runtime, and compare with PyTorch."""
    writer.add("model.onnx", "model").write_bytes(graph.SerializeToString(deterministic=True))
    samples.save(writer.add(SAMPLES, "samples"))
    opsets = {item.domain or "ai.onnx": item.version for item in graph.opset_import}
    ops = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph.graph.node)
    manifest = replace(
        manifest,
        opsets=opsets,
        ir_version=graph.ir_version,
        ops=dict(sorted(ops.items())),
        custom_ops=custom_ops(graph),
    )
    add_kernels(writer, plan.loaded.name, plan.kernels, manifest.custom_ops, step=plan.step)
    bundle = writer.preview(manifest)
    return bundle, _compare(plan, bundle, "onnxruntime") if plan.check else None


def _compare(plan: Plan, bundle: Bundle, backend: str) -> Check:
    """Load the bundle through the runtime and compare with PyTorch. Raises `ExportError` where it differs."""
    manifest = bundle.manifest
    plan.step(f"check {manifest.precision} against PyTorch")
    # The bodies travel with the bundle; native kernels are one machine's, and `edgekit verify` checks them there.
    session = load(bundle, backend=backend, kernels="portable")
    tolerance = _tolerance(plan, manifest.precision)
    check = verify_samples(session, tolerance=tolerance)
    if check and manifest.dims and manifest.precision != "int8":
        plan.step("check other sizes")
        other = check_other_sizes(session, plan.loaded, tolerance_for(manifest, tolerance))
        check = check if other is None or other else other
    if not check:
        raise ExportError(why_refused(bundle, plan.loaded, check))
    return check


def _with_figures(manifest: Manifest, check: Check | None, tolerance: float | None) -> Manifest:
    return replace(manifest, verification=with_figures(check, tolerance))
