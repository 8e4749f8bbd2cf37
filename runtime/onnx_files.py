"""What must be known of an ONNX model before it is loaded? Found without the onnx package.

Which files does it want to read besides its own? An ONNX tensor may keep its values in another file, at a path that the
model chooses. onnxruntime reads such files when it loads the model: recent versions refuse paths out of the model's
folder, older ones do not, and all of them take a file that no manifest lists. So edgekit looks before it loads, and
takes weights from files alone that the manifest lists as such.

Which of its nodes are ops of ours? These may be served by native kernels, or by the function bodies in the model.

The protobuf wire format is small enough to walk: https://protobuf.dev/programming-guides/encoding, field numbers from
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from edgekit.runtime.bundle import Bundle

Message = Literal["model", "training", "graph", "function", "node", "attribute", "sparse", "tensor"]

# For every message on the way to a tensor: the fields that lead on, and to what.
_CHILDREN: dict[Message, dict[int, Message]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_INITIALIZER_DEPTH = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# The fields that lead to nodes and to the types of tensors.
_MODEL_GRAPH, _MODEL_OPSETS, _MODEL_FUNCTIONS = 7, 8, 25
_GRAPH_NODES, _GRAPH_INITIALIZERS, _GRAPH_VALUES = 1, 5, (11, 12, 13)
_FUNCTION_NAME, _FUNCTION_NODES, _FUNCTION_OPSETS, _FUNCTION_DOMAIN, _FUNCTION_VALUES = 1, 7, 9, 10, (12,)
_NODE_INPUTS, _NODE_OUTPUTS, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTES, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_GRAPHS = (6, 11)
_LONGEST_TEXT = 4096
_DTYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}


@dataclass(frozen=True)
class CustomNode:
    """A node of an op of ours: its name (of its first output where it has none), op, and the dtype of its tensors.

    `dtype` is that of the first input; None where the model does not tell. `has_body`: the model holds its function.
    """

    name: str
    op: str
    dtype: str | None
    has_body: bool = True


@dataclass(frozen=True)
class ExternalTensor:
    """What a tensor says of its data outside of the model: keys and values as they stand there, in order.

    `initializer`: it is one of the main graph, rather than part of a node, of a function or of a graph inside a node.
    """

    entries: tuple[tuple[str, str], ...]
    initializer: bool

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.entries) or "data_location"


def external_data(model: memoryview) -> list[ExternalTensor]:
    """The tensors of a serialized ONNX model whose data lies outside of it; empty where all data is inside.

    Raises `ValueError` where `model` is no ONNX model: truncated, of another format, or not encoded as protobuf is.
    """
    if bytes(model[4:8]) == b"ORTM":
        raise ValueError("it is in onnxruntime's own format, not ONNX")
    found: list[ExternalTensor] = []
    left: list[tuple[Message, memoryview, int]] = [("model", model, 0)]
    has_graph = False
    while left:
        kind, message, depth = left.pop()
        if kind == "tensor":
            # The main graph lies in the model, and its initializers in it. A sparse one's tensors lie deeper.
            found += _external_tensor(message, depth == _INITIALIZER_DEPTH)
            continue
        for field, value in _fields(message):
            if field in _CHILDREN[kind] and isinstance(value, memoryview):
                has_graph = has_graph or kind == "model"
                inside = _CHILDREN[kind][field]
                left.append((inside, value, depth + (1 if inside in ("graph", "tensor") else _INITIALIZER_DEPTH)))
    if not has_graph:
        raise ValueError("it holds no graph")
    return found


def weights_problem(tensor: ExternalTensor, sizes: Mapping[str, int]) -> str | None:
    """Why a tensor's data may not be read; None where all is well.

    Args:
        tensor: one of a model that lies beside the files.
        sizes: the files that the manifest lists for weights, by name, with their sizes in bytes.
    """
    entries = dict(tensor.entries)
    if not tensor.initializer:
        return "only weights of the main graph may lie in another file"
    if len(entries) < len(tensor.entries) or entries.keys() != {"location", "offset", "length"}:
        return "it must name its location, offset and length, each once"
    location = entries["location"]
    if location.startswith("*"):
        return "its location is one that onnxruntime takes for an address in memory"
    if location not in sizes:
        return f"the manifest lists no file {location[:80]!r} with the role 'weights'"
    numbers = [entries[key] for key in ("offset", "length")]
    if not all(re.fullmatch(r"0|[1-9][0-9]{0,17}", number) for number in numbers):
        return "its offset and length must be numbers"
    if sum(map(int, numbers)) > sizes[location]:
        return f"it ends behind the {sizes[location]} bytes of {location}"
    return None


def _external_tensor(message: memoryview, initializer: bool) -> list[ExternalTensor]:
    """The tensor where it says that its data lies outside, by either of the two fields for it."""
    entries, outside = [], False
    for field, value in _fields(message):
        if field == _EXTERNAL_DATA and isinstance(value, memoryview):
            entries.append(_entry(value))
        elif field == _DATA_LOCATION and value != 0:
            outside = True
    return [ExternalTensor(tuple(entries), initializer)] if entries or outside else []


def custom_nodes(model: memoryview, domain: str) -> tuple[CustomNode, ...]:
    """The nodes of a serialized ONNX model whose ops are of `domain`, those in the bodies of control flow included.

    Bodies of functions count too, except for the functions of `domain`, which say what its ops mean. Cheap where the
    model does not import the domain. Raises `ValueError` as `external_data` does.
    """
    top = list(_messages(model))
    functions = [(value, list(_messages(value))) for field, value in top if field == _MODEL_FUNCTIONS]
    opsets = [value for field, value in top if field == _MODEL_OPSETS]
    opsets += [value for _, parts in functions for field, value in parts if field == _FUNCTION_OPSETS]
    if domain not in map(_first_text, opsets):
        return ()
    bodies = [parts for _, parts in functions if (_FUNCTION_DOMAIN, domain) in _texts(parts)]
    named = {text for parts in bodies for field, text in _texts(parts) if field == _FUNCTION_NAME}
    # What is left to look at: a function or a graph, and the dtypes that are known around it.
    left: deque[tuple[bool, memoryview, dict[str, str]]] = deque()
    left += ((False, value, {}) for field, value in top if field == _MODEL_GRAPH)
    left += ((True, value, {}) for value, parts in functions if (_FUNCTION_DOMAIN, domain) not in _texts(parts))
    found: list[CustomNode] = []
    while left:
        is_function, message, outer = left.popleft()
        fields = list(_messages(message))
        dtypes = outer | _dtypes(fields, is_function)
        for field, node in fields:
            if field == (_FUNCTION_NODES if is_function else _GRAPH_NODES):
                parts = list(_messages(node))
                left += ((False, graph, dtypes) for graph in _subgraphs(parts))
                found += _custom_node(parts, domain, dtypes, named)
    return tuple(found)


def adds_in_place(model: memoryview) -> bool:
    """Whether a serialized ONNX model holds a ScatterND that reduces, in bodies of functions and control flow too.

    One whose reduction is a parameter of its function counts. Cheap: of most nodes, no field is read. Raises
    `ValueError` as `external_data` does.
    """
    left: list[tuple[Message, memoryview]] = [("model", model)]
    while left:
        kind, message = left.pop()
        fields = list(_messages(message))
        if kind == "node" and (_NODE_OP, "ScatterND") in _texts(fields):
            reductions = (_texts(list(_messages(value))) for field, value in fields if field == _NODE_ATTRIBUTES)
            if any({(1, "reduction"), (4, "none")} & set(texts) == {(1, "reduction")} for texts in reductions):
                return True
        for field, value in fields:
            child = _CHILDREN[kind].get(field, "tensor")
            if child not in ("tensor", "sparse") and (child != "node" or b"ScatterND" in bytes(value)):
                left.append((child, value))
    return False


@contextlib.contextmanager
def mapped(bundle: Bundle, name: str) -> Iterator[memoryview]:
    """The bytes of a file: of a folder's as the system pages them in, so that they take no memory of their own."""
    path = bundle.file(name)
    if path is None or path.stat().st_size == 0:  # an empty file cannot be mapped
        yield memoryview(bundle.read(name))
        return
    with path.open("rb") as stream:
        # Not closed here: slices may be alive in the traceback of an error. It closes with the last of them.
        yield memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _custom_node(
    parts: list[tuple[int, memoryview]], domain: str, dtypes: Mapping[str, str], bodies: set[str]
) -> Iterator[CustomNode]:
    """The node with these fields where it is of `domain`."""
    texts: dict[int, list[str]] = {}
    for field, text in _texts(parts):
        texts.setdefault(field, []).append(text)
    if domain in texts.get(_NODE_DOMAIN, ()):
        inputs, outputs = texts.get(_NODE_INPUTS, [""]), texts.get(_NODE_OUTPUTS, [""])
        name = texts.get(_NODE_NAME, [""])[-1] or outputs[0]
        op = texts.get(_NODE_OP, [""])[-1]
        yield CustomNode(name, op, dtypes.get(inputs[0]) or dtypes.get(outputs[0]), op in bodies)


