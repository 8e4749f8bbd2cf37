"""The `coreml` target: torch.export, then Core ML Tools, to an ML program with its inputs as users know them.

What Core ML Tools gets wrong is put right in `coreml_faults`; ops of edgekit's own become Core ML's by the lowerings in
`edgekit.custom_ops`. Nothing here runs the program: only Apple's systems can.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from edgekit.custom_ops.coreml import keep_fp32, register_lowerings
from edgekit.custom_ops.registry import DOMAIN
from edgekit.errors import EdgekitError, ExportError
from edgekit.export.calling import first_line
from edgekit.export.coreml_compress import SMALL, compress_program
from edgekit.export.coreml_faults import Decomposition, conversion, decompositions, needs_fp32
from edgekit.export.coreml_options import CoreMLOptions
from edgekit.export.coreml_tools import import_coremltools, quiet_tools, release, source_line
from edgekit.export.coreml_trace import Traced, listed_sizes
from edgekit.export.shapes import InputShape, input_specs, output_specs
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.preprocess import ImagePreprocessing

PROBABILITIES = "probabilities"
LABEL_OUTPUTS = ("classLabel", "classLabel_probs")
_CONVERTING = ("from_exir_node", "convert_nodes", "convert_single_node")  # functions of Core ML Tools with a `node`
_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")  # operators with graphs inside
# Values of the converted program are called like the nodes: `convolution_cast_fp16` is that of `convolution`;
# a name that was taken got a number.
VALUE_SUFFIX = re.compile(r"(_cast_fp(16|32))+(_\d+)?$")
_COLORS = {"rgb": "RGB", "bgr": "BGR", "gray": "GRAYSCALE"}
_DTYPES = {"float32": "float32", "int32": "int32", "int64": "int32"}


@dataclass(frozen=True)
class CoreMLExport:
    """A converted model: `model` is Core ML Tools' MLModel, `lowered` counts the ops of edgekit's own that it had."""

    model: Any
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    lowered: dict[str, int]
    label_outputs: tuple[str, ...] = ()

    @property
    def spec(self) -> Any:
        """The protobuf of the model."""
        return self.model.get_spec()

    @property
    def ops(self) -> dict[str, int]:
        """How many ops of each type the main function has, constants left out."""
        return count_ops(self.spec)


def convert(
    traced: Traced,
    shapes: Sequence[InputShape],
    options: CoreMLOptions,
    *,
    recipe: ImagePreprocessing | None = None,
    labels: Sequence[str] | None = None,
    compressed: bool = True,
    keep: Callable[[str], bool] = lambda _: False,
    rules: Mapping[Any, Decomposition] | None = None,
) -> CoreMLExport:
    """Turn a traced program into an ML program.

    Args:
        shapes: what the package takes, in the order of the program's inputs (see `coreml_trace.outer_shapes`).
        recipe: makes the first input an image of the recipe's colours.
        labels: names of the classes of the first output, whose softmax the program gives as its last output.
        compressed: store weights in few bits where the precision says so.
        keep: whether the constant of a name stays as it is all the same.
        rules: further operators to take apart in PyTorch, before those of `coreml_faults`.

    Raises:
        ExportError: an op that Core ML Tools cannot convert, or an argument of one that it would ignore.
        InputError: a deployment target that is too old for an op.
    """
    ct = import_coremltools()
    _refuse_control_flow(traced.program)
    names = list(traced.names)
    specs = output_specs(traced.program, traced.shapes, names + ([PROBABILITIES] if labels else []))
    outputs = tuple(replace(spec, dtype=_output_dtype(spec)) for spec in specs)
    inputs = _inputs(ct, shapes, recipe)
    kinds = [ct.TensorType(name=spec.name, dtype=np.dtype(spec.dtype).type) for spec in outputs]
    config = None
    if labels:
        config = ct.ClassifierConfig(list(labels), LABEL_OUTPUTS[0], PROBABILITIES)
    finish = None
    if compressed and options.precision in SMALL:
        finish = functools.partial(compress_program, precision=options.precision, keep=keep)
    precision = ct.precision.FLOAT32
    if options.compute_precision == "fp16":
        precision = ct.transform.FP16ComputePrecision(op_selector=lambda op: not (keep_fp32(op) or needs_fp32(op)))
    try:
        with quiet_tools():
            program = traced.program.run_decompositions(decompositions() | dict(rules or {}))
            register_lowerings()
            with conversion(program, finish=finish):
                model = ct.convert(
                    program,
                    convert_to="mlprogram",
                    inputs=inputs,
                    outputs=kinds,
                    classifier_config=config,
                    minimum_deployment_target=getattr(ct.target, options.deployment_target),
                    compute_precision=precision,
                    skip_model_load=True,
                )
    except EdgekitError as error:
        release(error)
        raise
    except Exception as error:  # the converter asserts, and raises errors of many kinds
        raise _failure(error, traced.program) from release(error)
    outputs = outputs[: len(names)]
    _check_names(model.get_spec(), [shape.name for shape in shapes], names, labels is not None)
    specs_in = input_specs(shapes)[0]
    given = tuple(
        replace(spec, layout="NCHW" if len(spec.shape) == 4 else None, index_of=None if pixels else spec.index_of)
        for spec, pixels in zip(specs_in, itertools.chain([recipe is not None], itertools.repeat(False)), strict=False)
    )
    return CoreMLExport(model, given, outputs, _lowered(program), LABEL_OUTPUTS if labels else ())


def count_ops(spec: Any, function: str = "main") -> dict[str, int]:
    """How many ops of each type a function of the protobuf has, in its inner blocks too, constants left out."""
    body = spec.mlProgram.functions[function]
    counts = Counter(op.type for op in _ops(body.block_specializations[body.opset]))
    return {name: count for name, count in sorted(counts.items()) if name != "const"}


def _ops(block: Any) -> Iterator[Any]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _ops(inner)


def _output_dtype(spec: TensorSpec) -> str:
    if spec.dtype not in _DTYPES:
        raise ExportError(
            f"the output {spec.name} is {spec.dtype}; Core ML gives {', '.join(_DTYPES)}: convert it in forward, "
            "such as with .float() or .int()"
        )
    return _DTYPES[spec.dtype]


def _inputs(ct: Any, shapes: Sequence[InputShape], recipe: ImagePreprocessing | None) -> list[Any]:
    ranges: dict[str, Any] = {}
    made = []
    for index, shape in enumerate(shapes):
        if index == 0 and recipe is not None:
            color = getattr(ct.colorlayout, _COLORS[recipe.color])
            made.append(ct.ImageType(name=shape.name, shape=shape.dims, color_layout=color))
        else:
            kind = np.float32 if shape.dtype == "float32" else np.int32
            made.append(ct.TensorType(name=shape.name, shape=_shape(ct, shape, ranges), dtype=kind))
    return made


def _shape(ct: Any, shape: InputShape, ranges: dict[str, Any]) -> Any:
    """The sizes as Core ML Tools wants them; one dimension of several inputs is one object there."""
    every = listed_sizes(shape)
    if not every:
        for name, limits in shape.ranges.items():
            if name not in ranges:
                ranges[name] = ct.RangeDim(limits.min, limits.max, default=limits.min)
        return ct.Shape(tuple(ranges[dim] if isinstance(dim, str) else dim for dim in shape.dims))
    return ct.EnumeratedShapes(shapes=every, default=every[0])


def _lowered(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How many nodes of edgekit's own ops the program has, by their torch names."""
    names = (str(node.target) for node in program.graph.nodes if node.op == "call_function")
    counts = Counter(name.split(".")[1] for name in names if name.startswith(f"{DOMAIN}."))
    return dict(sorted(counts.items()))


