"""The lint on bundles as users export them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import edgekit
from edgekit.errors import InputError, UnknownNameError
from edgekit.export.lint import NOT_ON_DEVICE, layout_scores
from edgekit.runtime.bundle import Bundle

MODELS = (pytest.param("shvit_digits", marks=pytest.mark.slow), "care_digits")


@pytest.mark.parametrize("name", MODELS)
def test_zoo_bundles(coreml_bundle_of: Callable[..., Bundle], name: str) -> None:
    report = edgekit.lint(coreml_bundle_of(name))
    accuracy = coreml_bundle_of(name).report()["accuracy"]
    assert (accuracy["items"], accuracy["runtime"]) == (360, "coreml-reference")  # all of them, on any machine
    assert abs(accuracy["fp16"] - accuracy["pytorch"]) <= 1 / 360
    macs = coreml_bundle_of(name).manifest.model.macs
    assert macs is not None
    assert 0.9 * macs <= report.macs <= 1.1 * macs  # of the convolutions and linear layers, and of attention
    assert report.macs_on_engine > 0.9
    assert 30 < report.score < 100
    assert report.peaks is not None
    assert not report.peaks.overflowing
    assert report.peaks.worst.headroom_bits > 2
    assert {item.rule for item in report.advice} >= {"linear-layout", "narrow-axis"}
    assert report.check.endswith("check_on_mac.py")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["basis"] == NOT_ON_DEVICE


def test_the_layout_gains_and_answers_the_same(coreml_bundle_of: Callable[..., Bundle]) -> None:
    before, after = (
        edgekit.lint(coreml_bundle_of("care_digits", layout), samples=False) for layout in ("standard", "ane")
    )
    assert after.layout == "ane"
    assert after.score > before.score
    assert {item.rule for item in after.advice} < {item.rule for item in before.advice}
    assert sum(op.op_type == "transpose" for op in after.ops) == 0 < sum(op.op_type == "transpose" for op in before.ops)
    line = layout_scores(before, after)
    assert f"{before.score:.0f} -> {after.score:.0f} of 100" in line
    assert "linear-layout 1 -> 0" in line
    (advised,) = [item.remedy for item in before.advice if item.rule == "linear-layout"]
    assert advised.endswith("export with --layout ane")
    assert not [item.remedy for item in after.advice if "export with --layout ane" in item.remedy]
    assert "not measured" in line
    assert coreml_bundle_of("care_digits", "ane").report()["layout"] == line
    assert edgekit.verify(coreml_bundle_of("care_digits", "ane"), inputs=1)


@pytest.mark.slow
def test_where_the_layout_gains_nothing_the_export_says_so(coreml_bundle_of: Callable[..., Bundle]) -> None:
    """SHViT is convolutions and one head already: the einsums cost the transposes of the keys."""
    after = coreml_bundle_of("shvit_digits", "ane")
    assert "linear-layout" not in {item.rule for item in edgekit.lint(after, samples=False).advice}
    assert "gains nothing here" in after.report()["layout"]
    assert edgekit.verify(after, inputs=1)


def test_a_layout_that_gains_nothing_says_so(coreml_bundle_of: Callable[..., Bundle]) -> None:
    assert "gains nothing" in layout_scores(coreml_bundle_of("care_digits"), coreml_bundle_of("care_digits"))


def test_packed_bundles_are_read_too(coreml_bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    packed = coreml_bundle_of("care_digits").pack(tmp_path / "care.edge.zip")
    assert (
        edgekit.lint(packed, samples=False).score == edgekit.lint(coreml_bundle_of("care_digits"), samples=False).score
    )


def test_fp32_stays_off_the_engine(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU())
    bundle = edgekit.export(module, "coreml", tmp_path, precision="fp32", shapes="image:1x3x34x34", name="small")
    report = edgekit.lint(bundle)
    assert (report.macs_on_engine, report.score, report.peaks) == (0, 0, None)
    assert report.advice[0].rule == "fp32"


def test_an_overflow_comes_first(tmp_path: Path) -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 32, 1)
            with torch.no_grad():
                self.conv.weight.fill_(300)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.square(self.conv(x)) * 1e-8)

    bundle = edgekit.export(Loud(), "coreml", tmp_path, shapes="image:1x3x32x32", name="loud", check=False)
    report = edgekit.lint(bundle)
    assert report.peaks is not None
    assert report.peaks.overflowing[0].op_type in ("square", "mul")
    assert report.advice[0].rule == "fp16-overflow"


def test_other_targets_are_refused(digits_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"is for onnx.*--target coreml"):
        edgekit.lint(digits_bundle)


def test_unknown_function(coreml_bundle_of: Callable[..., Bundle]) -> None:
    with pytest.raises(UnknownNameError, match="known: main"):
        edgekit.lint(coreml_bundle_of("care_digits"), function="decoder")
