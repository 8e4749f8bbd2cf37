"""Tensors of a traced graph in the Neural Engine's format, (B, C, 1, S), and what their axes were before.

A `Form` says how a tensor of the original graph (the plain tensor) lies in a 4-dimensional one. Its axes are made of
atoms, factors of the batch, of the channels or of the places (the two spatial axes, row by row), so that reshapes,
transposes and splits of the plain tensor become book-keeping: (B, S, C) seen as (B, H, S, D) is the same
(B, C, 1, S) with C = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

Size = Any  # int, or torch.SymInt of a dynamic dimension
_KINDS = ("b", "c", "s")


class UnsupportedError(Exception):
    """A step that this book-keeping cannot express; the op stays as it was."""


class Atom:
    """One factor of an axis: of the batch `b`, the channels `c` or the places `s`. Compared by identity."""

    __slots__ = ("kind", "size")

    def __init__(self, kind: str, size: Size) -> None:
        self.kind, self.size = kind, size


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Form:
    """A plain tensor inside a 4-dimensional one.

    Attributes:
        node: the node of the new graph that makes the 4-dimensional tensor.
        dims: its sizes.
        b, c, s: the atoms of its batch, channels and places, outermost first; sizes of one have none.
        axes: the axes of the plain tensor.
    """

    node: fx.Node
    dims: tuple[Size, Size, Size, Size]
    b: Axis
    c: Axis
    s: Axis
    axes: tuple[Axis, ...]

    @property
    def order(self) -> Axis:
        """All atoms as they lie in memory."""
        return (*self.b, *self.c, *self.s)

    @property
    def is_plain(self) -> bool:
        """Whether the 4-dimensional tensor is the plain one."""
        return (
            len(self.axes) == 4
            and all(same(a, d) for a, d in zip(self.shape, self.dims, strict=True))
            and (tuple(atom for axis in self.axes for atom in axis) == self.order)
        )

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(size_of(axis) for axis in self.axes)


def same(first: Size, second: Size) -> bool:
    """Whether two sizes are equal, without adding a guard on a dynamic one."""
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    return str(first) == str(second)


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def size_of(axis: Sequence[Atom]) -> Size:
    """The product of the atoms' sizes; of a dynamic one it must be the only one."""
    if len(axis) == 1:
        return axis[0].size
    product = 1
    for atom in axis:
        if not isinstance(atom.size, int):
            raise UnsupportedError("a dynamic size is a factor of an axis")
        product *= atom.size
    return product


def new_axis(kind: str, size: Size) -> Axis:
    return () if is_one(size) else (Atom(kind, size),)


def argument(sizes: Sequence[Size]) -> list[int]:
    """Sizes as reshape takes them: one dynamic one becomes -1."""
    dynamic = [size for size in sizes if not isinstance(size, int)]
    if len(dynamic) > 1:
        raise UnsupportedError("more than one dynamic size in a reshape")
    return [size if isinstance(size, int) else -1 for size in sizes]


def pattern(form: Form) -> tuple[Any, ...]:
    """What two forms share when their plain tensors lie alike: per axis the factors by kind, place and size.

    Neighbouring factors of one axis that lie side by side in memory count as one.
    """
    place = {id(atom): (kind, index) for kind in _KINDS for index, atom in enumerate(getattr(form, kind))}
    found = []
    for axis in form.axes:
        merged: list[list[Atom]] = []
        for atom in axis:
            kind, index = place[id(atom)]
            if merged and place[id(merged[-1][-1])] == (kind, index - 1):
                merged[-1].append(atom)
            else:
                merged.append([atom])
        # The position of a factor is the product of what lies before it.
        found.append(tuple((g[0].kind, _offset(form, g[0]), str(_product(g))) for g in merged))
    return tuple(found)


def _offset(form: Form, atom: Atom) -> str:
    siblings: Axis = getattr(form, atom.kind)
    return str(_product(siblings[: siblings.index(atom)]))


def _product(atoms: Sequence[Atom]) -> Any:
    text = 1
    symbols = []
    for atom in atoms:
        if isinstance(atom.size, int):
            text *= atom.size
        else:
            symbols.append(str(atom.size))
    return (text, tuple(symbols)) if symbols else text


def reshaped(form: Form, shape: Sequence[Size]) -> Form:
    """The form of `plain.reshape(shape)`. Raises `UnsupportedError` where the new axes cut across the atoms."""
    pending = [atom for axis in form.axes for atom in axis]
    splits: dict[Atom, Axis] = {}
    axes: list[Axis] = []
    for size in shape:
        axis: list[Atom] = []
        while not is_one(size):
            if not pending:
                raise UnsupportedError("a reshape makes more elements")
            atom = pending.pop(0)
            if same(atom.size, size):
                axis.append(atom)
                break
            if not isinstance(atom.size, int) or not isinstance(size, int):
                raise UnsupportedError("a reshape of a dynamic size")
            if atom.size <= size and size % atom.size == 0:
                axis.append(atom)
                size //= atom.size
                continue
            if atom.size % size:
                raise UnsupportedError("a reshape cuts across an axis")
            outer, inner = Atom(atom.kind, size), Atom(atom.kind, atom.size // size)
            _record(splits, atom, (outer, inner))
            axis.append(outer)
            pending.insert(0, inner)
            break
        axes.append(tuple(axis))
    if pending:
        raise UnsupportedError("a reshape makes fewer elements")
    lists = {kind: tuple(p for atom in getattr(form, kind) for p in splits.get(atom, (atom,))) for kind in _KINDS}
    return replace(form, axes=tuple(axes), b=lists["b"], c=lists["c"], s=lists["s"])


def _record(splits: dict[Atom, Axis], atom: Atom, parts: Axis) -> None:
    """A part may be split again: keep, for each atom of the form, all its parts in order."""
    for whole, pieces in splits.items():
        if atom in pieces:
            index = pieces.index(atom)
            splits[whole] = (*pieces[:index], *parts, *pieces[index + 1 :])
            return
    splits[atom] = parts


def channels_last(form: Form) -> bool:
    """Whether the last plain axis is all channels in their order, and no other axis has any."""
    return bool(form.axes) and form.axes[-1] == form.c and bool(form.c)


@dataclass(frozen=True)
class Heads:
    """How a plain (B, H, S, D), or one with S and D exchanged, or either without H, lies in a form."""

    heads: int
    width: int
    places: Size
    transposed: bool


def heads_of(form: Form) -> Heads | None:
    """The heads of a query, key or value, or None where the axes are others."""
    if len(form.axes) not in (3, 4) or form.axes[0] != form.b:
        return None
    middle = form.axes[1] if len(form.axes) == 4 else ()
    count = len(middle)
    if form.c[:count] != middle or any(not isinstance(atom.size, int) for atom in form.c):
        return None
    rest = form.c[count:]
    for places, channels, transposed in ((-2, -1, False), (-1, -2, True)):
        if form.axes[places] == form.s and form.axes[channels] == rest:
            return Heads(size_of(middle), size_of(rest), size_of(form.s), transposed)
    return None


def trivial(node: fx.Node, shape: Sequence[Size]) -> Form:
    """The form of a plain (B, C, H, W)."""
    b, c, h, w = (new_axis(kind, size) for kind, size in zip("bcss", shape, strict=True))
    return Form(node, tuple(shape), b, c, (*h, *w), (b, c, h, w))


def shape_of(node: fx.Node) -> tuple[Size, ...] | None:
    """The sizes of what a node of the traced graph makes, None where it is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(int(size) if isinstance(size, int) else size for size in value.shape)
