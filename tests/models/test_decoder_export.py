"""The decoder through torch.export: one program for every batch, length and cache."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from torch.fx.experimental import _config

from edgekit.models import seed_weights
from edgekit.models.decoder import Cache, Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.sparse_attention import SparseAttention

SIZES = [(0, 1, 1), (0, 33, 2), (1, 1, 1), (16, 16, 2), (7, 50, 1), (130, 3, 3)]  # past, new tokens, batch
SPARSE = {"block_size": 16, "local": 16, "chunks_per_block": 4, "nms_radius": 2, "predictor_heads": 4}
OTHERS = {"share_boundaries": False, "share_masks": True, "heads": "shared", "dense_last": 5, "decode": "dense"}


class Method(torch.nn.Module):
    """A method of the decoder as a module of tensors."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids, mask, keys, values, chunk_keys, chunk_ids):
        logits, cache = getattr(self.model, self.name)(ids, mask, Cache(keys, values, chunk_keys, chunk_ids))
        return logits, cache.keys, cache.values, cache.chunk_keys, cache.chunk_ids


def decoder(family="gemma2", **attention):
    config = DecoderConfig(
        family=family,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context=512,
        query_scale=0.25,
        attention_softcap=30.0 if family == "gemma2" else 0.0,
        sliding_window=40,
        sliding_layers=(True, False),
        attention=SparseAttention(**{"budget": 64, "predictor_hidden": 16, **SPARSE, **attention}),
    )
    model = Decoder(config).eval()
    seed_weights(model, 0)
    return model


def arguments(model, method, past, count, batch):
    """Random tokens behind a cache of random ones; the second row of a prefill is padded."""
    generator = torch.Generator().manual_seed(1000 * past + count)
    ids = torch.randint(0, 61, (batch, past + count), generator=generator)
    mask = torch.ones_like(ids)
    if method == "prefill" and batch > 1:
        mask[1, past + (count + 1) // 2 :] = 0
    cache = model.empty_cache(batch)
    if past:
        cache = model.prefill(ids[:, :past], mask[:, :past], cache)[1]
    if method == "decode" and model.config.attention.decode == "dense":
        cache = Cache(cache.keys, cache.values)
    return ids[:, past:], mask, cache.keys, cache.values, cache.chunk_keys, cache.chunk_ids


def export(model, method):
    """The program; of a prefill without the conditions that torch.export cannot prove, as N <= 16 ceil(N / 16)."""
    prefill = method == "prefill"
    example = arguments(model, method, 35, 29 if prefill else 1, 3)
    auto, past = Dim.AUTO, Dim("past", min=0)
    kept = auto if prefill else past
    shapes = (
        {0: auto, 1: auto} if prefill else {0: auto},
        {0: auto, 1: auto if prefill else past + 1},
        [{0: auto, 2: kept}] * len(example[2]),
        [{0: auto, 2: kept}] * len(example[3]),
        [{0: auto, 2: auto}] * len(example[4]),
        [{0: auto, 1: kept}] * len(example[5]),
    )
    with _config.patch(backed_size_oblivious=True):  # sizes of 0 and 1 are as good as others
        program = torch.export.export(Method(model, method), example, dynamic_shapes=shapes)
    return program.module(check_guards=not prefill)


@pytest.mark.parametrize(
    ("method", "attention"),
    [
        ("prefill", {"kind": "dense"}),
        ("decode", {"kind": "dense"}),
        ("prefill", {"kind": "dhsa"}),
        ("decode", {"kind": "dhsa"}),
        pytest.param("prefill", {"kind": "dhsa", **OTHERS}, marks=pytest.mark.slow),
        pytest.param("decode", {"kind": "dhsa", **OTHERS}, marks=pytest.mark.slow),
        pytest.param("prefill", {"kind": "window"}, marks=pytest.mark.slow),
        pytest.param("decode", {"kind": "window"}, marks=pytest.mark.slow),
        pytest.param("prefill", {"kind": "block"}, marks=pytest.mark.slow),
        pytest.param("decode", {"kind": "block"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(map(str, value.values())),
)
def test_one_program_for_all_sizes(method, attention):
    model = decoder(**attention)
    with torch.no_grad():
        program = export(model, method)
        for past, count, batch in SIZES:
            inputs = arguments(model, method, past, 1 if method == "decode" else count, batch)
            cache = Cache(*inputs[2:])
            logits, wanted = getattr(model, method)(*inputs[:2], cache)
            got = program(*inputs)
            torch.testing.assert_close(got[0], logits)
            torch.testing.assert_close(list(got[1:]), [wanted.keys, wanted.values, wanted.chunk_keys, wanted.chunk_ids])


@pytest.mark.parametrize("family", ["gemma2", "llama"], ids=["with a cap", "without"])
def test_forward_of_any_length(family):
    """Shorter and longer than the sliding window, although the example is shorter."""
    model = decoder(family, kind="dense")
    ids = torch.randint(0, 61, (3, 100), generator=torch.Generator().manual_seed(0))
    batch, count = Dim("batch", min=2), Dim("tokens", min=2)
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):
        example = ids[:, :20].contiguous()
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch, 1: count},)).module()
        for rows, length in [(2, 2), (2, 41), (3, 100)]:
            torch.testing.assert_close(program(ids[:rows, :length]), model(ids[:rows, :length]))
