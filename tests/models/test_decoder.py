"""The decoder against transformers, its cache against itself without one, and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from edgekit.errors import InputError, ShapeError
from edgekit.models import count_macs, count_macs_per_token, seed_weights
from edgekit.models.decoder import Cache, Decoder
from edgekit.models.decoder_config import DecoderConfig, RopeScaling
from edgekit.models.sparse_attention import SparseAttention

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What each changes beside the sizes; head_dim differs from hidden / heads where a family allows it.
VARIANTS = {
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}),
    "gemma2 without caps": (
        "Gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 16},
    ),
    "gemma2, named layers": (
        "Gemma2",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}
SPARSE = SparseAttention(
    kind="dhsa",
    budget=64,
    block_size=16,
    local=16,
    chunks_per_block=4,
    nms_radius=2,
    predictor_heads=4,
    predictor_hidden=24,
)
GEMMA = DecoderConfig(
    family="gemma2",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=512,
    query_scale=8**-0.5,
    attention_softcap=30.0,
    final_softcap=30.0,
    sliding_window=40,
    sliding_layers=(True, False),
    embedding_scale=32**0.5,
)


def in_both(variant):
    """The same random model in transformers and here."""
    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    seed_weights(theirs, 3)
    ours = Decoder(DecoderConfig.from_huggingface(config.to_dict())).eval()
    ours.load_state_dict(ours.adapt_checkpoint(theirs.state_dict()))
    return theirs, ours


def small(**attention):
    """A small Gemma 2 with sparse attention, or with the fields given here."""
    model = Decoder(replace(GEMMA, attention=replace(SPARSE, **attention))).eval()
    seed_weights(model, 1)
    return model


def tokens(batch, count, *, vocabulary=61, seed=0):
    return torch.randint(0, vocabulary, (batch, count), generator=torch.Generator().manual_seed(seed))


def ones_first(lengths, count):
    return (torch.arange(count) < torch.tensor(lengths).unsqueeze(1)).long()


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def in_passes(model, ids, mask, ends, cache=None):
    """All logits of several passes that end at `ends`, and the cache behind them."""
    cache = model.empty_cache(len(ids)) if cache is None else cache
    logits = []
    for end in ends:
        out, cache = model.prefill(ids[:, cache.tokens : end], mask[:, :end], cache, logits="all")
        logits.append(out)
    return torch.cat(logits, 1), cache


@pytest.fixture(autouse=True)
def without_gradients(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_cache_are_those_of_transformers(variant):
    """Keys are cached after their rotation, as transformers and onnxruntime-genai have them."""
    theirs, ours = in_both(variant)
    ids, mask = tokens(3, 37, vocabulary=97), ones_first([37, 20, 1], 37)
    wanted = theirs(ids, attention_mask=mask, use_cache=True)
    valid = mask.bool()
    close(ours(ids, mask)[valid], wanted.logits[valid])
    logits, cache = ours.prefill(ids, mask, ours.empty_cache(3), logits="all")
    close(logits[valid], wanted.logits[valid])
    for layer, past in enumerate(wanted.past_key_values.layers):
        if not past.is_sliding:  # those keep their window alone
            close(cache.keys[layer].transpose(1, 2)[valid], past.keys.transpose(1, 2)[valid])
            close(cache.values[layer].transpose(1, 2)[valid], past.values.transpose(1, 2)[valid])


@pytest.mark.parametrize("variant", ["gemma2", "llama 3.1", "qwen2, sliding"])
def test_passes_and_steps_give_what_one_forward_gives(variant):
    _, ours = in_both(variant)
    ids = tokens(2, 41, vocabulary=97)
    mask, wanted = torch.ones_like(ids), ours(ids)
    logits, cache = in_passes(ours, ids, mask, [16, 17, 30])
    close(logits, wanted[:, :30])
    for end in range(31, 42):
        step, cache = ours.decode(ids[:, end - 1 : end], mask[:, :end], cache)
        close(step, wanted[:, end - 1 : end])
    assert cache.tokens == 41


@pytest.mark.parametrize("kind", ["dense", "window", "block", "dhsa"])
def test_rows_of_different_lengths_answer_as_each_alone(kind):
    """Padding of a pass stays between a row's tokens when it goes on: positions, windows and chunks skip it."""
    model, lengths, steps = small(kind=kind), [50, 17, 1], 5
    ids = tokens(3, 64)
    mask = ones_first(lengths, 64)
    cache, last = model.empty_cache(3), torch.zeros(3, 1, 61)
    for start, end in ((0, 16), (16, 64)):
        out, cache = model.prefill(ids[:, start:end], mask[:, :end], cache)
        last = torch.where(mask[:, start:end].any(1).view(-1, 1, 1), out, last)
    further = tokens(3, steps, seed=5)
    answers = [last]
    for step in range(steps):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        out, cache = model.decode(further[:, step : step + 1], mask, cache)
        answers.append(out)
    for row, length in enumerate(lengths):
        own, cache = ids[row : row + 1, :length], model.empty_cache(1)
        ends = [end for end in (16, length) if end <= length]
        logits, cache = in_passes(model, own, torch.ones_like(own), sorted(set(ends)))
        alone = [logits[:, -1:]]
        for step in range(steps):
            seen = torch.ones(1, length + step + 1, dtype=torch.int64)
            out, cache = model.decode(further[row : row + 1, step : step + 1], seen, cache)
            alone.append(out)
        close(torch.cat(answers, 1)[row], torch.cat(alone, 1)[0])


