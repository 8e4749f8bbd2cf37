"""Compare a bundle with PyTorch layer by layer, and name the first layer that leaves the tolerance.

The exporter names every tensor of the ONNX graph after the node of the traced PyTorch program that computes it. The
program is traced again here, so both sides can be asked for the same tensors: PyTorch by walking its graph, the bundle
by declaring its inner tensors as outputs. Tensors that a pass fused away exist on one side only and are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgekit import models
from edgekit.errors import NothingToCompareError
from edgekit.export import onnx as onnx_target
from edgekit.export.onnx import inner_name
from edgekit.export.shapes import InputShape, input_shapes, program_shapes
from edgekit.export.source import LoadedModel
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.compare import compare_arrays
from edgekit.runtime.onnxruntime_backend import give_weights, session_options
from edgekit.runtime.session import random_inputs
from edgekit.runtime.tolerances import layer_tolerance
from edgekit.runtime.verification import LayerComparison, LayerReport

# Views of other tensors say nothing new; comparing them would fill the table with repetitions.
# fmt: off
_VIEWS = frozenset((
    "_unsafe_view", "alias", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "getitem", "permute",
    "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view",
))
# fmt: on


def compare_layers(bundle: Bundle, loaded: LoadedModel) -> LayerReport:
    """Run both sides on the first stored sample (or a seeded input) and compare every layer they share.

    Raises `NothingToCompareError` where the graphs share no tensor.
    """
    manifest = bundle.manifest
    inputs = next(iter(bundle.samples()), (None, None))[0] or random_inputs(manifest.inputs, manifest.dims)
    program, order = _program(bundle, loaded)
    recorder = Recorder(program.module(check_guards=False))
    given = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in order]
    with torch.no_grad():
        # A language model's graph takes its cache as one list.
        recorder.run(*([*given[:2], given[2:]] if manifest.generation is not None else given))
    graph = onnx.load_from_string(bundle.read(manifest.model_file))
    produced = {name for node in graph.graph.node for name in node.output if name}
    # The graph's outputs carry the names of the bundle instead of their node's.
    outputs = dict(zip(program.graph_signature.user_outputs, (spec.name for spec in manifest.outputs), strict=True))
    outer = {*outputs.values(), *(spec.name for spec in manifest.inputs)}
    tensors = {name: outputs.get(name) or (inner_name(name) if name in outer else name) for name in recorder.values}
    shared = {name: _dequantized(tensor, produced) for name, tensor in tensors.items() if tensor in produced}
    if not shared:
        raise NothingToCompareError(f"nothing to compare: {bundle.name} and the model share no layer's name")
    actual = _run_with_outputs(bundle, graph, inputs, list(shared.values()), set(outputs.values()))
    found = {name: actual[tensor] for name, tensor in shared.items()}
    return report_layers(recorder, found, layer_tolerance(manifest.precision, manifest.target))


def report_layers(recorder: Recorder, actual: Mapping[str, np.ndarray[Any, Any]], tolerance: float) -> LayerReport:
    """Compare what the other side computed, by the names of the recorder's layers, with what it recorded."""
    layers = []
    for name, array in actual.items():
        node, value = recorder.nodes[name], recorder.values[name]
        comparison = compare_arrays(name, value, array, tolerance=tolerance)
        layers.append(LayerComparison(name, _module_path(node), _op_name(node), value.shape, comparison))
    return LayerReport(tuple(layers), tolerance, next((layer for layer in layers if not layer), None))


def _program(bundle: Bundle, loaded: LoadedModel) -> tuple[torch.export.ExportedProgram, list[str]]:
    """The traced program whose node names the bundle's tensors carry, and the order of its inputs."""
    manifest = bundle.manifest
    shapes: tuple[InputShape, ...]
    if manifest.generation is not None:
        from edgekit.export.language_graphs import LanguageGraph
        from edgekit.models.decoder import Decoder

        assert isinstance(loaded.module, Decoder)  # see `verify_language_model`
        language = LanguageGraph.of(loaded.module, "prefill")
        program = language.convert(manifest.opsets.get("ai.onnx", onnx_target.DEFAULT_OPSET))[2]
        return program, [shape.name for shape in language.shapes]
    if loaded.program is not None:
        program, shapes = loaded.program, program_shapes(loaded.program)
        order = [shape.name for shape in shapes]
    else:
        shapes = input_shapes(manifest.inputs, manifest.dims)
        program = onnx_target.trace(models.fuse(loaded.module), shapes)
        order = loaded.bind({shape.name: None for shape in shapes})[2]
    names = [spec.name for spec in manifest.outputs]
    by_name = {shape.name: shape for shape in shapes}
    opset = manifest.opsets.get("ai.onnx")
    exported = onnx_target.convert(program, [by_name[name] for name in order], names=names, opset=opset)
    return exported.program, order


class Recorder(torch.fx.Interpreter):
    """Walks a traced graph and keeps every float tensor that a layer computes."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, np.ndarray[Any, Any]] = {}
        self.nodes: dict[str, torch.fx.Node] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op == "call_function" and _op_name(n).startswith("_assert"):  # holds for the sizes of the trace alone
            return None
        result = super().run_node(n)
        is_layer = n.op == "call_function" and _op_name(n) not in _VIEWS
        if not is_layer or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        if result.numel() > 1 and bool(torch.isfinite(result).any()):  # masks of infinities say nothing
            self.values[n.name] = result.detach().numpy()
            self.nodes[n.name] = n
        return result


def _run_with_outputs(
    bundle: Bundle,
    model: onnx.ModelProto,
    inputs: dict[str, np.ndarray[Any, Any]],
    names: list[str],
    outputs: set[str],
) -> dict[str, np.ndarray[Any, Any]]:
    """Run the graph with inner tensors as further outputs. Graph optimizations stay on where they leave these alone."""
    extra = [name for name in names if name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    session = session_in_memory(bundle, model)
    return dict(zip(names, session.run(names, inputs), strict=True))


def session_in_memory(bundle: Bundle, graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session of a changed graph of the bundle, on its weights; one thread, portable bodies."""
    options = session_options(1)
    contents = {file: bundle.read(file) for file, entry in bundle.manifest.files.items() if entry.role == "weights"}
    if contents:
        give_weights(options, contents)
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _module_path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _op_name(node: torch.fx.Node) -> str:
    """`conv2d` for torch.ops.aten.conv2d.default, `getitem` for Python's own."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target))


def _dequantized(tensor: str, produced: set[str]) -> str:
    """The tensor as later int8 layers see it: quantization clips it, which also does the work of a removed ReLU."""
    name = f"{tensor}_DequantizeLinear_Output"
    return name if name in produced else tensor
