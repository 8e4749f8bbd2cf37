"""A MIL program as it stands in a package: functions, blocks, ops, values and their declared types.

Plain data, read from the protobuf without interpreting it, so that what reads it (the interpreter, the lint, the layer
comparison) sees what Core ML would see, `const` and `constexpr_*` ops included. The format is that of coremltools'
`mlmodel/format/MIL.proto`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from edgekit.errors import InputError

# The numpy dtype that holds a value of each MIL dtype; what is narrower than a byte lies one value to a byte.
STORAGE: Mapping[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bool": np.dtype(np.bool_),
    **{name: np.dtype(name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    "int4": np.dtype(np.int8),
    **{name: np.dtype(np.uint8) for name in ("uint1", "uint2", "uint3", "uint4", "uint6")},
}
BITS: Mapping[str, int] = {name: dtype.itemsize * 8 for name, dtype in STORAGE.items()} | {
    "int4": 4,
    "uint1": 1,
    "uint2": 2,
    "uint3": 3,
    "uint4": 4,
    "uint6": 6,
}


@dataclass(frozen=True)
class ValueType:
    """The declared type of a value.

    Attributes:
        dtype: `float16`, `float32`, `int32`, `bool`, `string`, `int4`, `uint6`, ...; of the elements or, for a
            dictionary, of the values.
        shape: sizes, None where one is known only at run time; of the elements for a list.
        kind: `tensor`, `state` (a tensor that outlives a run), `list` or `dictionary`.
    """

    dtype: str
    shape: tuple[int | None, ...] = ()
    kind: str = "tensor"

    @property
    def static(self) -> bool:
        """Whether every size is known."""
        return None not in self.shape

    @property
    def elements(self) -> int:
        """The number of elements, each unknown size counted as 1."""
        return math.prod(size or (1 if size is None else 0) for size in self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith("float")

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join('?' if size is None else str(size) for size in self.shape)}]"
        return text if self.kind == "tensor" else f"{self.kind} of {text}"


class Constant:
    """A value written in the program or in its weights file; read when it is asked for, each time.

    Attributes:
        type: its declared type.
        place: where it lies, in words: `immediate`, or the weights file and the offset in it.
        file: the weights file's name, None where the value stands in the program itself.
    """

    def __init__(self, type_: ValueType, load: Callable[[], Any], *, place: str, file: str | None = None) -> None:
        self.type = type_
        self.place = place
        self.file = file
        self._load = load

    @property
    def value(self) -> Any:
        """A numpy array of the declared shape (0-dimensional for a scalar; sub-byte integers one to a byte), a str for
        one string, a list for lists, a dict for dictionaries. Raises `BundleError` where the file does not hold it."""
        return self._load()

    @property
    def key(self) -> Hashable | None:
        """Equal for constants that are the same part of a weights file; None for what stands in the program itself."""
        return None if self.file is None else (self.file, self.place, self.type)

    def __repr__(self) -> str:
        return f"Constant({self.type}, {self.place})"


@dataclass(frozen=True)
class Reference:
    """The use of a named value: an output of an op, or an input of the function or block."""

    name: str


Argument = Reference | Constant


@dataclass(frozen=True)
class MilValue:
    """A named value with its declared type."""

    name: str
    type: ValueType


@dataclass(frozen=True)
class MilOp:
    """One op.

    Attributes:
        op_type: `conv`, `const`, `while_loop`, ...
        name: the op's own name; that of its first output where it has none.
        inputs: by parameter name; a tuple of one entry, except for parameters that take several values.
        outputs: its results; empty for `write_state`.
        attributes: what the file says of it besides: `val` of a `const`, the parameters of an iOS16 `constexpr_*`;
            `name` is left out.
        blocks: the blocks of `while_loop` (condition, body) and `cond` (true, false).
    """

    op_type: str
    name: str
    inputs: Mapping[str, tuple[Argument, ...]]
    outputs: tuple[MilValue, ...]
    attributes: Mapping[str, Constant] = field(default_factory=dict)
    blocks: tuple[MilBlock, ...] = ()

    @property
    def output(self) -> str:
        """The name by which messages call this op: that of its first output, else its own."""
        return self.outputs[0].name if self.outputs else self.name

    def references(self) -> Iterator[str]:
        """The names of the values that it takes as inputs, in order, with repetitions; those of its blocks left out."""
        for arguments in self.inputs.values():
            for argument in arguments:
                if isinstance(argument, Reference):
                    yield argument.name


@dataclass(frozen=True)
class MilBlock:
    """A list of ops with inputs and outputs: the body of a function, or a block of a control-flow op."""

    inputs: tuple[MilValue, ...]
    outputs: tuple[str, ...]
    operations: tuple[MilOp, ...]


@dataclass(frozen=True)
class MilFunction:
    """One function of a program.

    Attributes:
        name: such as `main`.
        opset: such as `CoreML7`.
        inputs: the inputs; those whose type is a `state` are the states.
        body: its ops and the names of its outputs.
    """

    name: str
    opset: str
    inputs: tuple[MilValue, ...]
    body: MilBlock

    @property
    def operations(self) -> tuple[MilOp, ...]:
        """All ops of the outermost block in order, `const` included."""
        return self.body.operations

    @property
    def states(self) -> tuple[MilValue, ...]:
        """The states, with the type of what they hold."""
        return tuple(
            MilValue(v.name, ValueType(v.type.dtype, v.type.shape)) for v in self.inputs if v.type.kind == "state"
        )

    @property
    def outputs(self) -> tuple[MilValue, ...]:
        """The outputs with their types."""
        return tuple(MilValue(name, self.types[name]) for name in self.body.outputs)

    def walk(self) -> Iterator[MilOp]:
        """All ops, `const` included; those of nested blocks after the op that has them."""
        pending = list(reversed(self.operations))
        while pending:
            op = pending.pop()
            yield op
            for block in reversed(op.blocks):
                pending.extend(reversed(block.operations))

    @cached_property
    def types(self) -> Mapping[str, ValueType]:
        """The declared type of every named value of the function, nested blocks included."""
        types = {value.name: value.type for value in self.inputs}
        for op in self.walk():
            for block in op.blocks:
                types.update((value.name, value.type) for value in block.inputs)
            types.update((value.name, value.type) for value in op.outputs)
        return types

    @cached_property
    def constants(self) -> Mapping[str, Constant]:
        """The values of all `const` ops by the name of their output."""
        return {
            op.outputs[0].name: op.attributes["val"]
            for op in self.walk()
            if op.op_type == "const" and op.outputs and "val" in op.attributes
        }

    @cached_property
    def producers(self) -> Mapping[str, MilOp]:
        """The op that makes each named value; inputs of functions and blocks have none."""
        return {value.name: op for op in self.walk() for value in op.outputs}

    def type_of(self, argument: Argument) -> ValueType:
        """The declared type of an input of an op."""
        return argument.type if isinstance(argument, Constant) else self.types[argument.name]

    def constant(self, op: MilOp, parameter: str) -> Any:
        """The value of a parameter where it is a constant written in the file (see `Constant.value`), else None.

        What a `constexpr_*` op would decode is no such constant. Several values give a list.
        """
        if parameter in op.attributes:
            return op.attributes[parameter].value
        values = []
        for argument in op.inputs.get(parameter, ()):
            known = argument if isinstance(argument, Constant) else self.constants.get(argument.name)
            if known is None:
                return None
            values.append(known.value)
        return None if not values else values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class MilProgram:
    """A program read from a package.

    Attributes:
        path: the package.
        specification_version: Core ML's version of the model: 7 for iOS16, 8 for iOS17, 9 for iOS18.
        functions: by name.
        default_function: the one that runs where none is named.
        metadata: the model's user-defined metadata, and `author`, `license`, `shortDescription`, `versionString`
            where they are not empty.
        image_inputs: the inputs that Core ML takes as images, by name: `RGB`, `BGR` or `GRAYSCALE`.
        decoded: weights that an interpreter of this program holds, so that those of other functions share them.
    """

    path: Path
    specification_version: int
    functions: Mapping[str, MilFunction]
    default_function: str = "main"
    metadata: Mapping[str, str] = field(default_factory=dict)
    image_inputs: Mapping[str, str] = field(default_factory=dict)
    decoded: WeakValueDictionary[Hashable, np.ndarray[Any, Any]] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    def function(self, name: str | None = None) -> MilFunction:
        """The function `name`, or the default one. Raises `InputError` where there is none of that name."""
        chosen = self.default_function if name is None else name
        if chosen not in self.functions:
            raise InputError(f"{self.path.name} has no function {chosen!r}; it has {', '.join(self.functions)}")
        return self.functions[chosen]
