"""Rewrites a traced PyTorch graph into the Neural Engine's layout, op by op; see `edgekit.export.ane_layout`.

Every value of the new graph is known as its plain node, as a `Form`, as per-head attention scores, or as several of
these; what one op wants is made from what there is, once. Views cost nothing while a form can express them. An op
without a rule gets plain inputs and stays as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from edgekit.export.ane_forms import (
    Axis,
    Form,
    Heads,
    Size,
    UnsupportedError,
    argument,
    channels_last,
    heads_of,
    is_one,
    new_axis,
    pattern,
    same,
    shape_of,
    size_of,
    trivial,
)

aten = torch.ops.aten


@dataclass
class Scores:
    """Attention scores as one (B, K, 1, Q) per head; the plain tensor is (B, H, Q, K), or without H, (B, Q, K).

    `transposed`: the plain tensor has K before Q.
    """

    nodes: list[fx.Node]
    batch: Size
    queries: Size
    keys: Size
    has_heads: bool
    transposed: bool = False


@dataclass
class Value:
    """What the new graph has of one value of the old one. Conversions are kept, so that each is made once."""

    shape: tuple[Size, ...] | None = None
    plain: fx.Node | None = None
    form: Form | None = None
    scores: Scores | None = None
    several: tuple[Value, ...] | None = None
    constant: torch.Tensor | None = None
    conversions: dict[Any, Form] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One op that was rewritten.

    Attributes:
        op: what it was: `linear`, `layer_norm`, `attention`, `conv1d`, `matmul`.
        into: what it is now, in words.
        module: the path of the module that has it, empty for the outermost.
    """

    op: str
    into: str
    module: str

    def __str__(self) -> str:
        return f"{self.op}{f' in {self.module}' if self.module else ''}: {self.into}"