def _subgraphs(parts: list[tuple[int, memoryview]]) -> Iterator[memoryview]:
    for field, attribute in parts:
        if field == _NODE_ATTRIBUTES:
            yield from (graph for number, graph in _messages(attribute) if number in _ATTRIBUTE_GRAPHS)


def _dtypes(fields: list[tuple[int, memoryview]], is_function: bool) -> dict[str, str]:
    """The dtypes of the tensors that a graph or a function declares, by name."""
    found: dict[str, str] = {}
    for field, value in fields:
        if field == _GRAPH_INITIALIZERS and not is_function:
            parts = list(_fields(value))
            name = next((_decoded(text) for at, text in parts if at == 8 and isinstance(text, memoryview)), "")
            code = next((number for at, number in parts if at == 2 and isinstance(number, int)), 0)
        elif field in (_FUNCTION_VALUES if is_function else _GRAPH_VALUES):
            name = _first_text(value)
            code = _element_type(value)
        else:
            continue
        if code:
            found[name] = _DTYPES.get(code, f"ONNX type {code}")
    return found


def _element_type(value_info: memoryview) -> int:
    """The number of a tensor's dtype: ValueInfo.type.tensor_type.elem_type; 0 where it is no tensor or not told."""
    kinds = [kind for field, kind in _messages(value_info) if field == 2]
    tensors = [tensor for kind in kinds for field, tensor in _messages(kind) if field == 1]
    codes = [code for tensor in tensors for field, code in _fields(tensor) if field == 1]
    return next((code for code in codes if isinstance(code, int)), 0)


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields that are text, a message or an array."""
    for field, value in _fields(message):
        if isinstance(value, memoryview):
            yield field, value


def _texts(parts: list[tuple[int, memoryview]]) -> Iterator[tuple[int, str]]:
    """The fields of a node or a function that hold text, as far as they are short: the others hold messages."""
    for field, value in parts:
        if len(value) <= _LONGEST_TEXT:
            yield field, _decoded(value)


def _first_text(message: memoryview) -> str:
    """Field 1 as text: the domain of an opset, the name of a value."""
    return next((_decoded(value) for field, value in _messages(message) if field == 1), "")


def _decoded(value: memoryview) -> str:
    return bytes(value).decode("utf-8", "replace")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message: its number, and an integer or the bytes of text, a message or an array."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        if tag >= 2**32:  # protobuf would cut it to another number
            raise ValueError(f"a field tag of more than 32 bits at byte {at}")
        wire = tag & 7
        value: int | memoryview
        if wire == _VARINT:
            value, at = _varint(message, at)
        else:
            if wire == _BYTES:
                size, at = _varint(message, at)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"an unknown wire type {wire} at byte {at}")
            if size > end - at:
                raise ValueError(f"a field of {size} bytes where {end - at} are left")
            value = message[at : at + size]
            at += size
        yield tag >> 3, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits per byte, lowest first, and where it ends."""
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"an integer without an end at byte {at}")


def _entry(message: memoryview) -> tuple[str, str]:
    """A key and its value; the last of each counts, as protobuf reads it."""
    texts = dict(_messages(message))
    return _decoded(texts.get(1, memoryview(b""))), _decoded(texts.get(2, memoryview(b"")))
