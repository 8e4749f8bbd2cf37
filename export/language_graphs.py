"""The two graphs of a decoder-only language model: `prefill` reads many tokens, `decode` one, both behind a cache.

Their tensors have the names that onnxruntime-genai uses; the cache of a sparse attention adds the chunks of the tokens
that were read (`edgekit.models.decoder.Cache`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import torch
from torch import nn

from edgekit.errors import ExportError
from edgekit.export import onnx as onnx_target
from edgekit.export.calling import first_line
from edgekit.export.custom_ops import add_functions
from edgekit.export.shapes import InputShape
from edgekit.export.source import one_thread
from edgekit.export.weights_file import Weights, detach, transpose_once
from edgekit.models.decoder import Cache, Decoder
from edgekit.runtime.manifest import Dim, DimRange
from edgekit.runtime.session import Array

Part = Literal["prefill", "decode"]

# Sizes while tracing: all different, and none that could be taken for a constant.
_BATCH = 3
_TILE = 64  # no model computes in larger tiles than this and its blocks
_PREFIX = "decoder."


class DecoderGraph(nn.Module):
    """One of a decoder's methods as a function of tensors alone."""

    def __init__(self, decoder: Decoder, part: Part) -> None:
        super().__init__()
        self.decoder, self.part = decoder, part

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The logits, and the cache as `flat_cache` orders it; `past` is one in that order."""
        layers = self.decoder.config.num_layers
        # Said at once, or torch.export finds out again for each layer what is equal to what, which takes it long.
        batch, slots = input_ids.shape[0], past[0].shape[2]
        pairs = [(attention_mask.shape[0], batch), (attention_mask.shape[1], slots + input_ids.shape[1])]
        for index, tensor in enumerate(past):
            pairs.append((tensor.shape[0], batch))
            if index < 2 * layers:
                pairs.append((tensor.shape[2], slots))
            elif index < 3 * layers:
                pairs.append((tensor.shape[2], past[2 * layers].shape[2]))
            else:
                pairs.append((tensor.shape[1], slots))
        for size, same in pairs:
            torch._check(size == same)  # type: ignore[no-untyped-call]
        cache = Cache(past[0 : 2 * layers : 2], past[1 : 2 * layers : 2], past[2 * layers : 3 * layers])
        cache = Cache(cache.keys, cache.values, cache.chunk_keys, past[3 * layers :])
        method = self.decoder.prefill if self.part == "prefill" else self.decoder.decode
        logits, grown = method(input_ids, attention_mask, cache)
        return (logits, *flat_cache(grown))


def flat_cache(cache: Cache) -> list[torch.Tensor]:
    """Keys and values in turns, then the chunks' keys, then the chunks of the tokens."""
    pairs = [tensor for pair in zip(cache.keys, cache.values, strict=True) for tensor in pair]
    return [*pairs, *cache.chunk_keys, *cache.chunk_ids]


def reads_chunks(decoder: Decoder, part: Part) -> bool:
    """Whether this graph takes and gives the chunks of the cache."""
    attention = decoder.config.attention
    return attention.has_chunks and not (part == "decode" and attention.decode == "dense")


