"""Building blocks for lowerings into MIL, Core ML's intermediate language: arguments of a torch node, named MIL ops.

coremltools is imported when a lowering runs. Its ops: https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html

What coremltools 9.0 does to a program afterwards, and what lowerings do about it:

* The pass `add_fp16_cast` makes every op half precision. A constant beyond 65,504 keeps its op in float32 unless it is
  beyond 1e38, which becomes infinite. Ops whose names begin with `FP32` stay in float32; see `coreml.keep_fp32`.
* The pass `add_int16_cast` makes the integers that `gather`, `topk` and `squeeze` read 16 bits wide, whatever their
  values: only indices below 32,768 may go through these ops.
* From iOS 17 on, the pass `guard_negative_gather_indices` puts four ops before each `gather` with signed indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FP32 = "edgekit_fp32_"
"""The names of ops that stay in float32 begin with this."""


def arguments(context: Any, node: Any, names: Sequence[str], tensors: Sequence[str]) -> dict[str, Any]:
    """The arguments of a node of torch.export's by parameter name, without those left out or None.

    Args:
        context, node: as coremltools gives them to a lowering.
        names: all parameters of the op in order.
        tensors: those that are tensors; they come back as MIL variables, others as Python values.
    """
    # Not coremltools' own reader: it takes a string that equals the name of a tensor in the model for that tensor.
    given = dict(zip(names, node.inputs, strict=False))
    for name in names:
        value = (node.kwinputs or {}).get(name)
        if value is not None:
            given[name] = value[0]
    return {name: context[value] if name in tensors else value for name, value in given.items() if value is not None}


def at_least(target: str) -> bool:
    """Whether the deployment target of the program in the making is `target` ("iOS17", "iOS18") or newer."""
    from coremltools.converters.mil._deployment_compatibility import AvailableTarget
    from coremltools.converters.mil.mil.block import is_current_opset_version_compatible_with

    return bool(is_current_opset_version_compatible_with(AvailableTarget[target]))


def fixed(size: Any) -> int | None:
    """The size of an axis, or None where it is symbolic."""
    from coremltools.converters.mil.mil.types.symbolic import is_symbolic

    return None if is_symbolic(size) else int(size)


def is_half(x: Any) -> bool:
    """Whether the MIL variable is float16."""
    from coremltools.converters.mil.mil import types

    return bool(x.dtype == types.fp16)


def number(value: float, like: Any) -> np.floating[Any]:
    """`value` in the dtype of the MIL variable `like`: MIL's binary ops do not convert."""
    return np.float16(value) if is_half(like) else np.float32(value)


class Graph:
    """Appends ops to the program in the making. Their names are `stem`, the op type, a number."""

    def __init__(self, stem: str) -> None:
        self._stem, self._count = stem, 0

    def op(self, kind: str, *, name: str | None = None, **inputs: Any) -> Any:
        """Append an op of type `kind`; returns its output, or a tuple of them. `name`: instead of a made-up one."""
        from coremltools.converters.mil.mil import Builder

        self._count += 1
        return getattr(Builder, kind)(**inputs, name=name or f"{self._stem}_{kind}_{self._count}")

    def scaled(self, x: Any, factor: float) -> Any:
        """`x` times a constant; `x` itself where that is 1."""
        return x if factor == 1.0 else self.op("mul", x=x, y=number(factor, x))

    def cast(self, x: Any, dtype: str) -> Any:
        """`x` as `dtype` ("fp16", "fp32", "int32", "uint16")."""
        return self.op("cast", x=x, dtype=dtype)

    def reshape(self, x: Any, *shape: int, name: str | None = None) -> Any:
        """`x` in this shape, in which one size may be -1."""
        return self.op("reshape", x=x, shape=list(shape), name=name)

    def padded(self, x: Any, axis: int, count: int) -> Any:
        """`x` with `count` zeros behind the end of an axis."""
        if count == 0:
            return x
        pad = [0] * (2 * x.rank)
        pad[2 * axis + 1] = count
        return self.op("pad", x=x, pad=pad, mode="constant", constant_val=number(0.0, x))

    def sliced(self, x: Any, axis: int, start: int, end: int, *, name: str | None = None) -> Any:
        """The entries `start` to `end` of an axis of known size; `x` itself where that is all and it needs no name."""
        if (start, end) == (0, fixed(x.shape[axis])) and name is None:
            return x
        begin, stop, all_of = [0] * x.rank, [0] * x.rank, [True] * x.rank
        begin[axis], stop[axis], all_of[axis] = start, end, False
        return self.op("slice_by_index", x=x, begin=begin, end=stop, begin_mask=all_of, end_mask=all_of, name=name)

    def gather(self, x: Any, indices: Any, *, axis: int, batch_dims: int = 0) -> Any:
        """`x` at `indices`, int32 and not negative, along an axis of known size; see coremltools' `gather`."""
        if at_least("iOS17") and x.shape[axis] <= 1 << 16:
            indices = self.cast(indices, "uint16")  # unsigned: no guard against negative indices
        return self.op("gather", x=x, indices=indices, axis=axis, batch_dims=batch_dims)
