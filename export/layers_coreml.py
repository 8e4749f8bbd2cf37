"""Compare a Core ML package with PyTorch layer by layer, on the reference runtime.

Core ML Tools names the values of its program after the nodes of the traced one, with a suffix where it casts. The model
is traced again as it was for the export, and both sides run on the same input. What a pass fused away exists on one
side only and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgekit.errors import ExportError, NothingToCompareError
from edgekit.export import onnx as onnx_target
from edgekit.export.coreml import VALUE_SUFFIX
from edgekit.export.coreml_faults import decompositions
from edgekit.export.coreml_language_graphs import RULES, StateGraph
from edgekit.export.coreml_tools import quiet_tools
from edgekit.export.coreml_trace import Traced, trace
from edgekit.export.layers import Recorder, report_layers
from edgekit.export.plan import Plan
from edgekit.export.shapes import InputShape, input_shapes
from edgekit.export.source import LoadedModel
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_reference import CoreMLReferenceSession
from edgekit.runtime.session import Array, random_inputs
from edgekit.runtime.tolerances import layer_tolerance
from edgekit.runtime.verification import LayerReport

if TYPE_CHECKING:
    from edgekit.runtime.mil import OpCall

_SMALLEST_NORMAL = float(np.finfo(np.float16).tiny)
_KEPT = "edgekit_fp32_"  # how the lowering of an op of ours marks what stays in fp32


def compare_coreml_layers(bundle: Bundle, loaded: LoadedModel) -> LayerReport:
    """Run both sides on the first stored sample (or a seeded input) and compare every layer they share.

    Args:
        bundle: of the target `coreml`, with one function.
        loaded: the model as one that takes the bundle's inputs (`edgekit.export.pixels.as_exported`).

    Raises:
        NothingToCompareError: the two programs share no value.
        ExportError: the model can no longer be traced as it was.
    """
    traced = _traced(bundle, replace(loaded, prepare=None))
    with onnx_target.quiet():
        program = traced.program.run_decompositions(decompositions())
    inputs = _inputs(bundle)
    tolerance = layer_tolerance(bundle.manifest.precision, bundle.manifest.target)
    report = _compare(bundle, program, _arguments(traced.shapes, inputs), inputs, tolerance)
    # The model is called `module` in the wrapper that was traced.
    own = tuple(replace(layer, module=layer.module.removeprefix("module").removeprefix(".")) for layer in report.layers)
    return replace(report, layers=own, first_bad=next((layer for layer in own if not layer), None))


def compare_function_layers(bundle: Bundle, graph: StateGraph, tolerance: float) -> LayerReport:
    """As `compare_coreml_layers`, for one function of a language model's package.

    Args:
        bundle: the package as a bundle of this function.
        graph: the function, with the weights that the package holds.
        tolerance: the largest relative L2 error of a layer that passes.
    """
    with quiet_tools():
        program = graph.trace().run_decompositions(decompositions() | RULES)
    inputs = _inputs(bundle)
    taken = [torch.from_numpy(np.ascontiguousarray(inputs[spec.name])) for spec in graph.inputs[:2]]
    return _compare(bundle, program, taken, inputs, tolerance)


def _inputs(bundle: Bundle) -> dict[str, Array]:
    """The first stored sample, or a seeded input."""
    manifest = bundle.manifest
    return next(iter(bundle.samples()), (None, None))[0] or random_inputs(manifest.inputs, manifest.dims)


def _compare(
    bundle: Bundle,
    program: torch.export.ExportedProgram,
    arguments: Sequence[torch.Tensor],
    inputs: dict[str, Array],
    tolerance: float,
) -> LayerReport:
    manifest = bundle.manifest
    half = manifest.coreml is not None and manifest.coreml.compute_precision == "fp16"
    recorder = Recorder(program.module(check_guards=False))
    with torch.no_grad():
        recorder.run(*arguments)
    session = CoreMLReferenceSession(bundle)
    actual: dict[str, Array] = {}

    def keep(call: OpCall) -> None:
        # The first op of a name is the layer's own; casts of its result come behind it.
        if call.outputs and isinstance(call.outputs[0], np.ndarray):
            actual.setdefault(VALUE_SUFFIX.sub("", call.name).removeprefix(_KEPT), np.array(call.outputs[0]))

    results = session.run_traced(inputs, keep)
    nodes = [str(name) for name in program.graph_signature.user_outputs]
    actual |= {node: results[spec.name] for node, spec in zip(nodes, manifest.outputs, strict=False)}
    # What lies below fp16's normal numbers, such as the eps of a norm, has no relative precision to speak of.
    wanted = {name: value for name, value in recorder.values.items() if not half or _peak(value) >= _SMALLEST_NORMAL}
    layers = list(_shared(wanted, actual))
    if not layers:
        raise NothingToCompareError(f"nothing to compare: {bundle.name} and the model share no layer's name")
    return report_layers(recorder, dict(layers), tolerance)


def _peak(value: Array) -> float:
    return float(np.max(np.abs(value), where=np.isfinite(value), initial=0.0))


def _traced(bundle: Bundle, loaded: LoadedModel) -> Traced:
    manifest = bundle.manifest
    if manifest.coreml is None:
        raise ExportError(f"{bundle.name} says nothing of how it was made for Core ML; export it again")
    recipe = manifest.inputs[0].preprocessing
    pixels = recipe if recipe is not None and recipe.pixels else None
    dtypes = dict(manifest.coreml.input_dtypes)
    if pixels is not None:
        dtypes[manifest.inputs[0].name] = "float32"
    shapes = tuple(
        replace(shape, dtype=dtypes.get(shape.name, shape.dtype))
        for shape in input_shapes(manifest.inputs, manifest.dims)
    )
    plan = Plan(
        loaded,
        shapes,
        recipe,
        manifest.labels,
        onnx_target.DEFAULT_OPSET,
        manifest.model.weights.seed or 0,
        check=False,
        tolerance=None,
        step=lambda _: None,
    )
    labelled = bool(manifest.coreml.label_outputs)
    return trace(plan, pixels, manifest.coreml.layout, probabilities=labelled)


def _arguments(shapes: tuple[InputShape, ...], inputs: Mapping[str, Array]) -> list[torch.Tensor]:
    """The bundle's inputs as the traced program takes them: levels as floats, integers as wide as PyTorch has them."""
    return [torch.from_numpy(np.ascontiguousarray(inputs[shape.name]).astype(shape.dtype)) for shape in shapes]


def _shared(wanted: Mapping[str, Array], actual: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """The values of one name and shape on both sides: an equal name alone may be another step of the same layer."""
    for name, value in wanted.items():
        if name in actual and actual[name].shape == value.shape:
            yield name, actual[name]
