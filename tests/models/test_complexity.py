"""Sizes equal the published tables, and the registry's declared figures equal the computed ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.models import (
    count_macs,
    count_macs_per_token,
    count_parameters,
    create_model,
    fuse,
    list_models,
    model_entry,
)
from edgekit.models.registry import ImageInput, TokenInput

# name: parameters, parameters after fuse, millions of multiply-accumulates; measured on the authors' code
TABLE = {
    "shvit_s1": (6_330_808, 6_308_660, 241.3),
    "shvit_s2": (11_483_072, 11_453_508, 365.4),
    "shvit_s3": (14_245_273, 14_210_010, 600.6),
    "shvit_s4": (16_588_484, 16_546_248, 986.2),
    "care_s0": (7_340_000, None, 717.8),
    "care_s1": (9_602_424, None, 1028.6),
    "care_s2": (19_481_288, None, 1923.1),
}


def input_shape(name, batch=1):
    shape = model_entry(name).input
    return (batch, shape.channels, shape.size, shape.size)


def on_meta(name):
    """The model without weights: sizes and arithmetic can be counted for the largest at no cost."""
    with torch.device("meta"):
        return model_entry(name).factory().eval()


@pytest.mark.parametrize("name", TABLE)
def test_the_papers_sizes(name):
    parameters, fused_parameters, millions = TABLE[name]
    model = create_model(name)
    fused = fuse(model)
    assert count_parameters(model) == parameters
    assert round(count_macs(model, input_shape(name)) / 1e6, 1) == millions
    if fused_parameters is not None:
        assert count_parameters(fused) == fused_parameters
        assert round(count_macs(fused, input_shape(name)) / 1e6, 1) == millions


@pytest.mark.parametrize("name", list_models())
def test_declared_figures_are_the_computed_ones(name):
    entry, model = model_entry(name), on_meta(name)
    assert entry.parameters == count_parameters(model)
    if isinstance(entry.input, ImageInput):
        assert entry.macs == count_macs(model, input_shape(name))
    elif isinstance(entry.input, TokenInput):
        assert entry.macs == count_macs_per_token(model)
    else:
        inputs = entry.input.examples(1)
        assert entry.macs * len(inputs[entry.input.tensors[0].name]) == count_macs(entry.factory(), inputs)


def test_the_meta_device_counts_as_the_cpu_does():
    assert count_macs(on_meta("care_digits"), input_shape("care_digits")) == count_macs(
        create_model("care_digits"), input_shape("care_digits")
    )


def test_inputs_by_name():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, left, right):
            return self.layer(left)[right]

    inputs = {"right": np.zeros(7, np.int64), "left": torch.zeros(5, 3)}
    assert count_macs(Both(), inputs) == 5 * 3 * 4


def test_every_batch_element_counts():
    model = create_model("shvit_digits")
    assert count_macs(model, input_shape("shvit_digits", batch=3)) == 3 * model_entry("shvit_digits").macs


def test_in_chans_one():
    model = create_model("shvit_s1", in_chans=1)
    stem = 112 * 112 * 16 * 9  # output positions x output channels x taps, for each input channel
    assert count_macs(model, (1, 1, 224, 224)) == model_entry("shvit_s1").macs - 2 * stem


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    assert count_macs(model, (1, 1, 5, 5)) == 9 * 9 * 2
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3)
    assert count_parameters(nn.Sequential(layer, layer)) == 12
