"""Does a text fit into memory, and how many tokens of its prompt at a time? Found before anything is run.

The need has two parts. Keys and values of all tokens are counted exactly, from the tensors that the manifest lists.
What one pass over a prompt takes besides is an estimate:

* each of its tokens keeps the activations of one layer. Their width follows from the parameters per layer: the decoders
  of the Gemma 2, Llama 3 and Qwen 2 families have 2 hidden + 3 intermediate = 3.7 to 4.3 times the square root of them;
* one layer's keys and values stand there in a few forms (as they come, padded to whole blocks, in blocks);
* choosing the blocks to read compares each block of the pass with every token of the text.

What onnxruntime's arena holds beyond what is in use comes on top. The figures were fitted to peaks of anonymous memory
measured with a DHSA decoder of 1.6 M parameters and with DHSA and dense ones of 73 M, for 2048 and 4096 tokens in
passes of 512 to 4096: the need is 1.0 to 1.4 times the peak there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.manifest import Manifest, TensorSpec

# See above.
_WIDTHS = 4.5
_FORMS, _FORMS_OF_BODIES = 6, 14  # with native kernels and with function bodies
_SELECTION_BYTES = 24
_ARENA = 1.4
_CHUNKS_PER_BLOCK = 8  # of a bundle that does not say
_GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """How a prompt is read, and what the whole text is expected to take, in bytes on top of the loaded model.

    Attributes:
        passes: how many tokens (padding included) each pass over the prompt takes.
        cache_bytes: keys and values of all tokens, at the end.
        needed_bytes: the most that is needed at once: while a token is read, its cache stands there besides the earlier
            one, and while the prompt is read, a pass's workspace.
        free_bytes: what was free when the plan was made; None where the system does not tell.
    """

    passes: tuple[int, ...]
    cache_bytes: int
    needed_bytes: int
    free_bytes: int | None


class MemoryModel:
    """What the texts of one model take.

    Args:
        prefill, decode: the manifests of its two graphs.
        native: whether native kernels serve the custom ops, rather than function bodies.
    """

    def __init__(self, prefill: Manifest, decode: Manifest, *, native: bool = True) -> None:
        generation = prefill.generation
        if generation is None:
            raise InputError(f"{prefill.name} is no language model")
        self._prefill = tuple(spec for spec in prefill.inputs if is_past(spec))
        self._decode = tuple(spec for spec in decode.inputs if is_past(spec))
        self._block_size = generation.block_size
        self._layers = generation.layers
        self._forms = _FORMS if native else _FORMS_OF_BODIES
        chunks = generation.attention.get("chunks_per_block", _CHUNKS_PER_BLOCK)
        self._chunks_per_block = chunks if isinstance(chunks, int) else _CHUNKS_PER_BLOCK
        self._vocabulary = generation.tokenizer.vocab_size
        self._width = _WIDTHS * math.sqrt(_layer_parameters(prefill.model.parameters, self._layers, self._vocabulary))
        self._key_heads = max((spec.shape[1] for spec in self._prefill if isinstance(spec.shape[1], int)), default=1)

    def cache_bytes(self, rows: int, prompt: int, new: int = 0, *, decode: bool = False) -> int:
        """Bytes of the cache of so many rows after so many tokens of a prompt and new ones."""
        chunks = math.ceil(prompt / self._block_size) * self._chunks_per_block + new
        specs = self._decode if decode else self._prefill
        return sum(_bytes(spec, rows, prompt + new, chunks) for spec in specs)

    def workspace_bytes(self, rows: int, tokens: int, total: int) -> int:
        """The estimate of what a pass of `tokens` per row takes besides the cache, when the text has `total` then."""
        activations = 4 * tokens * self._width
        forms = self._forms * self.cache_bytes(1, total) / self._layers
        selection = _SELECTION_BYTES * self._key_heads * math.ceil(tokens / self._block_size) * total
        return int(rows * (activations + forms + selection + 8 * self._vocabulary))

    def needed_bytes(self, rows: int, passes: tuple[int, ...], new: int) -> int:
        """The most that is needed at once for a prompt read in these passes and so many new tokens."""
        most = done = 0
        for tokens in passes:
            caches = self.cache_bytes(rows, done) + self.cache_bytes(rows, done + tokens)
            done += tokens
            most = max(most, caches + self.workspace_bytes(rows, tokens, done))
        last = 2 * self.cache_bytes(rows, done, new, decode=True) + self.workspace_bytes(rows, 1, done + new)
        return int(_ARENA * max(most, last))

    def plan(
        self, rows: int, prompt: int, new: int, *, pass_tokens: int, least: int = 1, free: int | None = None
    ) -> MemoryPlan:
        """The longest passes that fit.

        Args:
            rows: texts at a time.
            prompt: tokens of the longest prompt.
            new: tokens to generate.
            pass_tokens: the longest pass to take, a multiple of the block size; halved until the whole fits.
            least: the shortest pass that the model takes: a shorter last one is filled up.
            free: free bytes; None where that is unknown: then everything fits.

        Raises:
            InputError: not even passes of one block fit; the message gives the figures.
        """
        cache = self.cache_bytes(rows, prompt, new, decode=True)
        for size in _halves(pass_tokens, self._block_size):
            passes = _split(prompt, size, least)
            needed = self.needed_bytes(rows, passes, new)
            if free is None or needed <= free:
                return MemoryPlan(passes, cache, needed, free)
        assert free is not None
        texts = "" if rows == 1 else f"{rows} texts of up to "
        raise InputError(
            f"not enough memory: {texts}{prompt} prompt and {new} new tokens need about {_size(needed)}, even when the "
            f"prompt is read {self._block_size} tokens at a time (keys and values alone: {_size(cache)}), and "
            f"{_size(free)} are free; shorten the prompt, ask for fewer new tokens, or free memory"
        )


def loading_bytes(bundle: Bundle) -> int:
    """What loading both graphs takes: each lays out the weights anew, unless both leave them in their file."""
    from edgekit.runtime.onnxruntime_backend import maps_weights

    manifest = bundle.manifest
    sizes = dict.fromkeys(("model", "decode", "weights"), 0)
    for entry in manifest.files.values():
        if entry.role in sizes:
            sizes[entry.role] += entry.size
    weights = sizes.pop("weights")
    copies = 1 if maps_weights(bundle) else 2
    if bundle.packed:  # then each graph holds what it read besides
        copies += 2
    return 2 * sum(sizes.values()) + copies * weights


def check_weights_fit(name: str, needed: int, free: int | None, *, smallest: bool = False) -> None:
    """Raise `InputError` where a model that takes so many bytes cannot be loaded; `smallest`: there is no smaller."""
    if free is not None and needed > free:
        raise InputError(
            f"not enough memory: loading {name} needs about {_size(needed)}, and {_size(free)} are free; free memory"
            + ("" if smallest else ", or export it with --precision int4")
        )


def is_past(spec: TensorSpec) -> bool:
    """Whether an input is part of the cache."""
    return spec.name.startswith("past_")


def _layer_parameters(parameters: int, layers: int, vocabulary: int) -> float:
    """Parameters of one layer, where all are those of the layers and of one embedding table.

    The table's width is about a quarter of the square root x of a layer's parameters (Gemma 2 2B: 2304 of 8.8 k, Llama
    3.2 1B: 2048 of 7.8 k, Qwen 2 0.5B: 896 of 3.9 k), so that parameters = layers x^2 + vocabulary x / 4.
    """
    quarter = vocabulary / 4
    root = (math.sqrt(quarter**2 + 4 * layers * parameters) - quarter) / (2 * layers)
    return max(1.0, root**2)


def _halves(tokens: int, block: int) -> Iterator[int]:
    """`tokens`, half of it and so on down to one block, each a multiple of `block`."""
    blocks = tokens // block
    while blocks:
        yield blocks * block
        blocks //= 2


def _split(tokens: int, size: int, least: int) -> tuple[int, ...]:
    whole, rest = divmod(tokens, size)
    return (*[size] * whole, *([max(rest, least)] if rest else []))


def _bytes(spec: TensorSpec, rows: int, tokens: int, chunks: int) -> int:
    sizes = {"batch": rows, "chunks": chunks}
    shape = (sizes.get(dim, tokens) if isinstance(dim, str) else dim for dim in spec.shape)
    return math.prod(shape) * np.dtype(spec.dtype).itemsize


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.1f} MiB"
