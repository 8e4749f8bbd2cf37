from __future__ import annotations

import contextlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import ShapeError
from edgekit.export.shapes import (
    InputShape,
    input_shapes,
    input_specs,
    parse_shape,
    parse_shapes,
    program_shapes,
)
from edgekit.runtime.manifest import DTYPES, DimRange

GOOD = {
    "image:1x3x224x224": InputShape("image", (1, 3, 224, 224)),
    "image:Nx3x224x224 | 1..8": InputShape("image", ("N", 3, 224, 224), "float32", {"N": DimRange(1, 8)}),
    "ids:1x128@int64": InputShape("ids", (1, 128), "int64"),
    " ids : NxS @ int32 | N = 1 .. 8 , S = 16..": InputShape(
        "ids", ("N", "S"), "int32", {"N": DimRange(1, 8), "S": DimRange(16, None)}
    ),
    "x:N": InputShape("x", ("N",), "float32", {"N": DimRange()}),
    "a.b_1:batchx4": InputShape("a.b_1", ("batch", 4), "float32", {"batch": DimRange()}),
    "x:NxN | 2..4": InputShape("x", ("N", "N"), "float32", {"N": DimRange(2, 4)}),
    "x:1x3xSxS | S=224/192/256": InputShape("x", (1, 3, "S", "S"), "float32", {"S": DimRange.of((192, 224, 256))}),
    "x:N | 1 / 4": InputShape("x", ("N",), "float32", {"N": DimRange(1, 4, (1, 4))}),
    "vertex:P@int64<V": InputShape("vertex", ("P",), "int64", {"P": DimRange()}, "V"),
    "ids:1xN@int32<50257 | 8..": InputShape("ids", (1, "N"), "int32", {"N": DimRange(8)}, "50257"),
    " ids : 4 @ int64 < V ": InputShape("ids", (4,), "int64", {}, "V"),
}

BAD = {
    "image": "cannot read the shape",
    "": "cannot read the shape",
    ":1x3": "cannot read the shape",
    "x:": "cannot read the shape",
    "x:1,3": "cannot read the shape",
    "x:-1x3": "cannot read the shape",
    "x:1x3@": "cannot read the shape",
    "1x:2": "cannot read the shape",
    "x:\u0661x4": "cannot read the shape",
    "x:1x3@float": "unknown dtype 'float'",
    "x:1x3@bfloat16": "unknown dtype 'bfloat16'",
    "x:0x3": "dimension 0 in 'x:0x3' must be at least 1",
    "x:1xx3": "cannot read dimension ''",
    "x:4x": "cannot read dimension ''",
    "x:1x3n": "cannot read dimension '3n'",
    "x:N<V": "has <V, which is for indices, and float32 values; write @int64<V",
    "x:N@bool<2": "has <2, which is for indices, and bool values",
    "x:N@int64<0": "<0 in 'x:N@int64<0' must be a number of at least 1",
    "x:N@int64<007": "must be a number of at least 1, with no zero in front",
    "x:N@int64<2x": "cannot read <2x",
    "x:N@int64<x": "cannot read <x",
    "x:N@int64<": "cannot read the shape",
    "x:N@int64<-1": "cannot read the shape",
    "x:1x4 | 1..8": "belongs to no dynamic dimension (it has: none)",
    "x:NxS | 1..8": "belongs to no dynamic dimension (it has: N, S)",
    "x:Nx4 | M=1..8": "belongs to no dynamic dimension (it has: N)",
    "x:Nx4 | 8": "cannot read the range '8'",
    "x:N | 1/0": "the sizes '1/0' in 'x:N | 1/0' must be at least 1 and differ",
    "x:N | 2/2": "must be at least 1 and differ",
    "x:N | 2/": "cannot read the range '2/'",
    "x:Nx4 | 1-8": "cannot read the range '1-8'",
    "x:Nx4 | ..8": "cannot read the range '..8'",
    "x:Nx4 | 0..8": "must run from at least 1 upwards",
    "x:Nx4 | 8..2": "must run from at least 1 upwards",
    "x:Nx4 | 5..5": "holds one size; write 5 in place of N",
    "x:Nx4 | 1..8, N=2..4": "dimension N has two ranges",
}


@pytest.mark.parametrize("text", GOOD)
def test_parses(text):
    assert parse_shape(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_refuses_and_says_why(text):
    with pytest.raises(ShapeError, match=re.escape(BAD[text])):
        parse_shape(text)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,8}", fullmatch=True)
symbols = st.from_regex(r"[A-Wa-wyz_][A-Za-wyz0-9_]{0,4}", fullmatch=True)
ranges = st.tuples(st.integers(1, 50), st.none() | st.integers(51, 99)).map(lambda ends: DimRange(*ends))