@pytest.mark.parametrize("kind", ["window", "block", "dhsa"])
@pytest.mark.parametrize("count", [1, 16, 77])
def test_a_budget_for_all_keys_is_dense_attention(kind, count):
    sparse = small(kind=kind, budget=128)
    dense = Decoder(replace(GEMMA, attention=SparseAttention(kind="dense", block_size=16))).eval()
    dense.load_state_dict(dense.adapt_checkpoint(sparse.state_dict()))
    ids, mask = tokens(2, count + 3), ones_first([count + 3, max(1, count // 2)], count + 3)
    valid = mask.bool()
    close(sparse(ids, mask)[valid], dense(ids, mask)[valid])
    logits, cache = in_passes(sparse, ids, mask, sorted({min(32, count), count}))
    close(logits[valid[:, :count]], dense(ids, mask)[:, :count][valid[:, :count]])
    mask = mask[:, :count]
    for end in range(count + 1, count + 4):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        step, cache = sparse.decode(ids[:, end - 1 : end], mask, cache)
        close(step[0, 0], dense(ids[:1, :end])[0, -1])


@pytest.mark.parametrize("kind", ["window", "block"])
def test_sparse_passes_of_whole_blocks_give_what_one_pass_gives(kind):
    model, ids = small(kind=kind), tokens(2, 150)
    mask = ones_first([150, 90], 150)
    logits, cache = in_passes(model, ids, mask, [48, 64, 150])
    whole, at_once = in_passes(model, ids, mask, [150])
    close(logits[mask.bool()], whole[mask.bool()])
    assert not torch.allclose(whole[0], Decoder.forward(small(kind="dense"), ids)[0], atol=1e-3), (
        "the budget is no limit"
    )
    for got, wanted in zip(
        [*cache.chunk_keys, *cache.chunk_ids], [*at_once.chunk_keys, *at_once.chunk_ids], strict=True
    ):
        close(got, wanted)


@pytest.mark.parametrize(
    ("attention", "heads", "chunks", "tables"),
    [
        ({"kind": "dense"}, 0, 0, 0),
        ({"kind": "window"}, 0, 0, 0),
        ({"kind": "block"}, 2, 3, 1),
        ({"kind": "dhsa"}, 2, 12, 1),
        ({"kind": "dhsa", "share_boundaries": False, "heads": "shared"}, 1, 12, 2),
    ],
    ids=["dense", "window", "block", "dhsa", "dhsa, own boundaries, shared heads"],
)
def test_shapes_of_the_cache(attention, heads, chunks, tables):
    """Chunks: one per block of 16, for dhsa room for four; each generated token adds its own."""
    model, ids = small(**attention), tokens(2, 36)
    cache = model.prefill(ids[:, :35], torch.ones(2, 35, dtype=torch.int64), model.empty_cache(2))[1]
    assert (
        [tuple(key.shape) for key in cache.keys]
        == [tuple(value.shape) for value in cache.values]
        == [(2, 2, 35, 8)] * 2
    )
    assert [tuple(key.shape) for key in cache.chunk_keys] == [(2, heads, chunks, 8)] * (2 if tables else 0)
    assert [tuple(ids.shape) for ids in cache.chunk_ids] == [(2, 35)] * tables
    cache = model.decode(ids[:, 35:], torch.ones(2, 36, dtype=torch.int64), cache)[1]
    assert [tuple(key.shape) for key in cache.chunk_keys] == [(2, heads, chunks + 1, 8)] * (2 if tables else 0)
    assert [table[:, -1].tolist() for table in cache.chunk_ids] == [[chunks] * 2] * tables


def test_dense_decoding_needs_no_chunks():
    model, ids = small(decode="dense"), tokens(1, 40)
    mask = torch.ones_like(ids)
    cache = model.prefill(ids[:, :39], mask[:, :39], model.empty_cache(1))[1]
    step, grown = model.decode(ids[:, 39:], mask, cache)
    bare, _ = model.decode(ids[:, 39:], mask, Cache(cache.keys, cache.values))
    assert torch.equal(step, bare)
    assert grown.chunk_keys == grown.chunk_ids == []
    with pytest.raises(InputError, match="only decode can follow"):
        model.prefill(ids[:, :1], torch.ones(1, 41, dtype=torch.int64), grown)


def test_positions_of_training_skip_what_lies_between():
    """Where all layers slide, tokens behind a jump do not see those before it; and rotations are relative."""
    config = replace(GEMMA, sliding_layers=(True, True), sliding_window=9)
    model = Decoder(config).eval()
    seed_weights(model, 2)
    ids = tokens(2, 30)
    positions = torch.cat([torch.arange(12), torch.arange(100, 118)]).unsqueeze(0)
    close(model(ids, position_ids=positions)[:, 12:], model(ids[:, 12:]), 1e-4)
    close(model(ids, position_ids=positions)[:, :12], model(ids[:, :12]))
    assert (model(ids)[:, 12:] - model(ids[:, 12:])).abs().max() > 1e-2, "without a jump they see them"


def test_positions_of_training_are_those_of_transformers():
    theirs, ours = in_both("llama")
    ids, positions = tokens(2, 20, vocabulary=97), torch.arange(0, 60, 3).unsqueeze(0).expand(2, -1)
    wanted = theirs(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
    close(ours(ids, position_ids=positions), wanted)


@pytest.mark.parametrize("kind", ["dense", "dhsa"])
def test_all_weights_have_gradients(kind):
    """Of a dense and a sparse forward; the choice of what is read has none, and so the predictor has none."""
    model = small(kind=kind).train()
    ids = tokens(2, 70)
    logits = model(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("boundary_predictor."):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 0, name


def test_macs_per_token_are_those_of_the_linear_layers():
    config = replace(GEMMA, attention=SparseAttention(kind="dense"), num_kv_heads=1)
    model = Decoder(config)
    ids = tokens(1, 10)
    attention = 2 * 10 * 10 * config.num_heads * config.head_dim * config.num_layers
    assert count_macs(model, {"input_ids": ids}) == 10 * count_macs_per_token(model) + attention


@pytest.mark.parametrize("share", [True, False], ids=["shared", "per layer"])
def test_macs_per_token_count_the_boundary_predictor(share):
    """It sees 16 channels in windows of 8: three projections once, one for each token of the window, and the MLP."""
    predictor = (3 + 8) * 16 * 16 + (4 * 16 + 1) * 24 + 24
    with_it, without = small(share_boundaries=share), small(kind="block")
    assert count_macs_per_token(with_it) - count_macs_per_token(without) == predictor * (1 if share else 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m(tokens(1, 513)), InputError, r"up to 512 tokens; got 513\. Shorten the text"),
        (lambda m: m(tokens(1, 3) + 60), InputError, r"token ids lie in 0\.\.60; got"),
        (lambda m: m(tokens(1, 3).int()), InputError, "input_ids must be int64; got torch.int32"),
        (lambda m: m(tokens(1, 3)[0]), ShapeError, r"input_ids must be \[B, N\] with at least one token; got \[3\]"),
        (lambda m: m(tokens(1, 0)), ShapeError, r"at least one token; got \[1, 0\]"),
        (lambda m: m(tokens(1, 3), torch.ones(1, 4, dtype=torch.int64)), ShapeError, r"must be \[1, 3\]; got \[1, 4\]"),
        (lambda m: m(tokens(1, 3), torch.ones(1, 3)), InputError, "int64 of ones and zeros; got torch.float32"),
        (lambda m: m(tokens(2, 3), torch.tensor([[1, 1, 1], [0, 1, 1]])), InputError, "row 1 .* on the right"),
        (lambda m: m(tokens(1, 3), position_ids=torch.tensor([[0, 2, 2]])), InputError, "must rise in each row"),
        (
            lambda m: m(tokens(1, 2), position_ids=torch.tensor([[0, 512]])),
            InputError,
            r"within 0\.\.511; got 0\.\.512",
        ),
        (
            lambda m: m(tokens(1, 2), position_ids=torch.arange(3)[None]),
            ShapeError,
            r"\[B, 2\] or \[1, 2\]; got \[1, 3\]",
        ),
        (
            lambda m: m.decode(tokens(1, 2), torch.ones(1, 2, dtype=torch.int64), m.empty_cache(1)),
            ShapeError,
            r"one token per row, \[B, 1\]; got \[1, 2\]",
        ),
        (
            lambda m: m.prefill(tokens(2, 2), torch.ones(2, 2, dtype=torch.int64), m.empty_cache(1)),
            ShapeError,
            r"keys and values \[2, 2, 0, 8\] for 2 layers; got 2 layers, the first \[1, 2, 0, 8\]",
        ),
        (
            lambda m: m.prefill(tokens(1, 9), torch.ones(1, 9, dtype=torch.int64), after(m, 4)),
            ShapeError,
            r"must be \[1, 13\]; got \[1, 9\]; it covers the 4 cached tokens too",
        ),
        (
            lambda m: m.prefill(tokens(1, 1), torch.ones(1, 513, dtype=torch.int64), after(m, 512)),
            InputError,
            r"up to 512 tokens; got 513 \(512 of them cached\)",
        ),
        (
            lambda m: m.prefill(tokens(1, 2), torch.tensor([[1, 1, 0, 1, 1]]), after(m, 3)),
            InputError,
            "row 0 of attention_mask has a token behind padding",
        ),
    ],
    ids=[
        "too many tokens",
        "unknown token",
        "ids of another dtype",
        "ids of another rank",
        "no tokens",
        "mask of another length",
        "mask of another dtype",
        "padding on the left",
        "positions that stay",
        "position beyond the context",
        "positions of another length",
        "two tokens to decode",
        "cache of another batch",
        "mask without the cached tokens",
        "cache and tokens beyond the context",
        "prefill behind a gap",
    ],
)
def test_errors_of_calls(call, error, words):
    model = small(kind="dense")
    with pytest.raises(error, match=words):
        call(model)


@pytest.mark.parametrize(
    "other",
    [{"heads": "shared"}, {"share_boundaries": False}, {"kind": "block", "share_boundaries": False, "heads": "shared"}],
    ids=["other heads", "other tables", "both"],
)
def test_a_cache_of_another_attention(other):
    """Its keys and values would fit."""
    cache = after(small(**other), 20)
    mask = torch.ones(1, 21, dtype=torch.int64)
    with pytest.raises(ShapeError, match="take a cache of a model with the same attention"):
        small().decode(tokens(1, 1), mask, cache)
    with pytest.raises(ShapeError, match=r"chunks of its tokens, \[1, 20\]; got 2, the first"):
        small().prefill(tokens(1, 1), mask, cache)


def test_a_cache_without_chunks():
    model = small()
    empty = model.empty_cache(1)
    with pytest.raises(InputError, match=r"the cache has no chunks, .* begin with empty_cache"):
        model.prefill(tokens(1, 3), torch.ones(1, 3, dtype=torch.int64), Cache(empty.keys, empty.values))


def after(model, count):
    return model.prefill(tokens(1, count), torch.ones(1, count, dtype=torch.int64), model.empty_cache(1))[1]


def test_positions_go_with_dense_attention():
    with pytest.raises(InputError, match="position_ids go with dense attention; this model attends dhsa"):
        small()(tokens(1, 3), position_ids=torch.arange(3).unsqueeze(0))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"family": "gpt2"}, InputError, "family gemma2, llama, qwen2; got 'gpt2'"),
        ({"num_layers": 0}, ShapeError, "num_layers must be at least 1; got 0"),
        ({"num_heads": 3}, InputError, "a multiple of num_kv_heads; got 3 and 2"),
        ({"head_dim": 7}, InputError, "head_dim must be even, for rotary positions; got 7"),
        ({"activation": "relu"}, InputError, "silu or gelu_pytorch_tanh; got 'relu'"),
        ({"query_scale": 0.0}, InputError, "query_scale must be above 0; got 0.0"),
        ({"rope_theta": -1.0}, InputError, "rope_theta must be above 0; got -1.0"),
        ({"attention_softcap": -50.0}, InputError, "attention_softcap must be at least 0; got -50.0"),
        ({"norm_eps": -1e-6}, InputError, "norm_eps must be at least 0; got -1e-06"),
        ({"sliding_window": -1}, InputError, "sliding_window must be at least 0"),
        ({"sliding_window": 0}, InputError, "need a sliding_window of at least 1; got 0"),
        ({"sliding_layers": (True,)}, InputError, "names each of the 2 layers; got 1 entries"),
    ],
)
def test_errors_of_configurations(change, error, words):
    with pytest.raises(error, match=words):
        replace(GEMMA, **change)


