"""The `onnx` target: torch.export, then torch.onnx, then onnxsim, to a graph that stock onnxruntime runs."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxsim
import torch
from onnxscript import opset18

from edgekit.errors import ExportError, InputError, ShapeError
from edgekit.export.calling import bind_inputs, first_line
from edgekit.export.custom_ops import add_functions, translations
from edgekit.export.shapes import InputShape, input_specs
from edgekit.runtime.manifest import Dim, DimRange, TensorSpec

DEFAULT_OPSET = 20
# onnxruntime's CPU kernels take these; 19 has no exporter, 27 and above are refused at load.
OPSETS = (18, 20, 21, 22, 23, 24)
MAX_BYTES = 2 * 10**9  # protobuf's limit for one file is 2 GiB

_INPUT, _OUTPUT = "edgekit.in.{}", "edgekit.out.{}"
_TALKATIVE = (
    "onnx_ir",
    "onnxscript",
    "torch._dynamo",
    "torch._export",
    "torch.export",
    "torch.fx",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
)


@dataclass(frozen=True)
class OnnxExport:
    """An exported graph, the torch program whose node names its tensors carry, and its tensors."""

    model: onnx.ModelProto
    program: torch.export.ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def example_inputs(shapes: Sequence[InputShape], *, seed: int = 0, large: bool = False) -> dict[str, torch.Tensor]:
    """Seeded tensors of these shapes: standard normal floats, indices from all they may be, other integers 0 and 1.

    Args:
        large: give each dynamic dimension a size of at least 2 where its range allows, because torch.export takes a
            size of 1 for a constant; otherwise its smallest size.

    Raises:
        ShapeError: sizes that no memory holds.
    """
    generator = torch.Generator().manual_seed(seed)
    named = {dim: _example_size(limits, large) for shape in shapes for dim, limits in shape.ranges.items()}
    result = {}
    for shape, spec in zip(shapes, input_specs(shapes)[0], strict=True):
        sizes = [named[dim] if isinstance(dim, str) else dim for dim in shape.dims]
        limit = spec.index_limit(named)
        dtype: torch.dtype = getattr(torch, shape.dtype)
        try:
            if dtype.is_floating_point:
                result[shape.name] = torch.randn(sizes, generator=generator).to(dtype)
            else:
                high = 2 if limit is None else min(limit, torch.iinfo(dtype).max)
                result[shape.name] = torch.randint(0, high, sizes, generator=generator).to(dtype)
        except (RuntimeError, OverflowError, TypeError, MemoryError) as error:  # torch's words for what is too large
            raise ShapeError(f"cannot make an input of {shape}: {first_line(error)}; choose smaller sizes") from error
    return result


def trace(module: torch.nn.Module, shapes: Sequence[InputShape], *, seed: int = 0) -> torch.export.ExportedProgram:
    """torch.export with the dynamic dimensions of `shapes`. Raises `ShapeError` or `ExportError` in plain words."""
    tensors = example_inputs(shapes, seed=seed, large=True)
    args, kwargs, _ = bind_inputs(module, tensors)
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises on these shapes
        tried = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise ShapeError(
            f"the model does not run on {tried}: {first_line(error)}. A dimension that the model fixes must be written "
            "as a number in --shape"
        ) from error
    dims: dict[str, torch.export.Dim] = {}
    axes: dict[str, dict[int, torch.export.Dim]] = {shape.name: {} for shape in shapes}
    for shape in shapes:
        for axis, dim in enumerate(shape.dims):
            if isinstance(dim, str):
                limits = shape.ranges[dim]
                axes[shape.name][axis] = dims.setdefault(dim, torch.export.Dim(dim, min=limits.min, max=limits.max))
    # The axes take the places of the tensors they describe, however `forward` is called.
    axes_args, axes_kwargs, _ = bind_inputs(module, axes)
    signature = inspect.signature(module.forward)
    if dims and (free := sorted(axes_kwargs.keys() - signature.parameters.keys())):  # torch.export loses track of them
        raise ShapeError(
            f"{type(module).__name__}.forward takes {', '.join(free)} as **kwargs, which cannot have dynamic "
            "dimensions; name them in its signature, or write fixed sizes in --shape"
        )
    dynamic = dict(signature.bind(*axes_args, **axes_kwargs).arguments)
    try:
        with quiet():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic if dims else None)
    except Exception as error:  # torch.export raises from several private hierarchies
        raise ExportError(
            f"torch.export cannot trace {type(module).__name__}: {_trace_reason(str(error), list(dims))}"
        ) from error


def choose_opset(opset: int | None) -> int:
    """The opset to write: `DEFAULT_OPSET` for None. Raises `InputError` for one that is not in `OPSETS`."""
    if opset is None:
        return DEFAULT_OPSET
    if opset not in OPSETS:
        raise InputError(f"opset {opset} is not supported; choose one of {', '.join(map(str, OPSETS))}")
    return opset


def convert(
    program: torch.export.ExportedProgram,
    shapes: Sequence[InputShape],
    *,
    names: Sequence[str],
    opset: int | None = None,
) -> OnnxExport:
    """Turn a traced program into a simplified ONNX graph whose inputs carry the names of `shapes`.

    Args:
        shapes: in the order of the program's inputs.
        names: names of the outputs.
        opset: one of `OPSETS`; None takes `DEFAULT_OPSET`.
    """
    exported = translate(program, len(shapes), len(names), choose_opset(opset))
    assert exported.exported_program is not None  # see `translate`
    model = exported.model_proto
    name_tensors(model, shapes, names)
    add_functions(model)
    model = simplify(model)
    return OnnxExport(model, exported.exported_program, tuple(_specs(model, shapes)), tuple(_outputs(model)))


def translate(
    program: torch.export.ExportedProgram, inputs: int, outputs: int, opset: int, *, optimize: bool = True
) -> torch.onnx.ONNXProgram:
    """torch.onnx's translation of a program with so many inputs and outputs; `name_tensors` gives them their names.

    Args:
        optimize: fold constants and remove what is redundant; a caller may also do it later.

    Raises `ExportError` in plain words.
    """
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                (),
                input_names=[_INPUT.format(index) for index in range(inputs)],
                output_names=[_OUTPUT.format(index) for index in range(outputs)],
                opset_version=opset,
                dynamo=True,
                custom_translation_table=translations(program) | {torch.ops.aten.sort.stable: _stable_sort},
                optimize=optimize,
                verbose=False,
            )
    except Exception as error:  # the exporter raises one class per stage
        raise ExportError(f"torch.onnx cannot convert the model to opset {opset}: {_exporter_reason(error)}") from error
    if exported is None or exported.exported_program is None:
        raise ExportError("torch.onnx gave no program")
    return exported


def _stable_sort(tensor: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """`torch.sort(stable=True)` as TopK of the whole axis: ONNX too puts the earlier one of two equal values first."""
    axis = dim % len(tensor.shape)
    count = opset18.Shape(tensor, start=axis, end=axis + 1)
    values, indices = opset18.TopK(tensor, count, axis=axis, largest=int(descending), sorted=1)
    return values, indices


def name_tensors(model: onnx.ModelProto, shapes: Sequence[InputShape], names: Sequence[str]) -> None:
    """Give the inputs of a translated graph the names and dimensions of `shapes`, and its outputs `names`.

    Raises `ShapeError` where the graph has other inputs, or fixes a dimension that `shapes` names.
    """
    if len(model.graph.input) != len(shapes):
        raise ShapeError(
            f"the exported graph has {len(model.graph.input)} inputs "
            f"({', '.join(item.name for item in model.graph.input)}), shapes were given for {len(shapes)}"
        )
    # Inner tensors are named after the program's nodes and may hold the names wanted outside: those came last.
    outer = {_INPUT.format(index): shape.name for index, shape in enumerate(shapes)}
    outer |= {_OUTPUT.format(index): name for index, name in enumerate(names)}
    _rename(model.graph, {name: inner_name(name) for name in outer.values()} | outer)
    _name_dims(model, shapes)


def tensor_specs(
    model: onnx.ModelProto, shapes: Sequence[InputShape]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of a graph, for a manifest."""
    return tuple(_specs(model, shapes)), tuple(_outputs(model))


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxsim's result where it is smaller and adds no reshapes, otherwise the model as it was.

    On dynamic shapes onnxsim may turn one MatMul and Add into Reshape, Gemm and Reshape; such a result is not kept. It
    may also lose the names of dynamic sizes of inputs and outputs, which are put back.
    """
    simplified: onnx.ModelProto
    try:
        with quiet():
            simplified, same = onnxsim.simplify(model)
    except Exception:  # onnxsim gives up on some valid graphs; `finalize` checks the graph as it stays
        return model
    if not same or len(simplified.graph.node) >= len(model.graph.node):
        return model
    if _count(simplified, "Reshape") > _count(model, "Reshape"):
        return model
    for tensors, named in ((simplified.graph.input, model.graph.input), (simplified.graph.output, model.graph.output)):
        types = {item.name: item for item in named}
        for item in tensors:
            item.CopyFrom(types[item.name])
    return simplified


def finalize(model: onnx.ModelProto, *, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Remove what tells of the exporting machine, drop unused opset imports, add metadata, and check the graph."""
    tidy(model, metadata=metadata)
    if model.ByteSize() > MAX_BYTES:
        raise ExportError(
            f"the model is {model.ByteSize() / 1e9:.1f} GB; this version writes single files of up to 2 GB"
        )
    check(model)
    return model


