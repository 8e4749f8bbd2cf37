"""Weights that lie in a file of their own (ONNX external data), so that two graphs can share them.

A model's weights never pass through one protobuf message here: `detach` leaves the graph with the shapes of its weights
alone, and `WeightsFile` writes one at a time. So models above protobuf's 2 GB can be written, with little more memory
than PyTorch holds already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray

from edgekit.errors import ExportError
from edgekit.export.onnx import quiet

Array = NDArray[Any]
Weights = dict[str, Callable[[], Array]]
"""The weights of a graph by the names of its initializers, made when they are asked for."""

INLINE_BYTES = 1024
"""Initializers below this size stay in the graph: shape inference wants to see constants, and they save nothing."""

# So that a weight can be mapped into memory by itself, and a small one lies in as few cache lines as possible.
_PAGE, _LINE, _PAGED_FROM = 4096, 64, 65536


def detach(program: torch.onnx.ONNXProgram, *, prefix: str = "") -> tuple[onnx.ModelProto, Weights]:
    """The translated graph, optimized, without its large initializers' values; and these, by name less `prefix`.

    The initializers stay in the graph with their shapes and `data_location` EXTERNAL; `WeightsFile.place` says where.
    While the graph is optimized they are inputs of it, so that no copy of one is made, and all keep their names.
    """
    inside = program.model.graph
    weights: Weights = {}
    hidden = {}
    for name, value in list(inside.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= INLINE_BYTES:
            inside.initializers.pop(name)
            name = name.removeprefix(prefix)
            weights[name], hidden[name] = tensor.numpy, (value, tensor)
            value.const_value = None
            inside.inputs.append(value)
    with quiet():
        program.optimize()
    inside = program.model.graph
    for name, (value, tensor) in hidden.items():
        inside.inputs.remove(value)
        value.name = name
        value.const_value = onnx_ir.ExternalTensor(
            location="",
            offset=None,
            length=None,
            dtype=tensor.dtype,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            name=name,
        )
        inside.initializers[name] = value
    model = onnx_ir.to_proto(program.model)
    for initializer in model.graph.initializer:
        del initializer.external_data[:]
    return model, weights


def transpose_once(model: onnx.ModelProto, weights: Weights) -> None:
    """Turn the weights of linear layers as their products read them, in place.

    PyTorch holds them as `[out, in]` and the graph turns them in every session, which would keep a turned copy beside
    the file's. A weight that something else reads as it is, as the embedding does that a model shares with its logits,
    stays; its product, of one row per text, becomes a Gemm that reads it turned.
    """
    graph = model.graph
    turned = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in weights and _permutation(node) in ([1, 0], [])
    }
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for output, node in turned.items():
        source = node.input[0]
        if all(reader.op_type == "Transpose" for reader in readers[source]):
            name = f"{source}.T"
            _declare(graph, weights, name, source)
            for reader in readers.get(output, []):
                reader.input[:] = [name if item == output else item for item in reader.input]
            graph.node.remove(node)
            continue
        products = [reader for reader in readers.get(output, []) if reader.op_type == "MatMul"]
        if len(products) == len(readers.get(output, [])):
            for product in products:
                _read_turned(graph, product, source)
            graph.node.remove(node)
    drop_unused(model, weights)


def drop_unused(model: onnx.ModelProto, weights: Weights) -> None:
    """Remove initializers, and weights, that no node reads."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {item.name for item in model.graph.output}
    for initializer in [item for item in model.graph.initializer if item.name not in read]:
        model.graph.initializer.remove(initializer)
        weights.pop(initializer.name, None)


def _declare(graph: onnx.GraphProto, weights: Weights, name: str, source: str) -> None:
    """A new initializer: the weight `source`, turned."""
    made = weights[source]
    weights[name] = lambda: np.ascontiguousarray(made().T)
    original = next(item for item in graph.initializer if item.name == source)
    graph.initializer.append(external(name, original.data_type, list(reversed(original.dims))))


def external(name: str, data_type: int, dims: list[int]) -> onnx.TensorProto:
    """An initializer whose values lie in another file; `WeightsFile.place` says where."""
    return onnx.TensorProto(name=name, data_type=data_type, dims=dims, data_location=onnx.TensorProto.EXTERNAL)


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(item.ints) for item in node.attribute if item.name == "perm"), [])


def _read_turned(graph: onnx.GraphProto, product: onnx.NodeProto, weight: str) -> None:
    """`[B, 1, in]` times the turned `[out, in]` as Gemm, which turns while it reads; MatMul cannot."""
    index = next(at for at, node in enumerate(graph.node) if node is product or node == product)
    rows, scores, axis = (f"{product.output[0]}.{word}" for word in ("rows", "scores", "axis"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), axis))
    nodes = [
        onnx.helper.make_node("Squeeze", [product.input[0], axis], [rows]),
        onnx.helper.make_node("Gemm", [rows, weight], [scores], name=product.name, transB=1),
        onnx.helper.make_node("Unsqueeze", [scores, axis], list(product.output)),
    ]
    graph.node.remove(graph.node[index])
    for offset, node in enumerate(nodes):
        graph.node.insert(index + offset, node)


class WeightsFile:
    """Writes the weights of several graphs into one file, each content once. Use as a context manager.

    Args:
        path: the file, which is made anew.
        location: what the graphs call it: its name beside them.
    """

    def __init__(self, path: Path, location: str) -> None:
        self.location = location
        self._path = path
        self._stream: IO[bytes] | None = None
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> WeightsFile:
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()

    def place(self, model: onnx.ModelProto, weights: Mapping[str, Callable[[], Array]]) -> None:
        """Write the weights of a graph and note in its initializers where they lie."""
        for initializer in model.graph.initializer:
            if initializer.data_location != onnx.TensorProto.EXTERNAL:
                continue
            if initializer.name not in weights:
                raise ExportError(f"the converted graph has no values for {initializer.name}")
            offset, length = self._add(np.ascontiguousarray(weights[initializer.name]()))
            del initializer.external_data[:]
            for key, value in (("location", self.location), ("offset", offset), ("length", length)):
                initializer.external_data.add(key=key, value=str(value))

    def _add(self, array: Array) -> tuple[int, int]:
        """Where the bytes of `array` lie: offset and length."""
        stream = self._stream
        assert stream is not None  # used inside its `with` block
        content = array.reshape(-1).view(np.uint8).data
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            step = _PAGE if array.nbytes >= _PAGED_FROM else _LINE
            stream.write(b"\0" * (-stream.tell() % step))
            self._places[key] = stream.tell(), array.nbytes
            stream.write(content)
        return self._places[key]
