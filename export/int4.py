"""Weights of four bits: MatMulNBits for the products, GatherBlockQuantized for the embedding.

Blocks of 32 weights share a scale (float32) and, asymmetric, a zero point. Both graphs of a language model read the
same packed weights, and so do an embedding and the logits' product that are one matrix: the two ops pack alike.

What is left in fp32: norms and biases, weights below `INLINE_BYTES`, and the boundary predictor, whose answer is a
decision and not a sum.

Measured on one x86 core (AVX-512, onnxruntime 1.31, a product with a 2048 x 2048 matrix): with `accuracy_level` 4, that
also rounds the other factor to eight bits, one row takes 0.08 ms against 0.29 ms with level 0 and 0.25 to 0.41 ms in
fp32, and the error of the product grows from 0.0859 to 0.0868 (symmetric). Zero points lower it to 0.080, for
half a byte per block of 20. On `dhsa_bytes` (24 stretches of 1024 bytes of its validation text, dense attention) they
cost 2.233 bits per byte in place of 2.180 in fp32, symmetric ones 2.246; with the embedding left in fp32 2.221 and
2.224. So: asymmetric, level 4. Layer 0's keys are computed at level 0 where a boundary predictor reads them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from edgekit.errors import ExportError
from edgekit.export.weights_file import Array, Weights, drop_unused, external
from edgekit.runtime.bundle import Bundle

BITS, BLOCK = 4, 32
ACCURACY_LEVEL = 4
DOMAIN = "com.microsoft"

_KEPT = ("boundary_predictor.",)
_PREDICTOR_INPUT = re.compile(r"model\.layers\.0\.self_attn\.k_proj\.weight")
_PACKED, _SCALES, _ZEROS = ".int4", ".scales", ".zero_points"


@dataclass(frozen=True)
class Packed:
    """A weight `[rows, columns]` in four bits, blocks along the columns.

    Attributes:
        values: uint8 `[rows, blocks, 16]`, two weights per byte, the lower four bits first.
        scales: float32 `[rows, blocks]`.
        zeros: uint8 `[rows, ceil(blocks / 2)]`, zero points packed alike.
        columns: how many there are; the last block may be filled up.
    """

    values: Array
    scales: Array
    zeros: Array
    columns: int

    def unpacked(self) -> Array:
        """The weights that these bits stand for, float32 `[rows, columns]`."""
        rows, blocks = self.scales.shape
        levels = np.stack([self.values & 15, self.values >> 4], axis=-1).reshape(rows, blocks, BLOCK)
        zeros = np.stack([self.zeros & 15, self.zeros >> 4], axis=-1).reshape(rows, -1)[:, :blocks, None]
        weights = (levels.astype(np.float32) - zeros.astype(np.float32)) * self.scales[:, :, None]
        return np.ascontiguousarray(weights.reshape(rows, -1)[:, : self.columns])


def pack(weight: Array) -> Packed:
    """Quantize float32 `[rows, columns]` by onnxruntime's quantizer, which takes a product with the turned matrix."""
    rows, columns = weight.shape
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [make("x", onnx.TensorProto.FLOAT, [1, columns])],
        [make("y", onnx.TensorProto.FLOAT, [1, rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=BITS)
    log = logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        quantizer = MatMulNBitsQuantizer(model, algo_config=config)
        quantizer.process()
    finally:
        log.setLevel(level)
    done = quantizer.model.model.graph
    if [node.op_type for node in done.node] != ["MatMulNBits"]:
        raise ExportError(f"onnxruntime's quantizer left a product of {rows} x {columns} weights as it was")
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in done.initializer}
    values, scales, zeros = (arrays[name] for name in done.node[0].input[1:4])
    blocks = -(-columns // BLOCK)
    return Packed(
        values.reshape(rows, blocks, BLOCK // 2), scales.reshape(rows, blocks), zeros.reshape(rows, -1), columns
    )


class Int4:
    """Quantizes the weights of graphs, each weight once, whichever graphs read it.

    Args:
        precise_keys: keep layer 0's keys from being computed with rounded activations: a boundary predictor reads them.
    """

    def __init__(self, *, precise_keys: bool) -> None:
        self.precise_keys = precise_keys
        self.packed: dict[str, Packed] = {}

    def apply(self, model: onnx.ModelProto, weights: Weights) -> None:
        """Replace the graph's products with large weights, and look-ups in them, in place.

        Raises `ExportError` where there is none.
        """
        whole = _looked_up_whole(model.graph)
        count = 0
        for index, node in enumerate(list(model.graph.node)):
            if whole.intersection(node.input):
                continue
            made = self._product(model.graph, node, weights) or self._look_up(model.graph, node, weights)
            if made is not None:
                model.graph.node[index].CopyFrom(made)
                count += 1
        if not count:
            raise ExportError("int4 found no weights to quantize: all of them are too small; export it as fp32")
        drop_unused(model, weights)
        if not any(item.domain == DOMAIN for item in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))

    def _product(self, graph: onnx.GraphProto, node: onnx.NodeProto, weights: Weights) -> onnx.NodeProto | None:
        turned = node.op_type == "MatMul"
        if node.op_type not in ("MatMul", "Gemm") or len(node.input) != 2 or node.input[1] not in weights:
            return None
        name = node.input[1].removesuffix(".T") if turned else node.input[1]
        if (turned and name == node.input[1]) or name.startswith(_KEPT):
            return None
        make = weights[node.input[1]]
        packed = self._pack(name, (lambda: make().T) if turned else make)
        level = 0 if self.precise_keys and _PREDICTOR_INPUT.fullmatch(name) else ACCURACY_LEVEL
        return onnx.helper.make_node(
            "MatMulNBits",
            [node.input[0], *_declare(graph, weights, name, packed, packed.values.shape)],
            list(node.output),
            name=node.name,
            domain=DOMAIN,
            K=packed.columns,
            N=len(packed.values),
            bits=BITS,
            block_size=BLOCK,
            accuracy_level=level,
        )

    def _look_up(self, graph: onnx.GraphProto, node: onnx.NodeProto, weights: Weights) -> onnx.NodeProto | None:
        name = node.input[0] if node.input else ""
        if node.op_type != "Gather" or name not in weights:
            return None
        if next((item.i for item in node.attribute if item.name == "axis"), 0) != 0:
            return None
        shape = next(tuple(item.dims) for item in graph.initializer if item.name == name)
        packed = self._pack(name, weights[name])
        values, scales, zeros = _declare(graph, weights, name, packed, (shape[0], shape[1] // 2), "rows")
        return onnx.helper.make_node(
            "GatherBlockQuantized",
            [values, node.input[1], scales, zeros],
            list(node.output),
            name=node.name,
            domain=DOMAIN,
            gather_axis=0,
            quantize_axis=1,
            bits=BITS,
            block_size=BLOCK,
        )

    def _pack(self, name: str, make: Callable[[], Array]) -> Packed:
        if name not in self.packed:
            self.packed[name] = pack(make())
        return self.packed[name]


def _looked_up_whole(graph: onnx.GraphProto) -> set[str]:
    """The initializers in which rows are looked up and that do not fill their blocks.

    The ops pack alike only where no block is filled up. An embedding that is the logits' matrix, too, then stays as it
    is in both places: it would be two matrices otherwise.
    """
    shapes = {item.name: tuple(item.dims) for item in graph.initializer}
    found = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in shapes}
    return {name for name in found if len(shapes[name]) != 2 or shapes[name][1] % BLOCK}


def _declare(
    graph: onnx.GraphProto, weights: Weights, name: str, packed: Packed, shape: tuple[int, ...], kind: str = ""
) -> list[str]:
    """Initializers for the packed weight, its scales and zero points; the same bytes as another's are stored once."""
    suffix = f".{kind}" if kind else ""
    parts = {
        f"{name}{_PACKED}{suffix}": packed.values.reshape(shape),
        f"{name}{_SCALES}": packed.scales,
        f"{name}{_ZEROS}": packed.zeros,
    }
    known = {item.name for item in graph.initializer}
    for key, array in parts.items():
        if key not in known:
            weights[key] = lambda array=array: array  # type: ignore[misc]
            data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.initializer.append(external(key, data_type, list(array.shape)))
    return list(parts)


def restore(decoder: torch.nn.Module, packed: Mapping[str, Packed]) -> None:
    """Put the weights that the bits stand for into a decoder, in place."""
    state = decoder.state_dict()
    with torch.no_grad():
        for name, weight in packed.items():
            state[name].copy_(torch.from_numpy(weight.unpacked()))


def packed_weights(bundle: Bundle) -> dict[str, Packed]:
    """The quantized weights of a bundle, of both of its graphs, by the names of the parameters."""
    found: dict[str, Packed] = {}
    for file, entry in bundle.manifest.files.items():
        if entry.role not in ("model", "decode"):
            continue
        graph = onnx.load_from_string(bundle.read(file)).graph
        tensors = {item.name: item for item in graph.initializer}
        for node in graph.node:
            if node.op_type == "MatMulNBits" and (name := node.input[1].removesuffix(_PACKED)) not in found:
                values, scales, zeros = (_array(bundle, tensors[key]) for key in node.input[1:4])
                columns = next(item.i for item in node.attribute if item.name == "K")
                found[name] = Packed(values, scales, zeros, columns)
            if node.op_type == "GatherBlockQuantized" and (name := node.input[0].partition(_PACKED)[0]) not in found:
                values, scales, zeros = (_array(bundle, tensors[node.input[at]]) for at in (0, 2, 3))
                blocks = scales.shape[1]
                found[name] = Packed(values.reshape(-1, blocks, BLOCK // 2), scales, zeros, blocks * BLOCK)
    return found


def _array(bundle: Bundle, tensor: onnx.TensorProto) -> Array:
    """The values of an initializer, from the bundle's weights where they lie there."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place = {item.key: item.value for item in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset, shape = int(place["offset"]), tuple(tensor.dims)
    path = bundle.file(place["location"])
    if path is not None:
        return np.memmap(path, dtype, "r", offset, shape)
    content = bundle.read(place["location"])
    return np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with products of the quantized weights in fp32, as PyTorch computes them; changed in place."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    return model
