"""One sparse layer as an ONNX graph in onnxruntime, at sizes that the exporter never saw."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import nn

from edgekit import custom_ops
from edgekit.export.custom_ops import add_functions
from edgekit.export.onnx import quiet, translate
from edgekit.models.boundaries import BoundaryPredictor, boundary_starts
from edgekit.models.sparse_attention import (
    chunk_ids,
    chunk_keys,
    select_blocks,
    sparse_decode_attention,
    token_chunk,
)
from edgekit.models.sparse_config import SparseAttention

QUERY_HEADS, KEY_HEADS, DIM = 4, 2, 16
BASE = SparseAttention(kind="dhsa", budget=64, block_size=16, local=16)
PREFILL = {
    "dhsa": (BASE, 0),
    "dhsa-shared-heads-dense-last-sliding": (replace(BASE, heads="shared", dense_last=20), 90),
    "block-covered": (replace(BASE, kind="block"), 24),
}
DECODE = {
    "dhsa-sliding": (BASE, 90),
    "window": (replace(BASE, kind="window"), 0),
}

custom_ops.register()


class Layer(nn.Module):
    """Queries, keys and values side by side `[B, Hq + 2 Hkv, N, D]`, cached keys `[B, Hkv, P, D]` (its values, too)."""

    def __init__(self, config, window):
        super().__init__()
        torch.manual_seed(0)
        self.config, self.window = config, window
        self.predictor = BoundaryPredictor(KEY_HEADS * DIM, heads=4, hidden=8)

    def joined(self, x, past, mask):
        torch._check(mask.shape[1] == past.shape[2] + x.shape[2])
        q, k, v = x.split([QUERY_HEADS, KEY_HEADS, KEY_HEADS], dim=1)
        return q.contiguous(), torch.cat([past, k], 2), torch.cat([past, v], 2), mask.bool()


class Prefill(Layer):
    def forward(self, x, past, mask, chunks, ids):
        config = self.config
        q, k, v, valid = self.joined(x, past, mask)
        keys = None
        if config.has_chunks:
            new, present = k[:, :, past.shape[2] :], valid[:, past.shape[2] :]
            starts = boundary_starts(self.predictor, new, present, config) if config.kind == "dhsa" else None
            chunk = chunk_ids(starts, present, config)
            keys = torch.cat([chunks, chunk_keys(new, chunk, present, config)], 2)
            ids = torch.cat([ids, chunk + chunks.shape[2]], 1)
        index = select_blocks(q, valid, config, window=self.window, keys=keys, ids=ids)
        return index, torch.ops.edgekit.block_sparse_attention(
            q, k, v, index, config.block_size, config.block_size, True, 0.3, 20.0, self.window
        )


class Decode(Layer):
    def forward(self, x, past, mask, chunks, ids):
        config = self.config
        q, k, v, valid = self.joined(x, past, mask)
        if config.has_chunks:
            ids = torch.cat([ids, torch.zeros_like(mask[:, :1]) + chunks.shape[2]], 1)
            chunks = torch.cat([chunks, token_chunk(k[:, :, past.shape[2] :], config)], 2)
        out = sparse_decode_attention(
            q, k, v, valid, config, scale=0.3, softcap=20.0, window=self.window, keys=chunks, ids=ids
        )
        return (out,)


def inputs(config, batch, tokens, past, seed=0):
    """Random inputs; of the second row half of the pass, or some of the cache, is padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, QUERY_HEADS + 2 * KEY_HEADS, tokens, DIM, generator=generator)
    cached = torch.randn(batch, KEY_HEADS, past, DIM, generator=generator)
    chunks = torch.randn(batch, config.mask_heads(KEY_HEADS), max(1, past // 3), DIM, generator=generator)
    ids = torch.randint(0, chunks.shape[2], (batch, past), generator=generator)
    mask = torch.ones(batch, past + tokens, dtype=torch.int64)
    if batch > 1 and tokens > 1:
        mask[1, past + (tokens + 1) // 2 :] = 0
    elif batch > 1:
        mask[1, past // 3 : past // 2] = 0
    return x, cached, mask, chunks, ids


def onnx_session(module, arguments, tokens):
    """The module in onnxruntime, with dynamic numbers of rows, cached slots, chunks and, if wanted, tokens."""
    auto = torch.export.Dim.AUTO
    both = {0: auto, 2: auto}
    axes = (both if tokens else {0: auto}, both, {0: auto, 1: auto}, both, {0: auto, 1: auto})
    with quiet(), torch.no_grad():
        program = torch.export.export(module, arguments, dynamic_shapes=axes)
        outputs = len(module(*arguments))
    model = translate(program, len(arguments), outputs, 20).model_proto
    add_functions(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(
        None, {each.name: arrays[int(each.name.rpartition(".")[2])].numpy() for each in session.get_inputs()}
    )


@pytest.mark.parametrize("case", PREFILL)
def test_prefill_in_onnxruntime(case):
    config, window = PREFILL[case]
    layer = Prefill(config, window).eval()
    run = onnx_session(layer, inputs(config, 2, 48, 32), tokens=True)
    for tokens in (1, 63, 64, 65, 200):
        for past in (0, 64, 100):
            arguments = inputs(config, 2 if tokens == 65 else 1, tokens, past, seed=tokens + past)
            with torch.no_grad():
                index, expected = layer(*arguments)
            got_index, got = map(torch.from_numpy, run(arguments))
            assert torch.equal(got_index, index), (tokens, past)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", DECODE)
def test_decode_in_onnxruntime(case):
    config, window = DECODE[case]
    layer = Decode(config, window).eval()
    run = onnx_session(layer, inputs(config, 2, 1, 32), tokens=False)
    for past in (0, 1, 15, 16, 63, 64, 100, 300):
        arguments = inputs(config, 3, 1, past, seed=past)
        with torch.no_grad():
            (expected,) = layer(*arguments)
        torch.testing.assert_close(torch.from_numpy(run(arguments)[0]), expected, rtol=1e-4, atol=1e-5)
