"""Registering the Core ML lowerings, and what coremltools must leave in float32."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgekit.custom_ops.coreml import keep_fp32, register_lowerings
from edgekit.custom_ops.coreml_graph import FP32, arguments
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.models.digits import digits_batch, load_digits_split
from edgekit.models.registry import create_model
from edgekit.runtime.tolerances import OUTPUT_REL_L2


def test_importing_the_lowerings_imports_neither_coremltools_nor_torch():
    names = ["coreml", *(f"{op}.coreml" for op in ("block_sparse_attention", "kernel_linear_attention"))]
    names.append("selective_scan.coreml")
    code = "import sys; " + "; ".join(f"import edgekit.custom_ops.{name}" for name in names)
    check = "; sys.exit(int('coremltools' in sys.modules or 'torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code + check], check=False).returncode == 0


def test_registering_twice_changes_nothing(to_coreml):
    register_lowerings()
    register_lowerings()
    feed = {name: np.ones((1, 1, 4, 2), np.float32) for name in "qkv"}
    feed["v"][0, 0, 2] = 3

    def both(q, k, v):
        """A torch op whose name the lowerings must not take, beside one of theirs."""
        return torch.ops.edgekit.kernel_linear_attention(torch.relu(q), k, v)

    (got,) = to_coreml(both, feed).run(feed)
    assert relative_l2(got, np.full_like(got, 1.5)) <= tolerance("KernelLinearAttention", "float32", "coreml") + 1e-6


@pytest.mark.parametrize(
    ("name", "outputs", "expected"),
    [
        ("mul_1", ["mul_1"], False),
        (f"{FP32}scan_mul_1", ["a"], True),
        ("split", ["a", f"{FP32}scan_split_2_1"], True),
        (f"x_{FP32}", ["a"], False),
    ],
    ids=["other", "by-op", "by-output", "not-a-prefix"],
)
def test_what_stays_in_float32(name, outputs, expected):
    op = SimpleNamespace(name=name, outputs=[SimpleNamespace(name=output) for output in outputs])
    assert keep_fp32(op) is expected


def test_arguments_come_by_position_or_keyword_and_none_is_left_out():
    context = {"x": "tensor x", "relu": "a tensor of that name"}
    node = SimpleNamespace(inputs=("x", None, "relu"), kwinputs={"eps": (0.5,)})
    got = arguments(context, node, ("q", "k", "feature_map", "eps"), ("q", "k"))
    assert got == {"q": "tensor x", "feature_map": "relu", "eps": 0.5}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("care_digits", "fp16"),
        pytest.param("care_digits", "fp32", marks=pytest.mark.slow),
        # In half precision its topk orders other tokens (3e-3 in all); the scan itself stays in float32.
        pytest.param("dynamicvis_digits", "fp32", marks=pytest.mark.slow),
    ],
)
def test_models_agree_with_pytorch_through_the_lowerings(to_coreml, name, precision):
    """A whole model whose op is lowered here: its logits, and the digits that it sees."""
    model = create_model(name)
    images = digits_batch(load_digits_split("test")[0][:8])
    with torch.no_grad():
        want = model(images)
    program = to_coreml(model, {"image": images.numpy()}, "iOS16", precision)
    (got,) = program.run({"image": images.numpy()})
    assert relative_l2(got, want) <= OUTPUT_REL_L2[precision]
    assert np.array_equal(got.argmax(1), want.argmax(1).numpy())
