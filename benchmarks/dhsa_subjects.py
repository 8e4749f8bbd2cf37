"""What the benchmark of sparse attention runs: Gemma 2 2B's attention and layers, ours and the dense rivals'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.custom_ops_subjects import (
    OPSET,
    Tensors,
    bare_kernel,
    native_library,
    one_node_model,
    onnxruntime_run,
)
from benchmarks.turns import Subject
from edgekit import custom_ops
from edgekit.export.custom_ops import add_functions
from edgekit.export.language_graphs import LanguageGraph
from edgekit.export.onnx import quiet, translate
from edgekit.models.boundaries import BoundaryPredictor, chunk_starts
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_attention import LayerAttention
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.dense_attention import DenseAttention
from edgekit.models.sparse_attention import chunk_ids, chunk_keys, select_blocks
from edgekit.models.sparse_config import SparseAttention
from edgekit.runtime.onnxruntime_backend import session_options

HIDDEN, INNER, HEADS, KEY_HEADS, DIM = 2304, 9216, 8, 4, 256
SOFTCAP, WINDOW, SCALE, LAYERS = 50.0, 4096, 256**-0.5, 26
VOCABULARY = 1024  # of 256000: the logits of one token are no part of what is measured
BLOCK, BUDGET = 64, 2048
SPARSE = SparseAttention(kind="dhsa", budget=BUDGET, block_size=BLOCK)
Layer = Literal["global", "sliding"]
WINDOWS: dict[Layer, int] = {"global": 0, "sliding": WINDOW}
ROWS_CHECKED = 96

PrefillKind = Literal["eager", "dense", "dhsa"]
PREFILLS: dict[str, PrefillKind] = {"dhsa": "dhsa", "all blocks": "dense", "eager": "eager"}


def gemma_config(attention: SparseAttention, *, layers: int = 2, context: int = 16384) -> DecoderConfig:
    """Gemma 2 2B with `layers` layers, even ones sliding, and a small vocabulary."""
    return DecoderConfig(
        family="gemma2",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KEY_HEADS,
        head_dim=DIM,
        context=context,
        query_scale=SCALE,
        activation="gelu_pytorch_tanh",
        attention_softcap=SOFTCAP,
        final_softcap=30.0,
        sliding_window=WINDOW,
        sliding_layers=tuple(layer % 2 == 0 for layer in range(layers)),
        embedding_scale=HIDDEN**0.5,
        attention=attention,
    )


def attention_inputs(length: int) -> Tensors:
    """Random queries, keys and values `[1, heads, length, 256]`."""
    generator = torch.Generator().manual_seed(length)
    heads = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS}
    return {name: torch.randn(1, count, length, DIM, generator=generator) for name, count in heads.items()}


class Predict(nn.Module):
    """Keys to the chunk of each token: once per model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.predictor = BoundaryPredictor(KEY_HEADS * DIM, heads=SPARSE.predictor_heads)

    def forward(self, k: torch.Tensor) -> torch.Tensor:
        valid = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        logits = self.predictor.logits(k.transpose(1, 2).flatten(2))
        return chunk_ids(chunk_starts(logits, valid, SPARSE), valid, SPARSE)


class Select(nn.Module):
    """Queries, keys and the chunks of tokens to the blocks that are read: once per layer."""

    def __init__(self, window: int, sparse: SparseAttention = SPARSE) -> None:
        super().__init__()
        self.window, self.sparse = window, sparse

    def forward(self, q: torch.Tensor, k: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        valid = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
        keys = chunk_keys(k, ids, valid, self.sparse)
        return select_blocks(q, valid, self.sparse, window=self.window, keys=keys, ids=ids)


class AllBlocks(nn.Module):
    """Every block that a query block may see."""

    def __init__(self, window: int, block: int = BLOCK) -> None:
        super().__init__()
        self.window, self.dense = window, SparseAttention(kind="dense", block_size=block)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        valid = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool)
        return select_blocks(q, valid, self.dense, window=self.window)


class Attend(nn.Module):
    """BlockSparseAttention behind a selection."""

    def __init__(self, window: int, select: Select | AllBlocks) -> None:
        super().__init__()
        self.window, self.select = window, select

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ids: torch.Tensor) -> torch.Tensor:
        index = self.select(q, k, *ids) if isinstance(self.select, Select) else self.select(q)
        out: torch.Tensor = torch.ops.edgekit.block_sparse_attention(
            q, k, v, index, BLOCK, BLOCK, True, SCALE, SOFTCAP, self.window
        )
        return out


