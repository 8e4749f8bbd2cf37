"""From a model to a finished bundle: load, trace, convert, reduce precision, check, measure, move into place."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from edgekit.errors import ExportError, InputError, UnknownNameError
from edgekit.export import TARGETS
from edgekit.export import onnx as onnx_target
from edgekit.export.bundling import add_kernels, metadata_of, tools
from edgekit.export.coreml_options import CoreMLOptions, coreml_options
from edgekit.export.cost import measure_cost
from edgekit.export.custom_ops import custom_ops
from edgekit.export.data import load_calibration
from edgekit.export.language_model import LanguagePlan, export_language_model, is_language_model, refuse_options
from edgekit.export.plan import Plan, make_plan
from edgekit.export.samples import batch_size, first_items, record_answers, samples_of
from edgekit.export.source import load_model
from edgekit.export.steps import compare_with_torch, manifest_of, recorded_tolerance, trace, with_check
from edgekit.kernels.build import ARCH_NAMES
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples, bundle_stem
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.tolerances import check_precision, default_precision
from edgekit.runtime.verification import Check


def export_model(
    model: str | Path | torch.nn.Module,
    target: str,
    out: Path,
    *,
    precision: str | None = None,
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
    deployment_target: str | None = None,
    layout: str = "standard",
    input_kind: str | None = None,
    progress: Callable[[str], None] | None = None,
    overrides: Mapping[str, object] | None = None,
) -> Bundle:
    """See `edgekit.export`."""
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    if precision is None:
        precision = default_precision(target)
    check_precision(target, precision)
    if calibration is not None and (precision != "int8" or target != "onnx"):
        raise InputError(f"calibration data is for onnx in int8; this export is {precision} to {target}")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(
            f"a bundle's name has letters, digits, '.', '_' and '-' and starts with one of the first two; got {name!r}"
        )
    if target == "tvm":
        _check_tvm_options(opset, tune)
    elif arch is not None or tune:
        raise InputError(f"arch and tune are for the target tvm; this export is to {target}")
    coreml = None
    if target == "coreml":
        _check_coreml_options(opset, kernels)
        coreml = coreml_options(precision, deployment_target, layout, input_kind)
    elif deployment_target is not None or layout != "standard" or input_kind is not None:
        raise InputError(f"deployment target, layout and input are for the target coreml; this export is to {target}")
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
    given: dict[str, object | None] = {
        "--shape": shapes,
        "--calibration": calibration,
        "--labels": labels,
        "--preprocessing": preprocessing,
    }
    if is_language_model(loaded):
        return _export_language(
            LanguagePlan(
                loaded, precision, opset, seed, check, tolerance, step, tuple(kernels) if kernels is not None else None
            ),
            target,
            destination,
            given,
            coreml,
        )
    if precision == "int4" and target == "onnx":
        raise InputError(f"int4 is for language models, and {loaded.name} is none; choose fp16 or int8")
    plan = make_plan(loaded, shapes, labels, preprocessing, opset, seed, check, tolerance, step)
    plan = replace(plan, kernels=tuple(kernels) if kernels is not None else None)
    data = None
    if precision == "int8" and target == "onnx":
        step("read calibration data")
        data = load_calibration(
            calibration, plan.shapes, plan.preprocessing, loaded.entry, loaded.options, batch=batch_size(plan)
        )
    try:
        if target == "tvm":
            return _export_tvm(plan, destination, arch, tune)
        if coreml is not None:
            from edgekit.export.coreml_bundle import export_coreml

            return export_coreml(plan, coreml, destination)
        if precision == "fp32":
            return _export_fp32(plan, destination)
        return _export_reduced(plan, destination, precision, data)
    except OSError as error:
        raise ExportError(f"writing {destination} failed: {error.strerror or error}; nothing was left there") from error


def _check_coreml_options(opset: int | None, kernels: Sequence[str] | None) -> None:
    if opset is not None:
        raise InputError("a coreml bundle has no opset; its deployment target says which ops it may use")
    if kernels is not None:
        raise InputError("a coreml bundle holds no kernels of edgekit's: its ops are Core ML's own; leave kernels out")


def _export_language(
    plan: LanguagePlan,
    target: str,
    destination: Path,
    given: dict[str, object | None],
    coreml: CoreMLOptions | None,
) -> Bundle:
    if coreml is not None:
        from edgekit.export.coreml_bundle import export_language

        return export_language(plan, coreml, destination, given)
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
        manifest = manifest_of(plan, exported, "fp32", None)
        graph = onnx_target.finalize(exported.model, metadata=metadata_of(plan.loaded, "fp32"))
        bundle, check = _write(writer, plan, manifest, graph, samples)
        report = {"export": {"seconds": round(time.perf_counter() - started, 3), "nodes": len(graph.graph.node)}}
        return writer.finish(with_check(bundle.manifest, check, recorded_tolerance(plan, "fp32", "onnx")), report)


def _check_tvm_options(opset: int | None, tune: int) -> None:
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
        program, shapes, names = trace(plan)
        plan.step("convert to TVM")
        exported = tvm_target.convert(program, shapes, names=names, arch=arch, tune=tune, step=plan.step)
        samples = samples_of(plan, names)
        versions = tools() | tvm_target.tools()
        manifest = replace(
            manifest_of(plan, exported, "fp32", None),
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
            check = compare_with_torch(plan, bundle, "tvm")
        manifest = with_check(bundle.manifest, check, recorded_tolerance(plan, "fp32", "tvm"))
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
        return writer.finish(with_check(bundle.manifest, check, plan.tolerance), report)


def _convert(plan: Plan) -> tuple[onnx_target.OnnxExport, list[str]]:
    program, shapes, names = trace(plan)
    plan.step("convert to ONNX")
    return onnx_target.convert(program, shapes, names=names, opset=plan.opset), names


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
    return bundle, compare_with_torch(plan, bundle, "onnxruntime") if plan.check else None