def check(model: onnx.ModelProto | str) -> None:
    """Raise `ExportError` unless a graph, in memory or at a path, is valid ONNX."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # checker and shape inference have separate error classes
        raise ExportError(f"the converted graph is not valid ONNX: {first_line(error)}") from error


def tidy(model: onnx.ModelProto, *, metadata: Mapping[str, str]) -> None:
    """Remove what tells of the exporting machine, drop unused opset imports and add metadata."""
    _strip(model)
    for graph in _graphs(model.graph):
        _strip(graph)
        del graph.value_info[:]
        for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
            _strip(item)
    for function in model.functions:
        for item in (function, *function.node):
            _strip(item)
    model.producer_name, model.producer_version = "edgekit", metadata.get("edgekit", "")
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    used = {node.domain for node in nodes} | {n.domain for f in model.functions for n in f.node} | {""}
    kept = {item.domain: item.version for item in model.opset_import if item.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in sorted(kept.items()))
    onnx.helper.set_model_props(model, dict(metadata))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of torch's exporter and onnxsim, which tell the user nothing to act on."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _example_size(limits: DimRange, large: bool) -> int:
    if limits.values is not None:
        return limits.values[1 if large and limits.min < 2 else 0]
    return max(limits.min, min(2, limits.max or 2)) if large else limits.min


def _name_dims(model: onnx.ModelProto, shapes: Sequence[InputShape]) -> None:
    """Rename the exporter's symbols (s77) to the user's names, in inputs and in every expression of the outputs."""
    symbols: dict[str, str] = {}
    for value, shape in zip(model.graph.input, shapes, strict=True):
        for proto, dim in zip(value.type.tensor_type.shape.dim, shape.dims, strict=True):
            if isinstance(dim, str):
                if not proto.dim_param:
                    raise ShapeError(
                        f"the model fixes dimension {dim} of {shape.name} to {proto.dim_value}; write the number"
                    )
                symbols[proto.dim_param] = dim
                proto.dim_param = dim  # the exporter writes the sum where a size is that of two others
    for value in [*model.graph.output, *model.graph.value_info]:  # inputs have their names by now
        for proto in value.type.tensor_type.shape.dim:
            if proto.dim_param:
                proto.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), proto.dim_param)


def _specs(model: onnx.ModelProto, shapes: Sequence[InputShape]) -> Iterator[TensorSpec]:
    for value, shape in zip(model.graph.input, shapes, strict=True):
        layout = "NCHW" if len(shape.dims) == 4 else None
        yield TensorSpec(value.name, _dtype(value), _dims(value), layout, index_of=shape.index_of)


def _outputs(model: onnx.ModelProto) -> Iterator[TensorSpec]:
    for value in model.graph.output:
        yield TensorSpec(value.name, _dtype(value), _dims(value))


def _dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def _count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def inner_name(name: str) -> str:
    """What an inner tensor is called whose own name an input or an output of the graph bears."""
    return f"{name}.inner"


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for part in _graphs(graph):
        for item in (*part.input, *part.output, *part.initializer, *part.value_info):
            item.name = names.get(item.name, item.name)
        for node in part.node:
            for tensors in (node.input, node.output):
                tensors[:] = [names.get(name, name) for name in tensors]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those in the attributes of its nodes: branches and loop bodies."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _strip(item: Any) -> None:
    """Clear what torch notes of the source code: file names, stack traces, module classes."""
    item.doc_string = ""
    del item.metadata_props[:]


def _trace_reason(text: str, dims: Sequence[str]) -> str:
    """What torch.export found, without its pages of advice, and what to do about it."""
    lines = [line.strip() for line in text.strip().splitlines()] or ["it gave no reason"]
    if "data-dependent" in lines[0] or "data-dependent" in text[:400]:
        at = next((i for i, line in enumerate(lines) if line.startswith("The following call raised this error")), None)
        code = f" at {' '.join(lines[at + 1 : at + 3])}" if at is not None else ""
        return (
            f"its control flow depends on the data{code} ({lines[0].split('  ')[0]}). Python's if and while on tensor "
            "values must become torch.where or torch.cond"
        )
    fixed = [line for line in lines if line.partition(" = ")[0] in dims and line.partition(" = ")[2].isdigit()]
    if fixed:
        return f"the model works with {', '.join(fixed)} alone; write the number in --shape in place of the name"
    rules = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if rules and dims:
        return f"{rules[0]} Narrow the range in --shape, or write the dimension as a number"
    return lines[0]


def _exporter_reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)
