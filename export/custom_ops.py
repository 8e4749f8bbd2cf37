"""edgekit's own ops in an exported graph: nodes of domain `edgekit` with their bodies as local functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx
import torch

from edgekit.custom_ops import registry
from edgekit.errors import ExportError
from edgekit.runtime.manifest import CustomOp

# Every op runs from its function body, and from edgekit's kernel library where one is built for the machine.
KERNELS = ("portable", "native")


def translations(program: torch.export.ExportedProgram) -> dict[Any, Callable[..., Any]]:
    """What `torch.onnx.export` needs to know of the custom ops that the program calls, in any of its graphs.

    Raises:
        ExportError: a call in a dtype that the ONNX ops do not have.
    """
    called = set()
    for node in calls(program):
        called.add(str(node.target.overloadpacket.__name__))
        dtype = node.args[0].meta["val"].dtype
        if dtype not in (torch.float32, torch.float16):
            name = str(dtype).removeprefix("torch.")
            raise ExportError(
                f"the model calls {node.target.overloadpacket} in {name}; exported ops are float32 or float16: convert "
                "its inputs with .float()"
            )
    return dict(op.translation() for op in registry.OPS if op.folder in called)


def calls(program: torch.export.ExportedProgram) -> Iterator[Any]:
    """The nodes that call custom ops, those in branches included."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == registry.DOMAIN:
                    yield node


def add_functions(model: onnx.ModelProto) -> None:
    """Append the bodies of all custom ops in the model, for its version of ONNX's operators, and import their domain.

    Raises:
        EdgekitError: an attribute that the op's contract excludes.
    """
    nodes = list(_nodes(model.graph))
    if not nodes:
        return
    opset = next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    model.functions.extend(registry.functions(opset, nodes))
    if not any(item.domain == registry.DOMAIN for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(registry.DOMAIN, registry.VERSION))


def custom_ops(model: onnx.ModelProto) -> tuple[CustomOp, ...]:
    """The custom ops of a model for its manifest, with the number of nodes of each."""
    counts = Counter(node.op_type for node in _nodes(model.graph))
    return tuple(
        CustomOp(op.domain, op.name, op.version, counts[op.name], KERNELS) for op in registry.OPS if counts[op.name]
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The custom ops' nodes, those in branches and loop bodies included."""
    for node in graph.node:
        if node.domain == registry.DOMAIN:
            yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(inner)
