"""Inputs of a language model's graphs for measuring them: drawn tokens behind a drawn cache, of sizes that fit.

Their sizes depend on one another, unlike those of other models: the mask is as long as cache and new tokens together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.generation_info import Generation
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.session import Array

SIZES = ("batch", "tokens", "past")
DEFAULT_TOKENS = 512


def token_inputs(
    manifest: Manifest, generation: Generation, sizes: Mapping[str, int] | None = None, *, seed: int = 0
) -> dict[str, Array]:
    """Inputs for one of the two graphs.

    Args:
        manifest: describes the graph as its main one.
        generation: of the whole bundle.
        sizes: `tokens` (default: 512 or what the context leaves) behind `past` others (default 0), for each text of a
            `batch` (default 1). The graph `decode` reads one token behind all of these.

    Raises:
        InputError: an unknown size, or sizes beyond the context.
    """
    given = dict(sizes or {})
    for name, size in given.items():
        if name not in SIZES:
            raise InputError(f"unknown dimension {name!r}; the sizes of a language model are {', '.join(SIZES)}")
        if not isinstance(size, int | np.integer) or size < (0 if name == "past" else 1):
            raise InputError(f"the size of {name} must be an integer of at least 1 (past: 0), got {size!r}")
    batch, past = given.get("batch", 1), given.get("past", 0)
    tokens = given.get("tokens", max(1, min(DEFAULT_TOKENS, generation.context - 1 - past)))
    specs = {spec.name: spec for spec in manifest.inputs}
    if specs["input_ids"].shape[-1] == 1:
        past, tokens = past + tokens, 1
    if past + tokens > generation.context:
        raise InputError(
            f"{past + tokens} tokens are more than the context of {manifest.name}, {generation.context}; choose "
            "smaller sizes for tokens and past"
        )
    per_block = generation.attention.get("chunks_per_block", 1)
    chunks = math.ceil(past / generation.block_size) * (per_block if isinstance(per_block, int) else 1)
    dims = {"batch": batch, "tokens": tokens, "past": past, "total": past + tokens, "chunks": chunks}
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {}
    for name, spec in specs.items():
        shape = tuple(dims[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        if name == "attention_mask":
            arrays[name] = np.ones(shape, spec.dtype)
        elif spec.dtype.startswith("float"):
            arrays[name] = generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
        elif name == "input_ids":
            arrays[name] = generator.integers(0, generation.tokenizer.vocab_size, shape).astype(spec.dtype)
        else:  # the chunk of each cached token, as if all were of one length
            places = np.arange(past) * chunks // max(1, past)
            arrays[name] = np.broadcast_to(places, shape).astype(spec.dtype)
    return arrays
