"""`edgekit lint` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit.cli.app import run_command
from edgekit.runtime.bundle import Bundle


@pytest.fixture
def bundle(coreml_bundle_of: Callable[..., Bundle]) -> Path:
    return coreml_bundle_of("care_digits").path


def test_report(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", str(bundle)]) == 0
    out = capsys.readouterr().out
    for words in (
        "care_digits-coreml, function main (iOS16)",
        "linear-layout",
        "documented",
        "of the MACs likely on the Neural Engine",
        "fp16 peak on",
        "score: ",
        "what matters most:\n  1. ",
        "https://machinelearning.apple.com/research/neural-engine-transformers",
        "likely, not measured: nothing here ran on an Apple device",
        "check_on_mac.py",
    ):
        assert words in out


def test_ops_are_listed_when_asked_for(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", str(bundle), "--ops"]) == 0
    out = capsys.readouterr().out
    assert "likely on" in out
    assert "softmax" in out


def test_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", str(bundle), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["function"] == "main"
    assert 0 < data["score"] < 100
    assert len(data["changes"]) <= 3
    assert {fact["standing"] for fact in data["facts"]} <= {"documented", "community-observed"}
    assert all(fact["sources"] for fact in data["facts"])
    assert sum(op["macs"] for op in data["ops"]) == data["macs"]


def test_wrong_function_and_wrong_target(bundle: Path, digits_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["lint", str(bundle), "--function", "man"]) == 2
    assert "did you mean main?" in capsys.readouterr().err
    assert run_command(["lint", str(digits_bundle)]) == 2
    assert "edgekit lint reads bundles for Core ML" in capsys.readouterr().err
