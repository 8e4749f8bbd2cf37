"""Text from a language model's bundle, token by token. Needs numpy and onnxruntime, never torch.

generator = edgekit.load_generator("dhsa_bytes-onnx.edge")
for piece in generator.stream("A list is", max_new_tokens=64):
    print(piece.text, end="", flush=True)
print(generator.generate("A list is", temperature=0.8, top_p=0.9, seed=1).text)

A prompt is read by the bundle's main graph in one or several passes, each new token by its second one. Between the runs
the keys and values of all tokens stay with onnxruntime; nothing is copied to numpy and back but ids, mask and scores.
Texts that are generated together are filled up on the right, with zeros in the attention mask, and each gets what it
would get alone: positions and blocks of keys count its own tokens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError, InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generated import MAX_NEW_TOKENS, Generated, Piece, Row, Statistics, stop_texts
from edgekit.runtime.generation_memory import MemoryModel, MemoryPlan, check_weights_fit, is_past, loading_bytes
from edgekit.runtime.manifest import Dim, DimRange
from edgekit.runtime.sampling import Sampler, Sampling
from edgekit.runtime.system import free_memory_bytes, peak_memory_bytes
from edgekit.runtime.tokenization import load_tokenizer

if TYPE_CHECKING:
    from onnxruntime import OrtValue

    Cache = dict[str, OrtValue]


class Generator:
    """A loaded language model; see `load_generator`.

    Attributes:
        bundle: where it came from.
        prefill, decode: the sessions of its two graphs.
        tokenizer: its tokenizer.
        load_seconds: the time that loading both took.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle,
        *,
        threads: int | None = None,
        kernels: str | os.PathLike[str] = "auto",
    ) -> None:
        from edgekit.runtime.onnxruntime_backend import OnnxRuntimeSession

        if threads is not None and (not isinstance(threads, int) or threads < 1):
            raise InputError(f"threads must be at least 1, got {threads!r}")
        opened = Bundle.open(bundle)
        check_language_model(opened)
        part = opened.part("decode")
        manifest = opened.manifest
        assert manifest.generation is not None  # checked above
        self.bundle = opened
        self.info = manifest.generation
        self.tokenizer = load_tokenizer(opened)
        smallest = manifest.precision == "int4"
        check_weights_fit(opened.name, loading_bytes(opened), free_memory_bytes(), smallest=smallest)
        start = time.perf_counter()
        self.prefill = OnnxRuntimeSession(opened, threads=threads, kernels=kernels)
        self.decode = OnnxRuntimeSession(part, threads=threads, kernels=kernels)
        self.load_seconds = time.perf_counter() - start
        native = all(kernel.native for kernel in (*self.prefill.kernels, *self.decode.kernels))
        self._memory = MemoryModel(manifest, part.manifest, native=native)
        self._past = {spec.name: _present(spec.name) for spec in self.prefill.inputs if is_past(spec)}
        self._decode_past = {spec.name: _present(spec.name) for spec in self.decode.inputs if is_past(spec)}
        self._check_graphs()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: Sequence[int] | None = None,
        pass_tokens: int | None = None,
    ) -> Generated:
        """Continue one prompt, or several at once, to the end. The arguments are those of `stream`."""
        return self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            eos=eos,
            pass_tokens=pass_tokens,
        ).finish()

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        eos: Sequence[int] | None = None,
        pass_tokens: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> TextStream:
        """Continue one prompt, or several at once, and give the pieces as they come.

        Everything is checked here, memory too; the model runs when the pieces are asked for.

        Args:
            prompts: one text or several.
            max_new_tokens: how many tokens each text gets at most; None: 64, or fewer where the context ends.
            temperature, top_p, seed: how they are chosen, see `Sampling`; by default the likeliest ones.
            stop: texts that end an answer when they come; they are no part of it.
            eos: ids that end an answer; None: those of the bundle, (): none.
            pass_tokens: how many tokens of the prompts one pass takes, a multiple of the block size; None: as many as
                the bundle says. Fewer where memory is short. Where attention is sparse, how a prompt is split can
                change what its tokens attend to.
            progress: called before each pass over the prompts with the tokens that were read and those of the longest.

        Raises:
            InputError: a prompt that is empty or no text, a value out of its range, a text longer than the model's
                context, or not enough memory.
        """
        start = time.perf_counter()
        sampling = Sampling(temperature, top_p, seed).fixed()
        new = max_new_tokens
        if new is not None and (not isinstance(new, int) or isinstance(new, bool) or new < 1):
            raise InputError(f"max_new_tokens must be an integer of at least 1, got {new!r}")
        stops = stop_texts(stop)
        ends = frozenset(self.info.tokenizer.eos if eos is None else eos)
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(texts, Sequence) or not texts:
            raise InputError(f"expected a prompt or a list of prompts, got {prompts!r:.80}")
        prompt_ids = [self.tokenizer.encode(text) for text in texts]
        if new is None:
            new = max(1, min(MAX_NEW_TOKENS, self.info.context - max(map(len, prompt_ids))))
        plan = self._plan(prompt_ids, new, pass_tokens)
        rows = [
            Row(ids, Sampler(sampling, row), self.tokenizer.stream(ids), ends, stops, new)
            for row, ids in enumerate(prompt_ids)
        ]
        return self._text_stream(rows, plan, sampling.seed, time.perf_counter() - start, progress)

    def _text_stream(
        self,
        rows: list[Row],
        plan: MemoryPlan,
        seed: int | None,
        seconds_before: float,
        progress: Callable[[int, int], None] | None,
    ) -> TextStream:
        return TextStream(self, rows, plan, seed, seconds_before, progress)

    def _plan(self, prompts: list[list[int]], new: int, pass_tokens: int | None) -> MemoryPlan:
        dims = self.prefill.bundle.manifest.dims
        ids = next(spec for spec in self.prefill.inputs if spec.name == "input_ids")
        batch, tokens = (_range(dim, dims) for dim in ids.shape)
        if not batch[0] <= len(prompts) <= batch[1]:
            raise InputError(
                f"{self.bundle.name} takes {batch[0]} to {batch[1]} texts at a time, got {len(prompts)} prompts"
            )
        block, longest = self.info.block_size, max(map(len, prompts))
        size = self.info.pass_tokens if pass_tokens is None else pass_tokens
        if not isinstance(size, int) or size < block or size % block:
            raise InputError(f"pass_tokens must be a multiple of the block size, {block}; got {pass_tokens!r}")
        if tokens[1] < size:
            size = max(block, int(tokens[1]) // block * block)
        context = self.info.context
        if longest + new > context:
            room = context - longest
            mend = f"ask for at most {room} new tokens, or " if room > 0 else ""
            raise InputError(
                f"context longer than the cache: {longest} prompt and {new} new tokens are {longest + new}, but "
                f"{self.bundle.name} holds {context}; {mend}shorten the prompt"
            )
        return self._memory.plan(
            len(prompts), longest, new, pass_tokens=size, least=tokens[0], free=free_memory_bytes()
        )

    def _check_graphs(self) -> None:
        """Raise `BundleError` unless the outputs of one run fit the inputs of the next."""
        first, again = ({spec.name for spec in session.outputs} for session in (self.prefill, self.decode))
        wanted = [
            (self._past, first, "model"),
            (self._decode_past, first, "model"),
            (self._decode_past, again, "decode"),
        ]
        for pairs, given, graph in wanted:
            if missing := sorted(set(pairs.values()) - given):
                raise BundleError(
                    f"{self.bundle.path.name}: the {graph} graph gives no {missing[0]!r} for the cache; export the "
                    "bundle again"
                )

    def _empty_cache(self, rows: int) -> Cache:
        """No tokens yet: float or int64 tensors whose symbolic sizes but the batch are 0."""
        cache = {}
        for spec in self.prefill.inputs:
            if is_past(spec):
                sizes = {spec.shape[0]: rows} if isinstance(spec.shape[0], str) else {}
                shape = [sizes.get(dim, 0) if isinstance(dim, str) else dim for dim in spec.shape]
                cache[spec.name] = self.prefill.value(np.zeros(shape, spec.dtype))
        return cache


class TextStream(Iterator[Piece]):
    """Iterates over the pieces of the answers as they are generated; see `Generator.stream`."""

    def __init__(
        self,
        generator: Generator,
        rows: list[Row],
        plan: MemoryPlan,
        seed: int | None,
        seconds_before: float,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.plan = plan
        self._generator = generator
        self._rows = rows
        self._seed = seed
        self._progress = progress
        self._first_token_seconds = seconds_before
        self._prefill_seconds = self._decode_seconds = 0.0
        self._steps = self._run()

    def __next__(self) -> Piece:
        return next(self._steps)

    def finish(self) -> Generated:
        """Generate what is left, and give the whole."""
        for _ in self:
            pass
        return self.generated()

    def generated(self) -> Generated:
        """What was generated so far; `finish` is empty for a text that is not complete."""
        rows = self._rows
        prompt, new = sum(len(row.prompt) for row in rows), sum(len(row.tokens) for row in rows)
        later = sum(max(0, len(row.tokens) - 1) for row in rows)
        return Generated(
            texts=tuple("".join(row.texts) for row in rows),
            tokens=tuple(tuple(row.tokens) for row in rows),
            finish=tuple(row.finish or "" for row in rows),
            statistics=Statistics(
                prompt_tokens=prompt,
                new_tokens=new,
                passes=self.plan.passes,
                load_seconds=self._generator.load_seconds,
                first_token_seconds=self._first_token_seconds,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
                prompt_tokens_per_second=prompt / self._prefill_seconds if self._prefill_seconds else 0.0,
                tokens_per_second=later / self._decode_seconds if later and self._decode_seconds else None,
                cache_bytes=self.plan.cache_bytes,
                needed_bytes=self.plan.needed_bytes,
                peak_memory_bytes=peak_memory_bytes(),
                seed=self._seed,
            ),
        )

    def _run(self) -> Iterator[Piece]:
        start = time.perf_counter()
        rows, batch = self._rows, len(self._rows)
        width = sum(self.plan.passes)
        pad = self._generator.info.tokenizer.pad or 0
        ids = np.full((batch, width), pad, np.int64)
        most = max(row.limit for row in rows)
        mask = np.zeros((batch, width + most), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row.prompt)] = row.prompt
            mask[index, : len(row.prompt)] = 1
        scores, cache = self._read_prompts(ids, mask)
        self._prefill_seconds = time.perf_counter() - start
        chosen = [row.sampler.choose(scores[index]) for index, row in enumerate(rows)]
        self._first_token_seconds += time.perf_counter() - start
        decode = self._generator.decode
        token_ids = np.full((batch, 1), pad, np.int64)
        fed = decode.value(token_ids)  # on the memory of token_ids
        for total in range(width + 1, width + most + 1):
            for index, row in enumerate(rows):
                if row.finish is None:
                    text = row.take(chosen[index])
                    yield Piece(index, text, chosen[index], row.finish)
            if all(row.finish is not None for row in rows):
                return
            start = time.perf_counter()
            for index, row in enumerate(rows):
                live = row.finish is None
                token_ids[index, 0] = chosen[index] if live else pad
                mask[index, total - 1] = live
            seen = decode.value(np.ascontiguousarray(mask[:, :total]))
            outputs = decode.run_values({"input_ids": fed, "attention_mask": seen, **cache})
            cache = self._next(outputs, self._generator._decode_past)
            logits = outputs["logits"].numpy()
            for index, row in enumerate(rows):
                if row.finish is None:
                    chosen[index] = row.sampler.choose(logits[index, -1])
            self._decode_seconds += time.perf_counter() - start

    def _read_prompts(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> tuple[list[NDArray[Any]], Cache]:
        """The scores `[V]` after each prompt's last token, and the cache for the second graph."""
        generator, value = self._generator, self._generator.prefill.value
        cache = generator._empty_cache(len(ids))
        scores: list[NDArray[Any]] = [np.empty(0)] * len(ids)
        done = 0
        for number, tokens in enumerate(self.plan.passes, 1):
            end = done + tokens
            if self._progress is not None:
                self._progress(done, max(len(row.prompt) for row in self._rows))
            outputs = generator.prefill.run_values(
                {
                    "input_ids": value(np.ascontiguousarray(ids[:, done:end])),
                    "attention_mask": value(np.ascontiguousarray(mask[:, :end])),
                    **cache,
                },
                interruptible=True,
            )
            last = number == len(self.plan.passes)
            cache = self._next(outputs, generator._decode_past if last else generator._past)
            logits = outputs["logits"].numpy()
            for index, row in enumerate(self._rows):
                if done < len(row.prompt) <= end:  # other rows' scores are those of no token, or not of the last
                    scores[index] = logits[index, -1].copy()
            done = end
        return scores, cache

    def _next(self, outputs: dict[str, OrtValue], pairs: dict[str, str]) -> Cache:
        return {past: outputs[present] for past, present in pairs.items()}


def load_generator(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    backend: str | None = None,
) -> Generator:
    """Load a language model for generating text. `edgekit.load` gives a session of its main graph instead.

    Args:
        bundle: a bundle's folder or packed file, or an opened `Bundle`.
        threads: threads for one run; None leaves it to the backend (one per physical core).
        kernels: as for `edgekit.load`.
        backend: for a Core ML package, as for `edgekit.load`; an onnx bundle is run by onnxruntime.

    Raises:
        BundleError: the bundle is damaged or unsafe, or its tokenizer does not fit the model.
        InputError: it holds no language model, does not fit into memory, or the backend generates no text from it.
        MissingDependencyError: its tokenizer needs a library that is not installed.
    """
    opened = Bundle.open(bundle)
    if opened.manifest.target == "coreml":
        from edgekit.runtime.coreml_generation import CoreMLGenerator

        return CoreMLGenerator(opened, backend=backend, threads=threads)
    if backend not in (None, "onnxruntime"):
        raise InputError(f"the backend {backend} generates no text from {opened.name}; leave it out")
    return Generator(opened, threads=threads, kernels=kernels)


def generate(
    bundle: str | os.PathLike[str] | Bundle,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
) -> Generated:
    """Load a language model and continue one prompt, or several at once: `edgekit.generate(bundle, "A list is").text`.

    For several calls load it once with `load_generator`. The arguments are those of `load_generator` and of
    `Generator.stream`, which gives the text piece by piece.
    """
    generator = load_generator(bundle, threads=threads, kernels=kernels)
    return generator.generate(
        prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
    )


def check_language_model(bundle: Bundle) -> None:
    """Raise `InputError` unless the bundle holds a language model."""
    if bundle.manifest.generation is None:
        takes = ", ".join(map(str, bundle.manifest.inputs))
        raise InputError(
            f"{bundle.name} is no language model, so it takes no prompt; it takes {takes}. Run it on files: edgekit "
            f"run {bundle.path} INPUT"
        )


def _present(past: str) -> str:
    """The output that becomes this input: `past_key_values.0.key` is `present.0.key`, `past_x` is `present_x`."""
    stem = "past_key_values."
    return f"present.{past.removeprefix(stem)}" if past.startswith(stem) else f"present_{past.removeprefix('past_')}"


def _range(dim: Dim, dims: Mapping[str, DimRange]) -> tuple[int, float]:
    """The least and the largest size of a dimension."""
    if isinstance(dim, int):
        return dim, dim
    most = dims[dim].max
    return dims[dim].min, math.inf if most is None else most
