"""Read a saved `.mlpackage`: its manifest, the protobuf, and the weights file, none of which is trusted.

coremltools supplies the protobuf classes alone; its own loader rebuilds and checks programs with the very code that
wrote them, and loses the order of state reads and writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from edgekit.errors import BundleError, MissingDependencyError
from edgekit.runtime.mil.program import (
    BITS,
    STORAGE,
    Argument,
    Constant,
    MilBlock,
    MilFunction,
    MilOp,
    MilProgram,
    MilValue,
    Reference,
    ValueType,
)
from edgekit.runtime.mil.weights import WeightsFile, unpack_bits

_DEEPEST = 64  # nested blocks and value types; more is no program that a converter writes
_IMAGE_COLOURS = {10: "GRAYSCALE", 20: "RGB", 30: "BGR", 40: "GRAYSCALE_FLOAT16"}


def load_program(package: Path) -> MilProgram:
    """Read a saved ML program. Weights are read when they are first used.

    Args:
        package: the folder `*.mlpackage`.

    Raises:
        BundleError: it is no package, damaged or truncated, or holds no ML program.
        MissingDependencyError: coremltools, whose protobuf classes this uses, is not installed.
    """
    package = Path(package)
    model_file = _model_file(package)
    try:
        data = model_file.read_bytes()
    except OSError as error:
        raise BundleError(f"{package.name}: cannot read {model_file.name}: {error.strerror or error}") from error
    proto = import_proto()
    spec = proto.Model_pb2.Model()
    try:
        spec.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose class depends on protobuf's implementation
        raise BundleError(
            f"{package.name}/{model_file.name} is damaged or truncated, and no Core ML model ({error}); export it again"
        ) from error
    kind = spec.WhichOneof("Type")
    if kind != "mlProgram":
        raise BundleError(
            f"{package.name} holds {'no model' if kind is None else f'a model of the kind {kind}'}, not an ML program; "
            "convert it with convert_to='mlprogram'"
        )
    reader = _Reader(package.name, proto.MIL_pb2, model_file.parent)
    try:
        functions = {name: reader.function(name, f) for name, f in sorted(spec.mlProgram.functions.items())}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{package.name} holds a program that makes no sense ({error}); export it again") from error
    if not functions:
        raise BundleError(f"{package.name} holds a program without functions; export it again")
    default = spec.description.defaultFunctionName or ("main" if "main" in functions else next(iter(functions)))
    return MilProgram(
        path=package,
        specification_version=spec.specificationVersion,
        functions=functions,
        default_function=default,
        metadata=_metadata(spec.description.metadata),
        image_inputs=_image_inputs(spec.description),
    )


def import_proto() -> Any:
    """coremltools' protobuf classes. Raises `MissingDependencyError` where it is not installed."""
    try:
        with quiet_import():
            from coremltools import proto
    except ImportError as error:
        raise MissingDependencyError("coremltools", "coreml", "reading a Core ML package") from error
    return proto


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Keep coremltools from saying, as it is imported, which versions it knows and that it cannot predict on Linux."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _model_file(package: Path) -> Path:
    """The model's protobuf inside the package, as `Manifest.json` names it; a name that leads outside is refused."""
    manifest = package / "Manifest.json"
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        name = data["itemInfoEntries"][data["rootModelIdentifier"]]["path"]
        inside = PurePosixPath(name)
    except FileNotFoundError as error:
        raise BundleError(f"{package} is no Core ML package: it has no Manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{package.name}/Manifest.json is damaged ({error}); export the package again") from error
    if inside.is_absolute() or ".." in inside.parts or "\\" in name:
        raise BundleError(f"{package.name}/Manifest.json names {name!r}, which leads outside of the package")
    return package / "Data" / inside


def _metadata(metadata: Any) -> dict[str, str]:
    fields = ("author", "license", "shortDescription", "versionString")
    found = {name: getattr(metadata, name) for name in fields if getattr(metadata, name)}
    return found | dict(sorted(metadata.userDefined.items()))


def _image_inputs(description: Any) -> dict[str, str]:
    inputs = list(description.input)
    for function in getattr(description, "functions", ()):
        inputs += list(function.input)
    return {
        feature.name: _IMAGE_COLOURS.get(feature.type.imageType.colorSpace, "unknown")
        for feature in inputs
        if feature.type.WhichOneof("Type") == "imageType"
    }


