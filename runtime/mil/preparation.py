"""Turns a function into a list of bound steps: names become slots, constants are decoded, last uses are known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgekit.errors import BundleError, InputError
from edgekit.runtime.mil.ops import KERNELS
from edgekit.runtime.mil.program import (
    Argument,
    Constant,
    MilBlock,
    MilFunction,
    MilOp,
    MilProgram,
    Reference,
    ValueType,
)
from edgekit.runtime.mil.registry import Call, Kernel

CONTROL = ("while_loop", "cond", "read_state", "write_state")  # what the interpreter itself runs

# The ops that make floats of a type that none of their inputs has; all others give one that goes in.
_RETYPING = frozenset({"cast", "quantize", "dequantize", "classify", "random_bernoulli", "random_categorical"})

Slots = int | tuple[int, ...]


@dataclass(slots=True)
class Step:
    """One op, bound: where its inputs lie, where its outputs go, and which values nobody needs after it."""

    op: MilOp
    kernel: Kernel | None
    inputs: tuple[tuple[str, Slots], ...]
    outputs: tuple[int, ...]
    dtypes: tuple[str, ...]
    rounds: bool
    half: bool
    half_sums: bool
    free: tuple[int, ...] = ()
    blocks: tuple[Steps, ...] = ()
    state: str = ""
    state_type: ValueType = field(default_factory=lambda: ValueType("float32"))
    constant: bool = False


@dataclass(slots=True)
class Steps:
    """The steps of a block, with the slots of its inputs and outputs."""

    steps: list[Step]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(slots=True)
class Prepared:
    """A function ready to run: `constants` holds a value, or None, for each slot."""

    constants: list[Any]
    slots: dict[str, int]
    body: Steps


def prepare(
    program: MilProgram,
    function: MilFunction,
    numerics: str,
    compute: Callable[[Step, Call], tuple[Any, ...]],
) -> Prepared:
    """Bind every op of `function`.

    Args:
        numerics: see the interpreter.
        compute: runs a step on its inputs; used for the `constexpr_*` ops, which are decoded here.

    Raises:
        BundleError: the program is inconsistent, or its weights are missing or damaged.
        InputError: an op that no kernel computes.
    """
    preparation = _Preparation(program, function, numerics, compute)
    scope: dict[str, int] = {}
    for value in function.inputs:
        if value.type.kind == "state" and not value.type.static:
            raise BundleError(f"{program.path.name}: the state {value.name!r} is {value.type}; its sizes must be known")
        scope[value.name] = preparation.new_slot(type_=value.type)
    body = preparation.block(function.body, scope, inputs=())
    used = set(body.outputs).union(*(_used(step) for step in body.steps))
    for slot in range(len(preparation.constants)):  # what weights were decoded from is not needed again
        if slot not in used:
            preparation.constants[slot] = None
    return Prepared(preparation.constants, scope, body)


class _Preparation:
    def __init__(
        self,
        program: MilProgram,
        function: MilFunction,
        numerics: str,
        compute: Callable[[Step, Call], tuple[Any, ...]],
    ) -> None:
        self.constants: list[Any] = []
        self._program = program
        self._function = function
        self._numerics = numerics
        self._compute = compute
        self._types: list[ValueType | None] = []
        self._keys: dict[int, Hashable] = {}
        self._states = {state.name: state.type for state in function.states}
        self._where = program.path.name

    def new_slot(self, value: Any = None, type_: ValueType | None = None) -> int:
        self.constants.append(value)
        self._types.append(type_)
        return len(self.constants) - 1

    def block(self, block: MilBlock, scope: dict[str, int], inputs: tuple[int, ...]) -> Steps:
        """Bind a block's ops. `scope` (names to slots) is added to: give a copy where the names must not leak."""
        steps = [step for op in block.operations if (step := self._op(op, scope)) is not None]
        for name in block.outputs:
            if name not in scope:
                raise BundleError(f"{self._where}: the output {name!r} of {self._function.name} is computed nowhere")
            if name in self._states:
                raise BundleError(
                    f"{self._where}: the output {name!r} of {self._function.name} is a state, not its value"
                )
        outputs = tuple(scope[name] for name in block.outputs)
        _mark_last_uses(steps, keep=set(outputs))
        return Steps(steps, inputs, outputs)

    def _op(self, op: MilOp, scope: dict[str, int]) -> Step | None:
        if op.op_type == "const":
            if len(op.outputs) != 1 or "val" not in op.attributes:
                raise BundleError(f"{self._where}: the const {op.name!r} has no value; export it again")
            value = op.attributes["val"]
            if value.type != op.outputs[0].type and value.type.kind == "tensor":
                raise BundleError(
                    f"{self._where}: the const {op.output!r} holds {value.type}, it declares {op.outputs[0].type}"
                )
            scope[op.outputs[0].name] = self._constant_slot(value)
            return None
        kernel = KERNELS.get(op.op_type)
        if kernel is None and op.op_type not in CONTROL:
            raise InputError(
                f"{self._where} uses the op {op.op_type!r} (of {op.output!r}), which the reference runtime does not "
                "know; it guesses no op's meaning, so check this model on a Mac"
            )
        step = self._bind(op, kernel, scope)
        if op.op_type.startswith("constexpr_"):
            self._decode(step, scope)
            return None
        scope.update(zip((output.name for output in op.outputs), step.outputs, strict=True))
        return step

    def _bind(self, op: MilOp, kernel: Kernel | None, scope: dict[str, int]) -> Step:
        given: dict[str, tuple[Argument, ...]] = dict(op.inputs)
        given |= {name: (constant,) for name, constant in op.attributes.items()}
        inputs: list[tuple[str, Slots]] = []
        state = ""
        for name, arguments in given.items():
            first = arguments[0] if arguments else None
            if isinstance(first, Reference) and first.name in self._states:
                if op.op_type not in ("read_state", "write_state"):
                    raise BundleError(
                        f"{self._where}: the op {op.op_type} of {op.output!r} takes the state {first.name!r}, which "
                        "only read_state and write_state may"
                    )
                state = first.name
                continue
            slots = tuple(self._slot(op, argument, scope) for argument in arguments)
            inputs.append((name, slots if len(slots) != 1 or name in _SEVERAL.get(op.op_type, ()) else slots[0]))
        if op.op_type in ("read_state", "write_state"):
            if not state:
                raise BundleError(
                    f"{self._where}: {op.op_type} of {op.output!r} names no state of {self._function.name}"
                )
            reads = op.op_type == "read_state"
            if len(op.outputs) != int(reads) or (not reads and "data" not in dict(inputs)):
                raise BundleError(f"{self._where}: {op.op_type} of the state {state!r} lacks its data or its result")
            if any(value.type != self._states[state] for value in op.outputs):
                raise BundleError(
                    f"{self._where}: {op.output!r} is declared {op.outputs[0].type}, its state {self._states[state]}"
                )
        fp16 = bool(op.outputs) and op.outputs[0].type.dtype == "float16" and self._numerics != "fp32"
        outputs = tuple(self.new_slot(type_=value.type) for value in op.outputs)
        step = Step(
            op=op,
            kernel=kernel,
            inputs=tuple(inputs),
            outputs=outputs,
            dtypes=tuple(value.type.dtype for value in op.outputs),
            rounds=kernel is not None and kernel.rounds and self._numerics != "fp32",
            half=fp16,
            half_sums=fp16 and self._numerics == "fp16sum",
            state=state,
            state_type=self._states.get(state, ValueType("float32")),
            constant=op.op_type.startswith("constexpr_"),
        )
        self._check_floats(step)
        step.blocks = tuple(self._nested(op, block, scope) for block in op.blocks)
        self._check_blocks(step)
        return step

    def _slot(self, op: MilOp, argument: Argument, scope: Mapping[str, int]) -> int:
        if isinstance(argument, Constant):
            return self._constant_slot(argument)
        if argument.name not in scope:
            raise BundleError(
                f"{self._where}: the op {op.op_type} of {op.output!r} takes {argument.name!r}, which no op before it "
                "computes; the package is damaged"
            )
        return scope[argument.name]

    def _nested(self, op: MilOp, block: MilBlock, scope: Mapping[str, int]) -> Steps:
        inner = dict(scope)
        slots = []
        for value in block.inputs:
            inner[value.name] = self.new_slot(type_=value.type)
            slots.append(inner[value.name])
        return self.block(block, inner, tuple(slots))

    def _check_blocks(self, step: Step) -> None:
        """Control flow runs without further checks, so its blocks must fit together."""
        op, blocks = step.op, step.blocks
        if op.op_type == "while_loop":
            slots = step.inputs[0][1] if len(step.inputs) == 1 else ()
            count = 1 if isinstance(slots, int) else len(slots)
            fits = (
                len(blocks) == 2
                and all(len(block.inputs) == count for block in blocks)
                and len(blocks[0].outputs) == 1
                and len(blocks[1].outputs) == len(op.outputs) == count
            )
        elif op.op_type == "cond":
            fits = len(blocks) == 2 and all(len(block.outputs) == len(op.outputs) for block in blocks)
            fits = fits and "pred" in dict(step.inputs)
        else:
            fits = not blocks
        if not fits:
            raise BundleError(f"{self._where}: the blocks of {op.op_type} ({op.output!r}) do not fit it")

    def _check_floats(self, step: Step) -> None:
        """fp16 and fp32 look alike at run time, so that a wrong declaration must be found here."""
        op = step.op
        if op.op_type in _RETYPING or step.constant or op.op_type in CONTROL:
            return
        found = {
            type_.dtype
            for _, slots in step.inputs
            for slot in ((slots,) if isinstance(slots, int) else slots)
            if (type_ := self._types[slot]) is not None and type_.is_float
        }
        for value in op.outputs:
            if value.type.kind == "tensor" and value.type.is_float and found and value.type.dtype not in found:
                raise BundleError(
                    f"{self._where}: the op {op.op_type} of {value.name!r} declares {value.type}, but its inputs are "
                    f"{', '.join(sorted(found))}; the package is damaged"
                )

    def _constant_slot(self, constant: Constant) -> int:
        shared = self._program.decoded
        value = None if constant.key is None else shared.get(constant.key)
        if value is None:
            value = constant.value
            if isinstance(value, np.ndarray) and value.dtype != object:
                value = value.astype(np.float32) if value.dtype.kind == "f" else value.view()
                value.flags.writeable = False
                if constant.key is not None:
                    shared[constant.key] = value
        slot = self.new_slot(value, constant.type)
        key = _immediate_key(value) if constant.key is None else constant.key
        if key is not None:
            self._keys[slot] = key
        return slot

    def _decode(self, step: Step, scope: dict[str, int]) -> None:
        call = Call()
        call.half, call.half_sums, call.outputs = step.half, False, step.dtypes
        for name, slots in step.inputs:
            call[name] = self.constants[slots] if isinstance(slots, int) else [self.constants[slot] for slot in slots]
        if any(value is None for value in call.values()):
            raise BundleError(f"{self._where}: {step.op.op_type} of {step.op.output!r} takes what is no constant")
        keys = self._decoded_keys(step)
        found = [self._program.decoded.get(key) for key in keys]
        results = found if all(value is not None for value in found) else self._compute(step, call)
        for value, slot, key, result in zip(step.op.outputs, step.outputs, keys, results, strict=True):
            self.constants[slot] = result
            scope[value.name] = slot
            if key is not None:
                self._keys[slot] = key
                self._program.decoded[key] = result

    def _decoded_keys(self, step: Step) -> list[Hashable | None]:
        """For each output: what says that another function's op of this kind decodes the same; None if nothing does."""
        inputs = tuple((name, self._keys.get(slots) if isinstance(slots, int) else None) for name, slots in step.inputs)
        if any(key is None for _, key in inputs):
            return [None] * len(step.outputs)
        types = tuple(output.type for output in step.op.outputs)
        rounds = step.rounds and "float16" in step.dtypes
        return [(step.op.op_type, rounds, types, inputs, index) for index in range(len(types))]


_SHORT = 4096  # bytes of an immediate value that may be part of a key


def _immediate_key(value: Any) -> Hashable | None:
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= _SHORT:
        return (value.dtype.str, value.shape, value.tobytes())
    return value if isinstance(value, str) else None


# The parameters that take several values: a list also where the program gives one.
_SEVERAL: Mapping[str, frozenset[str]] = {
    "concat": frozenset({"values"}),
    "stack": frozenset({"values"}),
    "einsum": frozenset({"values"}),
    "while_loop": frozenset({"loop_vars"}),
    "make_list": frozenset({"elem_shape"}),
}


def _mark_last_uses(steps: list[Step], keep: set[int]) -> None:
    """Set `free` of each step: the values made in this block that no later step reads."""
    made = {slot for step in steps for slot in step.outputs}
    seen = set(keep)
    for step in reversed(steps):
        used = _used(step) | set(step.outputs)
        step.free = tuple(sorted((used & made) - seen))
        seen |= used


def _used(step: Step) -> set[int]:
    used = {slot for _, slots in step.inputs for slot in ((slots,) if isinstance(slots, int) else slots)}
    for block in step.blocks:
        used |= set(block.outputs)
        for inner in block.steps:
            used |= _used(inner)
    return used
