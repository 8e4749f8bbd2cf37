"""Half precision that stays accurate: weights and activations in fp16; what sums or divides, in fp32."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from edgekit.export.onnx import quiet

# Sums of many terms, divisions by small numbers, and exponentials lose accuracy or overflow in half precision.
FP32_OPS = (
    "Softmax",
    "LogSoftmax",
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


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert to half precision; inputs and outputs keep their dtype.

    Fp32 remain: `FP32_OPS`, and products of two activations (attention scores, the states of linear attention), which
    sum over tokens. Products with weights are fp16: runtimes accumulate those in fp32 (onnxruntime on x86 runs them in
    fp32 altogether; TensorRT and Core ML decide by their own settings).
    """
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    constants = {item.name for item in model.graph.initializer}
    constants |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    products = [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not any(name in constants for name in node.input)
    ]
    half: onnx.ModelProto
    with quiet():
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FP32_OPS],
            node_block_list=products,
        )
    _drop_round_trips(half)
    OnnxModel(half).topological_sort()
    return half


def _drop_round_trips(model: onnx.ModelProto) -> None:
    """Let an fp32 op read its fp32 predecessor directly where the converter put fp32 -> fp16 -> fp32 between them."""
    producers = {name: node for node in model.graph.node for name in node.output}
    rename: dict[str, str] = {}
    for node in model.graph.node:
        if not _casts(node, TensorProto.FLOAT):
            continue
        before = producers.get(node.input[0])
        if before is not None and _casts(before, TensorProto.FLOAT16) and _is_converters(before):
            rename[node.output[0]] = before.input[0]
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in rename and not set(node.output) & outputs:
                node.input[index] = rename[name]
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
