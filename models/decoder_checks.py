"""Checks of what a decoder is called with, in words that a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgekit.errors import InputError, ShapeError
from edgekit.models.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from edgekit.models.decoder import Cache


def check_forward(
    config: DecoderConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> None:
    """Refuse what `Decoder.forward` cannot take; does nothing while torch.export or torch.compile trace.

    Raises:
        ShapeError: a shape that does not fit.
        InputError: a value or dtype that does not.
    """
    if _tracing():
        return
    _check_ids(config, input_ids, 0)
    count = input_ids.shape[1]
    if attention_mask is not None:
        _check_mask(attention_mask, input_ids, 0)
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[0] not in (1, len(input_ids)) or position_ids.shape[1] != count:
            raise ShapeError(f"position_ids must be [B, {count}] or [1, {count}]; got {list(position_ids.shape)}")
        lowest, highest = int(position_ids.min()), int(position_ids.max())
        if lowest < 0 or highest >= config.context or bool((position_ids.diff(dim=1) <= 0).any()):
            raise InputError(
                f"position_ids must rise in each row, within 0..{config.context - 1}; got {lowest}..{highest}"
            )


def check_pass(
    config: DecoderConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Cache, *, single: bool = False
) -> None:
    """Refuse what `Decoder.prefill`, or with `single` `Decoder.decode`, cannot take; as `check_forward`."""
    if _tracing():
        return
    past = cache.tokens
    _check_ids(config, input_ids, past)
    if single and input_ids.shape[1] != 1:
        raise ShapeError(f"decode takes one token per row, [B, 1]; got {list(input_ids.shape)}; prefill takes more")
    wanted = (len(input_ids), config.num_kv_heads, past, config.head_dim)
    if len(cache.keys) != config.num_layers or any(tuple(key.shape) != wanted for key in (*cache.keys, *cache.values)):
        raise ShapeError(
            f"the cache must hold keys and values {list(wanted)} for {config.num_layers} layers; got "
            f"{len(cache.keys)} layers, the first {list(cache.keys[0].shape)}; start from empty_cache(batch)"
        )
    _check_mask(attention_mask, input_ids, past, gaps=single)
    if config.attention.has_chunks and not (single and config.attention.decode == "dense"):
        _check_chunks(config, cache, len(input_ids))


def _check_chunks(config: DecoderConfig, cache: Cache, batch: int) -> None:
    """The chunks of a cache are there for every layer and for every cached token."""
    if not cache.chunk_keys:
        raise InputError(
            'the cache has no chunks, which decode="dense" leaves out: after such a step only decode can follow; begin '
            "with empty_cache(batch)"
        )
    heads = config.attention.mask_heads(config.num_kv_heads)
    tables = 1 if config.attention.shared_ids else config.num_layers
    keys, ids = cache.chunk_keys, cache.chunk_ids
    wanted = (batch, heads, keys[0].shape[2], config.head_dim)
    if (
        (len(keys), len(ids)) != (config.num_layers, tables)
        or any(tuple(key.shape) != wanted for key in keys)
        or any(tuple(each.shape) != (batch, cache.tokens) for each in ids)
    ):
        raise ShapeError(
            f"the cache must hold chunk keys [{batch}, {heads}, chunks, {config.head_dim}] for {config.num_layers} "
            f"layers and {tables} times the chunks of its tokens, [{batch}, {cache.tokens}]; got {len(keys)}, the "
            f"first {list(keys[0].shape)}, and {len(ids)}; take a cache of a model with the same attention"
        )


def _tracing() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _check_ids(config: DecoderConfig, input_ids: torch.Tensor, past: int) -> None:
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ShapeError(f"input_ids must be [B, N] with at least one token; got {list(input_ids.shape)}")
    if input_ids.dtype != torch.int64:
        raise InputError(f"input_ids must be int64; got {input_ids.dtype}")
    count = past + input_ids.shape[1]
    if count > config.context:
        cached = f" ({past} of them cached)" if past else ""
        raise InputError(
            f"the model takes up to {config.context} tokens; got {count}{cached}. Shorten the text, or build the model "
            "with a larger context if it was trained for one"
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise InputError(f"token ids lie in 0..{config.vocab_size - 1}; got {lowest}..{highest}")


def _check_mask(attention_mask: torch.Tensor, input_ids: torch.Tensor, past: int, *, gaps: bool = False) -> None:
    wanted = (len(input_ids), past + input_ids.shape[1])
    if tuple(attention_mask.shape) != wanted:
        hint = f"; it covers the {past} cached tokens too" if past else ""
        raise ShapeError(f"attention_mask must be {list(wanted)}; got {list(attention_mask.shape)}{hint}")
    if attention_mask.dtype != torch.int64 or bool(((attention_mask != 0) & (attention_mask != 1)).any()):
        raise InputError(f"attention_mask must be int64 of ones and zeros; got {attention_mask.dtype}")
    if gaps:
        return
    slots = torch.arange(1, wanted[1] + 1, device=attention_mask.device)
    behind_gap = (attention_mask == 1) & (attention_mask.cumsum(1) < slots)
    if bool(behind_gap[:, past:].any()):
        row = int(behind_gap[:, past:].any(1).nonzero()[0])
        raise InputError(
            f"row {row} of attention_mask has a token behind padding; put the padding of a pass on the right, and the "
            "further tokens of a padded row into decode steps"
        )
