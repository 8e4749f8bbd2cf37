"""SelectiveScan as an ONNX node: schema, translation from the torch op, function body.

delta_softplus and the presence of z are constants of the body: the structure of a node (see
`edgekit.custom_ops.registry`) is both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgekit.custom_ops.onnx_function import FLOAT, GUARD, Function, Subgraph
from edgekit.custom_ops.selective_scan.contract import NAME, NAMES, SHAPES
from edgekit.errors import InputError

ATTRIBUTES = ("delta_softplus",)

# Tokens per step of the body's Scan. The recurrence is unrolled over them, so that all that needs no state is computed
# for a whole chunk at a time and only one product and one sum per token remain.
CHUNK = 16


@dataclass(frozen=True)
class Structure:
    """What the body depends on: `softplus` of delta, and whether there is a `gate` z."""

    softplus: bool
    gate: bool


def schema() -> onnx.defs.OpSchema:
    """u, delta `[B, C, L]`, A `[C, S]`, B, C `[B, S, L]`, D `[C]`, optional z `[B, C, L]` to `[B, C, L]`."""
    schema_ = onnx.defs.OpSchema
    optional = schema_.FormalParameterOption.Optional
    return schema_(
        NAME,
        "edgekit",
        1,
        inputs=[schema_.FormalParameter(name, "T") for name in NAMES[:6]]
        + [schema_.FormalParameter("z", "T", param_option=optional)],
        outputs=[schema_.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            schema_.Attribute("delta_softplus", helper.make_attribute("delta_softplus", 0), "1: delta is its softplus")
        ],
    )


def structure(node: onnx.NodeProto) -> Structure:
    """The node's attribute and inputs, checked. Raises `InputError`."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if unknown := sorted(values.keys() - set(ATTRIBUTES)):
        raise InputError(f"{NAME} takes the attribute {ATTRIBUTES[0]}; got {', '.join(unknown)}")
    softplus = values.get("delta_softplus", 0)
    if softplus not in (0, 1):
        raise InputError(f"{NAME} takes a delta_softplus of 0 or 1; got {softplus!r}")
    return Structure(softplus == 1, len(node.input) == len(NAMES) and node.input[-1] != "")


def translation(op: Callable[..., Any]) -> Callable[..., Any]:
    """The translation of `torch.ops.edgekit.selective_scan`."""

    def selective_scan(
        u: Any,
        delta: Any,
        A: Any,  # noqa: N803 - the names of the op
        B: Any,  # noqa: N803
        C: Any,  # noqa: N803
        D: Any,  # noqa: N803
        z: Any = None,
        delta_softplus: bool = False,
    ) -> Any:
        gate = () if z is None else (z,)
        return op(u, delta, A, B, C, D, *gate, delta_softplus=int(delta_softplus))

    return selective_scan