class Eager(nn.Module):
    """Attention with its matrix of scores, as models are written."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.layer = LayerAttention(SCALE, SOFTCAP, window)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return DenseAttention([self.layer], q.shape[2], None, q.device)(0, q, k, v)


def exported(module: nn.Module, inputs: Tensors) -> onnx.ModelProto:
    """A module whose inputs have the tokens in the axis before the last, or last where there are two axes."""
    custom_ops.register()
    axis = {
        name: {tensor.ndim - 2 if tensor.ndim == 4 else 1: torch.export.Dim.AUTO} for name, tensor in inputs.items()
    }
    with quiet(), torch.no_grad():
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=_nested(module, axis))
    model = translate(program, len(inputs), 1, OPSET).model_proto
    names = dict(zip((item.name for item in model.graph.input), inputs, strict=True))
    for item in model.graph.input:
        item.name = names[item.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    add_functions(model)
    return model


def _nested(module: nn.Module, axes: Mapping[str, dict[int, Any]]) -> tuple[Any, ...]:
    """`axes` in the order of the arguments, with those of *args as one."""
    flat = tuple(axes.values())
    return (*flat[:3], flat[3:]) if isinstance(module, Attend) and flat[3:] else flat


def with_ids(inputs: Tensors, ids: torch.Tensor) -> Tensors:
    return {**inputs, "ids": ids}


@cache
def graph(name: str, layer: Layer) -> onnx.ModelProto:
    """One of the graphs, for any length: predict, select, sparse, all blocks, eager."""
    inputs, window = attention_inputs(5 * BLOCK + 3), WINDOWS[layer]
    ids = torch.zeros(1, inputs["k"].shape[2], dtype=torch.int64)
    some = {key: inputs[key] for key in "qk"}
    makes: dict[str, Callable[[], onnx.ModelProto]] = {
        "predict": lambda: exported(Predict().eval(), {"k": inputs["k"]}),
        "select": lambda: exported(Select(window), with_ids(some, ids)),
        "sparse": lambda: exported(Attend(window, Select(window)), with_ids(inputs, ids)),
        "all blocks": lambda: exported(Attend(window, AllBlocks(window)), inputs),
        "eager": lambda: exported(Eager(window), inputs),
    }
    return makes[name]()


def op_model(inputs: Tensors, index: torch.Tensor, layer: Layer) -> onnx.ModelProto:
    """The op alone, for a selection that was made before."""
    attributes = {"block_q": BLOCK, "block_k": BLOCK, "causal": 1, "scale": SCALE, "softcap": SOFTCAP}
    attributes |= {"window": WINDOWS[layer]}
    return one_node_model("BlockSparseAttention", {**inputs, "block_index": index}, attributes)


def all_blocks_kernel(inputs: Tensors, threads: int, block: int, softcap: float) -> Subject:
    """The bare kernel on TVM's threads, reading every causal block."""
    kernel = bare_kernel("BlockSparseAttention", {}, threads)
    index, out = AllBlocks(0, block)(inputs["q"]), torch.empty_like(inputs["q"])

    def run() -> torch.Tensor:
        kernel(*inputs.values(), index, out, SCALE, softcap, 1, 0, block, block)
        return out

    return run


def run_graph(
    name: str, layer: Layer, inputs: Tensors, threads: int, *, native: bool = True, file: Path | None = None
) -> Subject:
    """One of the graphs in onnxruntime; from `file` where exporting it would disturb what is measured."""
    model = graph(name, layer) if file is None else onnx.load(file)
    return onnxruntime_run(model, inputs, threads, native=native)


def torch_sdpa(inputs: Tensors, layer: Layer) -> Subject:
    """torch's fused attention, which has no softcap; a window by bands of queries with the keys that they see."""
    q, k, v = (inputs[name] for name in "qkv")
    length, band, window = q.shape[2], 1024, WINDOWS[layer]
    if not window or length <= band:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    bands = []
    for begin in range(0, length, band):
        end, first = min(begin + band, length), max(0, begin - window + 1)
        distance = torch.arange(begin, end).unsqueeze(1) - torch.arange(first, end)
        bands.append((begin, end, first, (distance >= 0) & (distance < window)))

    def run() -> torch.Tensor:
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, begin:end],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=seen,
                scale=SCALE,
                enable_gqa=True,
            )
            for begin, end, first, seen in bands
        ]
        return torch.cat(parts, dim=2)

    return run


def flex_attention(inputs: Tensors, layer: Layer) -> Subject:
    """torch's compiled flex_attention with softcap, reading only the blocks of the window."""
    from torch.nn.attention import flex_attention as flex

    q, k, v = (inputs[name] for name in "qkv")
    length, window = q.shape[2], WINDOWS[layer] or q.shape[2]

    def seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (query - key < window)

    def capped(score: Any, _batch: Any, _head: Any, _query: Any, _key: Any) -> Any:
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    mask = flex.create_block_mask(seen, B=None, H=None, Q_LEN=length, KV_LEN=length, BLOCK_SIZE=128, device="cpu")
    torch._dynamo.reset()  # or it counts this as one recompilation too many, and runs uncompiled
    compiled = torch.compile(flex.flex_attention)
    return torch.no_grad()(lambda: compiled(q, k, v, score_mod=capped, block_mask=mask, scale=SCALE, enable_gqa=True))


