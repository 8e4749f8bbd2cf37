"""The boundary predictor against the authors' answers and a plain form, and boundaries against their definition."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgekit.errors import InputError
from edgekit.models.boundaries import BoundaryPredictor, boundary_starts, chunk_starts
from edgekit.models.sparse_config import SparseAttention
from edgekit.models.weights import read_state_dict

CASE = "dhsa_boundary_c64_h4"
LENGTHS = [1, 2, 3, 5, 31, 32, 33, 64, 77]


def predictor(*, channels=24, heads=3, hidden=16, window=4, window_pool=False, seed=0):
    torch.manual_seed(seed)
    made = BoundaryPredictor(channels, heads=heads, hidden=hidden, window=window, window_pool=window_pool)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases and norms count, too
    return made.eval()


def plain_logits(model, features):
    """Window by window, as the paper says it: attention within, norm, the two sides compared."""
    side = model.window
    padded = F.pad(features.transpose(1, 2), [0, 0, side - 1, side])
    attention = nn.MultiheadAttention(padded.shape[2], model.enc.mha.num_heads, batch_first=True)
    attention.load_state_dict(model.enc.mha.state_dict())
    logits = []
    for gap in range(features.shape[2]):
        window = padded[:, gap : gap + 2 * side]
        rows = model.enc.norm(attention(window, window, window, need_weights=False)[0])
        halves = []
        for half in (rows[:, :side], rows[:, side:]):
            weights = torch.full_like(half[:, :, :1], 1 / side)
            if model.pool is not None:
                weights = torch.softmax(model.pool.gate(half), dim=1)
            halves.append((weights * half).sum(1))
        left, right = halves
        cosine = F.cosine_similarity(left, right, dim=1, eps=1e-6).unsqueeze(1)
        logits.append(model.mlp(torch.cat([left, right, (left - right).abs(), left * right, cosine], dim=1)))
    return torch.cat(logits, dim=1)


def plain_starts(logits, count, config):
    """The starts of one text of `count` tokens, choice by choice."""
    window, radius, size = config.window, config.nms_radius, config.block_size
    gaps = {gap: float(logits[gap]) for gap in range(count) if window - 1 <= gap < count - window}
    likely = {}
    for gap, logit in gaps.items():
        near = {other: gaps[other] for other in gaps if 0 < abs(other - gap) <= radius}
        beaten = any(value > logit or (value == logit and other < gap) for other, value in near.items())
        if not beaten and (config.boundary_threshold is None or logit > config.boundary_threshold):
            likely[gap + 1] = logit
    starts = set()
    for group in range(0, len(logits), size):
        inside = [token for token in likely if group < token < group + size]
        inside.sort(key=lambda token: (-likely[token], token))
        starts |= {group, *inside[: config.chunks_per_block - 1]}
    return starts


@pytest.mark.parametrize("golden", [CASE], indirect=True, ids=[CASE])
def test_golden_logits_and_keys(golden):
    made = BoundaryPredictor(64, heads=4, hidden=32)
    assert [(key, tuple(value.shape)) for key, value in made.state_dict().items()] == list(golden.keys.items())
    made.load_state_dict(golden.state_dict(), strict=True)
    with torch.no_grad():
        got = made(golden.draw(f"input:{CASE}", (1, 64, 40)))
    expected = golden.output("boundary_logits")
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("golden", [CASE], indirect=True, ids=[CASE])
def test_a_checkpoint_as_the_authors_save_it(golden, tmp_path):
    torch.save(golden.state_dict(), tmp_path / "boundary_predictor.pt")
    made = BoundaryPredictor(64, heads=4, hidden=32)
    made.load_state_dict(read_state_dict(tmp_path / "boundary_predictor.pt"), strict=True)
    assert torch.equal(made.mlp[2].bias, golden.state_dict()["mlp.2.bias"])


@pytest.mark.parametrize("pool", [False, True], ids=["mean", "pool"])
@pytest.mark.parametrize("window", [1, 4, 20], ids=lambda window: f"window{window}")
@pytest.mark.parametrize("length", LENGTHS)
def test_windows_at_once_are_windows_one_by_one(length, window, pool):
    model = predictor(window=window, window_pool=pool)
    features = torch.randn(2, 24, length, generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        expected = plain_logits(model, features)
        torch.testing.assert_close(model(features), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_weight():
    model = predictor(window_pool=True)
    model(torch.randn(1, 24, 40)).square().sum().backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.parameters())


def test_memory_does_not_hold_all_windows():
    model = predictor(channels=64, heads=4)
    length, largest = 4096, 0
    features = torch.randn(1, 64, length)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with torch.no_grad(), Watch():
        model(features)
    assert largest < 6 * features.numel()  # all windows at once have 8 rows, and 24 numbers per channel


def test_heads_must_divide_the_channels():
    with pytest.raises(InputError, match="heads that divide its 24 channels; got 5"):
        BoundaryPredictor(24, heads=5)


SETTINGS = {
    "default": {},
    "radius0": {"nms_radius": 0},
    "radius3": {"nms_radius": 3, "chunks_per_block": 2},
    "threshold": {"boundary_threshold": 0.5},
    "one-chunk": {"chunks_per_block": 1},
    "small-blocks": {"block_size": 16, "chunks_per_block": 3, "nms_radius": 1, "window": 2},
}


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("length", [1, 4, 8, 9, 63, 64, 65, 200])
@pytest.mark.parametrize("setting", SETTINGS)
def test_starts_are_their_definition(setting, length, ties):
    config = SparseAttention(kind="dhsa", **SETTINGS[setting])
    logits = torch.randn(4, length, generator=torch.Generator().manual_seed(length))
    logits = logits.round() if ties else logits
    counts = [length, max(1, length - 1), (length + 1) // 2, 0]
    valid = torch.arange(length) < torch.tensor(counts).unsqueeze(1)
    starts = chunk_starts(logits, valid, config)
    for row, count in enumerate(counts):
        got = {int(token) for token in starts[row, :count].nonzero()}
        expected = {token for token in plain_starts(logits[row], count, config) if token < count}
        assert got == expected
        groups = F.pad(starts[row], [0, -length % config.block_size]).view(-1, config.block_size)
        assert int(groups.sum(1).max()) <= config.chunks_per_block


def test_padding_is_as_good_as_the_end_of_the_text():
    config = SparseAttention(kind="dhsa")
    model = predictor(channels=32, heads=4)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 4, 150, 8, generator=generator)
    alone = boundary_starts(model, keys, torch.ones(1, 150, dtype=torch.bool), config)
    padded = torch.cat([keys, 100 * torch.randn(1, 4, 61, 8, generator=generator)], dim=2)
    valid = (torch.arange(211) < 150).unsqueeze(0)
    assert torch.equal(boundary_starts(model, padded, valid, config)[:, :150], alone)
    assert int(alone.sum()) > math.ceil(150 / 64)
