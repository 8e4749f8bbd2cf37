"""Tables of values for weights: as near as can be, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.export.coreml_compress import compress_program, nearest_values
from edgekit.export.coreml_tools import quiet_tools


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40, 17)).astype(np.float16)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_value_gets_the_nearest_of_the_table(bits: int) -> None:
    weight = weights()
    table, indices = nearest_values(weight, 2**bits)
    assert (table.shape, indices.shape, indices.dtype) == ((2**bits,), (weight.size,), np.uint8)
    distances = np.abs(weight.ravel().astype(np.float64)[:, None] - table)
    assert np.allclose(distances[np.arange(weight.size), indices], distances.min(axis=1))


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.0975), (6, 0.05), (8, 0.02)])
def test_the_error_is_about_what_a_normal_distribution_allows(bits: int, bound: float) -> None:
    """The best quantizer of 16 values for a normal distribution has an error of 0.0975 (Max, 1960); of 680 drawn values
    it has less."""
    weight = weights().astype(np.float64)
    table, indices = nearest_values(weight, 2**bits)
    assert np.linalg.norm(table[indices] - weight.ravel()) / np.linalg.norm(weight) < bound


def test_few_distinct_values_are_kept_exactly() -> None:
    weight = np.tile(np.array([-1.5, 0.25, 3.0], np.float32), 50).reshape(10, 15)
    table, indices = nearest_values(weight, 16)
    assert np.array_equal(table[indices].reshape(weight.shape), weight)


def test_equal_weights_give_equal_tables() -> None:
    first, second = (nearest_values(weights(), 16) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("precision", ["int8", "int4", "palette4"])
def test_constants_to_keep_stay_as_they_are(precision: str) -> None:
    """A table of positions is no weight."""
    ct = pytest.importorskip("coremltools")
    with quiet_tools():
        from coremltools.converters.mil import Builder as mb  # noqa: N813
        from coremltools.converters.mil.mil import types

        @mb.program(input_specs=[mb.TensorSpec((3, 64), types.fp16)], opset_version=ct.target.iOS18)
        def program(x):  # type: ignore[no-untyped-def]
            constants = (mb.const(val=np.resize(weights(), (64, 64)), name=name) for name in ("rotary", "weight"))
            for constant in constants:
                x = mb.matmul(x=x, y=constant)
            return x

        compress_program(program, precision, keep=lambda name: "rotary" in name)
    stored = [op.inputs["y"].op.op_type for op in program.functions["main"].operations if op.op_type == "matmul"]
    assert stored[0] == "const"
    assert stored[1].startswith("constexpr_")
