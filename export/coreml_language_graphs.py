"""The functions of a language model's package for Core ML: `decode`, and a `prefill_N` for each of a few sizes.

A function keeps its cache in states. To the rest of edgekit it is a pure one: states are inputs `past_key_values.*`
and outputs `present.*` of the manifest, `[1, Hkv, C, D]` in fp16, of which the slots behind the text are zeros.

What PyTorch answers comes from the decoder as it was loaded, with its growing cache and in fp32, and not from the
modules that are converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgekit.errors import ExportError
from edgekit.export.calling import first_line
from edgekit.export.coreml_tools import quiet_tools
from edgekit.export.language_graphs import Part
from edgekit.export.source import one_thread
from edgekit.models.decoder import Cache, Decoder
from edgekit.models.decoder_state import DecodeState, PrefillState, half_safe, prefill_sizes, state_names
from edgekit.runtime.coreml_info import StateSpec
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.session import Array

DECODE = "decode"
STATE_DTYPE = "float16"  # the only one that Core ML has for states (coremltools.StateType)

_ATEN = torch.ops.aten
# Infinite and nearly infinite numbers in a graph become this one: fp16 holds it, and no score comes near.
_LARGE = 60_000.0


def _where(condition: torch.Tensor, self: torch.Tensor | float, other: torch.Tensor | float) -> torch.Tensor:
    """`torch.where` with numbers, as products: Core ML Tools would write out a tensor full of each number.

    Exact for finite tensors.
    """
    tensor = next((each for each in (self, other) if isinstance(each, torch.Tensor)), None)
    mask = condition.to(torch.float32 if tensor is None else tensor.dtype)
    parts = []
    for chosen, value in ((mask, self), (1 - mask, other)):
        if isinstance(value, torch.Tensor):
            parts.append(value * chosen)
        elif value != 0:
            parts.append(chosen * _finite(value))
    return sum(parts[1:], parts[0])


def _finite(value: Any) -> Any:
    """A mask or a rank needs no infinity, and hardware for fp16 may treat it as it likes."""
    if isinstance(value, float) and abs(value) > _LARGE:
        return _LARGE if value > 0 else -_LARGE
    return value


# For `edgekit.export.coreml.convert`: of these numbers Core ML Tools would make whole tensors.
RULES = dict.fromkeys((_ATEN.where.ScalarOther, _ATEN.where.ScalarSelf, _ATEN.where.Scalar), _where)


@dataclass(frozen=True)
class StateGraph:
    """One function: its module, and the decoder that says what is right.

    Attributes:
        decoder: the original, with its own attention in `prefill` and a dense one in `decode`.
        module: what is converted.
    """

    decoder: Decoder
    module: PrefillState | DecodeState

    @property
    def part(self) -> Part:
        return "prefill" if isinstance(self.module, PrefillState) else "decode"

    @property
    def name(self) -> str:
        """The function's name in the package."""
        return f"prefill_{self.module.count}" if isinstance(self.module, PrefillState) else DECODE

    @property
    def tokens(self) -> int:
        """How many tokens it takes."""
        return self.module.count if isinstance(self.module, PrefillState) else 1

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states with the tensors that stand for them."""
        config = self.decoder.config
        shape = (1, config.num_kv_heads, self.module.capacity, config.head_dim)
        specs = []
        for name in state_names(config.num_layers):
            kind, layer = name.split("_")
            specs.append(
                StateSpec(name, STATE_DTYPE, shape, f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
            )
        return tuple(specs)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Token ids, where they stand, and the states. `length` is 1..N, `position` 0..C-1."""
        vocabulary = str(self.decoder.config.vocab_size)
        where = (
            TensorSpec("length", "int32", (1,), index_of=str(self.tokens + 1))
            if self.part == "prefill"
            else TensorSpec("position", "int32", (1,), index_of=str(self.module.capacity))
        )
        ids = TensorSpec("input_ids", "int32", (1, self.tokens), index_of=vocabulary)
        return (ids, where, *(TensorSpec(state.input, state.dtype, state.shape) for state in self.states))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The logits of the last token, and the states."""
        logits = TensorSpec("logits", "float32", (1, 1, self.decoder.config.vocab_size))
        return (logits, *(TensorSpec(state.output, state.dtype, state.shape) for state in self.states))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What PyTorch answers, on one thread; values as the inputs' specifications say.

        Raises `InputError` or `ShapeError` where the decoder does not run on them.
        """
        ids = torch.from_numpy(np.asarray(inputs["input_ids"], np.int64))
        with torch.no_grad(), one_thread():
            if self.part == "prefill":
                ids = ids[:, : int(inputs["length"][0])]
                logits, cache = self.decoder.prefill(ids, torch.ones_like(ids), self.decoder.empty_cache(1))
            else:
                past = int(inputs["position"][0])
                halves = [
                    torch.from_numpy(inputs[state.input][:, :, :past].astype(np.float32)) for state in self.states
                ]
                mask = torch.ones(1, past + 1, dtype=torch.int64)
                logits, cache = self.decoder.decode(ids, mask, Cache(halves[0::2], halves[1::2]))
        pairs = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
        room = self.module.capacity - cache.tokens
        whole = (F.pad(tensor, [0, 0, 0, room]).to(torch.float16).numpy() for tensor in pairs)
        present = dict(zip((state.output for state in self.states), whole, strict=True))
        return {"logits": logits.numpy(), **present}

    def empty(self) -> dict[str, Array]:
        """The states of no text."""
        return {state.input: np.zeros(state.shape, state.dtype) for state in self.states}

    def trace(self) -> torch.export.ExportedProgram:
        """torch.export with the states as mutated buffers, without numbers beyond fp16's range; `RULES` go with it.

        Raises:
            ExportError: it cannot be traced.
        """
        where = torch.tensor([self.tokens - 1 or 1], dtype=torch.int32)
        args = (torch.zeros(1, self.tokens, dtype=torch.int32), where)
        try:
            with quiet_tools(), torch.no_grad():
                program = torch.export.export(self.module, args)
        except Exception as error:  # torch.export raises from several private hierarchies
            raise ExportError(f"torch.export cannot trace {self.name} of the decoder: {first_line(error)}") from error
        _make_finite(program)
        return program


def state_graphs(decoder: Decoder, capacity: int) -> list[StateGraph]:
    """The prefill functions, smallest first, and `decode`, for a state of `capacity` tokens; weights are shared.

    Raises:
        InputError: a capacity beyond the model's context.
    """
    safe = half_safe(decoder, capacity)
    modules: list[PrefillState | DecodeState] = [
        PrefillState(safe, capacity, size).eval() for size in prefill_sizes(capacity)
    ]
    modules.append(DecodeState(safe, capacity).eval())
    return [StateGraph(decoder, module) for module in modules]


def _make_finite(program: torch.export.ExportedProgram) -> None:
    """Replace infinite constants in place."""
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.args = torch.fx.node.map_aggregate(node.args, _finite)
            node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _finite)
    program.graph_module.recompile()
