"""Recurrent layers: rnn and lstm.

`gru` is left out: the documentation of iOS15 to iOS18 gives two formulas for its reset gate that contradict each other.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.mil.half import round_half
from edgekit.runtime.mil.ops.matmul import product
from edgekit.runtime.mil.ops.special import sigmoid
from edgekit.runtime.mil.registry import Array, Call, Result, op

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "linear": lambda x: x,
}


def _activation(call: Call, name: str, default: str) -> Callable[[Array], Array]:
    chosen = call.text(name, default)
    if chosen not in _ACTIVATIONS:
        raise InputError(f"its {name} {chosen!r} is none of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[chosen]


def _steps(call: Call, x: Array) -> list[int]:
    direction = call.text("direction", "forward")
    if direction not in ("forward", "reverse"):
        raise InputError(f"its direction {direction!r} is neither forward nor reverse")
    order = list(range(x.shape[0]))
    return order if direction == "forward" else order[::-1]


@op("rnn")
def _rnn(call: Call) -> Result:
    x, hidden = call.array("x"), call.array("initial_h")
    activation = _activation(call, "activation", "tanh")
    inputs = _inputs(call, x, "weight_ih", "bias")
    outputs = np.empty((*x.shape[:2], hidden.shape[-1]), np.float32)
    for step in _steps(call, x):
        carried = product(hidden, call.array("weight_hh").T, half_sums=call.half_sums)
        hidden = _stored(call, activation(inputs[step] + carried))
        outputs[step] = hidden
    return (outputs if call.flag("output_sequence") else hidden[None]), np.array(hidden)


def _inputs(call: Call, x: Array, weight: str, bias: str) -> Array:
    flat = product(x.reshape(-1, x.shape[-1]), call.array(weight).T, half_sums=call.half_sums)
    added = call.optional(bias)
    result = flat if added is None else flat + added
    return result.reshape(*x.shape[:2], -1)


def _stored(call: Call, state: Array) -> Array:
    """What passes from one step to the next is stored in the layer's type."""
    return round_half(np.asarray(state)) if call.half else state


@op("lstm")
def _lstm(call: Call) -> Result:
    """Gates in the order input, forget, output, cell."""
    x = call.array("x")
    both = call.text("direction", "forward") == "bidirectional"
    order = list(range(x.shape[0])) if both else _steps(call, x)
    size = call.array("weight_hh").shape[-1]
    runs = [("", order, slice(0, size))]
    if both:
        runs.append(("_back", order[::-1], slice(size, 2 * size)))
    results = [_lstm_one(call, x, suffix, steps, part) for suffix, steps, part in runs]
    sequence, hidden, cell = (np.concatenate(parts, axis=-1) for parts in zip(*results, strict=True))
    return (sequence if call.flag("output_sequence") else hidden[None]), hidden, cell


def _lstm_one(call: Call, x: Array, suffix: str, steps: list[int], part: slice) -> tuple[Array, Array, Array]:
    gate = _activation(call, "recurrent_activation", "sigmoid")
    cell_activation = _activation(call, "cell_activation", "tanh")
    activation = _activation(call, "activation", "tanh")
    if call.get(f"peephole{suffix}") is not None:
        raise InputError("peepholes are not known here")
    hidden, cell = call.array("initial_h")[:, part], call.array("initial_c")[:, part]
    inputs = _inputs(call, x, f"weight_ih{suffix}", f"bias{suffix}")
    weight, limit = call.array(f"weight_hh{suffix}").T, call.get("clip")
    outputs = np.empty((*x.shape[:2], hidden.shape[-1]), np.float32)
    for step in steps:
        gates = inputs[step] + product(hidden, weight, half_sums=call.half_sums)
        i, f, o, z = np.split(gates, 4, axis=-1)
        cell = gate(f) * cell + gate(i) * cell_activation(z)
        if limit is not None:
            cell = np.clip(cell, -np.float32(limit), np.float32(limit))
        cell = _stored(call, cell)
        hidden = _stored(call, gate(o) * activation(cell))
        outputs[step] = hidden
    return outputs, np.array(hidden), np.array(cell)