def huggingface(**changes):
    return {**SIZES, "model_type": "llama", **changes}


def test_both_spellings_of_the_rotary_embedding():
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    spellings = [
        DecoderConfig.from_huggingface(huggingface(rope_parameters=LLAMA3)),
        DecoderConfig.from_huggingface(huggingface(rope_theta=500.0, rope_scaling={**scaling, "rope_type": "llama3"})),
        DecoderConfig.from_huggingface(huggingface(rope_theta=500.0, rope_scaling={**scaling, "type": "llama3"})),
    ]
    assert spellings[0] == spellings[1] == spellings[2]
    assert (spellings[0].rope_theta, spellings[0].rope_scaling) == (500.0, RopeScaling(8.0, 1.0, 4.0, 64))


def test_what_a_configuration_leaves_out():
    gemma = DecoderConfig.from_huggingface(huggingface(model_type="gemma2"))
    assert (gemma.head_dim, gemma.attention_softcap, gemma.final_softcap, gemma.sliding_window) == (
        256,
        50.0,
        30.0,
        4096,
    )
    assert (gemma.query_scale, gemma.sliding_layers, gemma.tied) == (1 / 16, (True, False, True), True)
    llama = DecoderConfig.from_huggingface(huggingface(eos_token_id=[5, 6], bos_token_id=4), context=99)
    assert (llama.head_dim, llama.attention_softcap, llama.sliding_window, llama.tied) == (8, 0.0, 0, False)
    assert (llama.bos, llama.eos, llama.pad, llama.context) == (4, (5, 6), None, 99)
    qwen = DecoderConfig.from_huggingface(huggingface(model_type="qwen2", sliding_window=9))
    assert (qwen.sliding_window, qwen.attention_bias, qwen.output_bias) == (0, True, False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "model_type gemma2, llama, qwen2; got 'gpt2'"),
        ({"hidden_size": None}, "has no hidden_size; take the config.json that belongs to the weights"),
        ({"hidden_size": "48"}, "hidden_size in the configuration must be a whole number; got '48'"),
        ({"num_attention_heads": 0}, "num_attention_heads in the configuration must be at least 1; got 0"),
        ({"hidden_size": 0}, "hidden_size in the configuration must be at least 1; got 0"),
        ({"head_dim": 0}, "head_dim in the configuration must be above 0; got 0"),
        (
            {"model_type": "gemma2", "query_pre_attn_scalar": -16},
            "query_pre_attn_scalar in the configuration must be above 0; got -16",
        ),
        ({"rope_parameters": {**LLAMA3, "factor": 0.0}}, "by a factor of at least 1, .*; got factor 0, context 64"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "0 < low < high .* frequencies 4 and 4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps in the configuration must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings in the configuration must be true or false; got 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id in the configuration must be a token id or a list of them"),
        ({"rope_scaling": 2.0}, "rope_scaling in the configuration must be an object; got 2.0"),
        ({"rope_scaling": {"type": "yarn"}}, "as default or llama3; got rope type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "has no factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates whole heads; got partial_rotary_factor 0.5"),
        ({"hidden_act": "relu"}, "has the activations silu, gelu_pytorch_tanh; got 'relu'"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised; take the unquantised checkpoint"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "the decoder is causal"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "for each of 3 layers"),
    ],
)
def test_errors_of_huggingface_configurations(change, words):
    with pytest.raises(InputError, match=words):
        DecoderConfig.from_huggingface(huggingface(**change))
