"""BlockSparseAttention as an ONNX node: schema, translation from the torch op, function body (in `onnx_body`).

The attributes are constants of the body: the structure of a node (see `edgekit.custom_ops.registry`) is all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
from onnx import helper

from edgekit.custom_ops.block_sparse_attention.contract import NAME, Attributes
from edgekit.custom_ops.block_sparse_attention.onnx_body import body, fitting
from edgekit.custom_ops.onnx_function import Function
from edgekit.errors import ExportError, InputError

DEFAULTS: dict[str, int | float] = {"block_q": 64, "block_k": 64, "causal": 1, "softcap": 0.0, "window": 0}
ATTRIBUTES = ("scale", *DEFAULTS)  # scale has no default: it would depend on the shape of q

TEXTS = {
    "block_q": "queries per block",
    "block_k": "keys per block",
    "causal": "1: no key behind the position of the query",
    "softcap": "c > 0: a score s becomes c tanh(s / c)",
    "window": "w > 0: keys at distance w or more are hidden",
}


def schema() -> onnx.defs.OpSchema:
    """q `[B, Hq, N, D]`, k, v `[B, Hkv, M, D]`, block_index `[B, Hm, ceil(N / block_q), K]` to `[B, Hq, N, D]`."""
    schema_ = onnx.defs.OpSchema
    return schema_(
        NAME,
        "edgekit",
        1,
        inputs=[schema_.FormalParameter(name, "T") for name in ("q", "k", "v")]
        + [schema_.FormalParameter("block_index", "tensor(int32)")],
        outputs=[schema_.FormalParameter("o", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[schema_.Attribute("scale", schema_.AttrType.FLOAT, "factor of the scores", required=True)]
        + [schema_.Attribute(name, helper.make_attribute(name, DEFAULTS[name]), text) for name, text in TEXTS.items()],
    )


def structure(node: onnx.NodeProto) -> Attributes:
    """The node's attributes, checked. Raises `InputError`."""
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.name not in ATTRIBUTES:
            raise InputError(f"{NAME} takes the attributes {', '.join(ATTRIBUTES)}; got {attribute.name}")
        kind = "float" if attribute.name in ("scale", "softcap") else "int"
        values[attribute.name] = helper.get_attribute_value(attribute)
        if type(values[attribute.name]).__name__ != kind:
            raise InputError(f"{NAME} needs {attribute.name} as {kind}, got {values[attribute.name]!r}")
    if "scale" not in values:
        raise InputError(f"{NAME} needs the attribute scale (for example head_dim ** -0.5)")
    resolved = DEFAULTS | values
    if resolved["causal"] not in (0, 1):
        raise InputError(f"{NAME} takes causal 0 or 1; got {resolved['causal']}")
    return Attributes(
        block_q=resolved["block_q"],
        block_k=resolved["block_k"],
        causal=bool(resolved["causal"]),
        scale=resolved["scale"],
        softcap=resolved["softcap"],
        window=resolved["window"],
    )


def translation(op: Callable[..., Any]) -> Callable[..., Any]:
    """The translation of `torch.ops.edgekit.block_sparse_attention`.

    It resolves the scale, and where the number of keys is fixed, blocks too long for the body become shorter.
    """

    def block_sparse_attention(
        q: Any,
        k: Any,
        v: Any,
        block_index: Any,
        block_q: int = 64,
        block_k: int = 64,
        causal: bool = True,
        scale: float | None = None,
        softcap: float = 0.0,
        window: int = 0,
    ) -> Any:
        if scale is None:
            head_dim = q.shape[3] if q.shape is not None and len(q.shape) == 4 else None
            if not isinstance(head_dim, int):
                raise ExportError(f"{NAME} needs a fixed head_dim, or a scale, in ONNX; got q of shape {q.shape}")
            scale = head_dim**-0.5
        keys = k.shape[2] if k is not None and k.shape is not None and len(k.shape) == 4 else None
        if isinstance(keys, int) and keys >= 1:
            attributes = Attributes(block_q, block_k, causal, float(scale), float(softcap), window)
            block_q, block_k = fitting(attributes, keys)
        return op(
            q,
            k,
            v,
            block_index,
            block_q=block_q,
            block_k=block_k,
            causal=int(causal),
            scale=float(scale),
            softcap=float(softcap),
            window=window,
        )

    return block_sparse_attention


def function(structure: Attributes, opset: int, overload: str = "") -> onnx.FunctionProto:
    """The body for nodes with these attributes."""
    inputs = ("q", "k", "v", "block_index")
    f = Function(NAME, inputs, attributes=ATTRIBUTES, opset=opset, overload=overload, defaults=DEFAULTS)
    return f.proto(body(f, structure))
