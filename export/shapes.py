"""The shapes of a model's inputs as people type them: `image:Nx3x224x224 | 1..8`, `ids:1x128@int64<30522`.

What follows `<` may be a sum: `rows:SxW@int64<V+Q+1`. `| S=192/224/256` lists the only sizes of a dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgekit.errors import ExportError, ShapeError
from edgekit.runtime.manifest import DTYPES, Dim, DimRange, TensorSpec

if TYPE_CHECKING:
    import torch

_EXAMPLE = "write NAME:1x3x224x224, or NAME:Nx3x224x224 | 1..8 for a dynamic batch"
_NAME = r"[A-Za-wyz_][A-Za-wyz0-9_]*"  # of a dynamic dimension: an x stands between dimensions
_LISTED = r"\d+(?:\s*/\s*\d+)+"  # the only sizes of a dimension


@dataclass(frozen=True)
class InputShape:
    """One input: `dims` are sizes or the names of dynamic dimensions, whose `ranges` include both ends.

    `index_of` is for integers that point into something, as in `TensorSpec`: they lie below the size of the dimension
    of that name, which may be another input's, or below the number written there, or below a sum of such.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: str = "float32"
    ranges: dict[str, DimRange] = field(default_factory=dict)
    index_of: str | None = None

    def __str__(self) -> str:
        suffix = "" if self.dtype == "float32" else f"@{self.dtype}"
        suffix += "" if self.index_of is None else f"<{self.index_of}"
        ranges = ", ".join(f"{name}={limits}" for name, limits in self.ranges.items())
        return f"{self.name}:{'x'.join(map(str, self.dims))}{suffix}" + (f" | {ranges}" if ranges else "")


def parse_shape(text: str) -> InputShape:
    """Parse one input's shape. Raises `ShapeError` that shows the right form."""
    body, _, limits = text.partition("|")
    match = re.fullmatch(r"\s*([A-Za-z_][\w.]*)\s*:\s*(\w+)\s*(?:@\s*(\w+))?\s*(?:<\s*([\w+\s]+))?", body, re.ASCII)
    if not match:
        raise ShapeError(f"cannot read the shape {text!r}; {_EXAMPLE}")
    name, dims_text, dtype = match[1], match[2], match[3] or "float32"
    index_of = match[4] and re.sub(r"\s*\+\s*", "+", match[4].strip())
    if dtype not in DTYPES:
        raise ShapeError(f"unknown dtype {dtype!r} in {text!r}; one of {', '.join(DTYPES)}")
    if index_of is not None:
        _check_index(index_of, dtype, text)
    dims: list[Dim] = []
    for part in dims_text.split("x"):
        if part.isdigit():
            if int(part) < 1:
                raise ShapeError(f"dimension {part} in {text!r} must be at least 1")
            dims.append(int(part))
        elif re.fullmatch(_NAME, part):
            dims.append(part)
        else:
            raise ShapeError(f"cannot read dimension {part!r} in {text!r}; {_EXAMPLE}")
    return InputShape(name, tuple(dims), dtype, _parse_ranges(text, limits, dims), index_of)


def _check_index(index_of: str, dtype: str, text: str) -> None:
    """Raise unless integers may point into `index_of`; whether there are such dimensions, `parse_shapes` sees."""
    if "int" not in dtype:
        raise ShapeError(f"{text!r} has <{index_of}, which is for indices, and {dtype} values; write @int64<{index_of}")
    for term in index_of.split("+"):
        if term.isdigit():
            if not re.fullmatch(r"[1-9][0-9]{0,17}", term):
                raise ShapeError(f"<{index_of} in {text!r} must be a number of at least 1, with no zero in front")
        elif not re.fullmatch(_NAME, term):
            raise ShapeError(
                f"cannot read <{index_of} in {text!r}; write a number, the name of a dynamic dimension, or a sum of "
                "such, as in V+1"
            )


def parse_shapes(texts: str | Sequence[str]) -> tuple[InputShape, ...]:
    """Parse the shapes of all inputs; the same dynamic dimension may appear in several, with one range."""
    shapes = [parse_shape(text) for text in ([texts] if isinstance(texts, str) else texts)]
    names = [shape.name for shape in shapes]
    if len(set(names)) < len(names):
        raise ShapeError(f"an input is given twice: {', '.join(names)}")
    ranges: dict[str, DimRange] = {}
    for shape in shapes:
        for dim, limits in shape.ranges.items():
            stated = limits != DimRange()
            if stated and ranges.get(dim, DimRange()) not in (DimRange(), limits):
                raise ShapeError(f"dimension {dim} has two ranges: {ranges[dim]} and {limits}")
            if stated or dim not in ranges:
                ranges[dim] = limits
    for shape in shapes:
        for term in shape.index_of.split("+") if shape.index_of is not None else ():
            if not term.isdigit() and term not in ranges:
                known = ", ".join(ranges) or "none"
                raise ShapeError(
                    f"the values of {shape} point into {term}, which no input has as a dynamic dimension (there are: "
                    f"{known}); write the name of one, or a number"
                )
    return tuple(replace(shape, ranges={dim: ranges[dim] for dim in shape.ranges}) for shape in shapes)


