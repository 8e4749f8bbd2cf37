"""Compressed weights: decoded as coremltools' own materialisation says, of the ops themselves and of its optimizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.runtime.mil import MilInterpreter, load_program
from edgekit.runtime.mil.program import ValueType
from edgekit.runtime.mil.weights import WeightsFile, unpack_bits

pytest.importorskip("coremltools", reason="the coreml extra is not installed")

_RNG = np.random.default_rng(6)


def typed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Integers narrower than a byte, marked as coremltools wants them."""
    from coremltools.converters.mil.mil import types

    return values.astype(types.nptype_from_builtin(types.string_to_builtin(dtype)))


def decoded(
    write_package, opset: str, build: Any, float_dtype: str = "fp16"
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the interpreter decodes `build(mb)` to, and what coremltools materialises."""
    found: list[Any] = []

    def function(mb: Any, x: Any) -> Any:
        outputs = build(mb)
        outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        materialised = outputs[0].op.materialized_val_inference()
        found.extend(materialised if isinstance(materialised, tuple) else [materialised])
        return [mb.identity(x=x), *outputs]

    package = write_package({"main": ({"x": ("fp32", (1,))}, function)}, opset)
    results = MilInterpreter(load_program(package), "main").run({"x": np.zeros(1, np.float32)})
    return list(results.values())[1:], [np.asarray(value) for value in found]


def check(pair: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    ours, theirs = pair
    assert len(ours) == len(theirs) > 0
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.dtype == (their.dtype if mine.dtype.kind == "f" else mine.dtype)
        np.testing.assert_array_equal(mine, their)


class TestIOS16:
    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    @pytest.mark.parametrize("signed", [True, False])
    def test_affine(self, write_package, dtype, signed):
        data = _RNG.integers(-128, 128, (5, 3, 2)) if signed else _RNG.integers(0, 256, (5, 3, 2))
        kind = np.int8 if signed else np.uint8
        scale, zero = _RNG.random(3).astype(dtype), np.array([1, 0, 7], kind)
        check(
            decoded(
                write_package,
                "iOS16",
                lambda mb: mb.constexpr_affine_dequantize(
                    quantized_data=data.astype(kind), scale=scale, zero_point=zero, axis=1
                ),
            )
        )

    def test_affine_of_one_scale(self, write_package):
        data = _RNG.integers(-128, 128, (4, 5)).astype(np.int8)
        check(
            decoded(
                write_package,
                "iOS16",
                lambda mb: mb.constexpr_affine_dequantize(
                    quantized_data=data, scale=np.float16(0.3), zero_point=np.int8(-5), axis=0
                ),
            )
        )

    @pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
    def test_lookup(self, write_package, bits):
        shape = (3, 5, 7)
        places = _RNG.integers(0, 2**bits, 105)
        packed = np.packbits(((places[:, None] >> np.arange(bits)) & 1).astype(np.uint8).ravel(), bitorder="little")
        lut = _RNG.standard_normal(2**bits).astype(np.float16)
        check(
            decoded(
                write_package,
                "iOS16",
                lambda mb: mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array(shape, np.uint32)),
            )
        )

    def test_sparse(self, write_package):
        dense = _RNG.standard_normal((3, 7)) * (_RNG.random((3, 7)) < 0.4)
        mask = np.packbits(dense.ravel() != 0, bitorder="little")
        check(
            decoded(
                write_package,
                "iOS16",
                lambda mb: mb.constexpr_sparse_to_dense(
                    nonzero_data=dense[dense != 0].astype(np.float16), mask=mask, shape=np.array([3, 7], np.uint32)
                ),
            )
        )

    def test_cast(self, write_package):
        values = _RNG.standard_normal((3, 7)).astype(np.float16)
        check(decoded(write_package, "iOS16", lambda mb: mb.constexpr_cast(source_val=values, output_dtype="fp32")))


class TestIOS18:
    @pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
    @pytest.mark.parametrize("offset", [True, False])
    def test_blockwise(self, write_package, dtype, offset):
        low, high = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}[dtype]
        data = typed(_RNG.integers(low, high, (6, 8, 3)), dtype)
        scale = _RNG.random((3, 2, 1)).astype(np.float16)
        extra = {"offset": typed(_RNG.integers(low, high, (3, 2, 1)), dtype)} if offset else {}
        check(
            decoded(
                write_package, "iOS18", lambda mb: mb.constexpr_blockwise_shift_scale(data=data, scale=scale, **extra)
            )
        )

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
    def test_grouped_lookup(self, write_package, bits):
        indices = typed(_RNG.integers(0, 2**bits, (6, 5)), f"uint{bits}")
        lut = _RNG.standard_normal((3, 1, 2**bits, 1)).astype(np.float16)
        check(decoded(write_package, "iOS18", lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut)))

    @pytest.mark.parametrize("axis", [0, 1, -1])
    def test_vector_lookup(self, write_package, axis):
        indices = typed(_RNG.integers(0, 4, (4, 6)), "uint2")
        lut = _RNG.standard_normal((2, 1, 4, 3)).astype(np.float16)
        build = lambda mb: mb.constexpr_lut_to_dense(indices=indices, lut=lut, vector_axis=axis)  # noqa: E731
        check(decoded(write_package, "iOS18", build))

    def test_quantized_lookup_table(self, write_package):
        """A palette that is itself int8: one decoder after another."""
        indices = typed(_RNG.integers(0, 4, (4, 6)), "uint2")
        lut = _RNG.integers(-128, 128, (1, 1, 4, 1)).astype(np.int8)
        scale = np.full((1, 1, 1, 1), 0.125, np.float16)

        def build(mb: Any) -> Any:
            table = mb.constexpr_blockwise_shift_scale(data=lut, scale=scale)
            return mb.constexpr_lut_to_dense(indices=indices, lut=table)

        package = write_package({"main": ({"x": ("fp32", (1,))}, lambda mb, x: [build(mb)])}, "iOS18")
        result = next(iter(MilInterpreter(load_program(package), "main").run({"x": np.zeros(1, np.float32)}).values()))
        np.testing.assert_array_equal(result, (lut.ravel()[indices.astype(int)] * 0.125).astype(np.float16))

    def _mask(self, shape: tuple[int, ...]) -> np.ndarray:
        return typed((_RNG.random(shape) < 0.5).astype(np.uint8), "uint1")

    def test_sparse(self, write_package):
        mask = self._mask((5, 7))
        data = _RNG.standard_normal(int(mask.astype(int).sum())).astype(np.float16)
        check(decoded(write_package, "iOS18", lambda mb: mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)))

    @pytest.mark.parametrize("axis", [None, 0])
    def test_sparse_lookup(self, write_package, axis):
        mask = self._mask((4, 6))
        indices = typed(_RNG.integers(0, 2, int(mask.astype(int).sum())), "uint1")
        lut = _RNG.standard_normal((1, 1, 2, 1 if axis is None else 3)).astype(np.float16)
        extra = {} if axis is None else {"vector_axis": axis}
        check(
            decoded(
                write_package,
                "iOS18",
                lambda mb: mb.constexpr_lut_to_sparse(
                    indices_mask=mask, indices_nonzero_data=indices, lut=lut, **extra
                ),
            )
        )

    def test_sparse_blockwise(self, write_package):
        mask = self._mask((4, 6))
        data = _RNG.integers(-128, 128, int(mask.astype(int).sum())).astype(np.int8)
        scale, offset = _RNG.random((1, 6)).astype(np.float16), _RNG.integers(-9, 9, (1, 6)).astype(np.int8)
        check(
            decoded(
                write_package,
                "iOS18",
                lambda mb: mb.constexpr_sparse_blockwise_shift_scale(
                    data_mask=mask, nonzero_data=data, scale=scale, offset=offset
                ),
            )
        )


class TestBits:
    @pytest.mark.parametrize("dtype", ["uint1", "uint2", "uint3", "uint4", "uint6", "int4"])
    def test_the_weights_file_is_read_as_coremltools_writes_it(self, tmp_path, dtype):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from coremltools.libmilstoragepython import _BlobStorageWriter
        bits = int(dtype.lstrip("uint"))
        low, high = (-8, 8) if dtype == "int4" else (0, 2**bits)
        values = _RNG.integers(low, high, 77)
        path = tmp_path / "weight.bin"
        writer = _BlobStorageWriter(str(path))
        getattr(writer, "write_uint8_data")(np.arange(5, dtype=np.uint8))  # noqa: B009
        offset = getattr(writer, f"write_{dtype}_data")(typed(values, dtype))
        del writer
        read = WeightsFile(Path(path), "weight.bin").read(offset, ValueType(dtype, (7, 11)))
        np.testing.assert_array_equal(read.ravel(), values)

    def test_too_few_bytes(self):
        with pytest.raises(ValueError, match="2 bytes hold fewer than 5 values of uint4"):
            unpack_bits(np.zeros(2, np.uint8), "uint4", 5)