def checked_rows(length: int) -> torch.Tensor:
    """Queries that are checked: the last, the first, and some between."""
    between = torch.randperm(length, generator=torch.Generator().manual_seed(1))[: ROWS_CHECKED - 2]
    return torch.cat([torch.tensor([0, length - 1]), between])


def truth(
    inputs: Tensors, layer: Layer, *, index: torch.Tensor | None = None, softcap: float = SOFTCAP
) -> torch.Tensor:
    """Attention of the checked rows in float64 `[1, heads, rows, 256]`, of all keys or of the blocks in `index`."""
    q, k, v = (inputs[name].double() for name in "qkv")
    rows, length = checked_rows(q.shape[2]), q.shape[2]
    k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=1) for tensor in (k, v))
    scores = q[:, :, rows] @ k.transpose(2, 3) * SCALE
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = rows.unsqueeze(1) - torch.arange(length)
    seen = ((distance >= 0) & (distance < (WINDOWS[layer] or length))).expand(1, HEADS, -1, -1)
    if index is not None:
        blocks = -(-length // BLOCK)
        listed = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool)
        listed.scatter_(3, index.long() % (blocks + 1), True)  # -1 goes to the last place
        by_row = listed[:, :, rows // BLOCK, :blocks].repeat_interleave(HEADS // index.shape[1], dim=1)
        seen = seen & by_row.repeat_interleave(BLOCK, dim=3)[..., :length]
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=3) @ v


class EagerPrefill(nn.Module):
    """The decoder with attention as models are written: the last token's logits, and all keys and values."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept: list[torch.Tensor] = []
        dense = DenseAttention(self.decoder.layer_attention, input_ids.shape[1], None, input_ids.device)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            kept.extend((k, v))
            return dense(layer, q, k, v)

        positions = torch.arange(input_ids.shape[1]).unsqueeze(0)
        hidden = self.decoder.model(input_ids, positions, attend)
        return (self.decoder.logits(hidden[:, -1:]), *kept)


def decoder(kind: PrefillKind) -> Decoder:
    """Two layers with random weights, the same for every kind."""
    torch.manual_seed(0)
    dense = SparseAttention(kind="dense", block_size=BLOCK)
    return Decoder(gemma_config(SPARSE if kind == "dhsa" else dense)).eval()


def write_prefill(kind: PrefillKind, path: Path) -> None:
    """Write the two-layer prefill as ONNX with its weights beside it: "eager", or the exporter's graph of a kind."""
    custom_ops.register()
    made = decoder(kind)
    if kind == "eager":
        auto = torch.export.Dim.AUTO
        with quiet(), torch.no_grad():
            module, ids = EagerPrefill(made), torch.zeros(1, 323, dtype=torch.int64)
            program = torch.export.export(module, (ids,), dynamic_shapes=({1: auto},))
        model = translate(program, 1, 5, OPSET).model_proto
    else:
        prefill = LanguageGraph.of(made, "prefill")
        model = translate(prefill.trace(), len(prefill.shapes), len(prefill.outputs), OPSET).model_proto
        add_functions(model)
    onnx.save(model, path, save_as_external_data=True, location=path.with_suffix(".bin").name)


def prompt(length: int) -> np.ndarray[Any, Any]:
    """Random token ids int64 `[1, length]`."""
    return np.random.default_rng(length).integers(0, VOCABULARY, (1, length))


def prefill_feeds(session: onnxruntime.InferenceSession, length: int) -> dict[str, np.ndarray[Any, Any]]:
    """A prompt of `length` random tokens, everything else empty."""
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for number, item in enumerate(session.get_inputs()):
        if number == 0:
            feeds[item.name] = prompt(length)
        elif number == 1:
            feeds[item.name] = np.ones((1, length), np.int64)
        else:
            shape = [1, *(size if isinstance(size, int) else 0 for size in item.shape[1:])]
            feeds[item.name] = np.zeros(shape, np.int64 if "int64" in item.type else np.float32)
    return feeds


def prefill_run(path: Path, length: int, threads: int) -> Subject:
    """One prefill pass over a whole prompt: the last token's logits."""
    options = session_options(threads)
    options.register_custom_ops_library(str(native_library().path))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = prefill_feeds(session, length)
    return lambda: torch.from_numpy(session.run(None, feeds)[0])
