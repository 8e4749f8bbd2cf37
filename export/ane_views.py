"""The rules of the layout rewrite for views, elementwise ops and means: what forms express without touching data."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgekit.export.ane_forms import (
    Axis,
    Form,
    Size,
    UnsupportedError,
    is_one,
    new_axis,
    pattern,
    reshaped,
    same,
    shape_of,
    size_of,
    trivial,
)
from edgekit.export.ane_rewriter import Rewriter, Scores, Value, aten, handles

_UNARY = (
    "relu", "gelu", "silu", "sigmoid", "tanh", "exp", "neg", "abs", "sqrt", "rsqrt", "square", "leaky_relu", "elu",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "clamp", "clamp_min", "clamp_max", "relu6", "erf", "mish",
    "reciprocal", "logical_not",
)  # fmt: skip
_SAME = ("contiguous", "clone", "alias", "detach", "dropout", "lift_fresh_copy", "feature_dropout", "alpha_dropout")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")


@handles(*_UNARY, "pow", "rsub")
def unary(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value = rewriter.value(node.args[0])
    others = [n for n in node.all_input_nodes if n is not node.args[0]]
    if value is None or value.form is None or others or not _keeps_shape(node, value):
        return None
    made = rewriter.graph.call_function(node.target, (value.form.node, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
    return Value(value.shape, form=replace(value.form, node=made))


@handles(*_SAME)
def unchanged(rewriter: Rewriter, node: fx.Node) -> Value | None:
    if op_is_training(node):
        return None
    return rewriter.value(node.args[0])


def op_is_training(node: fx.Node) -> bool:
    """Whether a dropout drops."""
    return "dropout" in str(node.target) and bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("train"))


@handles("to", "_to_copy")
def to(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value = rewriter.value(node.args[0])
    made, given = node.meta.get("val"), getattr(node.args[0], "meta", {}).get("val")
    if isinstance(made, torch.Tensor) and isinstance(given, torch.Tensor) and made.dtype == given.dtype:
        return value
    return None


@handles(*_BINARY)
def binary(rewriter: Rewriter, node: fx.Node) -> Value | None:
    operands = [rewriter.value(argument) for argument in node.args[:2]]
    if any(operand is not None and operand.scores is not None for operand in operands):
        return _binary_scores(rewriter, node, operands)
    shape = shape_of(node)
    if shape is None:
        return None
    forms = [operand.form if operand is not None else None for operand in operands]
    full = [
        index
        for index, operand in enumerate(operands)
        if operand is not None
        and operand.form is not None
        and operand.shape is not None
        and _equal(operand.shape, shape)
    ]
    if not full:
        return None
    both_plain = all(form is not None and form.is_plain for form in forms)
    # The one whose axes are not those of the plain tensor decides: it would cost a transpose.
    first = next((index for index in full if not _form(operands[index]).is_plain), full[0])
    base = _form(operands[first])
    other = operands[1 - first]
    if other is None:
        if isinstance(node.args[1 - first], fx.Node):
            return None
        arguments: list[Any] = list(node.args[:2])
        arguments[first] = base.node
        made = rewriter.graph.call_function(node.target, (*arguments, *node.args[2:]), dict(node.kwargs))  # type: ignore[arg-type]
        return Value(shape, form=replace(base, node=made))
    if both_plain:
        made = rewriter.graph.call_function(
            node.target,  # type: ignore[arg-type]
            (*(_form(operand).node for operand in operands), *node.args[2:]),
            dict(node.kwargs),
        )
        return Value(shape, form=replace(base, node=made))
    second = rewriter.aligned(base, other)
    if second is None:
        return None
    base, second = rewriter.alike(base, second)
    nodes = (base.node, second.node) if first == 0 else (second.node, base.node)
    made = rewriter.graph.call_function(node.target, (*nodes, *node.args[2:]), dict(node.kwargs))  # type: ignore[arg-type]
    return Value(shape, form=replace(base, node=made))


def _binary_scores(rewriter: Rewriter, node: fx.Node, operands: Sequence[Value | None]) -> Value | None:
    """Scores times a number, or plus a mask of the keys and queries."""
    value, other = operands[0], operands[1] if len(operands) > 1 else None
    if value is None or value.scores is None or (other is not None and other.scores is not None):
        return None
    scores, shape = value.scores, shape_of(node)
    if not isinstance(node.args[1], fx.Node):
        made = [rewriter.call(node.target, part, node.args[1]) for part in scores.nodes]
        return Value(shape, scores=replace(scores, nodes=made))
    mask = None if other is None else mask_parts(rewriter, other, scores)
    if mask is None:
        return None
    made = [rewriter.call(node.target, *pair) for pair in zip(scores.nodes, mask, strict=True)]
    return Value(shape, scores=replace(scores, nodes=made))


def mask_parts(rewriter: Rewriter, mask: Value, scores: Scores) -> list[fx.Node] | None:
    """A plain mask, broadcast against (B, H, Q, K), as one (B | 1, K, 1, Q | 1) per head; None where it is another."""
    if mask.shape is None or not scores.nodes:
        return None
    rank = 4 if scores.has_heads else 3
    shape = (*[1] * (rank - len(mask.shape)), *mask.shape)
    if len(shape) != rank or scores.transposed or not all(isinstance(size, int) for size in shape):
        return None
    shape = shape if scores.has_heads else (shape[0], 1, *shape[1:])
    if mask.constant is not None:
        laid = mask.constant.reshape([int(size) for size in shape]).permute(0, 3, 1, 2)  # B, K, H, Q
        parts = [rewriter.tensor(laid[:, :, head : head + 1]) for head in range(shape[1])]
        return parts if len(parts) == len(scores.nodes) else parts * len(scores.nodes)
    node = rewriter.call(aten.reshape.default, rewriter.plain(mask), list(shape))
    node = rewriter.call(aten.permute.default, node, [0, 3, 1, 2])
    if is_one(shape[1]):
        return [node] * len(scores.nodes)
    return [rewriter.call(aten.slice.Tensor, node, 2, h, h + 1) for h in range(len(scores.nodes))]


@handles("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "view_as")
def reshape(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, shape = rewriter.value(node.args[0]), shape_of(node)
    if value is None or value.form is None or shape is None:
        return None
    name = str(node.target)
    if "expand" in name and (value.shape is None or not _equal(_squeezed(value.shape), _squeezed(shape))):
        return None
    return Value(shape, form=reshaped(value.form, shape))


@handles("permute", "transpose", "t", "mT", "numpy_T")
def permute(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, shape = rewriter.value(node.args[0]), shape_of(node)
    if value is None or shape is None:
        return None
    rank = len(shape)
    if "permute" in str(node.target):
        order = [int(axis) % rank for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
    else:
        given: Any = node.args[1:3] if "transpose" in str(node.target) else (-2, -1)
        first, second = (int(axis) % rank for axis in given)
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
    if value.scores is not None:
        exchanged = [*range(rank - 2), rank - 1, rank - 2]
        if order != exchanged:
            return None
        return Value(shape, scores=replace(value.scores, transposed=not value.scores.transposed))
    if value.form is None:
        return None
    return Value(shape, form=replace(value.form, axes=tuple(value.form.axes[axis] for axis in order)))


@handles("split", "split_with_sizes", "chunk", "unbind")
def split(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, made = rewriter.value(node.args[0]), node.meta.get("val")
    if value is None or value.form is None or value.shape is None or not isinstance(made, (tuple, list)):
        return None
    unbind = "unbind" in str(node.target)
    place = 1 if unbind else 2
    dim = int(rewriter.argument(node, place, "dim", 0)) % len(value.shape)
    if not unbind and (whole := _split_whole(rewriter, value.form, dim, [tensor.shape for tensor in made])):
        return Value(several=whole)
    parts, start = [], 0
    for tensor in made:
        size = 1 if unbind else tensor.shape[dim]
        if not isinstance(size, int):
            return None
        form = narrowed(rewriter, value.form, dim, start, size)
        if unbind:
            form = replace(form, axes=(*form.axes[:dim], *form.axes[dim + 1 :]))
        parts.append(Value(tuple(tensor.shape), form=form))
        start += size
    return Value(several=tuple(parts))


def _split_whole(
    rewriter: Rewriter, form: Form, dim: int, shapes: Sequence[Sequence[Size]]
) -> tuple[Value, ...] | None:
    """The parts of an axis that is all channels, or all places, as one split; None where it is another axis."""
    axis = form.axes[dim]
    sizes = [shape[dim] for shape in shapes]
    if not axis or axis not in (form.c, form.s) or not all(isinstance(size, int) for size in sizes):
        return None
    kind, place = ("c", 1) if axis == form.c else ("s", 3)
    form = rewriter.flat(form) if kind == "s" else _flat_if_plain_is(rewriter, form)
    values = []
    for shape, size, node in zip(shapes, sizes, rewriter.parts(form.node, sizes, place), strict=True):
        kept = new_axis(kind, size)
        lists = {"b": form.b, "c": form.c, "s": form.s, kind: kept}
        dims = (*form.dims[:place], size, *form.dims[place + 1 :])
        axes = (*form.axes[:dim], kept, *form.axes[dim + 1 :])
        values.append(Value(tuple(shape), form=Form(node, dims, lists["b"], lists["c"], lists["s"], axes)))
    return tuple(values)


def _flat_if_plain_is(rewriter: Rewriter, form: Form) -> Form:
    """Height 1 where the plain tensor has all places in one axis: before it is split, one reshape serves all parts."""
    return rewriter.flat(form) if len(form.s) > 1 and form.s in form.axes else form


@handles("getitem")
def getitem(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value = rewriter.value(node.args[0])
    if node.target is not operator.getitem or value is None or value.several is None:
        return None
    return value.several[int(node.args[1])]  # type: ignore[arg-type]


@handles("slice", "select", "narrow")
def slice_(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, shape = rewriter.value(node.args[0]), shape_of(node)
    if value is None or value.form is None or value.shape is None or shape is None:
        return None
    dim = int(rewriter.argument(node, 1, "dim", 0)) % len(value.shape)
    whole = value.shape[dim]
    if "select" in str(node.target):
        start = node.args[2]
        if not isinstance(start, int) or not isinstance(whole, int):
            return None
        form = narrowed(rewriter, value.form, dim, start % whole, 1)
        return Value(shape, form=replace(form, axes=(*form.axes[:dim], *form.axes[dim + 1 :])))
    start = rewriter.argument(node, 2, "start", 0) or 0
    if same(shape[dim], whole):
        return replace(value, shape=shape)
    if not isinstance(whole, int) or not isinstance(start, int) or rewriter.argument(node, 4, "step", 1) != 1:
        return None
    start = max(0, start + whole if start < 0 else start)
    return Value(shape, form=narrowed(rewriter, value.form, dim, start, shape[dim]))


def narrowed(rewriter: Rewriter, form: Form, dim: int, start: int, size: Size) -> Form:
    """`plain.narrow(dim, start, size)`, where the axis leads the channels or the places."""
    axis = form.axes[dim]
    if not axis:
        return form
    kind = axis[0].kind
    atoms: Axis = getattr(form, kind)
    if atoms[: len(axis)] != axis:
        raise UnsupportedError("a slice of an inner factor")
    rest = size_of(atoms[len(axis) :])
    if not isinstance(rest, int) or not isinstance(size, int):
        raise UnsupportedError("a slice of a dynamic size")
    place = {"b": 0, "c": 1, "s": 3}[kind]
    form = rewriter.flat(form) if kind == "s" else _flat_if_plain_is(rewriter, form)
    node = rewriter.call(aten.slice.Tensor, form.node, place, start * rest, (start + size) * rest)
    dims = (*form.dims[:place], size * rest, *form.dims[place + 1 :])
    kept = new_axis(kind, size)
    axes = (*form.axes[:dim], kept, *form.axes[dim + 1 :])
    lists = {"b": form.b, "c": form.c, "s": form.s, kind: (*kept, *atoms[len(axis) :])}
    return Form(node, dims, lists["b"], lists["c"], lists["s"], axes)


@handles("cat", "concat")
def cat(rewriter: Rewriter, node: fx.Node) -> Value | None:
    shape = shape_of(node)
    values = [rewriter.value(argument) for argument in node.args[0]]  # type: ignore[union-attr]
    if shape is None or any(value is None for value in values):
        return None
    given = [value for value in values if value is not None]
    dim = int(rewriter.argument(node, 1, "dim", 0)) % len(shape)
    base = next((value.form for value in given if value.form is not None and value.form.axes[dim]), None)
    if base is None:
        return None
    axis = base.axes[dim]
    kind = axis[0].kind
    atoms: Axis = getattr(base, kind)
    if kind == "b" or atoms != axis:
        return None
    if all(value.form is not None and value.form.is_plain for value in given):
        nodes = [_form(value).node for value in given]
        made = rewriter.call(aten.cat.default, nodes, dim)
        return Value(shape, form=trivial(made, shape))
    parts = []
    for value in given:
        size = (value.shape or ())[dim]
        part = new_axis(kind, size)
        axes = (*base.axes[:dim], part, *base.axes[dim + 1 :])
        lists = {"b": base.b, "c": base.c, "s": base.s, kind: part}
        expected = replace(base, axes=axes, b=lists["b"], c=lists["c"], s=lists["s"])
        if value.form is not None and pattern(value.form) == pattern(expected):
            parts.append(value.form)
        else:
            parts.append(rewriter.from_plain(value, lists["b"], lists["c"], lists["s"], axes))
    place = 1 if kind == "c" else 3
    parts = list(rewriter.alike(*parts)) if kind == "c" else [rewriter.flat(part) for part in parts]
    made = rewriter.call(aten.cat.default, [part.node for part in parts], place)
    whole = new_axis(kind, shape[dim])
    lists = {"b": base.b, "c": base.c, "s": base.s, kind: whole}
    dims = list(parts[0].dims)
    dims[place] = shape[dim]
    axes = (*base.axes[:dim], whole, *base.axes[dim + 1 :])
    return Value(shape, form=Form(made, tuple(dims), lists["b"], lists["c"], lists["s"], axes))


@handles("mean")
def mean(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, shape = rewriter.value(node.args[0]), shape_of(node)
    if value is None or value.form is None or value.shape is None or shape is None or len(node.args) < 2:
        return None
    form, rank = value.form, len(value.shape)
    given = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    axes = sorted(int(axis) % rank for axis in given)  # type: ignore[arg-type]
    taken = {id(atom) for axis in axes for atom in form.axes[axis]}
    kept = [tuple(a for a in atoms if id(a) not in taken) for atoms in (form.b, form.c, form.s)]
    whole = [not found for found in kept]
    if taken == {id(atom) for atom in form.s} and form.s:
        made = rewriter.call(aten.mean.dim, form.node, [2, 3], True)
        dims: tuple[Size, ...] = (form.dims[0], form.dims[1], 1, 1)
    elif taken == {id(atom) for atom in form.c} and whole[1]:
        made = rewriter.call(aten.mean.dim, form.node, [1], True)
        dims = (form.dims[0], 1, *form.dims[2:])
    else:
        return None
    left = tuple(() if index in axes else axis for index, axis in enumerate(form.axes))
    if len(shape) < rank:
        left = tuple(axis for index, axis in enumerate(left) if index not in axes)
    return Value(shape, form=Form(made, dims, kept[0], kept[1], kept[2], left))


@handles("flip")
def flip(rewriter: Rewriter, node: fx.Node) -> Value | None:
    value, shape = rewriter.value(node.args[0]), shape_of(node)
    if value is None or value.form is None or value.shape is None:
        return None
    axes = [value.form.axes[int(axis) % len(value.shape)] for axis in node.args[1]]  # type: ignore[union-attr,arg-type]
    form = rewriter.flat(value.form)
    places = []
    for axis in axes:
        found = [place for place, atoms in ((0, form.b), (1, form.c), (3, form.s)) if axis == atoms and axis]
        if axis and not found:
            return None
        places += found
    made = rewriter.call(aten.flip.default, form.node, places) if places else form.node
    return Value(shape, form=replace(form, node=made))


def _form(value: Value | None) -> Form:
    if value is None or value.form is None:
        raise UnsupportedError("a value without a form")
    return value.form


def _keeps_shape(node: fx.Node, value: Value) -> bool:
    shape = shape_of(node)
    return shape is not None and value.shape is not None and _equal(shape, value.shape)


def _squeezed(shape: Sequence[Size]) -> list[Size]:
    return [size for size in shape if not is_one(size)]


def _equal(first: Sequence[Size], second: Sequence[Size]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
