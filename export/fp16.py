"""Half precision that stays accurate: weights and activations in fp16; what sums or divides, in fp32."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from edgekit.export.onnx import quiet

# Sums of many terms, divisions by small numbers, and exponentials lose accuracy or overflow in half precision.
FP32_OPS = (
    "Softmax",
    "LogSoftmax",
    "Attention",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "RMSNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "BatchNormalization",
    "MeanVarianceNormalization",
    "LpNormalization",
    "ReduceMean",
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceProd",
    "ReduceLogSumExp",
    "GlobalAveragePool",
    "AveragePool",
    "CumSum",
    "Einsum",
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Div",
    "Exp",
    "Log",
)

# Where all that reads them is fp32, these are too: squares before a mean, a mask before a softmax.
ELEMENTWISE = ("Add", "Sub", "Mul")


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert to half precision; inputs and outputs keep their dtype.

    Fp32 remain: `FP32_OPS`; products of two activations (attention scores, the states of linear attention), which sum
    over tokens; scatters that add, for which onnxruntime has no other kernels; and sums and products of elements that
    only these read. Products with weights are fp16: runtimes accumulate those in fp32 (onnxruntime on x86 runs them in
    fp32 altogether; TensorRT and Core ML decide by their own settings). edgekit's own ops take and give fp16 and
    compute in fp32 inside, in every form of theirs.
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    half: onnx.ModelProto
    with quiet():
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FP32_OPS],
            node_block_list=_fp32_nodes(model.graph),
        )
    _drop_repeated_casts(half)
    _drop_round_trips(half)
    OnnxModel(half).topological_sort()
    return half


def _fp32_nodes(graph: onnx.GraphProto) -> list[str]:
    """The names of the nodes that stay fp32 because of what they read, or of what reads them."""
    constants = {item.name for item in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    chosen: list[str] = []
    fp32 = {node.name for node in graph.node if node.op_type in FP32_OPS}
    for node in reversed(graph.node):  # readers come before what they read
        product = node.op_type == "MatMul" and not constants.intersection(node.input)
        scatter = node.op_type.startswith("Scatter") and any(a.name == "reduction" for a in node.attribute)
        read_by = [reader for name in node.output for reader in readers.get(name, [])]
        if product or scatter or (node.op_type in ELEMENTWISE and read_by and fp32.issuperset(read_by)):
            chosen.append(node.name)
            fp32.add(node.name)
    return chosen


def _drop_repeated_casts(model: onnx.ModelProto) -> None:
    """The converter writes the same cast once for each fp32 op that reads a tensor, under one name; keep the first."""
    seen: set[str] = set()
    for node in list(model.graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            model.graph.node.remove(node)
        seen.update(node.output)


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Let an fp32 op read its fp32 predecessor directly where the converter put fp32 -> fp16 -> fp32 between them."""
    producers = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    read: dict[str, str] = {}
    written: dict[str, str] = {}
    for node in list(model.graph.node):
        before = producers.get(node.input[0]) if _casts(node, TensorProto.FLOAT) else None
        if before is None or not _casts(before, TensorProto.FLOAT16) or not _is_converters(before):
            continue
        source, result = before.input[0], node.output[0]
        if result not in outputs:
            read[result] = source
        elif source in producers and source not in outputs and source not in written:
            # An output keeps its name, so the op before the casts takes it over.
            written[source] = result
            model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [written.get(read.get(name, name), read.get(name, name)) for name in node.input]
        node.output[:] = [written.get(name, name) for name in node.output]
    _remove_dead_casts(model, outputs)


def _remove_dead_casts(model: onnx.ModelProto, outputs: set[str]) -> None:
    while True:
        used = {name for node in model.graph.node for name in node.input} | outputs
        dead = [node for node in model.graph.node if node.op_type == "Cast" and not set(node.output) & used]
        if not dead:
            return
        for node in dead:
            model.graph.node.remove(node)


def _casts(node: onnx.NodeProto, dtype: int) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == dtype for a in node.attribute)


def _is_converters(node: onnx.NodeProto) -> bool:
    """A cast that the converter put behind a blocked op (its input is fp32), not one of the user's model."""
    return "_cast_to_fp16" in node.name