Handler = Callable[["Rewriter", fx.Node], Value | None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the rule of aten ops. It returns None, before it makes any node, for what it leaves as it was."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def op_name(node: fx.Node) -> str:
    """`conv2d` for torch.ops.aten.conv2d.default, `getitem` for Python's own, empty for what is no function."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        packet = node.target.overloadpacket
        return (
            str(packet.__name__) if node.target.namespace == "aten" else f"{node.target.namespace}::{packet.__name__}"
        )
    return str(getattr(node.target, "__name__", node.target))


class Rewriter:
    """One rewrite of one graph module; `run` returns the new one.

    Args:
        module: what torch.export traced.
        converts: whether tokens that lie as they always did are transposed for the first layer that wants them; without
            it only what is (B, C, H, W) or follows from such is rewritten.
        without: names of ops whose rules are not applied.
    """

    def __init__(self, module: fx.GraphModule, *, converts: bool = True, without: frozenset[str] = frozenset()) -> None:
        self.old = module
        self.converts, self.without = converts, without
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.changes: list[Change] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self._flat: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        """The rewritten module, with the same inputs and outputs. Raises `UnsupportedError` where there is none."""
        for node in self.old.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self._plain_of), type_expr=node.type)
            else:
                self.values[node] = self._visit(node)
        self.graph.set_codegen(self.old.graph._codegen)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule({**_attributes(self.old, self.graph), **self.tensors}, self.graph)

    def _visit(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            tensor = _attribute(self.old, str(node.target))
            constant = tensor.detach() if isinstance(tensor, torch.Tensor) else None
            shape = tuple(constant.shape) if constant is not None else None
            return Value(shape, plain=self.graph.node_copy(node, lambda n: n), constant=constant)
        if op_name(node).startswith(("_assert", "sym_constrain")):  # held when the graph was traced, on plain tensors
            return Value()
        if node.op == "placeholder":
            return self._placeholder(node)
        handler = HANDLERS.get(op_name(node)) if op_name(node) not in self.without else None
        if handler is not None:
            if (folded := self._folded(node)) is not None:
                return folded
            try:
                made = handler(self, node)
            except UnsupportedError:
                made = None
            if made is not None:
                return made
        return self._as_it_was(node)

    def _placeholder(self, node: fx.Node) -> Value:
        """An input; tokens (B, S, C) get a form at once, so that a transpose of them is known as one."""
        value = Value(shape_of(node), plain=self.graph.node_copy(node, lambda n: n))
        tensor = node.meta.get("val")
        if self.converts and isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.is_floating_point():
            value.form = self.channels_last(value)
        return value

    def _folded(self, node: fx.Node) -> Value | None:
        """A view or chunk of a weight, computed now."""
        given = [self.values[n] for n in node.all_input_nodes]
        if not given or any(value.constant is None for value in given):
            return None
        args, kwargs = _replaced((tuple(node.args), dict(node.kwargs)), lambda n: self.values[n].constant)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(result, torch.Tensor):
            return Value(tuple(result.shape), constant=result)
        if isinstance(result, (tuple, list)) and all(isinstance(item, torch.Tensor) for item in result):
            return Value(several=tuple(Value(tuple(item.shape), constant=item) for item in result))
        return None

    def _as_it_was(self, node: fx.Node) -> Value:
        """The op on plain inputs; what it makes is a (B, C, H, W) where the op works on such."""
        copied = self.graph.node_copy(node, self._plain_of)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return Value(plain=copied)
        shape = shape_of(node)
        form = trivial(copied, shape) if shape is not None and len(shape) == 4 and op_name(node) in _MAP_OPS else None
        return Value(shape, plain=copied, form=form)

    # What an op asks of its inputs.

    def _plain_of(self, node: fx.Node) -> fx.Node:
        return self.plain(self.values[node])

    def plain(self, value: Value) -> fx.Node:
        """The plain node of a value, made from its form where need be."""
        if value.plain is None:
            if value.constant is not None:
                value.plain = self.tensor(value.constant)
            elif value.form is not None:
                value.plain = self._plain_of_form(value.form)
            elif value.scores is not None:
                value.plain = self._plain_of_scores(value.scores)
            else:
                raise UnsupportedError("a list of tensors is used as a whole")
        return value.plain

    def _plain_of_form(self, form: Form) -> fx.Node:
        if form.is_plain:
            return form.node
        order = form.order
        # Atoms that stay neighbours travel together: fewer axes to reshape to.
        flat = [atom for axis in form.axes for atom in axis]
        groups: list[list[Any]] = []
        for atom in flat:
            before = order.index(atom) - 1
            if groups and before >= 0 and groups[-1][-1] is order[before]:
                groups[-1].append(atom)
            else:
                groups.append([atom])
        memory = sorted(range(len(groups)), key=lambda index: order.index(groups[index][0]))
        node = form.node
        if len(groups) > 1 and memory != list(range(len(groups))):
            node = self.call(aten.reshape.default, node, argument([size_of(groups[index]) for index in memory]))
            node = self.call(aten.permute.default, node, [memory.index(index) for index in range(len(groups))])
        return self.call(aten.reshape.default, node, argument(form.shape))

    def _plain_of_scores(self, scores: Scores) -> fx.Node:
        parts = self.call(aten.cat.default, scores.nodes, 2) if len(scores.nodes) > 1 else scores.nodes[0]
        order = [0, 2, 1, 3] if scores.transposed else [0, 2, 3, 1]
        node = self.call(aten.permute.default, parts, order)
        return node if scores.has_heads else self.call(aten.squeeze.dim, node, 1)

    def channels_last(self, value: Value) -> Form | None:
        """The form of tokens whose last plain axis is the channels, converted from plain where it is another."""
        if value.form is not None and channels_last(value.form):
            return value.form
        shape = value.shape
        if shape is None or len(shape) not in (2, 3, 4) or not (self.converts or value.form is not None):
            return None
        if "last" not in value.conversions:
            *places, channels = shape
            # The rows of a matrix are places. So are those of (S, B, C) with a batch of one.
            batched = len(shape) > 2 and not (len(shape) == 3 and is_one(places[1]))
            kinds = ["b" if batched and not index else "s" for index in range(len(places))]
            axes = (*(new_axis(kind, size) for kind, size in zip(kinds, places, strict=True)), new_axis("c", channels))
            if not axes[-1]:
                return None
            b, s = (tuple(a for axis in axes[:-1] for a in axis if a.kind == kind) for kind in "bs")
            value.conversions["last"] = self.from_plain(value, b, axes[-1], s, axes)
        return value.conversions["last"]

    def from_plain(self, value: Value, b: Axis, c: Axis, s: Axis, axes: tuple[Axis, ...]) -> Form:
        """A form with these atoms, made from the plain tensor by at most one transpose."""
        flat = [atom for axis in axes for atom in axis]
        order = (*b, *c, *s)
        dims = (size_of(b), size_of(c), 1, size_of(s))
        target = argument(dims)
        permutation = [flat.index(atom) for atom in order]
        if value.constant is not None:
            sizes = [size_of((atom,)) for atom in flat]
            tensor = value.constant.reshape(sizes).permute(permutation).reshape(target).contiguous()
            return Form(self.tensor(tensor), dims, b, c, s, axes)
        node = self.plain(value)
        if permutation != list(range(len(flat))):
            shape = value.shape or ()
            if len(shape) != len(flat) or not all(same(a.size, d) for a, d in zip(flat, shape, strict=True)):
                node = self.call(aten.reshape.default, node, argument([atom.size for atom in flat]))
            node = self.call(aten.permute.default, node, permutation)
        if len(axes) == 4 and axes[:2] == (b, c) and value.shape is not None:
            form = trivial(node, value.shape)  # (B, C, H, W) already, with its own height
            return Form(node, form.dims, b, c, s, axes)
        return Form(self.call(aten.reshape.default, node, target), dims, b, c, s, axes)

    def flat(self, form: Form) -> Form:
        """The form with height 1."""
        if is_one(form.dims[2]):
            return form
        dims = (form.dims[0], form.dims[1], 1, size_of(form.s))
        if form.node not in self._flat:
            self._flat[form.node] = self.call(aten.reshape.default, form.node, argument(dims))
        return replace(form, node=self._flat[form.node], dims=dims)

    def alike(self, *forms: Form) -> tuple[Form, ...]:
        """The same forms with the same places in two axes: as maps (B, C, H, W) where their plain tensors are such, or
        at height 1. Forms without places fit both."""
        sizes = {tuple(map(str, form.dims[2:])) for form in forms if form.s}
        if len(sizes) < 2:
            return forms
        if all(len(form.axes) == 4 and form.axes[:2] == (form.b, form.c) for form in forms):
            return tuple(form if not form.s or form.is_plain else self._map(form) for form in forms)
        return tuple(self.flat(form) if form.s else form for form in forms)

    def _map(self, form: Form) -> Form:
        dims = form.shape
        return replace(form, node=self._plain_of_form(form), dims=dims)

    def heads(self, value: Value) -> tuple[Form, Heads] | None:
        """The form of a query, key or value, flat, with what its axes are."""
        form = value.form
        if form is None or (found := heads_of(form)) is None:
            return None
        return self.flat(form), found

    # Making nodes.

    def call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def parts(self, node: fx.Node, sizes: Sequence[int], dim: int) -> list[fx.Node]:
        """A tensor in parts along one axis; itself where it is one part."""
        if len(sizes) == 1:
            return [node]
        whole = self.call(aten.split_with_sizes.default, node, list(sizes), dim)
        return [self.call(operator.getitem, whole, index) for index in range(len(sizes))]

    def tensor(self, tensor: torch.Tensor) -> fx.Node:
        """A constant of the new graph."""
        name = f"_ane_{len(self.tensors)}"
        self.tensors[name] = tensor.detach().clone()
        return self.graph.get_attr(name)

    def argument(self, node: fx.Node, index: int, name: str, default: Any = None) -> Any:
        """An argument of a node, however it was passed."""
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    def value(self, argument: Any) -> Value | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def changed(self, node: fx.Node, into: str, op: str | None = None) -> None:
        stack = node.meta.get("nn_module_stack") or {}
        path = str(list(stack.values())[-1][0]) if stack else ""
        self.changes.append(Change(op or op_name(node), into, path))

    def aligned(self, base: Form, other: Value) -> Form | None:
        """`other` in a form that broadcasts against `base` as their plain tensors do; None where they do not."""
        shape = other.shape
        if shape is None or len(shape) > len(base.axes):
            return None
        missing = len(base.axes) - len(shape)
        axes: list[Axis] = []
        for axis, size in zip(base.axes[missing:], shape, strict=True):
            if is_one(size) or same(size_of(axis), size):
                axes.append(() if is_one(size) else axis)
            else:
                return None
        present = {id(atom) for axis in axes for atom in axis}
        kept = [tuple(atom for atom in atoms if id(atom) in present) for atoms in (base.b, base.c, base.s)]
        if any(found and len(found) < len(atoms) for found, atoms in zip(kept, (base.b, base.c, base.s), strict=True)):
            return None  # half of the channels, or one spatial axis alone
        expected = Form(base.node, base.dims, kept[0], kept[1], kept[2], tuple(axes))
        if other.form is not None and pattern(other.form) == pattern(expected):
            return other.form
        return self.from_plain(other, kept[0], kept[1], kept[2], tuple(axes))


_MAP_OPS = frozenset(
    (
        "conv2d", "convolution", "batch_norm", "group_norm", "instance_norm", "max_pool2d", "avg_pool2d",
        "adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "pixel_shuffle", "pad", "conv_transpose2d",
    )
)  # fmt: skip


def _attribute(module: torch.nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _attributes(module: torch.nn.Module, graph: fx.Graph) -> dict[str, Any]:
    names = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    return {name: _attribute(module, name) for name in names if not name.startswith("_ane_")}


def _replaced(arguments: Any, function: Callable[[fx.Node], Any]) -> Any:
    """Arguments of a node, nested as they may be, with values for nodes."""
    if isinstance(arguments, fx.Node):
        return function(arguments)
    if isinstance(arguments, tuple):
        return tuple(_replaced(item, function) for item in arguments)
    if isinstance(arguments, list):
        return [_replaced(item, function) for item in arguments]
    if isinstance(arguments, dict):
        return {key: _replaced(item, function) for key, item in arguments.items()}
    return arguments
