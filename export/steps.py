"""What exports to all targets share: tracing, the manifest's first draft, and the comparison with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from edgekit import models
from edgekit.errors import ExportError, InputError
from edgekit.export import onnx as onnx_target
from edgekit.export.bundling import tools, with_figures
from edgekit.export.calling import output_names, tensor_leaves
from edgekit.export.plan import Plan
from edgekit.export.shapes import InputShape
from edgekit.export.source import LoadedModel
from edgekit.export.verification import check_other_sizes, why_refused
from edgekit.models.registry import ImageInput
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.manifest import Manifest, TensorSpec
from edgekit.runtime.session import load
from edgekit.runtime.tolerances import output_tolerance
from edgekit.runtime.verification import Check, tolerance_for, verify_samples


class Converted(Protocol):
    """A converted model as the manifest sees it."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


def recorded_tolerance(plan: Plan, precision: str, target: str) -> float | None:
    """The tolerance to record: the caller's, or the zoo's for a model that is sensitive to rounding by itself."""
    entry = plan.loaded.entry
    if plan.tolerance is not None or entry is None:
        return plan.tolerance
    if precision == "fp32":
        return entry.tolerance
    if target != "coreml" or entry.half_tolerance is None:
        return None
    # However the weights are stored, it computes in fp16.
    return max(entry.half_tolerance, output_tolerance(precision, target))


def trace(plan: Plan) -> tuple[torch.export.ExportedProgram, list[InputShape], list[str]]:
    """The traced program, the shapes of its inputs in its order, and the names of its outputs."""
    tensors = onnx_target.example_inputs(plan.shapes, seed=plan.seed)
    names = check_answers(plan.loaded, tensors)
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


def check_answers(loaded: LoadedModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
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


def manifest_of(plan: Plan, exported: Converted, precision: str, calibration: str | None) -> Manifest:
    """The manifest without what only a finished graph can tell."""
    inputs = list(exported.inputs)
    labels = fitting_labels(plan, exported.outputs)
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


def fitting_labels(plan: Plan, outputs: Sequence[TensorSpec]) -> tuple[str, ...] | None:
    """The labels, checked against the outputs; those of the zoo fall away where an option leaves no class scores."""
    labels = plan.labels
    classes = [spec.shape[-1] for spec in outputs if len(spec.shape) == 2 and isinstance(spec.shape[-1], int)]
    if labels is None or len(labels) in classes:
        return labels
    if not classes:
        return None if plan.loaded.entry is not None and labels == plan.loaded.defaults.labels else labels
    raise InputError(f"there are {len(labels)} labels for the model's {classes[0]} classes; name each class once")


def compare_with_torch(plan: Plan, bundle: Bundle, backend: str) -> Check:
    """Load the bundle through the runtime and compare with PyTorch. Raises `ExportError` where it differs."""
    manifest = bundle.manifest
    plan.step(f"check {manifest.precision} against PyTorch")
    # The bodies travel with the bundle; native kernels are one machine's, and `edgekit verify` checks them there.
    session = load(bundle, backend=backend, kernels="portable")
    tolerance = recorded_tolerance(plan, manifest.precision, manifest.target)
    check = verify_samples(session, tolerance=tolerance)
    if check and manifest.dims and (manifest.target, manifest.precision) != ("onnx", "int8"):
        plan.step("check other sizes")
        other = check_other_sizes(session, plan.loaded, tolerance_for(manifest, tolerance))
        check = check if other is None or other else other
    if not check:
        raise ExportError(why_refused(bundle, plan.loaded, check))
    return check


def with_check(manifest: Manifest, check: Check | None, tolerance: float | None) -> Manifest:
    """The manifest with the figures of the check at export."""
    return replace(manifest, verification=with_figures(check, tolerance))
