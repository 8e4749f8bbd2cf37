"""Static int8 quantization: QDQ with calibrated activation ranges and per-channel weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekit.errors import ExportError, InputError
from edgekit.export.onnx import quiet
from edgekit.runtime.datasets import Dataset

# What runs in int8. Norms, softmax, sigmoid and Gelu stay fp32: quantizing them costs accuracy and saves no time.
INT8_OPS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Concat", "Split", "Reshape", "Transpose", "MaxPool")

MAX_CALIBRATION_ITEMS = 256


def to_int8(model: onnx.ModelProto, calibration: Dataset) -> onnx.ModelProto:
    """Quantize to int8 with the activation ranges that `calibration` shows.

    Activations are asymmetric uint8, weights symmetric int8 per output channel: the form with the fastest kernels on
    x86 with VNNI and on Arm with dot products. The graph's outputs stay fp32.

    Raises:
        ExportError: nothing in the graph could be quantized.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(prefix="edgekit-int8-") as folder, quiet():
        prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(model, str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(quantized),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(INT8_OPS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        result = onnx.load(str(quantized))
    if not any(node.op_type == "QuantizeLinear" for node in result.graph.node):
        raise ExportError(
            f"int8 found nothing to quantize: the graph has none of {', '.join(INT8_OPS)}; export it as fp32 or fp16"
        )
    _unquantize_outputs(result)
    return result


def check_calibration(data: Dataset, names: list[str]) -> Dataset:
    """At most `MAX_CALIBRATION_ITEMS` items of `data`, chosen with a fixed seed; raises `InputError` on wrong names."""
    if set(data.inputs) != set(names):
        raise InputError(f"the calibration data {data.source} has {sorted(data.inputs)}, the model takes {names}")
    return data if len(data) <= MAX_CALIBRATION_ITEMS else data.take(MAX_CALIBRATION_ITEMS, seed=0)


class _Reader:
    """onnxruntime's CalibrationDataReader over a data set, one item at a time."""

    def __init__(self, data: Dataset) -> None:
        self._items: Iterator[Mapping[str, np.ndarray[Any, Any]]] = (part.inputs for part in data.batches(1))

    def get_next(self) -> Mapping[str, np.ndarray[Any, Any]] | None:
        return next(self._items, None)


def _unquantize_outputs(model: onnx.ModelProto) -> None:
    """Remove the quantize and dequantize pair in front of a graph output: class scores need no 8-bit grid."""
    producers = {name: node for node in model.graph.node for name in node.output}
    uses: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for value in model.graph.output:
        dequantize = producers.get(value.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize = producers.get(dequantize.input[0])
        if quantize is None or quantize.op_type != "QuantizeLinear" or uses[quantize.output[0]] != 1:
            continue
        source = producers.get(quantize.input[0])
        if source is None or uses[quantize.input[0]] != 1:
            continue
        source.output[list(source.output).index(quantize.input[0])] = value.name
        model.graph.node.remove(quantize)
        model.graph.node.remove(dequantize)
