"""Text from a language model's package for Core ML, with the tokenization and the sampling of `runtime.generation`.

The package reads a prompt with the smallest of its prefill functions that holds it, and each new token with `decode`.
Between the runs the states travel as arrays: that is what lets any backend run it, and costs a copy of the cache per
token. An app keeps them in an `MLState` instead, which Core ML changes in place.

On Linux the functions run in the reference runtime, which is made to say what a package computes and not to be fast.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generated import Piece
from edgekit.runtime.generation import Generator, TextStream, check_language_model
from edgekit.runtime.generation_memory import MemoryPlan
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.session import Array, Session, load
from edgekit.runtime.system import free_memory_bytes
from edgekit.runtime.tokenization import load_tokenizer

if TYPE_CHECKING:
    import os

_PREFILL = re.compile(r"prefill_([1-9][0-9]{0,6})")


def prefill_sizes(bundle: Bundle) -> dict[int, str]:
    """How many tokens each prefill function of the package takes, and its name; smallest first."""
    functions = bundle.manifest.coreml.functions if bundle.manifest.coreml is not None else ()
    sizes = {int(match[1]): name for name in functions if (match := _PREFILL.fullmatch(name))}
    return dict(sorted(sizes.items()))


def prefill_view(bundle: Bundle, size: int) -> Bundle:
    """The prefill function of so many tokens as a bundle of its own on the same files, without samples."""
    manifest = bundle.manifest
    assert manifest.coreml is not None  # see `prefill_sizes`

    def resized(spec: TensorSpec) -> TensorSpec:
        if spec.name == "input_ids":
            return replace(spec, shape=(1, size))
        return replace(spec, index_of=str(size + 1)) if spec.name == "length" else spec

    name = prefill_sizes(bundle)[size]
    view = replace(
        manifest,
        name=f"{manifest.name}-{name}",
        inputs=tuple(map(resized, manifest.inputs)),
        ops={},
        files={file: entry for file, entry in manifest.files.items() if entry.role != "samples"},
        verification={},
        decode=None,
        generation=None,
        coreml=replace(manifest.coreml, function=name),
    )
    return Bundle(bundle._storage, view)


class CoreMLGenerator(Generator):
    """A loaded language model for Core ML; made by `load_generator`, used as any `Generator`."""

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        opened = Bundle.open(bundle)
        check_language_model(opened)
        manifest = opened.manifest
        assert manifest.generation is not None  # checked above
        assert manifest.coreml is not None  # every bundle for Core ML has it
        self.bundle = opened
        self.info = manifest.generation
        self.tokenizer = load_tokenizer(opened)
        self._backend, self._threads = backend, threads
        self._sizes = prefill_sizes(opened)
        if not self._sizes:
            raise InputError(f"{opened.name} has no prefill function; export it again")
        self._states = {state.input: (state.output, state.shape, state.dtype) for state in manifest.coreml.states}
        start = time.perf_counter()
        self._sessions: dict[int, Session] = {}
        self.decode = load(opened.part("decode"), backend=backend, threads=threads)  # type: ignore[assignment]
        self.prefill = self.prefill_for(1)  # type: ignore[assignment]
        self.load_seconds = time.perf_counter() - start

    def prefill_for(self, tokens: int) -> Session:
        """The session of the smallest function for a prompt of so many tokens; loaded when it is first needed."""
        size = next(size for size in self._sizes if size >= tokens)
        if size not in self._sessions:
            view = prefill_view(self.bundle, size)
            self._sessions[size] = load(view, backend=self._backend, threads=self._threads)
        return self._sessions[size]

    def empty(self) -> dict[str, Array]:
        """The states of no text, by the names of the inputs that stand for them."""
        return {name: np.zeros(shape, dtype) for name, (_, shape, dtype) in self._states.items()}

    def states_of(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """The states that a run left behind, as inputs of the next."""
        return {name: outputs[output] for name, (output, _, _) in self._states.items()}

    def _plan(self, prompts: list[list[int]], new: int, pass_tokens: int | None) -> MemoryPlan:
        if pass_tokens is not None:
            raise InputError(
                f"pass_tokens does nothing here: {self.bundle.name} reads a prompt in one of its fixed sizes, "
                f"{', '.join(map(str, self._sizes))}; leave it out"
            )
        longest, context = max(map(len, prompts)), self.info.context
        if longest + new > context:
            room = context - longest
            mend = f"ask for at most {room} new tokens, or " if room > 0 else ""
            raise InputError(
                f"context longer than the state: {longest} prompt and {new} new tokens are {longest + new}, but "
                f"{self.bundle.name} holds {context}; {mend}shorten the prompt, or export it with --option context=N"
            )
        if longest > max(self._sizes):
            raise InputError(
                f"the prompt has {longest} tokens, and the largest prefill function of {self.bundle.name} takes "
                f"{max(self._sizes)}; shorten the prompt"
            )
        passes = (next(size for size in self._sizes if size >= longest),)
        cache = sum(math.prod(shape) * np.dtype(dtype).itemsize for _, shape, dtype in self._states.values())
        cache *= len(prompts)
        return MemoryPlan(passes, cache, 2 * cache, free_memory_bytes())

    def _text_stream(self, *arguments: Any) -> TextStream:
        return _Stream(self, *arguments)


class _Stream(TextStream):
    """One text after another: the functions take one at a time."""

    _generator: CoreMLGenerator

    def _run(self) -> Iterator[Piece]:
        generator, pad = self._generator, self._generator.info.tokenizer.pad or 0
        start = time.perf_counter()
        chosen: list[int] = []
        states: list[dict[str, Array]] = []
        for done, row in enumerate(self._rows):
            if self._progress is not None:
                self._progress(0 if not done else len(self._rows[done - 1].prompt), len(row.prompt))
            session = generator.prefill_for(len(row.prompt))
            size = session.inputs[0].shape[1]
            assert isinstance(size, int)  # the functions have no symbolic sizes
            ids = np.full((1, size), pad, np.int32)
            ids[0, : len(row.prompt)] = row.prompt
            length = np.array([len(row.prompt)], np.int32)
            outputs = session.run({"input_ids": ids, "length": length, **generator.empty()})
            states.append(generator.states_of(outputs))
            chosen.append(row.sampler.choose(outputs["logits"][0, -1]))
        self._prefill_seconds = time.perf_counter() - start
        self._first_token_seconds += self._prefill_seconds
        for index, row in enumerate(self._rows):
            position = len(row.prompt)
            while True:
                yield Piece(index, row.take(chosen[index]), chosen[index], row.finish)
                if row.finish is not None:
                    break
                start = time.perf_counter()
                ids, where = np.array([[chosen[index]]], np.int32), np.array([position], np.int32)
                outputs = generator.decode.run({"input_ids": ids, "position": where, **states[index]})
                states[index] = generator.states_of(outputs)
                chosen[index] = row.sampler.choose(outputs["logits"][0, -1])
                position += 1
                self._decode_seconds += time.perf_counter() - start