@st.composite
def any_shapes(draw):
    dims = draw(st.lists(st.integers(1, 4096) | symbols, min_size=1, max_size=5))
    limits = {dim: draw(ranges) for dim in dims if isinstance(dim, str)}
    dtype = draw(st.sampled_from(DTYPES))
    terms = st.lists(symbols | st.integers(1, 10**18 - 1).map(str), max_size=3)
    index_of = "+".join(draw(terms)) or None if "int" in dtype else None
    return InputShape(draw(names), tuple(dims), dtype, limits, index_of)


@given(any_shapes())
def test_text_of_a_shape_parses_to_it(shape):
    assert parse_shape(str(shape)) == shape


@given(st.text(max_size=30))
def test_any_text_parses_or_raises_shape_error(text):
    with contextlib.suppress(ShapeError):
        assert str(parse_shape(text))


class TestSeveral:
    def test_one_text_is_one_input(self):
        assert parse_shapes("x:1x4") == (InputShape("x", (1, 4)),)

    def test_a_range_given_once_holds_for_all(self):
        a, b = parse_shapes(["a:Nx4", "b:Nx2 | 1..8"])
        assert a.ranges == b.ranges == {"N": DimRange(1, 8)}

    def test_two_ranges_of_one_dimension(self):
        with pytest.raises(ShapeError, match=re.escape("dimension N has two ranges: 1..8 and 2..8")):
            parse_shapes(["a:Nx4 | 1..8", "b:Nx2 | 2..8"])

    def test_the_same_range_twice(self):
        assert parse_shapes(["a:Nx4 | 1..8", "b:Nx2 | 1..8"])[1].ranges == {"N": DimRange(1, 8)}

    def test_an_input_given_twice(self):
        with pytest.raises(ShapeError, match="an input is given twice: x, x"):
            parse_shapes(["x:1x4", "x:1x4"])


class TestIndices:
    def test_into_a_dimension_of_another_input(self):
        vertex, features = parse_shapes(["vertex:P@int64<V", "features:Vx4 | 2..9"])
        assert vertex.index_of == "V"
        assert features.ranges == {"V": DimRange(2, 9)}

    def test_into_a_dimension_that_no_input_has(self):
        with pytest.raises(ShapeError, match=r"point into E, which no input has .*\(there are: V, P\)"):
            parse_shapes(["features:Vx4", "vertex:P@int64<E"])

    def test_into_several_dimensions(self):
        rows, _ = parse_shapes(["rows:SxW@int64 < V + W + 1", "features:Vx4"])
        assert rows.index_of == "V+W+1"
        assert str(rows).startswith("rows:SxW@int64<V+W+1 |")
        with pytest.raises(ShapeError, match=r"rows:SxW@int64<V\+E\+1 .* point into E, which no input has"):
            parse_shapes(["rows:SxW@int64<V+E+1", "features:Vx4"])

    @pytest.mark.parametrize("index", ["V+", "+V", "V++1", "V W", "V-1", "V+x"])
    def test_no_sum(self, index):
        with pytest.raises(ShapeError, match="cannot read"):
            parse_shapes([f"rows:S@int64<{index}", "features:Vx4"])

    def test_into_a_fixed_number(self):
        assert parse_shapes("ids:1x8@int64<100")[0].index_of == "100"

    def test_to_a_manifest_and_back(self):
        shapes = parse_shapes(["vertex:P@int64<V | 1..5", "features:Vx4"])
        specs, dims = input_specs(shapes)
        assert (specs[0].index_of, specs[1].index_of) == ("V", None)
        assert input_shapes(specs, dims) == shapes


class Add(torch.nn.Module):
    def forward(self, x, y):
        return x + y


class TestProgram:
    def test_fixed_and_dynamic(self):
        batch = torch.export.Dim("batch", min=2, max=16)
        program = torch.export.export(
            Add(), (torch.ones(2, 4), torch.ones(1, 4)), dynamic_shapes={"x": {0: batch}, "y": {}}
        )
        x, y = program_shapes(program)
        assert y == InputShape("y", (1, 4))
        assert (x.name, x.dims[1], x.dtype) == ("x", 4, "float32")
        assert list(x.ranges.values()) == [DimRange(2, 16)]

    def test_a_size_computed_from_another(self):
        half = torch.export.Dim("half", min=1, max=8)
        program = torch.export.export(
            Add(), (torch.ones(4, 4), torch.ones(1, 4)), dynamic_shapes={"x": {0: 2 * half}, "y": {}}
        )
        with pytest.raises(ShapeError, match="has a size computed from another"):
            program_shapes(program)

    def test_an_input_that_is_no_tensor(self):
        program = torch.export.export(Add(), (torch.ones(4), 3))
        with pytest.raises(ShapeError, match="inputs that are no tensors"):
            program_shapes(program)

    def test_a_dtype_that_bundles_lack(self):
        program = torch.export.export(Add(), (torch.ones(4).bfloat16(), torch.ones(4).bfloat16()))
        with pytest.raises(ShapeError, match="input x is bfloat16"):
            program_shapes(program)
