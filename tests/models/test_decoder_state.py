"""Decoders with a state of fixed size against the decoder with its growing cache, and what fp16 must hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgekit.errors import InputError
from edgekit.models import seed_weights
from edgekit.models.boundaries import boundary_starts
from edgekit.models.decoder import Decoder, RMSNorm
from edgekit.models.decoder_attention import LayerAttention
from edgekit.models.decoder_config import DecoderConfig, RopeScaling
from edgekit.models.decoder_state import DecodeState, HalfSafeNorm, PrefillState, half_safe, prefill_sizes, state_names
from edgekit.models.decoder_state_attention import StaticPrefill
from edgekit.models.sparse_attention import SparseAttention, chunk_ids, chunk_keys, select_blocks

GEMMA = DecoderConfig(
    family="gemma2",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=200,
    query_scale=8**-0.5,
    activation="gelu_pytorch_tanh",
    attention_softcap=30.0,
    final_softcap=30.0,
    sliding_window=40,
    sliding_layers=(True, False, True),
    embedding_scale=32**0.5,
)
LLAMA = replace(
    GEMMA,
    family="llama",
    num_kv_heads=1,
    activation="silu",
    attention_softcap=0.0,
    final_softcap=0.0,
    sliding_window=0,
    sliding_layers=(),
    rope_scaling=RopeScaling(factor=8.0, low_frequency=1.0, high_frequency=4.0, original_context=64),
    tied=False,
    embedding_scale=1.0,
)
SPARSE = SparseAttention(
    kind="dhsa",
    budget=64,
    block_size=16,
    local=16,
    decode="dense",
    chunks_per_block=4,
    nms_radius=2,
    predictor_heads=4,
    predictor_hidden=24,
)
ATTENTIONS = {
    "dense": SparseAttention(kind="dense"),
    "window": replace(SPARSE, kind="window"),
    "block": replace(SPARSE, kind="block"),
    "dhsa": SPARSE,
    "dhsa, last queries dense": replace(SPARSE, dense_last=20),
    "dhsa, shared heads, own boundaries": replace(SPARSE, heads="shared", share_boundaries=False),
    "dhsa, shared masks, threshold": replace(SPARSE, share_masks=True, boundary_threshold=0.0),
    "block, a budget below the window": replace(SPARSE, kind="block", budget=48),
    "dhsa, a budget below the window": replace(SPARSE, budget=48, dense_last=3),
    "dhsa, odd blocks": replace(SPARSE, block_size=13, local=5, budget=39),
}
CAPACITY = 150


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def built(config, attention):
    model = Decoder(replace(config, attention=attention)).eval()
    seed_weights(model, 1)
    return model


def tokens(count, seed=0):
    return torch.randint(0, 61, (1, count), generator=torch.Generator().manual_seed(seed))


def padded(ids, count):
    return torch.nn.functional.pad(ids, [0, count - ids.shape[1]], value=7).to(torch.int32)


def number(value):
    return torch.tensor([value], dtype=torch.int32)


def close(got, wanted, tolerance=1e-5):
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 16, 77, 128])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prefill_answers_as_the_decoder(attention, length):
    model = built(GEMMA, ATTENTIONS[attention])
    ids = tokens(length)
    wanted, cache = model.prefill(ids, torch.ones_like(ids), model.empty_cache(1))
    state = PrefillState(half_safe(model, CAPACITY), CAPACITY, 128, torch.float32)
    close(state(padded(ids, 128), number(length)), wanted)
    for layer in range(3):
        for kind, past in (("key", cache.keys), ("value", cache.values)):
            whole = torch.nn.functional.pad(past[layer], [0, 0, 0, CAPACITY - length])
            close(state.states()[f"{kind}_{layer}"], whole)


@pytest.mark.parametrize("config", [GEMMA, LLAMA], ids=["gemma2", "llama"])
@pytest.mark.parametrize("prompt", [1, 38, 60])
def test_steps_answer_as_the_decoder(config, prompt):
    """To the last slot, across the edge of the sliding window."""
    model, capacity = built(config, SPARSE), 64
    safe = half_safe(model, capacity)
    prefill, decode = PrefillState(safe, capacity, capacity, torch.float32), DecodeState(safe, capacity, torch.float32)
    ids = tokens(capacity)
    mask = torch.ones_like(ids)
    cache = model.prefill(ids[:, :prompt], mask[:, :prompt], model.empty_cache(1))[1]
    prefill(padded(ids[:, :prompt], capacity), number(prompt))
    for name, state in decode.states().items():
        state.copy_(prefill.states()[name])
    for end in range(prompt + 1, capacity + 1):
        wanted, cache = model.decode(ids[:, end - 1 : end], mask[:, :end], cache)
        close(decode(ids[:, end - 1 : end].int(), number(end - 1)), wanted)


def test_a_step_reads_no_slot_behind_its_own():
    """What earlier texts left there may be anything that is finite."""
    model = half_safe(built(GEMMA, SPARSE), 32)
    decode = DecodeState(model, 32, torch.float32)
    for state in decode.states().values():
        state[:, :, :9] = torch.randn(state[:, :, :9].shape, generator=torch.Generator().manual_seed(4))
    kept = {name: state.clone() for name, state in decode.states().items()}
    first = decode(number(5).unsqueeze(0), number(9))
    for name, state in decode.states().items():
        state.copy_(kept[name])
        state[:, :, 9:] = 6e4
    assert torch.equal(decode(number(5).unsqueeze(0), number(9)), first)


@pytest.mark.parametrize("attention", [key for key in ATTENTIONS if key != "dense"])
@pytest.mark.parametrize("length", [97, 144, 200])
@pytest.mark.parametrize("window", [0, 40], ids=["full", "sliding"])
def test_the_blocks_are_those_that_the_cache_selects(attention, length, window):
    """Of random queries and keys; in any order, and without the rows of padding."""
    sparse, count = ATTENTIONS[attention], 200
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(1, heads, count, 8, generator=generator) for heads in (4, 2))
    valid = torch.arange(count).unsqueeze(0) < length
    predictor = built(GEMMA, sparse).boundary_predictor
    step = StaticPrefill(sparse, count, number(length), predictor)
    layer = LayerAttention(0.3, 0.0, window)
    got = step._select(layer, q, k)
    keys = ids = None
    if sparse.has_chunks:
        starts = None if predictor is None else boundary_starts(predictor, k, valid, sparse)
        ids = chunk_ids(starts, valid, sparse)
        keys = chunk_keys(k, ids, valid, sparse)
    wanted = select_blocks(q, valid, sparse, window=window, keys=keys, ids=ids)
    rows = -(-length // sparse.block_size)
    heads = max(got.shape[1], wanted.shape[1])
    for head in range(heads):
        for row in range(rows):
            mine, theirs = (
                sorted(set(index[0, head % index.shape[1], row].tolist()) - {-1}) for index in (got, wanted)
            )
            assert mine == theirs


def test_boundaries_are_the_first_layers_though_it_selects_nothing():
    """Its window fits into the budget, so only the second layer asks for chunks."""
    sparse = replace(SPARSE, budget=80)
    assert sparse.covers(40)
    model = built(GEMMA, sparse)
    state = PrefillState(half_safe(model, 192), 192, 192, torch.float32)
    ids = tokens(190)
    wanted = model.prefill(ids, torch.ones_like(ids), model.empty_cache(1))[0]
    close(state(padded(ids, 192), number(190)), wanted)
    other = built(GEMMA, replace(sparse, share_boundaries=False))
    assert (other.prefill(ids, torch.ones_like(ids), other.empty_cache(1))[0] - wanted).abs().max() > 1e-4


class TestNorm:
    def test_is_the_decoders(self):
        norm = RMSNorm(48, 1e-6, 1.0)
        torch.nn.init.normal_(norm.weight, std=0.2)
        x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))
        for scale in (1e-6, 1e-3, 1.0, 1e4, 1e15):
            close(HalfSafeNorm(norm)(x * scale), norm(x * scale))
        assert torch.equal(HalfSafeNorm(norm)(torch.zeros(2, 48)), torch.zeros(2, 48))

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0, 1.3e4])
    def test_holds_in_half_precision(self, scale):
        """Where the plain one is infinite inside, its answer zero."""
        norm = RMSNorm(256, 1e-6, 0.0)
        x = (scale * torch.randn(4, 256, generator=torch.Generator().manual_seed(0))).half()
        got = HalfSafeNorm(norm).half()(x)
        assert got.dtype == torch.float16
        close(got.float(), norm(x.float()), 4e-3)
        if scale >= 300:
            assert torch.isinf(x.square().mean(-1)).all()


def test_a_whole_model_holds_in_half_precision():
    """With activations beyond 255, whose squares fp16 has not, and at a position that it has not either."""
    config = replace(GEMMA, context=4096, embedding_scale=2000.0)
    model = built(config, ATTENTIONS["dense"])
    safe = half_safe(model, 4096)
    exact = DecodeState(safe, 4096, torch.float32)
    past = torch.randn(1, 2, 4096, 8, generator=torch.Generator().manual_seed(2))
    for state in exact.states().values():
        state.copy_(past)
    wanted = exact(number(11).unsqueeze(0), number(3001))
    half = DecodeState(half_safe(model, 4096), 4096).half()
    for state in half.states().values():
        state.copy_(past)
    got = half(number(11).unsqueeze(0), number(3001))
    assert got.dtype == torch.float16
    assert (got.float() - wanted).norm() / wanted.norm() < 5e-3


def test_copies_share_their_weights_and_leave_the_model_alone():
    model = built(LLAMA, ATTENTIONS["dense"])
    before = dict(model.named_modules())
    safe = half_safe(model, 64)
    assert {id(p) for p in safe.parameters()} == {id(p) for p in model.parameters()}
    assert dict(model.named_modules()) == before
    assert list(PrefillState(safe, 64, 16).states()) == list(state_names(3)) == [
        "key_0", "value_0", "key_1", "value_1", "key_2", "value_2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capacity", "sizes"),
    [(1, (1,)), (64, (64,)), (65, (64, 65)), (2048, (64, 256, 1024, 2048)), (8704, (64, 256, 1024, 4096, 8704))],
)
def test_sizes_of_the_prefill_functions(capacity, sizes):
    assert prefill_sizes(capacity) == sizes


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda m: half_safe(m, 201), "1 to 200 tokens, the model's context; got a capacity of 201"),
        (lambda m: half_safe(m, 0), "got a capacity of 0"),
        (lambda m: PrefillState(half_safe(m, 64), 64, 65), "1 to 64 tokens, the state's capacity; got 65"),
    ],
    ids=["beyond the context", "no slot", "a pass beyond the state"],
)
def test_sizes_that_do_not_fit(build, words):
    with pytest.raises(InputError, match=words):
        build(built(GEMMA, ATTENTIONS["dense"]))


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("part", ["prefill", "decode"])
def test_torch_export_lists_the_states_as_changed(part):
    safe = half_safe(built(GEMMA, SPARSE), 96)
    module = PrefillState(safe, 96, 80) if part == "prefill" else DecodeState(safe, 96)
    count = 80 if part == "prefill" else 1
    inputs = (tokens(count).int(), number(min(count, 70)))
    program = torch.export.export(module, inputs).run_decompositions({})
    assert sorted(program.graph_signature.buffers_to_mutate.values()) == sorted(state_names(3))
    for state in module.states().values():
        state.zero_()
    close(program.module()(*inputs), module(*inputs))
