"""Inputs for the functions of a language model's package: real text, and the states that PyTorch leaves behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edgekit.export.coreml_language_graphs import StateGraph
from edgekit.export.language_samples import TextInputs
from edgekit.models.sparse_config import SparseAttention
from edgekit.runtime.session import Array


class StateTexts:
    """Makes inputs of a decoder's functions from text.

    Args:
        texts: the text in the decoder's tokens.
        graphs: the functions; the largest prefill function makes the states for `decode`.
    """

    def __init__(self, texts: TextInputs, graphs: Sequence[StateGraph]) -> None:
        self._texts = texts
        self._reader = max((graph for graph in graphs if graph.part == "prefill"), key=lambda graph: graph.tokens)

    def of(self, graph: StateGraph, lengths: Sequence[int], *, seed: int) -> Iterator[dict[str, Array]]:
        """Inputs by name: texts of these lengths, which `decode` continues by one token. Too long ones are cut."""
        for index, length in enumerate(lengths):
            yield self._inputs(graph, length, seed + 31 * index)

    def _inputs(self, graph: StateGraph, length: int, seed: int) -> dict[str, Array]:
        if graph.part == "prefill":
            length = min(length, graph.tokens)
            ids = np.full((1, graph.tokens), self._texts.pad, np.int32)
            ids[:, :length] = self._token_ids(length, seed)
            return {"input_ids": ids, "length": np.array([length], np.int32), **graph.empty()}
        length = min(length, graph.module.capacity - 1)
        states = graph.empty()
        if length:
            read = self._reader.run(self._inputs(self._reader, length, seed))
            states = {state.input: read[state.output] for state in graph.states}
        ids = self._token_ids(1, seed + 3)
        return {"input_ids": ids, "position": np.array([length], np.int32), **states}

    def _token_ids(self, count: int, seed: int) -> Array:
        return self._texts.rows([count], seed)[0].numpy().astype(np.int32)


def stored_lengths(part: str, attention: SparseAttention, most: int) -> tuple[int, ...]:
    """What travels in a bundle: a text of several blocks, one beyond the budget of a sparse attention, a short one.

    `decode` goes on behind texts of these lengths, and without any. None is longer than `most`.
    """
    block = attention.block_size
    longest = 2 * block + 5 if attention.kind == "dense" else max(2, attention.blocks + 3) * block + 5
    lengths = dict.fromkeys(min(length, most) for length in (2 * block + 5, longest, 1))
    return (*(min(length, most - 1) for length in lengths), 0) if part == "decode" else tuple(lengths)


def fresh_lengths(graph: StateGraph) -> tuple[int, ...]:
    """Other lengths than the stored ones: all that the function takes, and some less."""
    most = graph.tokens if graph.part == "prefill" else graph.module.capacity - 1
    return (most, max(1, most // 2 + 3), max(1, most - graph.decoder.config.attention.block_size))