def input_shapes(specs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> tuple[InputShape, ...]:
    """What a bundle's manifest says of its inputs, as the shapes that it was exported with."""
    return tuple(
        InputShape(s.name, s.shape, s.dtype, {d: dims[d] for d in s.shape if isinstance(d, str)}, s.index_of)
        for s in specs
    )


def input_specs(shapes: Sequence[InputShape]) -> tuple[tuple[TensorSpec, ...], dict[str, DimRange]]:
    """The same the other way: the specs of a manifest's inputs, and the ranges of their dimensions."""
    specs = tuple(TensorSpec(s.name, s.dtype, s.dims, index_of=s.index_of) for s in shapes)
    return specs, {name: limits for shape in shapes for name, limits in shape.ranges.items()}


def program_shapes(program: torch.export.ExportedProgram) -> tuple[InputShape, ...]:
    """The input shapes that a saved program was exported for, with the ranges of its dynamic dimensions.

    Raises `ShapeError` for inputs that are no tensors, of a dtype that a bundle cannot hold, or whose sizes are
    computed from one another.
    """
    inputs = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    if constants := [repr(name) for name in inputs if getattr(values.get(str(name)), "shape", None) is None]:
        raise ShapeError(
            f"the program takes inputs that are no tensors ({', '.join(constants)}); export it without them"
        )
    return tuple(_program_shape(str(name), values[str(name)], program) for name in inputs)


def output_specs(
    program: torch.export.ExportedProgram, shapes: Sequence[InputShape], names: Sequence[str]
) -> tuple[TensorSpec, ...]:
    """The outputs of a traced program under `names`, with sizes in terms of the dimensions of `shapes`.

    Args:
        shapes: in the order of the program's inputs.

    Raises:
        ShapeError: the program fixes a dimension that `shapes` names.
        ExportError: an output is a constant.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    symbols: dict[str, str] = {}
    for name, shape in zip(program.graph_signature.user_inputs, shapes, strict=True):
        for size, dim in zip(values[str(name)].shape, shape.dims, strict=True):
            if isinstance(dim, str):
                if isinstance(size, int):
                    raise ShapeError(f"the model fixes dimension {dim} of {shape.name} to {size}; write the number")
                symbols[str(size)] = dim

    def named(size: int | torch.SymInt) -> Dim:
        return size if isinstance(size, int) else re.sub(r"[A-Za-z_]\w*", lambda m: symbols.get(m[0], m[0]), str(size))

    specs = []
    for name, wanted in zip(program.graph_signature.user_outputs, names, strict=True):
        value = values.get(str(name))
        if value is None:
            raise ExportError(f"the output {wanted} is a constant; leave it out of what forward returns")
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(TensorSpec(wanted, dtype, tuple(named(size) for size in value.shape)))
    return tuple(specs)


def _program_shape(name: str, value: torch.Tensor, program: torch.export.ExportedProgram) -> InputShape:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ShapeError(f"the program's input {name} is {dtype}; a bundle takes {', '.join(DTYPES)}")
    dims: list[Dim] = []
    ranges: dict[str, DimRange] = {}
    for size in value.shape:
        if isinstance(size, int):
            dims.append(size)
            continue
        symbol, limits = str(size), program.range_constraints.get(size.node.expr)
        if limits is None or not symbol.isidentifier():
            raise ShapeError(
                f"the program's input {name} has a size computed from another ({symbol}); export it with plain names"
            )
        upper = int(limits.upper) if limits.upper < 2**31 else None
        ranges[symbol] = DimRange(max(1, int(limits.lower)), upper)
        dims.append(symbol)
    return InputShape(name, tuple(dims), dtype, ranges)


def _parse_ranges(text: str, limits: str, dims: list[Dim]) -> dict[str, DimRange]:
    symbols = list(dict.fromkeys(dim for dim in dims if isinstance(dim, str)))
    ranges = {symbol: DimRange() for symbol in symbols}
    given: set[str] = set()
    for part in filter(None, (piece.strip() for piece in limits.split(","))):
        match = re.fullmatch(rf"(?:(\w+)\s*=\s*)?(?:(\d+)\s*\.\.\s*(\d*)|({_LISTED}))", part, re.ASCII)
        if not match:
            raise ShapeError(f"cannot read the range {part!r} in {text!r}; write 1..8, N=1..8 or N=1/2/4")
        symbol = match[1] or (symbols[0] if len(symbols) == 1 else "")
        if symbol not in ranges:
            known = ", ".join(symbols) or "none"
            raise ShapeError(
                f"the range {part!r} in {text!r} belongs to no dynamic dimension (it has: {known}); write N=1..8 with "
                "the name of one"
            )
        if symbol in given:
            raise ShapeError(f"dimension {symbol} has two ranges in {text!r}; give one")
        given.add(symbol)
        if match[4]:
            ranges[symbol] = _listed(part, text, [int(size) for size in match[4].split("/")])
            continue
        low, high = int(match[2]), int(match[3]) if match[3] else None
        if low < 1 or (high is not None and high < low):
            raise ShapeError(f"the range {part!r} in {text!r} must run from at least 1 upwards, such as 1..8")
        if low == high:
            raise ShapeError(f"the range {part!r} in {text!r} holds one size; write {low} in place of {symbol}")
        ranges[symbol] = DimRange(low, high)
    return ranges


def _listed(part: str, text: str, sizes: list[int]) -> DimRange:
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ShapeError(f"the sizes {part!r} in {text!r} must be at least 1 and differ, such as 192/224/256")
    return DimRange.of(sizes)