class _Reader:
    """Turns messages of MIL.proto into the plain classes of `program`."""

    def __init__(self, package: str, mil: Any, folder: Path) -> None:
        self._package = package
        self._mil = mil
        self._folder = folder
        self._weights: dict[str, WeightsFile] = {}

    def function(self, name: str, message: Any) -> MilFunction:
        if message.opset not in message.block_specializations:
            raise BundleError(f"{self._package}: the function {name} has no body for its opset {message.opset!r}")
        inputs = tuple(MilValue(value.name, self._type(value.type)) for value in message.inputs)
        body = self._block(message.block_specializations[message.opset])
        return MilFunction(name, message.opset, inputs, body)

    def _block(self, message: Any, depth: int = 0) -> MilBlock:
        if depth > _DEEPEST:
            raise BundleError(f"{self._package} nests blocks more than {_DEEPEST} deep; export it again")
        return MilBlock(
            tuple(MilValue(value.name, self._type(value.type)) for value in message.inputs),
            tuple(message.outputs),
            tuple(self._op(op, depth) for op in message.operations),
        )

    def _op(self, message: Any, depth: int) -> MilOp:
        outputs = tuple(MilValue(value.name, self._type(value.type)) for value in message.outputs)
        attributes = {name: self._constant(value) for name, value in sorted(message.attributes.items())}
        named = attributes.pop("name", None)
        name = named.value if named is not None else outputs[0].name if outputs else message.type
        return MilOp(
            op_type=message.type,
            name=str(name),
            inputs={
                parameter: tuple(self._argument(binding) for binding in argument.arguments)
                for parameter, argument in sorted(message.inputs.items())
            },
            outputs=outputs,
            attributes=attributes,
            blocks=tuple(self._block(block, depth + 1) for block in message.blocks),
        )

    def _argument(self, binding: Any) -> Argument:
        kind = binding.WhichOneof("binding")
        if kind == "name":
            return Reference(binding.name)
        if kind == "value":
            return self._constant(binding.value)
        raise BundleError(f"{self._package} has an op with an empty input; export it again")

    def _type(self, message: Any, depth: int = 0) -> ValueType:
        kind = message.WhichOneof("type")
        if kind == "tensorType" and depth <= _DEEPEST:
            tensor = message.tensorType
            dtype = self._mil.DataType.Name(tensor.dataType).lower()
            shape = tuple(
                int(dim.constant.size) if dim.WhichOneof("dimension") == "constant" else None
                for dim in tensor.dimensions
            )
            if tensor.rank != len(shape):
                raise BundleError(f"{self._package}: a tensor of rank {tensor.rank} with {len(shape)} sizes")
            return ValueType(dtype, shape)
        if kind == "stateType" and depth <= _DEEPEST:
            inner = self._type(message.stateType.wrappedType, depth + 1)
            return ValueType(inner.dtype, inner.shape, "state")
        if kind == "listType" and depth <= _DEEPEST:
            inner = self._type(message.listType.type, depth + 1)
            return ValueType(inner.dtype, inner.shape, "list")
        if kind == "dictionaryType" and depth <= _DEEPEST:
            inner = self._type(message.dictionaryType.valueType, depth + 1)
            return ValueType(inner.dtype, inner.shape, "dictionary")
        raise BundleError(f"{self._package} declares a value of the kind {kind}, which is not known here")

    def _constant(self, message: Any) -> Constant:
        type_ = self._type(message.type)
        if message.WhichOneof("value") == "blobFileValue":
            file, offset = message.blobFileValue.fileName, int(message.blobFileValue.offset)
            place = f"{PurePosixPath(file).name} at {offset}"
            return Constant(type_, lambda: self._file_value(file, offset, type_), place=place, file=file)
        return Constant(type_, lambda: self._immediate(message, type_), place="immediate")

    def _file_value(self, name: str, offset: int, type_: ValueType) -> np.ndarray[Any, Any]:
        inside = PurePosixPath(name.removeprefix("@model_path/"))
        if inside.is_absolute() or ".." in inside.parts or "\\" in name:
            raise BundleError(f"{self._package} takes weights from {name!r}, which leads outside of the package")
        if name not in self._weights:
            self._weights[name] = WeightsFile(self._folder / inside, f"{self._package}/{inside}")
        return self._weights[name].read(offset, type_)

    def _immediate(self, message: Any, type_: ValueType) -> Any:
        value = message.immediateValue
        kind = value.WhichOneof("value")
        if kind not in ("tensor", "list", "dictionary"):
            raise BundleError(f"{self._package} has a constant of the kind {kind}, which is not known here")
        try:
            if kind == "list":
                return [self._constant(item).value for item in value.list.values]
            if kind == "dictionary":
                return {
                    _plain(self._constant(item.key).value): _plain(self._constant(item.value).value)
                    for item in value.dictionary.values
                }
            return _tensor(value.tensor, type_)
        except BundleError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BundleError(
                f"{self._package} has a constant that does not fit its type {type_} ({error}); export it again"
            ) from error


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def _tensor(message: Any, type_: ValueType) -> Any:
    """The value of a TensorValue: an array, or a str for one string."""
    shape = _static(type_)
    kind = message.WhichOneof("value")
    if type_.dtype == "string":
        texts = [text.decode() if isinstance(text, bytes) else str(text) for text in message.strings.values]
        if len(texts) != math.prod(shape):
            raise ValueError(f"it holds {len(texts)} strings")
        return texts[0] if not shape else np.array(texts, dtype=object).reshape(shape)
    storage = STORAGE[type_.dtype]
    if kind is None:
        return np.zeros(0, storage).reshape(shape)
    values = getattr(message, kind).values
    if not isinstance(values, bytes):
        return np.array(values, dtype=storage).reshape(shape)
    if BITS[type_.dtype] < 8:
        return unpack_bits(np.frombuffer(values, np.uint8), type_.dtype, math.prod(shape)).reshape(shape)
    return np.frombuffer(values, storage).reshape(shape)


def _static(type_: ValueType) -> tuple[int, ...]:
    sizes = tuple(size for size in type_.shape if size is not None)
    if len(sizes) != len(type_.shape):
        raise ValueError("a constant must have known sizes")
    return sizes


def describe_types(types: Mapping[str, ValueType]) -> str:
    """`name: float16[1, 3], ...` for messages."""
    return ", ".join(f"{name}: {type_}" for name, type_ in types.items())
