"""The rules of the lint: from one MIL op and the types around it to findings, and to the work that it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.export.lint_facts import (
    ALIGNMENT,
    FACTS,
    FP16_MAX,
    IDEAL_RANK,
    MAX_CHANNELS,
    MAX_KERNEL,
    MAX_RANK,
    MAX_WIDTH,
    OP_RULES,
    Fact,
)
from edgekit.runtime.mil import Constant, MilFunction, MilOp, Reference, ValueType

_CONVOLUTIONS = ("conv", "conv_transpose")
_POOLS = ("avg_pool", "max_pool", "l2_pool")
_INDEX_PARAMETERS = {
    "slice_by_index": ("begin", "end", "stride"),
    "slice_by_size": ("begin", "size"),
    "slice_update": ("begin", "end", "stride"),
}
_HALF_BYTES = 2


@dataclass(frozen=True)
class Finding:
    """A rule that an op meets, and the figures in words."""

    rule: str
    detail: str

    @property
    def fact(self) -> Fact:
        return FACTS[self.rule]


@dataclass(frozen=True)
class OpView:
    """An op with what its function knows of its inputs."""

    op: MilOp
    function: MilFunction

    def type_of(self, parameter: str) -> ValueType | None:
        """The type of the (first) value of a parameter, None where it is not given."""
        arguments = self.op.inputs.get(parameter, ())
        return self.function.type_of(arguments[0]) if arguments else None

    def constant(self, parameter: str) -> Any:
        return self.function.constant(self.op, parameter)

    def integers(self, parameter: str) -> tuple[int, ...]:
        """A constant parameter of whole numbers; empty where it is not given, or not constant."""
        value = self.constant(parameter)
        return () if value is None else tuple(int(item) for item in np.atleast_1d(np.asarray(value)))

    def is_fixed(self, parameter: str) -> bool:
        """Whether the file holds the values of a parameter, plain or compressed."""
        return all(is_fixed(argument, self.function) for argument in self.op.inputs.get(parameter, ()))

    @property
    def types(self) -> tuple[ValueType, ...]:
        """The types of the outputs."""
        return tuple(value.type for value in self.op.outputs)


def is_fixed(argument: Constant | Reference, function: MilFunction) -> bool:
    """Whether a value stands in the file: a constant, or compressed weights."""
    if isinstance(argument, Constant):
        return True
    producer = function.producers.get(argument.name)
    return producer is not None and (producer.op_type == "const" or producer.op_type.startswith("constexpr_"))


def is_free(op: MilOp, function: MilFunction) -> bool:
    """Whether an op costs nothing at run time: constants, what follows from them alone, and what belongs to the
    model's border: casts of whole inputs and outputs, and the choice of a label."""
    if op.op_type in ("const", "classify") or op.op_type.startswith("constexpr_"):
        return True
    if op.op_type == "cast":
        inputs = {value.name for value in function.inputs}
        made = {value.name for value in op.outputs}
        readers = {other.op_type for other in function.walk() if made & set(other.references())}
        at_end = bool(made & set(function.body.outputs)) or readers == {"classify"}
        return at_end or any(name in inputs for name in op.references())
    given = [argument for arguments in op.inputs.values() for argument in arguments]
    return not op.blocks and bool(given) and all(is_fixed(argument, function) for argument in given)


def findings(op: MilOp, function: MilFunction) -> tuple[Finding, ...]:
    """Every rule that the op meets; none of a free op."""
    if is_free(op, function):
        return ()
    view = OpView(op, function)
    found = list(_residency(view))
    if not any(finding.fact.effect == "off" for finding in found):  # the layout of what runs elsewhere is no matter
        found += _layout(view)
    return (*found, *_numbers(view))


def _residency(view: OpView) -> Iterator[Finding]:
    op = view.op
    rule = OP_RULES.get(op.op_type)
    if rule is not None:
        yield Finding(rule, op.op_type)
    elif op.op_type == "conv" and len(_shape(view.type_of("x"))) == MAX_RANK:
        yield Finding("unsupported-op", "a convolution over three spatial axes")
    elif finding := _dtype(view):
        yield finding
    for parameter in _INDEX_PARAMETERS.get(op.op_type, ()):
        if not view.is_fixed(parameter):
            yield Finding("dynamic-index", f"{op.op_type} with a computed {parameter!r}")
            break
    if any(not type_.static for type_ in view.types):
        yield Finding("dynamic-shape", f"{op.op_type} makes {view.types[0]}")
    for type_ in view.types:
        if len(type_.shape) > MAX_RANK:
            yield Finding("rank", f"{len(type_.shape)} axes: {type_}")
            break
    for type_ in view.types:
        width, channels = max(_sizes(type_)[-2:], default=0), _sizes(type_)[-3:-2] or (0,)
        if width > MAX_WIDTH or channels[0] > MAX_CHANNELS:
            yield Finding("size", f"{type_}")
            break
    extent = _extent(view)
    if extent > MAX_KERNEL:
        yield Finding("kernel", f"{op.op_type} reads {extent} places along one axis")


def _dtype(view: OpView) -> Finding | None:
    """What the types of an op's values say of where it runs. A comparison's truth values stay with their operands."""
    given = [view.function.type_of(argument) for argument in _data(view)]
    dtypes = {type_.dtype for type_ in (*given, *view.types)}
    if view.op.op_type == "cast" and {"float16", "float32"} <= dtypes:
        return Finding("cast", f"{given[0]} to {view.types[0].dtype}")
    if "float32" in dtypes:
        return Finding("fp32", f"{view.op.op_type} on {next(t for t in (*view.types, *given) if t.dtype == 'float32')}")
    if wide := [type_ for type_ in view.types if type_.dtype in ("int32", "int64", "uint32")]:
        return Finding("integer", f"{view.op.op_type} makes {wide[0]}")
    return None


