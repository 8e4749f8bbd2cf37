"""A decoder whose key-value cache is state of a fixed size, as Core ML (iOS 18) keeps it between calls.

`PrefillState` reads a prompt of up to N tokens into an empty state, `DecodeState` one token behind those in it. Both
compute what `Decoder.prefill` and `Decoder.decode` (with `decode="dense"`) compute for one text, in arithmetic that
fits into fp16: norms divide by the greatest value before they square, angles of positions come from tables, masks are
finite. Keys and values are buffers that the modules change; torch.export lists them as mutated, and Core ML Tools turns
such buffers into states, which hold fp16 whatever the model computes in.

A slot is a place in the state, 0..C-1. Slots behind the last token hold what earlier texts left and are never read.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from edgekit.errors import InputError
from edgekit.models.decoder import Decoder, RMSNorm
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.decoder_state_attention import StaticPrefill, attend, bias
from edgekit.models.rotary import Rotary

# What the greatest value of a vector is taken to be at least, so that dividing by it stays within fp16.
_LEAST_PEAK = 2.0**-10
# Sizes of the prefill functions grow by this factor: half empty passes cost less than many functions.
_LEAST_PREFILL, _GROWTH = 64, 4


def prefill_sizes(capacity: int) -> tuple[int, ...]:
    """How many tokens the prefill functions of a state of C slots read: 64, 256, 1024, ... below C, and C."""
    sizes = []
    size = _LEAST_PREFILL
    while size < capacity:
        sizes.append(size)
        size *= _GROWTH
    return (*sizes, capacity)


def state_names(layers: int) -> tuple[str, ...]:
    """The names of the buffers: `key_0`, `value_0`, `key_1`, ..."""
    return tuple(f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value"))


class HalfSafeNorm(nn.Module):
    """`RMSNorm` that fp16 can compute: the mean of squares of values beyond 255 would be infinite there.

    x / rms(x) does not change when x is divided by its greatest value first; eps is divided by that value's square.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.root_eps, self.offset = norm.eps**0.5, norm.offset
        self.weight = norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` to the same shape."""
        peak = x.abs().amax(-1, keepdim=True).clamp(min=_LEAST_PEAK)
        x = x / peak
        eps = (self.root_eps / peak).square()
        weight = self.weight.to(x.dtype)
        scale = weight + self.offset if self.offset else weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


class RotaryTable(nn.Module):
    """`Rotary` from tables of its cosines and sines: fp16 has no room for the angles of far positions.

    Args:
        rotary: whose tables they are.
        positions: how many there are.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, rotary: Rotary, positions: int) -> None:
        super().__init__()
        cos, sin = rotary(torch.arange(positions).unsqueeze(0))
        self.register_buffer("cos", cos[0, 0].clone(), persistent=False)
        self.register_buffer("sin", sin[0, 0].clone(), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int `[1, N]` to cosines and sines float32 `[1, 1, N, head_dim / 2]`."""
        at = positions.flatten()
        return self.cos.index_select(0, at)[None, None], self.sin.index_select(0, at)[None, None]


def half_safe(decoder: Decoder, capacity: int) -> Decoder:
    """A copy of the decoder for positions 0..capacity-1, whose norms and angles fp16 can compute; it shares weights.

    Raises:
        InputError: a capacity below 1, or beyond the model's context.
    """
    context = decoder.config.context
    if not 1 <= capacity <= context:
        raise InputError(
            f"the state holds 1 to {context} tokens, the model's context; got a capacity of {capacity}. Ask for less, "
            "or build the model with a larger context if it was trained for one"
        )
    tensors: dict[int, object] = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    copied = copy.deepcopy(decoder, tensors)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, RMSNorm):
                setattr(module, name, HalfSafeNorm(child))
    copied.model.rotary = RotaryTable(decoder.model.rotary, capacity)  # type: ignore[assignment]
    return copied.eval()


class _Stateful(nn.Module):
    """A decoder and its state: buffers `key_0`, `value_0`, ... `[1, Hkv, C, D]`."""

    def __init__(self, decoder: Decoder, capacity: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.decoder, self.capacity = decoder, capacity
        config = decoder.config
        for name in state_names(config.num_layers):
            empty = torch.zeros(1, config.num_kv_heads, capacity, config.head_dim, dtype=dtype)
            self.register_buffer(name, empty, persistent=False)

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def states(self) -> dict[str, torch.Tensor]:
        """The buffers by name, in their order; changing them changes the state."""
        return {name: self.get_buffer(name) for name in state_names(self.config.num_layers)}


class PrefillState(_Stateful):
    """Reads a text of up to N tokens into the slots 0..N-1; those of padding become zeros.

    Args:
        decoder: from `half_safe`.
        capacity: C, slots of the state.
        count: N, at most C.
        dtype: of the state.
    """

    def __init__(self, decoder: Decoder, capacity: int, count: int, dtype: torch.dtype = torch.float16) -> None:
        if not 1 <= count <= capacity:
            raise InputError(f"a pass takes 1 to {capacity} tokens, the state's capacity; got {count}")
        super().__init__(decoder, capacity, dtype)
        self.count = count

    def forward(self, input_ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Token ids int32 `[1, N]`, padded on the right, to the logits `[1, 1, vocab_size]` of the last valid token.

        Args:
            input_ids: any ids of the vocabulary where padding is.
            length: int32 `[1]`, how many are valid: 1..N.
        """
        decoder, count = self.decoder, self.count
        step = StaticPrefill(decoder.config.attention, count, length, decoder.boundary_predictor)
        present = step.valid.to(decoder.model.embed_tokens.weight.dtype)[:, None, :, None]

        def layer(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for kind, tensor in (("key", k), ("value", v)):
                state = self.get_buffer(f"{kind}_{index}")
                new = (tensor * present).to(state.dtype)
                if count == self.capacity:
                    state.copy_(new)
                else:
                    state[:, :, :count] = new
            return step.attend(decoder.layer_attention[index], q, k, v)

        positions = torch.arange(count, dtype=torch.int32).unsqueeze(0)
        hidden = decoder.model(input_ids, positions, layer)
        return decoder.logits(hidden.index_select(1, length - 1))


class DecodeState(_Stateful):
    """Reads one token into a slot and attends to it and all slots before it, as far as sliding windows reach.

    Args:
        decoder: from `half_safe`.
        capacity: C, slots of the state.
        dtype: of the state.
    """

    def __init__(self, decoder: Decoder, capacity: int, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(decoder, capacity, dtype)

    def forward(self, input_ids: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """A token id int32 `[1, 1]` to the logits `[1, 1, vocab_size]` behind it.

        Args:
            input_ids: the token.
            position: int32 `[1]`, its slot: 0..C-1, all before it filled.
        """
        decoder, capacity = self.decoder, self.capacity
        # All slots are written, with what was there but for one: a slice at a place that the graph computes would leave
        # the Neural Engine.
        slots = torch.arange(capacity, dtype=torch.int32)
        new = (slots == position).to(decoder.model.embed_tokens.weight.dtype)[None, None, :, None]
        old = 1.0 - new
        masks: dict[int, torch.Tensor] = {}

        def layer(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            attention = decoder.layer_attention[index]
            filled = []
            for kind, tensor in (("key", k), ("value", v)):
                state = self.get_buffer(f"{kind}_{index}")
                filled.append(state.to(tensor.dtype) * old + tensor * new)
                state.copy_(filled[-1].to(state.dtype))
            window = attention.window if attention.window < capacity else 0
            if window not in masks:
                masks[window] = bias(position, capacity, window, q.dtype)
            return attend(attention, q, filled[0], filled[1], masks[window])

        hidden = decoder.model(input_ids, position.unsqueeze(0), layer)
        return decoder.logits(hidden)
