"""Core ML on the command line, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.cli.app import run_command
from edgekit.errors import InputError

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

NET = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4))

class Odd(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)
"""
RECIPE = {"size": [8, 8], "resize": "squash", "crop_pct": 1.0, "interpolation": "bilinear", "color": "gray",
          "scale": 0.00392156862745098, "mean": [0.5], "std": [0.25], "layout": "NCHW", "pad_value": 0.0}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "coreml_cli_net.py").write_text(NET)
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    (tmp_path / "labels.txt").write_text("\n".join(["ape", "bee", "cat", "dog"]))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    code = run_command(words.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


EXPORT = "export coreml_cli_net:net --target coreml --shape image:1x1x8x8 --preprocessing recipe.json"


def test_export_inspect_and_verify(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, f"{EXPORT} --labels labels.txt --deployment-target iOS17 --name tiny")
    assert code == 0, err
    assert "not run: Apple's Core ML and the Neural Engine" in out
    assert "check_on_mac.py" in out
    code, out, err = run(capsys, "inspect out/tiny-coreml.edge")
    assert code == 0, err
    for words in (
        "runs from  iOS 17, macOS 14 (specification 8); computes in fp16, standard layout",
        "image      image is a Core ML image; the package normalises it itself",
        "labels     also given as classLabel, classLabel_probs",
        "checked on coreml-reference; never on Apple's Core ML",
        "model.mlpackage/Data/com.apple.CoreML/model.mlmodel",
    ):
        assert words in out
    code, out, err = run(capsys, "verify out/tiny-coreml.edge --backend coreml-reference --json")
    assert code == 0, err
    assert json.loads(out)["passed"] is True
    code, out, err = run(capsys, "verify out/tiny-coreml.edge --backend coreml-reference-fp16sum")
    assert "this backend adds up in fp16, one term after the other" in out


def test_two_targets_each_in_its_own_default_precision(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, f"{EXPORT} --input tensor --json".replace("coreml --", "onnx,coreml --"))
    assert code == 0, err
    made = [(entry["manifest"]["target"], entry["manifest"]["precision"]) for entry in json.loads(out)]
    assert made == [("onnx", "fp32"), ("coreml", "fp16")]


def test_options_of_one_target_go_to_it_alone(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, dict[str, Any]] = {}

    def export(model: str, target: str, *_: object, **options: Any) -> None:
        given[target] = options
        if len(given) == 3:
            raise InputError("seen enough")

    monkeypatch.setattr(edgekit, "export", export)
    words = (
        "export shvit_digits --target onnx,tvm,coreml --opset 18 --kernels aarch64 --tune 3 --arch aarch64 --layout ane"
    )
    code, _, err = run(capsys, words)
    assert (code, err.splitlines()[-1]) == (2, "edgekit: error: seen enough")
    names = ("opset", "kernels", "tune", "arch", "layout")
    assert {target: [options[name] for name in names] for target, options in given.items()} == {
        "onnx": [18, ["aarch64"], 0, None, "standard"],
        "tvm": [None, ["aarch64"], 3, "aarch64", "standard"],
        "coreml": [None, None, 0, None, "ane"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{EXPORT} --precision int4 --deployment-target iOS16", "needs a deployment target of at least iOS18"),
        (f"{EXPORT} --precision palette5", "unknown precision 'palette5'"),
        (f"{EXPORT} --opset 20", "has no opset"),
        (f"{EXPORT} --precision palette4".replace("coreml --", "coreml,onnx --"), "onnx is exported as fp32"),
        ("export shvit_digits --target onnx --deployment-target iOS16", "--deployment-target, --layout and --input"),
        (
            "export coreml_cli_net:Odd --target coreml --shape x:1x3",
            "coreml_cli_net.py:10: return torch.special.bessel",
        ),
        ("export coreml_cli_net:net --target coreml --shape image:1x1x8x8 --input image", "can take no Core ML image"),
    ],
    ids=["too old", "precision", "opset", "precision of one target", "other target", "op", "no image"],
)
def test_errors(place: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    code, _, err = run(capsys, words)
    assert code in (1, 2)
    assert message in err
    assert not list((place / "out").glob("*"))
