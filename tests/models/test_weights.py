"""Weights files: every wrapper and format reads the same, every misfit is refused by name, and no code runs."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgekit.errors import WeightsError
from edgekit.models import create_model, load_weights, seed_weights, state_dict_sha256
from edgekit.models.weights import read_state_dict


@pytest.fixture
def state():
    model = create_model("shvit_digits", weights="random", seed=7)
    seed_weights(model, 7)
    return model.state_dict()


@pytest.fixture
def model():
    return create_model("shvit_digits", weights="random")


WRAPPERS = {
    "flat": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "model-with-training-arguments": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, output="x")},
    "state_dict": lambda state: {"state_dict": state, "best": 0.5},
    "data-parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "wrapped-data-parallel": lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin", ".ckpt"])
def test_torch_files(tmp_path, state, model, wrapper, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(WRAPPERS[wrapper](state), path)
    load_weights(model, path)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_safetensors(tmp_path, state, model):
    save_file(state, tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_directory_with_one_file(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    (tmp_path / "README.md").write_text("about the weights")
    assert read_state_dict(tmp_path).keys() == state.keys()
    loaded = create_model("shvit_digits", weights=tmp_path)
    assert torch.equal(loaded.state_dict()["head.l.weight"], state["head.l.weight"])


def test_linear_weight_for_a_pointwise_convolution(tmp_path, state, model):
    """The authors' loader takes [O, I] for [O, I, 1, 1]."""
    key = "blocks1.0.ffn.m.pw1.c.weight"
    torch.save({**state, key: state[key][:, :, 0, 0]}, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.state_dict()[key], state[key])


def test_half_precision_weights_convert(tmp_path, state, model):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "weights.pth")
    load_weights(model, tmp_path / "weights.pth")
    assert model.state_dict()["head.l.weight"].dtype == torch.float32


class _RunsCode:
    def __reduce__(self):
        return (os.system, ("touch /tmp/edgekit-test-code-ran",))


def _truncated(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:700])


def _pickle(path, content):
    with path.open("wb") as file:
        pickle.dump(content, file, protocol=2)


