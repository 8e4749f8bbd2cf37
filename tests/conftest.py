"""Fixtures that several folders of tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgekit


@pytest.fixture(scope="session")
def digits_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shvit_digits` at fp32: a real, trained model. Do not change it; copy it first."""
    return edgekit.export("shvit_digits", "onnx", tmp_path_factory.mktemp("digits")).path