def function(structure: Structure, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The body for nodes of this structure: a Scan over chunks of tokens, in float32."""
    names = NAMES if structure.gate else NAMES[:6]
    f = Function(NAME, names, attributes=ATTRIBUTES, opset=opset, overload=overload)
    zero = _shape_guard(f, structure.gate)
    # In a float32 model these casts are none, and runtimes drop them.
    inputs = {name: f.op("Cast", name, to=FLOAT) for name in names}
    if structure.softplus:
        inputs["delta"] = _softplus(f, inputs["delta"])
    y = _scan(f, inputs, zero)
    skip = f.op(
        "Mul", inputs["u"], f.op("Unsqueeze", inputs["D"], f.constant([1])), name=f"{GUARD}{SHAPES}; D and u differ"
    )
    y = f.op("Add", y, skip)
    if structure.gate:
        y = f.op("Mul", y, f.op("Mul", inputs["z"], f.op("Sigmoid", inputs["z"])))
    return f.proto(f.op("CastLike", y, "u"))


def _shape_guard(f: Function, gate: bool) -> str:
    """The contract's shapes as a guard; see `Function.guard`, here with fewer nodes.

    Two lists of sizes must agree, and the second is at least 1. Any difference is an index out of bounds.
    """
    u, rates = f.op("Shape", "u"), f.op("Shape", "A")
    weights = [f.op("Shape", name) for name in ("B", "C")]
    given = [u, rates, *weights, f.op("Shape", "delta"), f.op("Shape", "D")]
    batch, channels, length = (f.op("Shape", "u", start=axis, end=axis + 1) for axis in range(3))
    states = f.op("Shape", "A", start=1, end=2)
    wanted = [batch, channels, length, channels, states, *[batch, states, length] * 2, u, channels]
    if gate:
        given, wanted = [*given, f.op("Shape", "z")], [*wanted, u]
    sizes = f.op("Concat", *given, axis=0)
    expected = f.op("Max", f.op("Concat", *wanted, axis=0), f.constant([1]))
    difference = f.op("ReduceMax", f.op("Abs", f.op("Sub", sizes, expected)), keepdims=1)
    return f.op("Gather", f.constant([0]), difference, name=GUARD + SHAPES)


def _softplus(f: Function, x: str) -> str:
    """max(x, 0) + log1p(exp(-|x|)). The op Softplus rounds 1 + exp(x) first and loses small steps altogether.

    log1p(e) is e log(1 + e) / ((1 + e) - 1), where the rounding of 1 + e cancels (Goldberg, "What every computer
    scientist should know about floating-point arithmetic", 1991, theorem 4), and e where 1 + e is 1.
    """
    one = f.constant(1.0, np.float32)
    e = f.op("Exp", f.op("Neg", f.op("Abs", x)))
    above = f.op("Add", e, one)
    is_one = f.op("Equal", above, one)
    quotient = f.op("Div", f.op("Mul", e, f.op("Log", above)), f.op("Sub", above, one))
    return f.op("Add", f.op("Max", x, f.constant(0.0, np.float32)), f.op("Where", is_one, e, quotient))


def _scan(f: Function, inputs: dict[str, str], zero: str) -> str:
    """y_t = C_t . h_t as `[B, C, L]`; `zero` is the guard's."""
    chunk, one, rest = f.constant([CHUNK]), f.constant([1]), f.constant([-1])
    batch, channels = (f.op("Shape", "u", start=axis, end=axis + 1) for axis in (0, 1))
    states = f.op("Shape", "A", start=1, end=2)
    length = f.op("Add", f.op("Shape", "u", start=2, end=3), zero)
    # Tokens are added until the last chunk is full. Their steps are 0, so that they leave the state as it is.
    missing = f.op("Mod", f.op("Neg", length), chunk)
    pads = f.op("Concat", f.constant([0, 0, 0]), missing, f.constant([0, 0]), axis=0)

    def chunks(x: str, *sizes: str) -> str:
        """`[B, X, L]` to `[chunks, CHUNK, B, *sizes]`: tokens lead, and all of one token is one run of memory."""
        tokens_first = f.op("Pad", f.op("Transpose", x, perm=[2, 0, 1]), pads)
        return f.op("Reshape", tokens_first, f.op("Concat", rest, chunk, batch, *sizes, axis=0))

    # Named like the guard: a runtime may run this product before it.
    driven = f.op("Mul", inputs["delta"], inputs["u"], name=f"{GUARD}{SHAPES}; delta and u differ")
    sequences = (
        chunks(inputs["delta"], one, channels),
        chunks(driven, one, channels),
        chunks(inputs["B"], states, one),
        chunks(inputs["C"], one, states),
    )
    rates = f.op("Transpose", inputs["A"], perm=[1, 0])  # [S, C]
    start = f.op("ConstantOfShape", f.op("Concat", batch, states, channels, axis=0))
    body = _chunk_body(f, rates)
    _, y = f.ops("Scan", start, *sequences, outputs=2, body=body, num_scan_inputs=len(sequences))
    tokens = f.op("Reshape", y, f.op("Concat", rest, batch, channels, axis=0))
    return f.op("Transpose", f.op("Slice", tokens, f.constant([0]), length, f.constant([0])), perm=[1, 2, 0])


def _chunk_body(f: Function, rates: str) -> onnx.GraphProto:
    """One chunk: the state `[B, S, C]` and T tokens' delta, delta u, B and C to the next state and C_t . h_t."""
    g = Subgraph(f)
    h = g.input("state", FLOAT)
    delta, driven = g.input("delta", FLOAT), g.input("driven", FLOAT)  # [T, B, 1, C]
    weights_in, weights_out = g.input("weights_in", FLOAT), g.input("weights_out", FLOAT)  # [T, B, S, 1], [T, B, 1, S]
    decays = g.ops("Split", g.op("Exp", g.op("Mul", delta, rates)), outputs=CHUNK, axis=0, num_outputs=CHUNK)
    drives = g.ops("Split", g.op("Mul", weights_in, driven), outputs=CHUNK, axis=0, num_outputs=CHUNK)
    states = []
    for decay, drive in zip(decays, drives, strict=True):
        h = g.op("Add", g.op("Mul", decay, h), drive)  # [1, B, S, C]
        states.append(h)
    y = g.op("MatMul", weights_out, g.op("Concat", *states, axis=0))  # [T, B, 1, C]
    return g.proto("chunk", [(g.op("Squeeze", h, f.constant([0])), FLOAT), (y, FLOAT)])