@dataclass(frozen=True)
class LanguageGraph:
    """One graph of a decoder: its inputs and the names of its outputs."""

    module: DecoderGraph
    shapes: tuple[InputShape, ...]
    outputs: tuple[str, ...]

    @staticmethod
    def of(decoder: Decoder, part: Part) -> LanguageGraph:
        """The graph `part`, for any batch, and for up to `config.context` tokens."""
        context = decoder.config.context
        ranges = {
            "batch": DimRange(),
            "tokens": DimRange(1, context),
            "past": DimRange(0, context),
            "total": DimRange(1, context),
            "chunks": DimRange(0),
        }
        vocabulary = str(decoder.config.vocab_size)
        tokens: Dim = "tokens" if part == "prefill" else 1
        shapes = [
            _shape("input_ids", ("batch", tokens), "int64", ranges, vocabulary),
            _shape("attention_mask", ("batch", "total"), "int64", ranges, "2"),
        ]
        outputs = ["logits"]
        empty = decoder.empty_cache(1)
        for layer, (key, value) in enumerate(zip(empty.keys, empty.values, strict=True)):
            for kind, tensor in (("key", key), ("value", value)):
                dims = ("batch", tensor.shape[1], "past", tensor.shape[3])
                shapes.append(_shape(f"past_key_values.{layer}.{kind}", dims, "float32", ranges))
                outputs.append(f"present.{layer}.{kind}")
        if reads_chunks(decoder, part):
            for layer, tensor in enumerate(empty.chunk_keys):
                dims = ("batch", tensor.shape[1], "chunks", tensor.shape[3])
                shapes.append(_shape(f"past_chunks.{layer}.key", dims, "float32", ranges))
                outputs.append(f"present_chunks.{layer}.key")
            for layer in range(len(empty.chunk_ids)):
                suffix = f".{layer}" if len(empty.chunk_ids) > 1 else ""
                shapes.append(_shape(f"past_chunk_ids{suffix}", ("batch", "past"), "int64", ranges, "chunks"))
                outputs.append(f"present_chunk_ids{suffix}")
        return LanguageGraph(DecoderGraph(decoder, part), tuple(shapes), tuple(outputs))

    @property
    def part(self) -> Part:
        return self.module.part

    @property
    def dims(self) -> dict[str, DimRange]:
        """The ranges of the symbolic dimensions."""
        return {name: limits for shape in self.shapes for name, limits in shape.ranges.items()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What PyTorch answers, on one thread. Raises `InputError` or `ShapeError` where it does not run on them."""
        ids, mask, *past = (torch.from_numpy(np.ascontiguousarray(inputs[shape.name])) for shape in self.shapes)
        with torch.no_grad(), one_thread():
            answers = self.module(ids, mask, past)
        # A graph that reads no chunks is asked for none, though the method may give them.
        return {name: tensor.numpy() for name, tensor in zip(self.outputs, answers, strict=True)}

    def trace(self) -> torch.export.ExportedProgram:
        """torch.export with all sizes symbolic. Raises `ExportError` where one of them is not."""
        decoder = self.module.decoder
        size = max(decoder.config.attention.block_size, _TILE)
        # Several blocks of each, and some rest: a count of one block would be taken for a constant.
        past, tokens = 3 * size + 3, 2 * size + 5 if self.part == "prefill" else 1
        sizes = {"batch": _BATCH, "tokens": tokens, "past": past, "total": past + tokens}
        sizes["chunks"] = 4 * decoder.config.attention.capacity + 1
        generator = torch.Generator().manual_seed(0)
        tensors, axes = [], []
        for shape in self.shapes:
            dims = [sizes[dim] if isinstance(dim, str) else dim for dim in shape.dims]
            if shape.dtype == "float32":
                tensors.append(torch.randn(dims, generator=generator))
            elif shape.name == "attention_mask":
                tensors.append(torch.ones(dims, dtype=torch.int64))
            else:
                tensors.append(torch.zeros(dims, dtype=torch.int64))
            auto = torch.export.Dim.AUTO
            axes.append({axis: auto for axis, dim in enumerate(shape.dims) if isinstance(dim, str)})
        try:
            with onnx_target.quiet(), torch.no_grad():
                program = torch.export.export(
                    self.module,
                    (tensors[0], tensors[1], tensors[2:]),
                    dynamic_shapes={"input_ids": axes[0], "attention_mask": axes[1], "past": axes[2:]},
                )
        except Exception as error:  # torch.export raises from several private hierarchies
            raise ExportError(f"torch.export cannot trace {self.part} of the decoder: {first_line(error)}") from error
        return program

    def convert(self, opset: int) -> tuple[onnx.ModelProto, Weights, torch.export.ExportedProgram]:
        """The ONNX graph with its functions, its large weights apart, and the program whose names its tensors carry."""
        translated = onnx_target.translate(self.trace(), len(self.shapes), len(self.outputs), opset, optimize=False)
        assert translated.exported_program is not None  # see `translate`
        model, weights = detach(translated, prefix=_PREFIX)
        transpose_once(model, weights)
        onnx_target.name_tensors(model, self.shapes, self.outputs)
        add_functions(model)
        return model, weights, translated.exported_program


def _shape(
    name: str, dims: tuple[Dim, ...], dtype: str, ranges: Mapping[str, DimRange], index_of: str | None = None
) -> InputShape:
    return InputShape(name, dims, dtype, {dim: ranges[dim] for dim in dims if isinstance(dim, str)}, index_of)
