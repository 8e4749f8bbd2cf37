"""Static int8 quantization: QDQ with calibrated activation ranges and per-channel weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekit.errors import ExportError
from edgekit.export.onnx import quiet
from edgekit.runtime.datasets import Dataset

# What runs in int8: the ops with int8 kernels, and those that only move values between them. Measured once in
# onnxruntime 1.31, 1 thread, interleaved, on a shared machine with AVX-512 VNNI: latency as a share of fp32's; relative
# L2 error of the logits on data that was not calibrated on (the test digits; random values for the large models, whose
# weights are random too); top-1 on the 360 test digits, where fp32 has .9944 for SHViT and .9861 for CARE:
#                                SHViT digits       CARE digits        SHViT-S1     CARE-S0
#   these ops                    .91 .042 .9944    1.10 .044 .9833    .515 .038    .68 .028
#   Conv, Gemm, MatMul alone    1.08 .043 .9944    1.18 .032 .9833    .58  .039    .75 .024
#   these without Add            .91 .041 .9944    1.10 .044 .9833    .516 .037    .71 .028
#   these and Mul                .89 .042 .9944    1.09 .044 .9833    .514 .039    .73 .027
#   these and Gelu               (has none)        1.12 .048 .9833    (has none)   .69 .034
#   onnxruntime's own list       .90 .042 .9944    1.10 .047 .9833    .512 .037    .68 .031
# Quantizing the products alone is slower, and int8 around Gelu raises the error without a gain in time. The rest
# differs by less than the runs do: one image is .0028 of top-1, and three runs of `profile_pair` on SHViT-S1
# put these ops at .97 to .98 of the time of onnxruntime's own list. The list was set before these runs and none was a
# reason to change it, so the test digits chose nothing.
# That was with CARE's attention as plain products. It is the op KernelLinearAttention since, which int8 leaves in fp32:
# the digits' int8 model takes .90 of the time it took then, with an error of .042 in place of .044 (stored samples).
# Further choices, on the digits: signed activations take 1.7 to 2.2 times as long as fp32; a percentile of 99.9 or a
# moving average has 1.7 to 2.8 times the error; 99.999 and entropy change at most two of 360 answers, and onnxruntime
# keeps the activations of all items in memory for them. One scale per tensor in place of one per channel is 2 % faster
# with the same or a little more error here.
INT8_OPS = ("Conv", "Gemm", "MatMul", "Add", "Relu", "Concat", "Split", "Reshape", "Transpose", "MaxPool")


def to_int8(model: onnx.ModelProto, calibration: Dataset, *, batch: int = 1) -> onnx.ModelProto:
    """Quantize to int8 with the activation ranges that `calibration` shows, run `batch` items at a time.

    Activations are asymmetric uint8, weights symmetric int8 per output channel, the fastest form measured on x86
    with VNNI. The graph's outputs stay fp32.

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
            _Reader(calibration, batch),
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


class _Reader:
    """onnxruntime's CalibrationDataReader over a data set, one batch at a time."""

    def __init__(self, data: Dataset, batch: int) -> None:
        self._items: Iterator[Mapping[str, np.ndarray[Any, Any]]] = (part.inputs for part in data.batches(batch))

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