REFUSED = {
    "missing": ("w.pth", lambda path: None, "no weights file at .*w.pth; check the path"),
    "empty-directory": ("w", lambda path: path.mkdir(), "exactly one weights file; found none. Name a file"),
    "other-suffix": ("w.onnx", lambda path: path.write_bytes(b"x"), r"expected one of \.pth, .*\.safetensors"),
    "empty-file": ("w.pth", lambda path: path.write_bytes(b""), "damaged or not a PyTorch weights file"),
    "not-a-checkpoint": ("w.pth", lambda path: path.write_text("hello"), "damaged or not a PyTorch weights file"),
    "truncated": ("w.pth", _truncated, "damaged or not a PyTorch weights file .*; fetch it again"),
    "code": (
        "w.pth",
        lambda path: torch.save({"a": _RunsCode()}, path),
        r"asks to run code \((posix|os|nt)\.system\), which edgekit refuses; save the weights alone",
    ),
    "plain-pickle-code": ("w.pth", lambda path: _pickle(path, {"a": _RunsCode()}), "which edgekit refuses"),
    "whole-module": (
        "w.pth",
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"asks to run code \(torch.nn.modules.linear.Linear\).*state_dict",
    ),
    "bad-safetensors": ("w.safetensors", lambda path: path.write_bytes(b"\x08" * 40), "not a safetensors file"),
    "a-list": ("w.pth", lambda path: torch.save([torch.zeros(1)], path), "holds a list, not a dictionary of tensors"),
    "no-tensors": ("w.pth", lambda path: torch.save({}, path), "holds no tensors"),
    "not-tensors": ("w.pth", lambda path: torch.save({"epoch": 3}, path), r"more than tensors: 1 \(epoch \(int\)\)"),
    "mixed": ("w.pth", lambda path: torch.save({"a": torch.zeros(1), "b": "x"}, path), r"1 \(b \(str\)\)"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_refused_with_what_arrived_and_what_to_do(tmp_path, case):
    name, write, message = REFUSED[case]
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / name)
    with pytest.raises(WeightsError):  # never silently random
        create_model("shvit_digits", weights=tmp_path / name)


def test_code_in_a_file_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Touch:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    torch.save({"model": Touch()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="refuses"):
        read_state_dict(tmp_path / "w.pth")
    assert not marker.exists()


def test_directory_with_several_files_names_them(tmp_path, state):
    for name in ("a.pth", "b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"found 2 weights files \(a.pth, b.safetensors\)"):
        read_state_dict(tmp_path)


def _without(state, *keys):
    return {key: value for key, value in state.items() if key not in keys}


MISFITS = {
    "missing": (lambda s: _without(s, "head.l.bias"), r"1 missing \(head.l.bias\)"),
    "unexpected": (lambda s: {**s, "extra.weight": torch.zeros(1)}, r"1 unexpected \(extra.weight\)"),
    "renamed": (
        lambda s: {**_without(s, "head.l.bias"), "head.b": s["head.l.bias"]},
        r"1 missing \(head.l.bias\); 1 unexpected \(head.b\)",
    ),
    "shape": (
        lambda s: {**s, "head.l.bias": torch.zeros(7)},
        r"1 of another shape \(head.l.bias: expected \[10\], got \[7\]\)",
    ),
    "quantised": (
        lambda s: {**s, "head.l.bias": torch.zeros(10, dtype=torch.int8)},
        r"1 of another type \(head.l.bias: expected torch.float32, got torch.int8\)",
    ),
    "nan": (lambda s: {**s, "head.l.bias": torch.full((10,), torch.nan)}, r"NaN or infinite values: 1 \(head.l.bias\)"),
    "infinite": (lambda s: {**s, "head.l.bias": torch.full((10,), -torch.inf)}, "NaN or infinite values"),
    "too-large": (lambda s: {**s, "head.l.bias": torch.full((10,), 1e300, dtype=torch.float64)}, "infinite values"),
    "another-model": (
        lambda s: {f"stages.{k}": v for k, v in s.items()},
        r"\d+ missing \(.*, \.\.\.\); \d+ unexpected",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_and_leave_the_model_alone(tmp_path, state, model, case):
    change, message = MISFITS[case]
    torch.save(change(state), tmp_path / "w.pth")
    before = state_dict_sha256(model)
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert state_dict_sha256(model) == before


@pytest.mark.parametrize("name", ["shvit_s1", "care_s0", "care_digits"])
def test_seeded_weights_make_every_branch_count(name):
    model = create_model(name, weights="random")
    seed_weights(model, 0)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not key.endswith(("bias", "running_mean")):
            assert float(value.abs().mean()) > 0.01, key
    channels = model.in_chans
    with torch.no_grad():
        logits = model(torch.randn(4, channels, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert 0.1 < float(logits.std()) < 10
    assert float((logits - logits.mean(0)).std()) > 0.05  # the answer depends on the image


def test_seeded_weights_repeat_and_differ():
    hashes = []
    for seed in (0, 0, 1):
        model = create_model("care_digits", weights="random", seed=seed + 5)
        state = torch.random.get_rng_state()
        seed_weights(model, seed)
        assert torch.equal(state, torch.random.get_rng_state())
        hashes.append(state_dict_sha256(model))
    assert hashes[0] == hashes[1] != hashes[2]


def test_seeding_again_changes_nothing():
    model = create_model("shvit_digits", weights="random")
    seed_weights(model, 0)
    first = state_dict_sha256(model)
    seed_weights(model, 0)
    assert state_dict_sha256(model) == first


def test_seeding_leaves_constant_buffers():
    model = nn.Module()
    model.register_buffer("positions", torch.arange(4.0))
    seed_weights(model, 0)
    assert torch.equal(model.positions, torch.arange(4.0))


def test_hash_sees_key_dtype_shape_and_bytes():
    def tensors(**values):
        model = nn.Module()
        for key, value in values.items():
            model.register_buffer(key, value)
        return state_dict_sha256(model)

    base = tensors(a=torch.zeros(4), b=torch.ones(2))
    assert base == tensors(b=torch.ones(2), a=torch.zeros(8)[::2])  # neither order nor strides matter
    others = [
        tensors(a=torch.zeros(4), c=torch.ones(2)),
        tensors(a=torch.zeros(4, dtype=torch.int32), b=torch.ones(2)),
        tensors(a=torch.zeros(2, 2), b=torch.ones(2)),
        tensors(a=torch.zeros(4), b=torch.tensor([1.0, 2.0])),
        tensors(a=torch.zeros(4), b=torch.ones(2), c=torch.tensor(True)),
        tensors(a=torch.zeros(4), b=torch.ones(2).bfloat16()),
    ]
    assert len({base, *others}) == 1 + len(others)


class Adapting(nn.Linear):
    """Knows checkpoints in which its weight is called `w` and lies transposed."""

    def adapt_checkpoint(self, tensors):
        if "w" in tensors:
            tensors = {"weight": tensors["w"].T, **_without(tensors, "w")}
        return tensors


def test_a_model_adapts_the_checkpoints_it_knows(tmp_path):
    model, weight = Adapting(2, 3, bias=False), torch.arange(6.0).reshape(2, 3)
    torch.save({"model": {"module.w": weight}}, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.weight, weight.T)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.zeros(2, 3), "extra": torch.zeros(1)}, r"does not fit this Adapting: 1 unexpected \(extra\)"),
        ({"w": torch.zeros(5, 3)}, r"weight: expected \[3, 2\], got \[3, 5\]"),
        ({"w": torch.full((2, 3), torch.nan)}, "NaN"),
        ({"other": torch.zeros(1)}, r"1 missing \(weight\); 1 unexpected \(other\)"),
    ],
    ids=["unexpected", "shape", "nan", "another model"],
)
def test_what_was_adapted_must_fit_as_strictly(tmp_path, state, message):
    model = Adapting(2, 3, bias=False)
    before = state_dict_sha256(model)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=message):
        load_weights(model, tmp_path / "w.pth")
    assert state_dict_sha256(model) == before


@pytest.mark.parametrize("name", ["dynamicvis_digits", "hgnn_digits", "lighthgnn_digits"])
def test_a_checkpoint_of_another_architecture_stays_an_error(tmp_path, state, name):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"does not fit this \w+: \d+ missing .*; \d+ unexpected"):
        create_model(name, weights=tmp_path / "w.pth")
