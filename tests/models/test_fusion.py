"""`fuse` is exact, leaves its argument alone, and folds nothing that it must not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgekit.models import create_model, fuse, list_models, seed_weights, state_dict_sha256

DISTILLED = [(name, {"distillation": True}) for name in list_models() if name.startswith("shvit")]
NORMED = [("hgnn", {"use_bn": True}), ("hgnnp", {"use_bn": True})]
LARGE = {"dynamicvis_base", "dynamicvis_large"}
VARIANTS = [
    pytest.param(name, overrides, id="-".join([name, *overrides]), marks=[pytest.mark.slow] if name in LARGE else [])
    for name, overrides in [(name, {}) for name in list_models()] + DISTILLED + NORMED
]


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_exact_for_every_variant(active, name, overrides):
    model, inputs = active(name, **overrides)
    before = state_dict_sha256(model)
    fused = fuse(model)
    with torch.no_grad():
        assert relative_error(fused(**inputs), model(**inputs)) < 5e-6
    assert not norms(fused)
    assert not fused.training
    assert state_dict_sha256(model) == before


@pytest.mark.parametrize("name", ["shvit_s1", "care_s0", "lighthgnn"])
def test_models_with_batch_norms_lose_them(name):
    model = create_model(name, weights="random")
    assert norms(model)
    assert not norms(fuse(model))


@pytest.mark.parametrize("name", ["shvit_digits", "care_digits"])
def test_in_double_precision_nothing_is_lost(active, name):
    model, inputs = active(name)
    model, inputs = model.double(), {key: value.double() for key, value in inputs.items()}
    with torch.no_grad():
        assert relative_error(fuse(model)(**inputs), model(**inputs)) < 1e-13


@pytest.mark.parametrize(
    ("name", "count"), [("shvit_s1", 174), ("shvit_s2", 174), ("shvit_s3", 192), ("shvit_s4", 234)]
)
def test_fused_shvit_keys(name, count):
    keys = list(fuse(create_model(name)).state_dict())
    assert len(keys) == count
    assert {
        "patch_embed.0.weight",
        "blocks1.0.conv.weight",
        "blocks1.0.conv.bias",
        "blocks1.0.ffn.m.pw1.weight",
        "blocks2.0.0.weight",
        "blocks2.1.se.fc1.weight",
        "blocks2.3.mixer.m.pre_norm.weight",
        "blocks2.3.mixer.m.qkv.bias",
        "blocks2.3.mixer.m.proj.1.weight",
        "head.weight",
        "head.bias",
    } <= set(keys)


@pytest.mark.parametrize(("name", "overrides"), [("shvit_digits", {"distillation": True}), ("care_digits", {})])
def test_both_heads_become_one(active, name, overrides):
    model, inputs = active(name, **overrides)
    heads = model.train()(**inputs)
    assert [head.shape for head in heads] == [(2, 10), (2, 10)]
    fused = fuse(model)
    assert model.training
    assert not [key for key in fused.state_dict() if "dist" in key]
    assert fused(**inputs).shape == (2, 10)


@pytest.mark.parametrize("name", ["shvit_digits", "care_digits", "lighthgnn_digits"])
def test_fusing_twice_changes_nothing(active, name):
    model, inputs = active(name)
    once = fuse(model)
    twice = fuse(once)
    assert twice is not once
    assert state_dict_sha256(twice) == state_dict_sha256(once)
    with torch.no_grad():
        assert torch.equal(twice(**inputs), once(**inputs))


def test_gamma_keeps_its_meaning_after_a_second_fuse(active):
    """The layer scale must not be multiplied in twice."""
    model, inputs = active("care_digits")
    with torch.no_grad():
        assert relative_error(fuse(fuse(fuse(model)))(**inputs), model(**inputs)) < 5e-6


def user_model():
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.BatchNorm2d(8, affine=False),
    )
    seed_weights(model, 3)
    return model


def test_neighbours_in_a_users_sequential():
    model = user_model()
    model.train()
    fused = fuse(model)
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(fused(images), copy.deepcopy(model).eval()(images)) < 1e-6
    assert [type(layer).__name__ for layer in fused] == ["Identity", "Conv2d", "Identity", "ReLU", "Conv2d", "Identity"]
    assert model.training
    assert len(norms(model)) == 3


def test_grouped_convolution_after_a_norm():
    model = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 2, stride=2, groups=2))
    seed_weights(model, 5)
    images = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    fused = fuse(model)
    assert not norms(fused)
    with torch.no_grad():
        assert relative_error(fused(images), model.eval()(images)) < 1e-6


def shared():
    conv = nn.Conv2d(3, 3, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv)


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


def parametrised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3))


def padded_after_norm():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1))


def without_statistics():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize("build", [shared, hooked, parametrised, padded_after_norm, without_statistics])
def test_leaves_alone_what_would_change_the_answer(build):
    model = build().eval()
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    fused = fuse(model)
    assert len(norms(fused)) == 1
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images))


def test_a_model_without_such_parts_comes_back_as_an_eval_copy():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    fused = fuse(model)
    assert fused is not model
    assert not fused.training
    assert model.training
    assert state_dict_sha256(fused) == state_dict_sha256(model)


def test_a_users_own_fuse_method_is_not_called():
    class Ours(nn.Module):
        def fuse(self):
            raise AssertionError("this method means something else")

        def forward(self, x):
            return x

    assert isinstance(fuse(Ours()), Ours)
