"""The zoo gives the answers of the authors' own code, before and after `fuse`, and has their keys."""

from __future__ import annotations

import pytest
import torch

from edgekit.models import create_model, fuse

CASES = ["shvit_s1", "shvit_s4", "care_s0"]
SIZES = {"shvit_s4": 256}

each_case = pytest.mark.parametrize("golden", CASES, indirect=True, ids=CASES)


def relative_error(got, expected):
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@each_case
def test_keys_are_the_originals_in_order(golden):
    state = create_model(golden.case, weights="random").state_dict()
    assert [(key, tuple(value.shape)) for key, value in state.items()] == list(golden.keys.items())


@each_case
def test_logits_before_and_after_fuse(golden):
    model = create_model(golden.case, weights="random")
    model.load_state_dict(golden.state_dict(), strict=True)
    images = golden.images(SIZES.get(golden.case, 224))
    with torch.no_grad():
        assert relative_error(model(images), golden.output("logits")) < 1e-5
        assert relative_error(fuse(model)(images), golden.output("logits")) < 2e-5


@pytest.mark.parametrize("golden", ["care_s0"], indirect=True, ids=["care_s0"])
def test_features(golden):
    model = create_model(golden.case, weights="random")
    model.load_state_dict(golden.state_dict(), strict=True)
    with torch.no_grad():
        features = model.features(golden.images(224))[:, :64]
    assert relative_error(features, golden.output("features")) < 1e-5
