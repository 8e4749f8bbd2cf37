"""The training of the shipped language model: its parts on a tiny model, and what the shipped weights can do."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import resources

import numpy as np
import pytest
import torch

from edgekit.errors import InputError
from edgekit.models import create_model, needles
from edgekit.models.corpus import PARTS, load_corpus
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.dhsa_recipe import PHASES, Phase, Recipe
from edgekit.models.selection_loss import selection_loss
from edgekit.models.sparse_attention import SparseAttention
from edgekit.models.train_dhsa import (
    CHECKPOINT_STEPS,
    BlockedAttention,
    bits_per_byte,
    corpus_text,
    retrieval,
    train_base,
    train_predictor,
    training_batch,
    training_logits,
    training_losses,
)
from edgekit.models.training import reproducible
from edgekit.models.weights import read_state_dict, state_dict_sha256

PRETRAINED = resources.files("edgekit.models") / "pretrained"
SHORT = Phase(12, (64, 96), 256, (1.0, 0.5), 0.3, 0.2, 0.3)


def tiny(kind="dense", window=32):
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            family="gemma2",
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            context=512,
            query_scale=8**-0.5,
            activation="gelu_pytorch_tanh",
            final_softcap=30.0,
            sliding_window=window,
            sliding_layers=(True, False),
            embedding_scale=32**0.5,
            attention=SparseAttention(kind=kind, budget=64, block_size=16, local=16, predictor_heads=4),
        )
    )


@pytest.fixture(scope="module")
def report():
    return json.loads((PRETRAINED / "dhsa_bytes.json").read_text())


@pytest.fixture(scope="module")
def shipped():
    return create_model("dhsa_bytes", attention="dense").eval()


def test_training_lowers_the_loss():
    lines = []
    with reproducible(1, 0):
        model = tiny()
        before = bits_per_byte(model, 256)
        train_base(model, Recipe(phases=(replace(SHORT, steps=30),), warmup=5), lines.append)
        after = bits_per_byte(model, 256)
    assert before > 7.5
    assert after < before - 2
    assert len(lines) == 1
    assert lines[0].startswith("step 30/30: text ")


def test_training_is_reproducible_and_leaves_the_predictor_alone():
    hashes = []
    for seed in (0, 0, 1):
        with reproducible(1, seed):
            model = tiny()
            train_base(model, Recipe(phases=(replace(SHORT, steps=2),), seed=seed), lambda _: None)
            hashes.append(state_dict_sha256(model))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("length", [37, 64, 96, 100, 160])
def test_blocked_attention_is_dense_attention(length):
    model = tiny().eval()
    ids = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).unsqueeze(0)
    with torch.no_grad():
        blocked = model.logits(model.model(ids, positions, BlockedAttention(model, length)))
        torch.testing.assert_close(blocked, model(ids), rtol=1e-5, atol=1e-5)


def test_training_logits_are_those_of_the_model_but_for_rounding():
    model = tiny().eval()
    ids = torch.randint(0, 256, (2, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, (rounded, _) = model(ids), training_logits(model, ids)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
    assert not torch.equal(exact, rounded)


def looked_up(grouped_alike):
    """Queries and keys where head 0 looks far back at token 70, and head 1 does so too or drowns it."""
    generator = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 1, 256, 8, generator=generator)
    k[:, :, 70] = 6 * torch.eye(8)[0]
    k[:, :, 120:128] = 6 * torch.eye(8)[1]
    q = torch.zeros(1, 2, 256, 8)
    q[:, 0] = 6 * torch.eye(8)[0]
    q[:, 1] = 6 * torch.eye(8)[0] if grouped_alike else 5 * torch.eye(8)[1] - 6 * torch.eye(8)[0]
    answers = torch.zeros(1, 256, dtype=torch.bool)
    answers[0, 200:205] = True
    return q, k, answers


@pytest.mark.parametrize("size", [1, 16, 64])
def test_selection_loss_is_low_where_means_find_what_is_attended_to(size):
    good, bad = (selection_loss(*looked_up(alike), 8**-0.5, (size,)) for alike in (True, False))
    assert 0 <= good < 0.2
    assert bad > good + 1


def test_selection_loss_wants_answers_and_something_far():
    q, k, answers = looked_up(True)
    assert selection_loss(q, k, torch.zeros_like(answers), 8**-0.5) == 0
    near = torch.zeros_like(answers)
    near[0, 100] = True  # of the blocks before its own, one is local and none is far
    assert selection_loss(q, k, near, 8**-0.5) == 0


def test_selection_loss_reaches_queries_and_keys():
    q, k, answers = looked_up(False)
    q.requires_grad_()
    k.requires_grad_()
    torch.autograd.backward(selection_loss(q, k, answers, 8**-0.5))
    assert q.grad[0, :, 200:205].abs().sum() > 0
    assert k.grad.abs().sum() > 0


def test_phase_with_selection_trains():
    with reproducible(1, 0):
        model = tiny()
        phase = replace(SHORT, steps=2, lengths=(256,), tokens=512, copies=0.0, texts=0.0, pairs=0.0, selection=0.5)
        ids, kinds = training_batch(corpus_text("train"), phase, 256, np.random.default_rng(0))
        losses = training_losses(model, torch.from_numpy(ids), torch.from_numpy(kinds), phase.selection)
        assert losses.selection > 0
        train_base(model, Recipe(phases=(phase,)), lambda _: None)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("phase", range(len(PHASES)))
def test_every_phase_gives_batches(phase):
    text = corpus_text("train")
    for length in set(PHASES[phase].lengths):
        ids, kinds = training_batch(text, PHASES[phase], length, np.random.default_rng(0))
        assert ids.shape == kinds.shape == (max(1, PHASES[phase].tokens // length), length + 1)
        assert ids.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < 256
        assert set(np.unique(kinds)) <= {needles.IGNORED, needles.TEXT, needles.ANSWER}


def test_predictor_is_trained_on_frozen_weights():
    recipe = Recipe(boundary_steps=2, boundary_texts=2, boundary_length=600)
    model = tiny("dhsa")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = train_predictor(model, replace(recipe, boundary_length=500), lambda _: None)
    assert trained.steps == 2
    assert trained.tokens == 2 * 500
    for key, value in model.state_dict().items():
        moved = not torch.equal(value, before[key])
        assert moved == key.startswith("boundary_predictor."), key


def test_figures_belong_to_the_shipped_file(report):
    model = create_model("dhsa_bytes")
    assert report["weights_sha256"] == state_dict_sha256(model)
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["tokens"] == sum(phase.steps * phase.tokens for phase in PHASES)
    assert report["recipe"] == json.loads(json.dumps(asdict(Recipe())))
    tensors = read_state_dict(str(PRETRAINED / "dhsa_bytes.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert (PRETRAINED / "dhsa_bytes.safetensors").stat().st_size < 6_000_000


def test_shipped_model_finds_needles(shipped):
    assert retrieval(shipped, 1024, 8, distractors=0, seed=7) == (1.0, 1.0)


def test_shipped_model_finds_needles_by_greedy_decoding(shipped):
    task = needles.needle(corpus_text("validation"), 1024, 0.4, np.random.default_rng(11))
    ids = torch.tensor([list(task.prompt)])
    answer = []
    with torch.no_grad():
        mask = torch.ones_like(ids)
        logits, cache = shipped.prefill(ids, mask, shipped.empty_cache(1))
        for _ in task.answer:
            answer.append(int(logits[0, -1].argmax()))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits, cache = shipped.decode(torch.tensor([answer[-1:]]), mask, cache)
    assert bytes(answer) == task.answer


def test_shipped_model_reads_text(shipped, report):
    measured = bits_per_byte(shipped, 1024)
    assert measured < 2.35
    same_text = {part: load_corpus(part).sha256 for part in PARTS} == {
        part: report["corpus"][part]["sha256"] for part in PARTS
    }
    if same_text:  # another Python version has other docstrings
        assert measured == pytest.approx(report["dense"]["bits_per_byte"]["1024"], abs=1e-3)


class StoppedError(Exception):
    """Stands for whatever stops a training."""


@pytest.fixture
def long_recipe():
    return replace(Recipe(), phases=(replace(SHORT, steps=CHECKPOINT_STEPS + 3, lengths=(64,), tokens=64),), warmup=2)


def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, long_recipe):
    checkpoint = tmp_path / "folder" / "state.pt"
    whole, parted, again = tiny(), tiny(), tiny()
    with reproducible(1, 0):
        train_base(whole, long_recipe, log=lambda line: None)
    calls = []

    def stop(line):
        calls.append(line)
        if len(calls) == CHECKPOINT_STEPS // 50:
            raise StoppedError

    with reproducible(1, 0), pytest.raises(StoppedError):
        train_base(parted, long_recipe, stop, checkpoint)
    lines = []
    with reproducible(1, 7):  # other first weights, which the checkpoint replaces
        assert train_base(again, long_recipe, lines.append, checkpoint) == CHECKPOINT_STEPS
    assert f"after step {CHECKPOINT_STEPS}" in lines[0]
    assert state_dict_sha256(again) == state_dict_sha256(whole)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"], ids=["empty", "text", "truncated zip"])
def test_a_damaged_checkpoint_is_named_with_its_mend(tmp_path, long_recipe, content):
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"state\.pt is no checkpoint .*; delete .*state\.pt to begin anew"):
        train_base(tiny(), long_recipe, lambda line: None, path)
    assert path.read_bytes() == content


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    recipe = replace(Recipe(), phases=(replace(SHORT, steps=1, lengths=(64,), tokens=64),))
    with reproducible(1, 0):
        train_base(tiny(), recipe, lambda line: None, path)
    with pytest.raises(InputError, match="another seed or recipe; delete"):
        train_base(tiny(), replace(recipe, seed=1), lambda line: None, path)
