"""Building blocks for ONNX function bodies: constants, nodes, subgraphs and guards.

A body has no op that raises an error. `Function.guard` makes one of `Gather`: it reads a one-element tensor at index 0
where the condition holds and at index 1, out of bounds, where it does not. The runtime then stops with the name of that
node in its message, and the name is the message (`GUARD` and the text). The zero that a passing guard gives is added to
a shape that the body needs anyway, so that the guard is no dead code and runs before what it protects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

FLOAT = onnx.TensorProto.FLOAT
INT64 = onnx.TensorProto.INT64
BOOL = onnx.TensorProto.BOOL

GUARD = "edgekit: "
"""Every guard's node name starts with this; onnxruntime puts the name of an inlined function before it."""


class Graph:
    """Nodes in order, with fresh names for what they make. `Function` and `Subgraph` are graphs."""

    def __init__(self, counter: list[int]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._counter = counter
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def fresh(self, stem: str) -> str:
        """A tensor name that nothing else in the function has."""
        self._counter[0] += 1
        return f"{stem.lower()}_{self._counter[0]}"

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """A constant; equal ones are made once. Integers are int64, as ONNX wants shapes and axes."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("constant")
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
            self._constants[key] = name
        return self._constants[key]

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node of the default domain; returns its output."""
        return self.ops(op_type, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, name: str = "", **attributes: Any) -> tuple[str, ...]:
        """Append a node with several outputs; returns them."""
        results = tuple(self.fresh(op_type) for _ in range(outputs))
        # A profile tells to which function a node belongs only where the node has a name.
        self.nodes.append(helper.make_node(op_type, list(inputs), list(results), name=name or results[0], **attributes))
        return results

    def dim(self, shape: str, axis: int) -> str:
        """Entry `axis` of a shape vector, as a vector of one."""
        return self.op("Gather", shape, self.constant([axis]))

    def all_of(self, *conditions: str) -> str:
        """The conjunction of boolean tensors."""
        result, *rest = conditions
        for condition in rest:
            result = self.op("And", result, condition)
        return result

    def guard(self, condition: str, message: str, after: str | None = None) -> str:
        """Stop the run with `message` unless all of `condition` (bool, any shape) hold.

        Args:
            after: what an earlier guard returned; that one then speaks first where both fail.

        Returns:
            An int64 tensor `[1]` holding 0. Add it to a shape that everything behind the guard depends on.
        """
        failed = self.op("Cast", self.op("Not", condition), to=INT64)
        index = self.op("ReduceMax", self.op("Reshape", failed, self.constant([-1])), keepdims=1)
        if after is not None:
            index = self.op("Add", index, after)
        return self.op("Gather", self.constant([0]), index, name=GUARD + message)


class Subgraph(Graph):
    """The body of a `Scan` or a branch of an `If`; may read every tensor of the graphs around it."""

    def __init__(self, parent: Graph) -> None:
        super().__init__(parent._counter)
        self._inputs: list[onnx.ValueInfoProto] = []

    def input(self, stem: str, dtype: int, shape: Sequence[int | str | None] | None = None) -> str:
        """Declare the next input. onnxruntime needs a shape where it cannot infer the rank of a Scan's outputs."""
        name = self.fresh(stem)
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def proto(self, name: str, outputs: Sequence[tuple[str, int]]) -> onnx.GraphProto:
        """The graph, with these outputs (tensor and dtype)."""
        results = [helper.make_tensor_value_info(output, dtype, None) for output, dtype in outputs]
        return helper.make_graph(self.nodes, name, self._inputs, results)


class Function(Graph):
    """A function body of domain `edgekit`.

    Args:
        name: the op.
        inputs: names of the inputs, which the body reads by these names.
        attributes: names of the node's attributes. All that a node carries must be listed, read or not.
        defaults: values for those of them that a node may leave out.
        opset: version of the default domain, equal to the model's.
        overload: see `edgekit.custom_ops.registry`.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        *,
        attributes: Sequence[str],
        opset: int,
        overload: str = "",
        defaults: Mapping[str, int | float | str] | None = None,
    ) -> None:
        super().__init__([0])
        self._name, self._inputs, self._defaults = name, list(inputs), dict(defaults or {})
        self._attributes = [attribute for attribute in attributes if attribute not in self._defaults]
        self._opset, self._overload = opset, overload

    def proto(self, *outputs: str) -> onnx.FunctionProto:
        """The finished function with these tensors as its outputs."""
        return helper.make_function(
            "edgekit",
            self._name,
            self._inputs,
            list(outputs),
            self.nodes,
            [helper.make_opsetid("", self._opset)],
            attributes=self._attributes,
            attribute_protos=[helper.make_attribute(name, value) for name, value in self._defaults.items()],
            overload=self._overload,
        )
