"""Labels from attention against the whole matrix, and the training of a predictor on a frozen model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from edgekit.errors import InputError
from edgekit.models.boundary_labels import dense_attention_masses
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.sparse_config import SparseAttention
from edgekit.models.train_boundaries import evaluate_boundaries, lesson_of, train_boundaries

SPARSE = SparseAttention(kind="dhsa", budget=48, block_size=16, local=16, predictor_heads=4, predictor_hidden=16)


def whole_matrix(q, k, scale, softcap, window):
    """The attention weights `[B, Hq, N, N]` in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(q.shape[2]).unsqueeze(1) - torch.arange(q.shape[2])
    seen = (distance >= 0) & ((distance < window) if window else True)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=3)


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 20)], ids=["plain", "softcap", "sliding"])
@pytest.mark.parametrize("length", [1, 3, 8, 127, 128, 129, 300])
def test_masses_are_sums_over_the_matrix(length, softcap, window, side):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, heads, length, 8, generator=generator) * 2 for heads in (4, 2, 2))
    out, masses = dense_attention_masses(q, k, v, side=side, scale=0.4, softcap=softcap, window=window)
    weights = whole_matrix(q, k, 0.4, softcap, window)
    torch.testing.assert_close(out, (weights @ v.repeat_interleave(2, dim=1).double()).float(), rtol=1e-4, atol=1e-5)
    mean = weights.mean(dim=1)
    for gap in range(length):
        later = mean[:, gap + side + 1 :]
        before = later[:, :, max(0, gap - side + 1) : gap + 1].sum((1, 2))
        behind = later[:, :, gap + 1 : gap + side + 1].sum((1, 2))
        torch.testing.assert_close(masses.before[:, gap], before, rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(masses.behind[:, gap], behind, rtol=1e-5, atol=1e-12)


def test_labels_are_half_where_one_side_gets_twice_as_much():
    q, k, v = (torch.randn(1, 1, 40, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    _, masses = dense_attention_masses(q, k, v, side=4, scale=1.0)
    masses = replace(
        masses,
        before=torch.tensor([[1.0, 2.0, 4.0, 0.0]], dtype=torch.float64),
        behind=torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64),
    )
    expected = [1 / (1 + math.exp(2 * math.log(2))), 0.5, 1 / (1 + math.exp(-2 * math.log(2))), 0.2]
    assert masses.labels()[0].tolist() == pytest.approx(expected, rel=1e-5)


def decoder(*, seed=0, windows=(0, 0), **changes):
    """A small model; `windows`: what each layer's keys are hidden behind, 0 for none."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        family="gemma2",
        vocab_size=17,
        hidden_size=32,
        intermediate_size=48,
        num_layers=len(windows),
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        query_scale=8**-0.5,
        sliding_window=max(windows),
        sliding_layers=tuple(window > 0 for window in windows),
        context=512,
        attention=replace(SPARSE, **changes),
    )
    return Decoder(config)


def texts(count, length=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 17, (2, length), generator=generator) for _ in range(count)]


def sharp(model):
    """The model with weights so large that its attention has something to look at."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed" in name:
                parameter.mul_(25)
    return model


def test_only_the_predictor_learns():
    model = sharp(decoder())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    steps = []
    done = train_boundaries(
        model, texts(4), held_out=texts(2, seed=1), steps=6, seed=3, progress=lambda step, loss: steps.append(step)
    )
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (done.steps, done.tokens, done.layers) == (6, 6 * 2 * 96, (0, 1))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("boundary_predictor."), key
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if "boundary" not in key)


def test_one_seed_one_predictor():
    first, second, other = (sharp(decoder()) for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        torch.manual_seed(seed + 10)  # what the caller has drawn is of no matter
        train_boundaries(model, texts(3), held_out=texts(1, seed=1), steps=4, seed=seed)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.boundary_predictor.mlp[0].weight, other.boundary_predictor.mlp[0].weight)


def test_it_learns_what_the_attention_shows():
    """Two layers with attention that depends on single tokens: a better order than a random one after few steps."""
    model = sharp(decoder())
    done = train_boundaries(model, texts(6), held_out=texts(2, seed=1), steps=120, seed=0, learning_rate=3e-3)
    assert done.last_loss < 0.9 * done.first_loss
    assert done.held_out == evaluate_boundaries(model, texts(2, seed=1))
    assert done.held_out.gaps == 2 * 2 * (96 - 16)
    assert done.held_out.average_precision > done.held_out.base_rate + 0.1


def test_lessons_of_shared_and_of_own_boundaries():
    batch = texts(1)[0]
    shared, own = sharp(decoder()), sharp(decoder(share_boundaries=False))
    masses, keys = [], []

    def attend(_layer, q, k, v):
        out, mass = dense_attention_masses(q, k, v, side=4, scale=8**-0.5)
        masses.append(mass)
        keys.append(k.transpose(1, 2).flatten(2))
        return out

    with torch.no_grad():
        own.model(batch, torch.arange(96).unsqueeze(0), attend)
    apart, together = lesson_of(own, batch), lesson_of(shared, batch)
    for lesson, expected_keys, expected in (
        (apart, keys, [mass.labels() for mass in masses]),
        (together, keys[:1], [mean_of(masses).labels()]),
    ):
        assert len(lesson.keys) == len(lesson.labels) == len(expected)
        assert all(map(torch.equal, lesson.keys, expected_keys))
        assert all(map(torch.equal, lesson.labels, expected))


def mean_of(masses):
    return replace(
        masses[0],
        before=(masses[0].before + masses[1].before) / 2,
        behind=(masses[0].behind + masses[1].behind) / 2,
    )


def test_layers_that_select_nothing_teach_nothing():
    for window, layers in ((16, (1,)), (100, (0, 1))):  # three blocks of 16 hold a window of 16 tokens
        model = sharp(decoder(windows=(window, 0)))
        assert train_boundaries(model, texts(1), held_out=texts(1, seed=1), steps=1).layers == layers
    with pytest.raises(InputError, match="every layer's sliding window fits into the budget"):
        train_boundaries(decoder(windows=(16, 16)), texts(1), held_out=texts(1), steps=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least 1 step, batches and held-out batches; got 0, 1 and 1"),
        ({"batches": []}, "got 2, 0 and 1"),
        ({"batches": texts(1, 16)}, "leaves none of 16 tokens; give longer texts"),
    ],
    ids=["no-steps", "no-batches", "short"],
)
def test_what_cannot_be_trained_on(arguments, message):
    arguments = {"steps": 2, "batches": texts(1), "held_out": texts(1)} | arguments
    with pytest.raises(InputError, match=message):
        train_boundaries(decoder(), arguments.pop("batches"), **arguments)


def test_a_model_without_a_predictor():
    with pytest.raises(InputError, match="is trained for attention 'dhsa'; this model attends 'block'"):
        train_boundaries(decoder(kind="block"), texts(1), held_out=texts(1), steps=1)
