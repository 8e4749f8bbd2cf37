"""A model as the program that Core ML Tools converts: fused, laid out, with pixels for its image, and flat outputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from edgekit import models
from edgekit.errors import ExportError, InputError, ShapeError
from edgekit.export import onnx as onnx_target
from edgekit.export.coreml_options import require
from edgekit.export.pixels import Normalise
from edgekit.export.plan import Plan
from edgekit.export.shapes import InputShape
from edgekit.export.steps import check_answers
from edgekit.runtime.manifest import DimRange
from edgekit.runtime.preprocess import ImagePreprocessing

# Core ML takes no dimension without an upper bound, and may plan its memory for the largest size.
MOST = 4096
# Core ML's limit on the enumerated shapes of an input ("Flexible Input Shapes" in the guide of Core ML Tools).
MOST_SHAPES = 128
_DTYPES = {"float32": "float32", "int32": "int32", "int64": "int32"}


class Traceable(nn.Module):
    """Calls a module with its inputs by position, and gives a flat tuple of tensors.

    Args:
        module: the model.
        arguments: its positional and keyword arguments, with the names of inputs in place of tensors.
        names: the inputs, in the order in which `forward` takes them.
        recipe: how the first input's pixels become what the module takes; None where it is no image.
        probabilities: add the softmax of the first output, which holds class scores.
    """

    def __init__(
        self,
        module: nn.Module,
        arguments: tuple[Any, Any],
        names: Sequence[str],
        recipe: ImagePreprocessing | None,
        *,
        probabilities: bool,
    ) -> None:
        super().__init__()
        self.module = module
        self.normalise = None if recipe is None else Normalise(recipe)
        self._arguments = arguments
        self._names = tuple(names)
        self._probabilities = probabilities

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors that the module returns, whatever nests them."""
        inputs = dict(zip(self._names, tensors, strict=True))
        if self.normalise is not None:
            inputs[self._names[0]] = self.normalise(tensors[0])
        args, kwargs = _pytree.tree_map(lambda name: inputs[name], self._arguments)
        leaves = [leaf for leaf in _pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        if self._probabilities:
            leaves.append(torch.softmax(leaves[0], -1))
        return tuple(leaves)


@dataclass(frozen=True)
class Traced:
    """A traced program; `shapes` in its order, `names` of the model's outputs, and what a layout changed."""

    program: torch.export.ExportedProgram
    shapes: tuple[InputShape, ...]
    names: tuple[str, ...]
    changes: tuple[str, ...] = ()


def bounded(shapes: Sequence[InputShape]) -> tuple[InputShape, ...]:
    """The shapes with an upper bound for every dimension. Raises `ShapeError` for one that begins above `MOST`."""

    def bound(name: str, limits: DimRange) -> DimRange:
        if limits.max is not None:
            return replace(limits, min=max(1, limits.min))
        if limits.min > MOST:
            raise ShapeError(f"Core ML needs an upper bound for {name}; write one, such as {name}={limits.min}..20000")
        return DimRange(max(1, limits.min), MOST)

    return tuple(replace(s, ranges={name: bound(name, limits) for name, limits in s.ranges.items()}) for s in shapes)


def listed_sizes(shape: InputShape) -> list[tuple[int, ...]]:
    """Every shape that an input with listed sizes takes; empty for one that lists none.

    Raises `ShapeError` where only some of its sizes are listed, or the combinations are too many for Core ML.
    """
    if all(limits.values is None for limits in shape.ranges.values()):
        return []
    if unlisted := [name for name, limits in shape.ranges.items() if limits.values is None]:
        raise ShapeError(
            f"Core ML lists all sizes of an input or none; list those of {unlisted[0]} too in {shape}, or give ranges"
        )
    sizes = [limits.values or () for limits in shape.ranges.values()]
    if (count := math.prod(map(len, sizes))) > MOST_SHAPES:
        raise ShapeError(f"{shape} has {count} combinations of sizes; Core ML takes at most {MOST_SHAPES}")
    chosen = [dict(zip(shape.ranges, each, strict=True)) for each in itertools.product(*sizes)]
    return [tuple(each[dim] if isinstance(dim, str) else dim for dim in shape.dims) for each in chosen]


def check_listed(shapes: Sequence[InputShape], deployment_target: str) -> None:
    """Raise `ShapeError` or `InputError` for listed sizes that Core ML has not, before anything takes its time."""
    listed = [shape.name for shape in shapes if listed_sizes(shape)]
    if len(listed) > 1:  # "Flexible Input Shapes" in the guide of Core ML Tools
        require(deployment_target, "iOS18", f"listing sizes of several inputs ({listed[0]}, ..)")


def outer_shapes(shapes: Sequence[InputShape], *, pixels: bool) -> tuple[InputShape, ...]:
    """What the package takes in place of what PyTorch takes: int32 for int64, levels for an image.

    Raises `InputError` for a dtype that Core ML has not, and for a name that it does not take.
    """
    result = []
    for shape in shapes:
        if shape.dtype not in _DTYPES:
            raise InputError(
                f"the input {shape.name} is {shape.dtype}; Core ML takes {', '.join(_DTYPES)}: convert it in forward"
            )
        if not shape.name.isidentifier():
            raise InputError(f"Core ML takes names of letters, digits and '_' for inputs; rename {shape.name!r}")
        result.append(replace(shape, dtype=_DTYPES[shape.dtype]))
    if pixels:  # the values drawn for samples lie below 256, as levels do
        result[0] = replace(result[0], dtype="uint8", index_of="256")
    return tuple(result)


def trace(plan: Plan, recipe: ImagePreprocessing | None, layout: str, *, probabilities: bool) -> Traced:
    """torch.export of the plan's model as PyTorch has it: `plan.shapes` are what PyTorch takes.

    Raises:
        ExportError: it cannot be traced, or is no function of its inputs alone.
        ShapeError: it does not run on these shapes.
    """
    loaded = plan.loaded
    tensors = onnx_target.example_inputs(plan.shapes, seed=plan.seed)
    names = check_answers(loaded, tensors)
    if loaded.entry is not None and names == ["output"]:
        names = ["logits"]
    args, kwargs, _ = loaded.bind({name: name for name in tensors})
    plan.step("fuse and trace")
    module = loaded.module if loaded.program is not None else models.fuse(loaded.module)
    by_name = {shape.name: shape for shape in plan.shapes}
    shapes = tuple(by_name[name] for name in tensors)
    # Messages about the model name its class, so the wrapper bears that name.
    kind = type(type(loaded.module).__name__, (Traceable,), {})
    wrapper = kind(module, (args, kwargs), list(tensors), recipe, probabilities=probabilities)
    if loaded.program is None:  # a program is traced as it will be run, and refuses to be switched
        wrapper.eval()
    program = onnx_target.trace(wrapper, shapes, seed=plan.seed)
    changes: tuple[str, ...] = ()
    if layout == "ane":
        from edgekit.export.ane_layout import rewrite_program

        plan.step("rewrite for the Neural Engine's layout")
        rewrite = rewrite_program(program, list(tensors.values()))
        changes = tuple(map(str, rewrite.changes))
        if rewrite:  # its inputs come by position, in the order of `tensors`; normalisation and softmax are inside
            flat = kind(rewrite.module, (list(tensors), {}), list(tensors), None, probabilities=False)
            program = onnx_target.trace(flat.eval(), shapes, seed=plan.seed)
    outputs = [str(name) for name in program.graph_signature.user_outputs]
    inputs = {str(name): shape.name for name, shape in zip(program.graph_signature.user_inputs, shapes, strict=True)}
    if same := [(names[i], inputs[name]) for i, name in enumerate(outputs[: len(names)]) if name in inputs]:
        output, given = same[0]
        raise ExportError(f"the output {output} is the input {given} unchanged; leave it out of what forward returns")
    if twice := [names[i] for i, name in enumerate(outputs[: len(names)]) if outputs.index(name) != i]:
        raise ExportError(f"the output {twice[0]} is the same tensor as another; return it once")
    return Traced(program, shapes, tuple(names), changes)
