"""Runs one function of a MIL program in numpy, op by op.

What the modes promise, for a program whose values are fp16 (fp32 values are computed in fp32 in every mode):

- `typed`: every op computes in fp32 from inputs that are half-precision numbers, and its result is rounded once to its
  declared type: nearest even, infinity beyond 65504, subnormal halves kept. It is what hardware gives that
  accumulates in fp32 and rounds what it stores, and so the optimistic end.
- `fp16sum`: as `typed`, but matrix products, convolutions, attention, normalisations, softmax, average pooling,
  cumulative sums and reductions add one term after the other in half precision. It is the pessimistic end.
- `fp32`: declared fp16 is ignored: nothing is rounded (weights keep the values that the file holds). It says what the
  graph computes, apart from its precision.

None promises Apple's numbers. The CPU, GPU and Neural Engine each choose the order and the width of their sums, fuse
ops (then without rounding between them), and may flush subnormals; elementary functions differ in the last bit. The
two fp16 modes bracket what to expect; they are no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import BundleError, EdgekitError, InputError, UnknownNameError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.preparation import Prepared, Step, Steps, prepare
from edgekit.runtime.mil.program import STORAGE, MilProgram, MilValue, ValueType
from edgekit.runtime.mil.registry import Array, Call

NUMERICS = ("typed", "fp32", "fp16sum")
_LARGEST_STATE = 2**28  # elements: 1 GiB as the interpreter keeps them
_LONGEST_LOOP = 1_000_000  # rounds; at some microseconds per op, a damaged loop ends within the minute


@dataclass(frozen=True)
class OpCall:
    """One op that was just run.

    Attributes:
        op_type: such as `conv`.
        name: the name of its first output (its own for `write_state`).
        outputs: the results; fp16 tensors as float32 arrays that hold half-precision numbers. Read-only.
        inputs: the inputs by parameter name, constants included, likewise.
    """

    op_type: str
    name: str
    outputs: tuple[Any, ...]
    inputs: Mapping[str, Any]


Trace = Callable[[OpCall], None]


@dataclass(slots=True)
class _Frame:
    """One run: the values by slot, the states by name."""

    values: list[Any]
    states: dict[str, Array]
    trace: Trace | None


class MilInterpreter:
    """One function of a program, prepared to run. Keeps no state between runs, so that threads may share it."""

    def __init__(self, program: MilProgram, function: str | None = None, *, numerics: str = "typed") -> None:
        """Prepare `function` (None: the program's default one): bind every op, read and decode the constants.

        Raises:
            BundleError: the program is inconsistent, or its weights are missing or damaged.
            InputError: no such function, or an op that this interpreter does not know.
            UnknownNameError: no such mode of `numerics`; see `NUMERICS`.
        """
        if numerics not in NUMERICS:
            raise UnknownNameError("numerics", numerics, NUMERICS)
        self.program = program
        self.numerics = numerics
        self.function = program.function(function)
        self.inputs: tuple[MilValue, ...] = tuple(v for v in self.function.inputs if v.type.kind == "tensor")
        self.states: tuple[MilValue, ...] = self.function.states
        with np.errstate(all="ignore"):
            self._prepared: Prepared = prepare(program, self.function, numerics, self._compute)
        self.outputs: tuple[MilValue, ...] = self.function.outputs

    def run(
        self,
        inputs: Mapping[str, Array],
        states: dict[str, Array] | None = None,
        *,
        trace: Trace | None = None,
    ) -> dict[str, Any]:
        """Run once.

        Args:
            inputs: an array for each input, of the declared shape. Floats of any width are rounded to the declared
                type; integers are taken where the declared type holds their values.
            states: the states by name; what is missing starts as zeros, and the new values are put into this dict.
                The arrays handed in are not written to.
            trace: called after each op.

        Returns:
            The outputs by name: arrays of the declared dtype (mode `fp32`: float32 for fp16), a str for a class label,
            a dict for a classifier's probabilities.

        Raises:
            InputError: inputs or states that do not fit; an op that cannot compute with what it got, or whose result is
                not what it declares (the message names the op and the package).
        """
        values = list(self._prepared.constants)
        held: dict[str, Array] = {} if states is None else states
        where = self.program.path.name
        wanted = {value.name for value in self.inputs}
        if inputs.keys() != wanted:
            raise InputError(
                f"{where} takes the inputs {', '.join(f'{v.name}: {v.type}' for v in self.inputs) or 'none'}; "
                f"got {', '.join(map(repr, inputs)) or 'none'}"
            )
        with np.errstate(all="ignore"):
            for value in self.inputs:
                values[self._prepared.slots[value.name]] = self._take(value, inputs[value.name], "input")
            current = {
                state.name: self._take(state, held[state.name], "state")
                if state.name in held
                else self._take(state, self._zeros(state), "state")
                for state in self.states
            }
            if unknown := held.keys() - current.keys():
                raise InputError(f"{where} has no state {min(unknown)!r}; it has {', '.join(current) or 'none'}")
            frame = _Frame(values, current, trace)
            self._run(self._prepared.body, frame)
            results = {
                value.name: self._give(values[slot], value.type)
                for value, slot in zip(self.outputs, self._prepared.body.outputs, strict=True)
            }
            held.update({state.name: self._give(current[state.name], state.type) for state in self.states})
        return results

    def _zeros(self, state: MilValue) -> Array:
        """The first value of a state. Raises `InputError` for a size that no state of a device has."""
        if state.type.elements > _LARGEST_STATE:
            raise InputError(
                f"{self.program.path.name}: the state {state.name} is {state.type}; the reference runtime makes none "
                "above 2^28 elements"
            )
        shape = tuple(size or 0 for size in state.type.shape)
        return np.zeros(shape, np.float32)

    def _take(self, value: MilValue, given: Any, what: str) -> Array:
        """An input as the interpreter keeps it. Raises `InputError` where it does not fit the declared type."""
        array, type_ = np.asarray(given), value.type
        if array.ndim != len(type_.shape) or any(
            size is not None and size != got for size, got in zip(type_.shape, array.shape, strict=True)
        ):
            raise InputError(f"{what} {value.name}: expected {type_}, got an array of shape {list(array.shape)}")
        storage = np.dtype(np.float32) if type_.is_float else STORAGE[type_.dtype]
        if not type_.is_float and array.dtype != storage:
            converted = array.astype(storage) if array.dtype.kind in "iub" else None
            if converted is None or not np.array_equal(converted, array):
                raise InputError(
                    f"{what} {value.name}: expected {type_}, got values of {array.dtype} that it does not hold"
                )
            array = converted
        elif array.dtype.kind not in "fiub":
            raise InputError(f"{what} {value.name}: expected {type_}, got an array of {array.dtype}")
        result = np.array(array, dtype=storage, order="C")
        if type_.dtype == "float16" and self.numerics != "fp32":
            result = round_half(result)
        result.flags.writeable = False
        return result

    def _give(self, value: Any, type_: ValueType) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        half = type_.dtype == "float16" and self.numerics != "fp32"
        return value.astype(np.float16) if half else np.array(value)

    def _run(self, steps: Steps, frame: _Frame) -> None:
        values = frame.values
        for step in steps.steps:
            call = Call()
            call.half, call.half_sums, call.outputs = step.half, step.half_sums, step.dtypes
            for name, slot in step.inputs:
                call[name] = values[slot] if isinstance(slot, int) else [values[item] for item in slot]
            results = self._results(step, call, frame)
            if step.blocks:  # what a branch gives is checked against what the op declares
                for result, value in zip(results, step.op.outputs, strict=True):
                    self._check(step, result, value.type)
            for slot, result in zip(step.outputs, results, strict=True):
                values[slot] = result
            if frame.trace is not None:
                frame.trace(OpCall(step.op.op_type, step.op.output, results, call))
            for slot in step.free:
                values[slot] = None

    def _results(self, step: Step, call: Call, frame: _Frame) -> tuple[Any, ...]:
        kind = step.op.op_type
        if kind == "while_loop":
            return self._loop(step, frame)
        if kind == "cond":
            block = step.blocks[0 if self._truth(step, call["pred"]) else 1]
            self._run(block, frame)
            return tuple(frame.values[slot] for slot in block.outputs)
        if kind == "read_state":
            return (frame.states[step.state],)
        if kind == "write_state":
            data = call["data"]
            self._check(step, data, step.state_type)
            frame.states[step.state] = data
            return ()
        return self._compute(step, call)

    def _loop(self, step: Step, frame: _Frame) -> tuple[Any, ...]:
        condition, body = step.blocks
        slots = step.inputs[0][1]
        variables = [frame.values[slot] for slot in ([slots] if isinstance(slots, int) else slots)]
        for _ in range(_LONGEST_LOOP):
            for block in (condition, body):
                for slot, value in zip(block.inputs, variables, strict=True):
                    frame.values[slot] = value
                self._run(block, frame)
                if block is condition and not self._truth(step, frame.values[block.outputs[0]]):
                    return tuple(variables)
            variables = [frame.values[slot] for slot in body.outputs]
        raise self._fault(step, f"it did not end within {_LONGEST_LOOP} rounds")

    def _compute(self, step: Step, call: Call) -> tuple[Any, ...]:
        """Run an op's kernel and check what it gives against the declared types."""
        if step.kernel is None:
            raise self._fault(step, "it has no kernel")
        try:
            given = step.kernel.run(call)
        except EdgekitError as error:
            raise self._fault(step, str(error), call) from error
        except (ValueError, TypeError, IndexError, KeyError, ArithmeticError, AttributeError, MemoryError) as error:
            raise self._fault(step, f"it cannot compute: {error}", call) from error
        results = list(given) if isinstance(given, tuple) else [given]
        if len(results) != len(step.op.outputs):
            raise self._fault(step, f"it declares {len(step.op.outputs)} outputs and gives {len(results)}", call)
        for index, value in enumerate(step.op.outputs):
            results[index] = self._finish(step, results[index], value.type)
        return tuple(results)

    def _finish(self, step: Step, result: Any, type_: ValueType) -> Any:
        if type_.kind != "tensor" or type_.dtype == "string":
            return result
        array = np.asarray(result)
        if step.rounds and type_.dtype == "float16" and array.dtype == np.float32:
            array = round_half(array)
        self._check(step, array, type_)
        array.flags.writeable = False
        return array

    def _truth(self, step: Step, value: Any) -> bool:
        if not isinstance(value, np.ndarray) or value.size != 1:
            raise self._fault(step, "its condition is no single value")
        return bool(value)

    def _check(self, step: Step, array: Any, type_: ValueType) -> None:
        if type_.kind != "tensor" or type_.dtype == "string":
            return
        if not isinstance(array, np.ndarray):
            raise self._fault(step, f"it declares {type_}, but gives a {type(array).__name__}")
        storage = np.float32 if type_.is_float else STORAGE.get(type_.dtype)
        fits = len(array.shape) == len(type_.shape) and all(
            size is None or size == got for size, got in zip(type_.shape, array.shape, strict=True)
        )
        if array.dtype != storage or not fits:
            raise self._fault(step, f"it declares {type_}, but gives {array.dtype}{list(array.shape)}")

    def _fault(self, step: Step, problem: str, call: Call | None = None) -> EdgekitError:
        shapes = "" if call is None else f" (inputs: {_shapes(call)})"
        kind = BundleError if step.constant else InputError
        return kind(f"{self.program.path.name}: the op {step.op.op_type} of {step.op.output!r}: {problem}{shapes}")


def _shapes(call: Call) -> str:
    texts = []
    for name, value in call.items():
        arrays = value if isinstance(value, list) else [value]
        shown = [
            f"{a.dtype}{list(a.shape)}" if isinstance(a, np.ndarray) and a.ndim else str(a)[:40] for a in arrays[:4]
        ]
        texts.append(f"{name} {', '.join(shown)}")
    return "; ".join(texts)