def _data(view: OpView) -> Iterator[Constant | Reference]:
    """The op's operands: what other ops compute. Constants in another type are parameters, such as an epsilon."""
    for arguments in view.op.inputs.values():
        yield from (argument for argument in arguments if not is_fixed(argument, view.function))


def _layout(view: OpView) -> Iterator[Finding]:
    op, types = view.op, view.types
    if not types or not any(type_.is_float for type_ in types):
        return
    type_ = types[0]
    sizes = _sizes(type_)
    if len(sizes) == MAX_RANK:
        yield Finding("rank-5", f"{type_}")
    if len(sizes) >= 3:  # the few numbers of a vector fill one block at most
        bytes_ = sizes[-1] * _HALF_BYTES
        if bytes_ < ALIGNMENT:
            yield Finding("narrow-axis", f"{type_}: {ALIGNMENT / max(bytes_, 1):.3g} times the memory")
        elif bytes_ % ALIGNMENT:
            padded = -(-bytes_ // ALIGNMENT) * ALIGNMENT
            yield Finding("unaligned-axis", f"{type_}: {100 * (padded - bytes_) / padded:.0f} % padding")
    if op.op_type == "linear" or (op.op_type == "matmul" and (view.is_fixed("x") or view.is_fixed("y"))):
        yield Finding("linear-layout", f"{op.op_type} on {view.type_of('x')}")
    elif op.op_type == "scaled_dot_product_attention":
        yield Finding("fused-attention", f"{view.type_of('query')}")
    elif op.op_type == "matmul" and (heads := math.prod(sizes[1:-2])) > 1:
        yield Finding("attention-heads", f"{heads} products of {sizes[-2]} x {sizes[-1]} at once")
    strides = view.integers("strides")
    if op.op_type in _CONVOLUTIONS and any(_other_primes(stride) for stride in strides):
        yield Finding("stride", f"{op.op_type} with strides {_x(strides)}")
    if op.op_type in _POOLS and any(stride not in (1, 2, 4) for stride in strides):
        yield Finding("stride", f"{op.op_type} with strides {_x(strides)}")
    dilations = view.integers("dilations")
    if any(dilation > 3 for dilation in dilations):
        yield Finding("dilation", f"{op.op_type} with dilations {_x(dilations)}")
    if op.op_type == "softmax" and len(sizes) == IDEAL_RANK and view.integers("axis"):
        axis = view.integers("axis")[0] % IDEAL_RANK
        if axis >= 2:
            yield Finding("spatial-softmax", f"along axis {axis} of {type_}")


def _numbers(view: OpView) -> Iterator[Finding]:
    """Constants of fp16 that are infinite, or become so: masks."""
    if view.op.op_type not in ("add", "select", "minimum", "maximum", "mul", "sub", "scaled_dot_product_attention"):
        return
    for parameter in view.op.inputs:
        value = view.constant(parameter)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.any(value < -FP16_MAX):
            yield Finding("infinite-mask", f"{view.op.op_type} with {value.min()} in {parameter!r}")
            return


def macs(op: MilOp, function: MilFunction) -> int:
    """Multiply-accumulates of an op; 0 where it has none. Unknown sizes count as 1."""
    view = OpView(op, function)
    out = math.prod(_sizes(view.types[0])) if view.types else 0
    if op.op_type in _CONVOLUTIONS:
        weight = _sizes(view.type_of("weight"))
        # conv: [out, in / groups, *kernel] per output; conv_transpose: [in, out / groups, *kernel] per input.
        places = out if op.op_type == "conv" else math.prod(_sizes(view.type_of("x")))
        return places * math.prod(weight[1:])
    if op.op_type == "linear":
        return out * _sizes(view.type_of("x"))[-1]
    if op.op_type == "matmul":
        sizes = _sizes(view.type_of("x"))
        transposed = len(sizes) > 1 and bool(view.constant("transpose_x"))
        return out * sizes[-2 if transposed else -1]
    if op.op_type == "einsum":
        return _einsum_macs(view)
    if op.op_type == "scaled_dot_product_attention":
        query, key, value = (_sizes(view.type_of(name)) for name in ("query", "key", "value"))
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _einsum_macs(view: OpView) -> int:
    equation = view.constant("equation")
    if not isinstance(equation, str):
        return 0
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    for letters, argument in zip(terms, view.op.inputs.get("values", ()), strict=False):
        sizes.update(zip(letters, _sizes(view.function.type_of(argument)), strict=False))
    return math.prod(sizes.values())


def out_bytes(op: MilOp) -> int:
    """Bytes that an op writes, at two per float: what the Neural Engine would hold."""
    return sum(math.prod(_sizes(value.type)) * _HALF_BYTES for value in op.outputs)


def _extent(view: OpView) -> int:
    """The most places that a kernel spans along one axis, dilation included; 0 where the op has no kernel."""
    if view.op.op_type in _CONVOLUTIONS:
        kernel = _sizes(view.type_of("weight"))[2:]
        dilations = view.integers("dilations") or (1,) * len(kernel)
        return max(((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=False)), default=0)
    return max(view.integers("kernel_sizes"), default=0) if view.op.op_type in _POOLS else 0


def _other_primes(number: int) -> bool:
    """Whether a number has prime factors other than 2 and 3."""
    for prime in (2, 3):
        while number > 1 and number % prime == 0:
            number //= prime
    return number > 1


def _shape(type_: ValueType | None) -> tuple[int | None, ...]:
    return () if type_ is None else type_.shape


def _sizes(type_: ValueType | None) -> tuple[int, ...]:
    """The sizes, unknown ones as 1."""
    return tuple(1 if size is None else size for size in _shape(type_))


def _x(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
