"""The `onnx` target: torch.export, then torch.onnx, then onnxsim, to a graph that stock onnxruntime runs."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxsim
import torch
from torch.utils import _pytree

from edgekit.errors import ExportError, ShapeError
from edgekit.export.shapes import InputShape
from edgekit.export.source import bind_inputs
from edgekit.runtime.manifest import Dim, DimRange, TensorSpec

DEFAULT_OPSET = 20
# onnxruntime's CPU kernels take these; 19 has no exporter, 27 and above are refused at load.
OPSETS = (18, 20, 21, 22, 23, 24)
MAX_BYTES = 2 * 10**9  # protobuf's limit for one file is 2 GiB


@dataclass(frozen=True)
class OnnxExport:
    """An exported graph, the torch program whose node names its tensors carry, and its tensors."""

    model: onnx.ModelProto
    program: torch.export.ExportedProgram
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def example_inputs(shapes: Sequence[InputShape], *, seed: int = 0, large: bool = False) -> dict[str, torch.Tensor]:
    """Seeded tensors of these shapes: standard normal floats, integers 0 and 1.

    Args:
        large: give each dynamic dimension a size of at least 2 where its range allows, because torch.export takes a
            size of 1 for a constant; otherwise its smallest size.
    """
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for shape in shapes:
        sizes = [_example_size(shape.ranges[dim], large) if isinstance(dim, str) else dim for dim in shape.dims]
        dtype: torch.dtype = getattr(torch, shape.dtype)
        if dtype.is_floating_point:
            result[shape.name] = torch.randn(sizes, generator=generator).to(dtype)
        else:
            result[shape.name] = torch.randint(0, 2, sizes, generator=generator).to(dtype)
    return result


def output_names(outputs: Any) -> list[str]:
    """Names for a model's outputs from its return value: dict keys and field names, else `output`, `output_1`, ..."""
    names: list[str] = []
    for path, leaf in _pytree.tree_flatten_with_path(outputs)[0]:
        if not isinstance(leaf, torch.Tensor):
            continue
        words = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        name = "_".join(filter(None, words)) or "output"
        names.append(f"output_{name}" if name.isdigit() else re.sub(r"\W", "_", name))
    if not names:
        raise ExportError("the model returns no tensor")
    if len(set(names)) < len(names):
        return [f"output_{index}" for index in range(len(names))]
    return names


def trace(module: torch.nn.Module, shapes: Sequence[InputShape], *, seed: int = 0) -> torch.export.ExportedProgram:
    """torch.export with the dynamic dimensions of `shapes`. Raises `ShapeError` or `ExportError` in plain words."""
    tensors = example_inputs(shapes, seed=seed, large=True)
    args, kwargs, order = bind_inputs(module, tensors)
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    except Exception as error:  # whatever the user's forward raises on these shapes
        raise ShapeError(f"the model does not run on {', '.join(map(str, shapes))}: {_first_line(error)}") from error
    by_name = {shape.name: shape for shape in shapes}
    dims: dict[str, torch.export.Dim] = {}
    per_input = []
    for name in order:
        axes = {}
        for axis, dim in enumerate(by_name[name].dims):
            if isinstance(dim, str):
                limits = by_name[name].ranges[dim]
                axes[axis] = dims.setdefault(dim, torch.export.Dim(dim, min=limits.min, max=limits.max))
        per_input.append(axes)
    dynamic: Any = dict(zip(order, per_input, strict=True)) if kwargs else tuple(per_input)
    try:
        with quiet():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic if dims else None)
    except Exception as error:  # torch.export raises from several private hierarchies
        raise ExportError(
            f"torch.export cannot trace {type(module).__name__}: {_first_line(error)}\n"
            "Data-dependent Python control flow must become torch.where or torch.cond; a dimension that the model "
            "fixes must be written as a number in --shape."
        ) from error


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
    opset = DEFAULT_OPSET if opset is None else opset
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported; choose one of {', '.join(map(str, OPSETS))}")
    try:
        with quiet():
            exported = torch.onnx.export(
                program,
                (),
                input_names=[shape.name for shape in shapes],
                output_names=list(names),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises one class per stage
        raise ExportError(f"torch.onnx cannot convert the model: {_exporter_reason(error)}") from error
    if exported is None or exported.exported_program is None:
        raise ExportError("torch.onnx gave no program")
    model = exported.model_proto
    if len(model.graph.input) != len(shapes):
        raise ShapeError(
            f"the exported graph has {len(model.graph.input)} inputs "
            f"({', '.join(item.name for item in model.graph.input)}), shapes were given for {len(shapes)}"
        )
    _name_dims(model, shapes)
    model = simplify(model)
    return OnnxExport(model, exported.exported_program, tuple(_specs(model, shapes)), tuple(_outputs(model)))


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxsim's result where it is smaller and adds no reshapes, otherwise the model as it was.

    On dynamic shapes onnxsim may turn one MatMul and Add into Reshape, Gemm and Reshape; such a result is not kept.
    """
    simplified: onnx.ModelProto
    with quiet():
        simplified, same = onnxsim.simplify(model)
    if not same or len(simplified.graph.node) >= len(model.graph.node):
        return model
    if _count(simplified, "Reshape") > _count(model, "Reshape"):
        return model
    return simplified


def finalize(model: onnx.ModelProto, *, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Remove what tells of the exporting machine, drop unused opset imports, add metadata, and check the graph."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "edgekit", metadata.get("edgekit", "")
    used = {node.domain for node in model.graph.node} | {n.domain for f in model.functions for n in f.node} | {""}
    kept = {item.domain: item.version for item in model.opset_import if item.domain in used}
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in sorted(kept.items()))
    onnx.helper.set_model_props(model, dict(metadata))
    if model.ByteSize() > MAX_BYTES:
        raise ExportError(
            f"the model is {model.ByteSize() / 1e9:.1f} GB; this version writes single files of up to 2 GB"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # checker and shape inference have separate error classes
        raise ExportError(f"the converted graph is not valid ONNX: {_first_line(error)}") from error
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and log lines of torch's exporter and onnxsim, which tell the user nothing to act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _example_size(limits: DimRange, large: bool) -> int:
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
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for proto in value.type.tensor_type.shape.dim:
            if proto.dim_param:
                proto.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), proto.dim_param)


def _specs(model: onnx.ModelProto, shapes: Sequence[InputShape]) -> Iterator[TensorSpec]:
    for value, shape in zip(model.graph.input, shapes, strict=True):
        layout = "NCHW" if len(shape.dims) == 4 else None
        yield TensorSpec(value.name, _dtype(value), _dims(value), layout)


def _outputs(model: onnx.ModelProto) -> Iterator[TensorSpec]:
    for value in model.graph.output:
        yield TensorSpec(value.name, _dtype(value), _dims(value))


def _dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def _count(model: onnx.ModelProto, op: str) -> int:
    return sum(node.op_type == op for node in model.graph.node)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _exporter_reason(error: BaseException) -> str:
    """The innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)
