"""The custom ops of domain `edgekit` as an exporter sees them: schema, function bodies, translation from torch.

Each op's ONNX side is the module `edgekit.custom_ops.<folder>.onnx_op`, imported when first asked for. It has:

    schema() -> onnx.defs.OpSchema
        In domain `edgekit`, since version 1; types float and float16.
    structure(node: onnx.NodeProto) -> Hashable
        All of a node that its body depends on: the attributes that change the body's nodes or are baked into them, and
        which optional inputs are there. Checks the attributes; raises an `EdgekitError`.
    function(structure, opset: int, overload: str) -> onnx.FunctionProto
        The body for nodes of that structure: standard ops of the default domain at `opset`, any batch and length.
    translation(op) -> Callable
        The function for `custom_translation_table`: takes the arguments of the torch op, returns `op(...)` with every
        attribute resolved (`op` is the `onnxscript.values.Op` that emits the node).

Bodies differ in structure (causal or not, gated or not). ONNX has overloads for this, and onnxruntime 1.31 takes them:
without a library it expands the overload that the node names, and a registered custom op serves every overload of its
name. `onnx.checker` and onnxsim keep them; `onnx.reference` ignores the overload and takes the last body, and other
parsers may. So the first structure of a model, in most models the only one, gets the plain name; only further ones
become overloads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import onnx

from edgekit.errors import UnknownNameError

DOMAIN = "edgekit"
VERSION = 1


class OnnxOp(Protocol):
    """What an `onnx_op` module holds; see the module's docstring."""

    def schema(self) -> onnx.defs.OpSchema: ...
    def structure(self, node: onnx.NodeProto) -> Hashable: ...
    def function(self, structure: Any, opset: int, overload: str) -> onnx.FunctionProto: ...
    def translation(self, op: Callable[..., Any]) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class CustomOpSpec:
    """One custom op: its ONNX name, and the folder that is also the name of its torch op."""

    name: str
    folder: str
    domain: str = DOMAIN
    version: int = VERSION

    def schema(self) -> onnx.defs.OpSchema:
        """The ONNX schema: inputs, outputs, attributes, types."""
        return self._onnx.schema()

    def functions(self, opset: int, nodes: Iterable[onnx.NodeProto]) -> list[onnx.FunctionProto]:
        """The bodies that a model needs, and each node's `overload` set to the body that it uses.

        Args:
            opset: the model's version of the default domain; every body gets the same.
            nodes: all nodes of this op in the model, in any graph of it. Others are ignored.

        Raises:
            EdgekitError: an attribute that the contract excludes.
        """
        names: dict[Hashable, str] = {}
        for node in nodes:
            if (node.domain, node.op_type) == (self.domain, self.name):
                structure = self._onnx.structure(node)
                node.overload = names.setdefault(structure, f"v{len(names) + 1}" if names else "")
        return [self._onnx.function(structure, opset, overload) for structure, overload in names.items()]

    def translation(self) -> tuple[Any, Callable[..., Any]]:
        """The entry for `custom_translation_table` of `torch.onnx.export`: the torch overload and its translation."""
        import torch
        from onnxscript import values

        importlib.import_module(f"edgekit.custom_ops.{self.folder}.torch_op")
        op = values.Op(values.Opset(self.domain, self.version), self.name, self.schema())
        return getattr(torch.ops.edgekit, self.folder).default, self._onnx.translation(op)

    @property
    def _onnx(self) -> OnnxOp:
        return cast(OnnxOp, importlib.import_module(f"edgekit.custom_ops.{self.folder}.onnx_op"))


OPS: tuple[CustomOpSpec, ...] = (
    CustomOpSpec("BlockSparseAttention", "block_sparse_attention"),
    CustomOpSpec("KernelLinearAttention", "kernel_linear_attention"),
    CustomOpSpec("SelectiveScan", "selective_scan"),
)


def find_op(name: str) -> CustomOpSpec:
    """The op of this ONNX name. Raises `UnknownNameError`."""
    for op in OPS:
        if op.name == name:
            return op
    raise UnknownNameError("custom op", name, [op.name for op in OPS])


def translation_table() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` with all custom ops."""
    return dict(op.translation() for op in OPS)


def functions(opset: int, nodes: Sequence[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The bodies of all custom ops among `nodes`; see `CustomOpSpec.functions`."""
    return [function for op in OPS for function in op.functions(opset, nodes)]
