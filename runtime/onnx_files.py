"""Which files does an ONNX model want to read besides its own? Found without the onnx package.

An ONNX tensor may keep its values in another file, at a path that the model chooses. onnxruntime reads such files when
it loads the model: recent versions refuse paths out of the model's folder, older ones do not, and all of them take a
file that no manifest lists. So edgekit looks before it loads. The protobuf wire format is small enough to walk:
https://protobuf.dev/programming-guides/encoding, field numbers from
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_data(model: memoryview) -> list[str]:
    """What the tensors of a serialized ONNX model say of their data outside of it; empty where all data is inside.

    Raises `ValueError` where `model` is no ONNX model: truncated, of another format, or not encoded as protobuf is.
    """
    if bytes(model[4:8]) == b"ORTM":
        raise ValueError("it is in onnxruntime's own format, not ONNX")
    found: list[str] = []
    left: list[tuple[Message, memoryview]] = [("model", model)]
    has_graph = False
    while left:
        kind, message = left.pop()
        for field, value in _fields(message):
            if kind == "tensor":
                if field == _EXTERNAL_DATA and isinstance(value, memoryview):
                    found.append(_text(value))
                elif field == _DATA_LOCATION and value != 0:
                    found.append("data_location")
            elif field in _CHILDREN[kind] and isinstance(value, memoryview):
                has_graph = has_graph or kind == "model"
                left.append((_CHILDREN[kind][field], value))
    if not has_graph:
        raise ValueError("it holds no graph")
    return found


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


def _text(entry: memoryview) -> str:
    """A key and its value, as `key=value`."""
    parts = [bytes(value).decode("utf-8", "replace") for _, value in _fields(entry) if isinstance(value, memoryview)]
    return "=".join(parts)
