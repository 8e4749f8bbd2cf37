"""KernelLinearAttention as an ONNX node: schema, translation from the torch op, function body.

Feature map and eps are constants of the body: the structure of a node (see `edgekit.custom_ops.registry`) is both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from edgekit.custom_ops.kernel_linear_attention.contract import NAME, NAMES, SHAPES, check_attributes
from edgekit.custom_ops.onnx_function import FLOAT, GUARD, Function
from edgekit.errors import InputError

ATTRIBUTES = ("feature_map", "eps")


@dataclass(frozen=True)
class Structure:
    """The attributes, resolved. Making one checks them; see `contract.check_attributes`."""

    feature_map: str
    eps: float

    def __post_init__(self) -> None:
        check_attributes(self.feature_map, self.eps)


def schema() -> onnx.defs.OpSchema:
    """q and k `[B, H, N, D]` and v `[B, H, N, E]` to `[B, H, N, E]`."""
    schema_ = onnx.defs.OpSchema
    return schema_(
        NAME,
        "edgekit",
        1,
        inputs=[schema_.FormalParameter(name, "T") for name in NAMES],
        outputs=[schema_.FormalParameter("o", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            schema_.Attribute("feature_map", helper.make_attribute("feature_map", "relu"), "relu, elu1 or identity"),
            schema_.Attribute("eps", helper.make_attribute("eps", 1e-6), "added to the denominator"),
        ],
    )


def structure(node: onnx.NodeProto) -> Structure:
    """The node's attributes, checked. Raises `InputError` or `UnknownNameError`."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if unknown := sorted(values.keys() - set(ATTRIBUTES)):
        raise InputError(f"{NAME} takes the attributes {', '.join(ATTRIBUTES)}; got {', '.join(unknown)}")
    feature_map, eps = values.get("feature_map", b"relu"), values.get("eps", 1e-6)
    if not isinstance(feature_map, bytes):
        raise InputError(f"{NAME} needs feature_map as string, got {feature_map!r}")
    if not isinstance(eps, float):
        raise InputError(f"{NAME} needs eps as float, got {eps!r}")
    return Structure(feature_map.decode(errors="replace"), eps)


def translation(op: Callable[..., Any]) -> Callable[..., Any]:
    """The translation of `torch.ops.edgekit.kernel_linear_attention`."""

    def kernel_linear_attention(q: Any, k: Any, v: Any, feature_map: str = "relu", eps: float = 1e-6) -> Any:
        return op(q, k, v, feature_map=feature_map, eps=float(eps))

    return kernel_linear_attention


def function(structure: Structure, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The body for nodes with these attributes: three matrix products in float32.

    The means are taken of sums over the tokens, as `eager` does it, so `contract`'s bound on these holds here. Dividing
    k instead would not lift it: where shapes are fixed, onnxruntime makes such a factor one of the whole product.
    onnxruntime fuses the transposes into the products and folds all that depends on shapes where these are fixed, the
    guard included.
    """
    f = Function(NAME, NAMES, attributes=ATTRIBUTES, opset=opset, overload=overload)
    zero = _shape_guard(f)
    # In a float32 model these casts are none, and runtimes drop them.
    q, k, v = (f.op("Cast", name, to=FLOAT) for name in NAMES)
    # The product of keys and values must not run before the guard, so phi(k) depends on it.
    q = _features(f, q, structure.feature_map, f.constant(0.0, np.float32))
    k = _features(f, k, structure.feature_map, f.op("Cast", zero, to=FLOAT))
    tokens = f.op("Cast", f.op("Shape", "k", start=2, end=3), to=FLOAT)
    mean_key = f.op("ReduceMean", k, f.constant([2]), keepdims=1)  # [B, H, 1, D]
    products = f.op("MatMul", f.op("Transpose", k, perm=[0, 1, 3, 2]), v)
    mean_key_value = f.op("Div", products, tokens)  # [B, H, D, E]
    weights = f.op("MatMul", q, f.op("Transpose", mean_key, perm=[0, 1, 3, 2]))  # [B, H, N, 1]
    denominator = f.op("Add", weights, f.constant(structure.eps, np.float32))
    result = f.op("Div", f.op("MatMul", q, mean_key_value), denominator)
    return f.proto(f.op("CastLike", result, "q"))


def _shape_guard(f: Function) -> str:
    """The contract's shapes as a guard; see `Function.guard`, here with fewer nodes.

    Where an axis is dynamic these nodes run with every call, and CARE has twelve of these ops: q must have k's shape, v
    the first axes of q, and what they are compared with is at least 1. Any difference is an index out of bounds.
    """
    sizes = f.op("Concat", f.op("Shape", "q"), f.op("Shape", "v"), axis=0)
    rows, columns = f.op("Shape", "q", start=0, end=3), f.op("Shape", "v", start=3, end=4)
    expected = f.op("Max", f.op("Concat", f.op("Shape", "k"), rows, columns, axis=0), f.constant([1]))
    difference = f.op("ReduceMax", f.op("Abs", f.op("Sub", sizes, expected)), keepdims=1)
    return f.op("Gather", f.constant([0]), difference, name=GUARD + SHAPES)


def _features(f: Function, x: str, feature_map: str, zero: str) -> str:
    """phi(x), where `zero` is a 0 that phi has to read."""
    if feature_map == "relu":
        return f.op("Max", x, zero)
    if feature_map == "elu1":  # exp(x) up to 0 and x + 1 above; Elu and a sum lose digits and are slower
        return f.op("Add", f.op("Exp", f.op("Min", x, zero)), f.op("Max", x, zero))
    return f.op("Add", x, zero)
