"""Inputs that make sense to a language model: real text in its own tokens, and the caches that the text before left.

The caches come from PyTorch itself. A cache of random numbers would do for the sums, but the choice of what a sparse
attention reads would then be one of noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgekit.export.language_graphs import LanguageGraph, flat_cache, reads_chunks
from edgekit.export.source import one_thread
from edgekit.models.decoder import Cache, Decoder
from edgekit.runtime.generation_info import TokenizerInfo
from edgekit.runtime.session import Array

# Of one sample's cache: samples travel in the bundle, and large models have large caches.
_MOST_BYTES = 8 * 2**20
_LEAST_TOKENS = 8

_TEXT = """\
The old lighthouse keeper wrote down the weather every morning. On the first day of March the sea was grey and the wind
came from the north-west at 31 knots; by noon a small boat, the Margaret Ellen, had passed with two sails torn. He asked
himself: who would go out on such a day? "Nobody," said his daughter, "except the doctor." In the evening she read aloud
from a book about numbers. A prime has exactly two divisors; 2, 3, 5, 7, 11 and 13 are the first six of them.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

The key to the lamp room is kept behind the third stone. Les marées d'équinoxe sont les plus fortes. When the storm was
over, the keeper walked down to the harbour, counted the boats (there were 17), and bought bread, salt and lamp oil. The
third stone, he told the new keeper many years later, is the one with the white line.
"""


@dataclass(frozen=True)
class Pass:
    """One run of a graph: `lengths` tokens per row, of which the first `past` of each row were read before.

    For `decode`, all of them were, and then `steps` single tokens.
    """

    lengths: tuple[int, ...]
    past: int = 0
    steps: int = 0


def stored_passes(part: str, block: int) -> list[Pass]:
    """What travels in a bundle: an empty cache and a filled one, a batch of different lengths, a single token."""
    if part == "decode":
        return [Pass((2 * block + 5,)), Pass((block + 3, 7), steps=1), Pass((1,))]
    return [Pass((2 * block + 5,)), Pass((2 * block + 3,), past=block), Pass((block + 7, 5)), Pass((1,))]


def fresh_passes(part: str, block: int) -> list[Pass]:
    """Other sizes than the stored ones."""
    if part == "decode":
        return [Pass((3 * block + 1,)), Pass((block, 3), steps=2), Pass((block // 2 + 1,)), Pass((block - 1,), steps=1)]
    return [
        Pass((3 * block + 11,)),
        Pass((block + 1,), past=block),
        Pass((2 * block + block // 2, 3 * block), past=2 * block),
        Pass((block, 2, block // 2 + 1)),
    ]


class TextInputs:
    """Makes the inputs of a decoder's graphs from text.

    Args:
        decoder: whose cache they have.
        tokenizer: what its tokens mean.
        folder: where the tokenizer's file lies.

    Attributes:
        pad: the token that fills rows up.
        most: how many tokens a sample's cache should hold at most.
    """

    def __init__(self, decoder: Decoder, tokenizer: TokenizerInfo, folder: Path | None) -> None:
        self._decoder = decoder
        self._tokens = _tokens(tokenizer, folder)
        self.pad = tokenizer.pad if tokenizer.pad is not None else 0
        empty = decoder.empty_cache(1)
        per_token = 4 * sum(key.shape[1] * key.shape[3] for key in (*empty.keys, *empty.values))
        self.most = min(decoder.config.context, max(_LEAST_TOKENS, _MOST_BYTES // per_token))

    def of(self, graph: LanguageGraph, passes: Sequence[Pass], *, seed: int) -> Iterator[dict[str, Array]]:
        """The inputs of each pass, by name; lengths are cut where context or size ask for it."""
        for index, one in enumerate(passes):
            yield self._inputs(graph, one, seed + 31 * index)

    def _inputs(self, graph: LanguageGraph, one: Pass, seed: int) -> dict[str, Array]:
        decode = graph.part == "decode"
        most = self.most - one.steps - int(decode)
        past = min(one.past, most - 1)
        lengths = [max(past + 1, min(length, most)) for length in one.lengths]
        ids, mask = self.rows(lengths, seed)
        with torch.no_grad(), one_thread():
            cache = self._decoder.empty_cache(len(lengths))
            if past:
                cache = self._decoder.prefill(ids[:, :past], mask[:, :past], cache)[1]
            if decode:
                cache = self._decoder.prefill(ids[:, past:], mask, cache)[1]
                for step in range(one.steps + 1):
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                    new = self.rows([1] * len(lengths), seed + 7 * step + 3)[0]
                    if step < one.steps:
                        cache = self._decoder.decode(new, mask, cache)[1]
                ids = new
            else:
                ids = ids[:, past:]
        if not reads_chunks(self._decoder, graph.part):
            cache = Cache(cache.keys, cache.values)
        tensors = [ids, mask, *flat_cache(cache)]
        return {shape.name: tensor.numpy() for shape, tensor in zip(graph.shapes, tensors, strict=True)}

    def rows(self, lengths: Sequence[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask `[rows, longest]`: each row another place of the text, filled up on the right."""
        ids = np.full((len(lengths), max(lengths)), self.pad, np.int64)
        mask = np.zeros_like(ids)
        for row, length in enumerate(lengths):
            start = (197 * seed + 61 * row) % len(self._tokens)
            ids[row, :length] = np.resize(np.roll(self._tokens, -start), length)
            mask[row, :length] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def _tokens(tokenizer: TokenizerInfo, folder: Path | None) -> Array:
    """The text in the model's tokens, int64; at least one."""
    if tokenizer.kind == "bytes" or folder is None or tokenizer.file is None:
        return np.frombuffer(_TEXT.encode("utf-8"), np.uint8).astype(np.int64)
    import tokenizers  # there, or the tokenizer would have been refused

    ids = tokenizers.Tokenizer.from_file(str(folder / tokenizer.file)).encode(_TEXT, add_special_tokens=False).ids
    return np.array(ids or [0], np.int64)
