"""What `edgekit inspect` says of a graph's tensors and of a language model, line by line."""

from __future__ import annotations

import re

from edgekit.runtime.generation_info import Generation
from edgekit.runtime.manifest import Manifest

# Tensors of the layers from the second on, in a language model's cache.
_LAYER = re.compile(r"(past|present)\w*\.[1-9]\d*(\.(key|value))?$")


def generation_lines(generation: Generation) -> list[str]:
    """What a language model's bundle says of generating text."""
    attention = ", ".join(f"{key} {value}" for key, value in generation.attention.items() if key != "kind")
    tokenizer = generation.tokenizer
    marks = (("bos", tokenizer.bos), ("eos", ", ".join(map(str, tokenizer.eos)) or None), ("pad", tokenizer.pad))
    named = ", ".join(f"{key} {value}" for key, value in marks if value is not None)
    kind = "bytes" if tokenizer.file is None else tokenizer.file
    kind_of = str(generation.attention.get("kind", "unknown"))
    return [
        f"text       up to {generation.context:,} tokens, {generation.layers} layers; a prompt is read in passes of "
        f"{generation.pass_tokens:,}, in blocks of {generation.block_size}",
        f"attention  {kind_of}" + (f": {attention}" if attention else ""),
        f"tokenizer  {kind}, {tokenizer.vocab_size:,} tokens" + (f" ({named})" if named else ""),
    ]


def tensor_lines(manifest: Manifest) -> list[str]:
    """Inputs, outputs and dimensions of one graph; of a cache, the first layer's."""
    lines = []
    for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            if _LAYER.match(spec.name):
                continue
            lines.append(f"{side:10} {spec}")
            if spec.preprocessing is not None:
                lines.append(f"           {spec.preprocessing.describe()}")
        if more := sum(_LAYER.match(spec.name) is not None for spec in specs):
            lines.append(f"           and {more} more, the same of further layers")
    return [*lines, *(f"dimension  {name} in {limits}" for name, limits in manifest.dims.items())]
