"""`dhsa_bytes`: its entry, its options, its weights, and that the choice of what is read matters."""

from __future__ import annotations

import json
import math
from importlib import resources

import pytest
import torch
from safetensors.torch import save_file

from edgekit.errors import EdgekitError, InputError, ShapeError, WeightsError
from edgekit.models import count_parameters, create_model, fuse, model_entry, seed_weights, state_dict_sha256
from edgekit.models.decoder import Decoder
from edgekit.models.dhsa import BOS, BYTES, EOS, PAD, VOCAB_SIZE
from edgekit.models.registry import TokenInput


def text(count, *, batch=1, seed=0):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    """Random weights that let every branch count."""
    built = create_model("dhsa_bytes", weights="random")
    seed_weights(built, 0)
    return built


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_the_vocabulary_of_bytes():
    assert (BOS, EOS, PAD, VOCAB_SIZE) == (256, 257, 258, 259)
    entry = model_entry("dhsa_bytes")
    assert entry.input == TokenInput(259, BYTES.context, BOS, (EOS,), PAD)
    assert (entry.input.tokenizer, entry.num_classes) == ("bytes", 259)


def test_the_block_is_gemmas():
    """Norms on both sides of attention and MLP, a sliding window on even layers, and tied embeddings."""
    config = create_model("dhsa_bytes", weights="random").config
    assert (config.family, config.tied, config.embedding_scale) == ("gemma2", True, config.hidden_size**0.5)
    assert [config.window(layer) > 0 for layer in range(config.num_layers)] == [True, False, True, False]
    assert config.attention.kind == "dhsa"


def test_logits_of_texts_of_different_lengths(model):
    ids, mask = text(300, batch=2), (torch.arange(300) < torch.tensor([[300], [7]])).long()
    logits = model(ids, mask)
    assert logits.shape == (2, 300, 259)
    torch.testing.assert_close(logits[1, :7], model(ids[1:, :7])[0], atol=1e-5, rtol=1e-5)


def test_nothing_later_is_read(model):
    """Changing a byte changes no logits before it: neither attention nor boundaries nor the choice look ahead there."""
    ids = text(1000)
    changed = ids.clone()
    changed[0, 990] += 1
    # A boundary looks `window` tokens ahead and asks the neighbours within `nms_radius`; a block is chosen as a whole.
    start = 990 // BYTES.attention.block_size * BYTES.attention.block_size
    torch.testing.assert_close(model(ids)[:, :start], model(changed)[:, :start], atol=1e-5, rtol=1e-5)
    assert not torch.equal(model(ids)[:, 990:], model(changed)[:, 990:])


@pytest.mark.parametrize("attention", ["dense", "window", "block"])
def test_kinds_of_attention_answer_differently_beyond_the_budget(model, attention):
    other = create_model("dhsa_bytes", weights="random", attention=attention)
    other.load_state_dict(other.adapt_checkpoint(model.state_dict()))
    ids = text(1200)
    got, wanted = other(ids), model(ids)
    budget = BYTES.attention.budget
    torch.testing.assert_close(got[:, :budget], wanted[:, :budget], atol=5e-5, rtol=1e-5)  # of logits up to 30
    assert (got - wanted)[:, budget + 64 :].abs().amax(-1).min() > 1e-4


def test_a_larger_context(model):
    with pytest.raises(InputError, match=f"up to {BYTES.context} tokens"):
        model(text(BYTES.context + 1))
    assert create_model("dhsa_bytes", context=100_000).config.context == 100_000


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"attention": "sparse"}, InputError, "attention is one of dense, window, block, dhsa; got 'sparse'"),
        ({"budget": 64}, InputError, "budget below 128"),
        ({"budget": "512"}, InputError, "budget is a whole number, such as 2048; got '512'"),
        ({"block_size": 0}, InputError, "block_size of at least 1, got 0"),
        ({"block_size": True}, InputError, "block_size is a whole number"),
        ({"decode": "slow"}, InputError, "decode is one of sparse, dense; got 'slow'"),
        ({"heads": 2}, InputError, "heads is one of kv, shared; got 2"),
        ({"share_masks": "no"}, InputError, "share_masks is true or false; got 'no'"),
        ({"boundary_threshold": "1.1"}, InputError, "boundary_threshold is a number, or null for none; got '1.1'"),
        ({"context": 0}, ShapeError, "context must be at least 1; got 0"),
        ({"hidden_size": 64}, EdgekitError, "dhsa_bytes does not take hidden_size; it takes attention, budget"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_errors_of_options(options, error, words):
    with pytest.raises(error, match=words):
        create_model("dhsa_bytes", weights="random", **options)


def test_weights_serve_every_kind_of_attention(model, tmp_path):
    """Half precision, as they ship; without the predictor only for kinds that have none."""
    file = tmp_path / "weights.safetensors"
    halved = {key: value.half() for key, value in model.state_dict().items()}
    save_file(halved, file)
    sparse, dense = (create_model("dhsa_bytes", weights=file, attention=kind) for kind in ("dhsa", "dense"))
    assert dense.boundary_predictor is None
    for key, value in dense.state_dict().items():
        assert torch.equal(value, halved[key].float())
        assert torch.equal(value, sparse.state_dict()[key])
    save_file({key: value for key, value in halved.items() if not key.startswith("boundary_predictor.")}, file)
    create_model("dhsa_bytes", weights=file, attention="block")
    with pytest.raises(WeightsError, match=r"missing \(boundary_predictor\.enc\.mha\.in_proj_weight"):
        create_model("dhsa_bytes", weights=file)


def test_keys_are_those_of_gemma_and_of_the_predictors_authors(model):
    keys = set(model.state_dict())
    assert {
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.pre_feedforward_layernorm.weight",
        "model.norm.weight",
        "boundary_predictor.enc.mha.in_proj_weight",
        "boundary_predictor.mlp.2.bias",
    } <= keys
    assert not any("rotary" in key or "lm_head" in key for key in keys)


def test_fuse_leaves_it_as_it_is(model):
    fused = fuse(model)
    assert isinstance(fused, Decoder)
    ids = text(70)
    assert torch.equal(fused(ids), model(ids))


def test_shipped_weights():
    """They are small, those that their report tells of, and foresee English better than the frequency of its bytes."""
    folder = resources.files("edgekit.models") / "pretrained"
    report = json.loads((folder / "dhsa_bytes.json").read_text())
    with resources.as_file(folder / model_entry("dhsa_bytes").weights) as path:
        assert path.stat().st_size < 6e6
    shipped = create_model("dhsa_bytes")
    assert state_dict_sha256(shipped) == report["weights_sha256"]
    assert count_parameters(shipped) == report["parameters"] < 5e6
    words = b"Return the absolute value of a number. The argument may be an integer or a floating point number."
    ids = torch.tensor([[BOS, *words]])
    bits = torch.nn.functional.cross_entropy(shipped(ids)[0, :-1], ids[0, 1:]) / math.log(2)
    assert bits < 3