def _check_names(spec: Any, inputs: Sequence[str], outputs: Sequence[str], labelled: bool) -> None:
    """Raise unless the package has the wanted names: the converter renames what it does not take."""
    found_in = [feature.name for feature in spec.description.input]
    found_out = [feature.name for feature in spec.description.output]
    wanted = [*LABEL_OUTPUTS, *outputs] if labelled else list(outputs)
    if found_in != list(inputs) or sorted(found_out) != sorted(wanted):
        raise ExportError(
            f"Core ML Tools made a package with the inputs {found_in} and the outputs {found_out}, where "
            f"{list(inputs)} and {wanted} were wanted; an output that is an input, or a constant, is one cause"
        )


def _refuse_control_flow(program: torch.export.ExportedProgram) -> None:
    """Core ML Tools stumbles over the graphs inside torch.cond and its like, and says nothing of where."""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target) in _CONTROL_FLOW:
            raise ExportError(
                f"Core ML Tools cannot convert {_described(node)}: it takes no branches and loops of torch.export. "
                "Compute both branches and choose with torch.where, or unroll the loop"
            )


def _failure(error: Exception, program: torch.export.ExportedProgram) -> ExportError:
    """The converter's failure in plain words: the op, the user's line, and what to do."""
    reason = first_line(error).rstrip(".")
    place = _place(error) or _named(reason, program)
    if reason.startswith("Unsupported fx node"):
        reason = "it has no conversion for it"
    if "Please update the minimum_deployment_target" in str(error):
        return ExportError(f"{place}{reason}. Choose a newer --deployment-target")
    return ExportError(
        f"Core ML Tools cannot convert {place or 'the model'}: {reason}. Write that part of forward with other ops, or "
        "export to onnx"
    )


def _place(error: Exception) -> str:
    """The op that was being converted when the error came up, and the user's line that it is from."""
    traceback, node = error.__traceback__, None
    while traceback is not None:  # a node of torch.fx while they are read, one of the converter's own later
        frame = traceback.tb_frame
        if frame.f_code.co_name in _CONVERTING:  # asking a frame for its variables keeps them all alive
            node = frame.f_locals.get("node", node)
        traceback = traceback.tb_next
    if node is None:
        return ""
    return _described(node)


def _named(reason: str, program: torch.export.ExportedProgram) -> str:
    """The node that a message names by its value in the converted program, as `"view_cast_fp16"`."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    for name in re.findall(r"[\"'](\w+)[\"']", reason):
        if node := nodes.get(VALUE_SUFFIX.sub("", name)):
            return _described(node)
    return ""


def _described(node: Any) -> str:
    """A node of torch.fx or of the converter: the op, and the user's line."""
    kind = getattr(node, "kind", None) or str(node.target)
    line = source_line((node.meta or {}).get("stack_trace"))
    return f"the op {kind}" + (f" ({line})" if line else "")
