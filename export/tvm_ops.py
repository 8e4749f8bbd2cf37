"""edgekit's own ops in a TVM model: calls of our scheduled kernels, which are compiled into the same library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tvm import IRModule, relax, te, tirx

from edgekit.custom_ops.block_sparse_attention import contract
from edgekit.custom_ops.registry import DOMAIN, OPS
from edgekit.errors import ExportError
from edgekit.export.tvm_schedule import SCHEDULED
from edgekit.kernels.tvm import catalog
from edgekit.kernels.tvm.catalog import Kernel
from edgekit.kernels.tvm.compat import T
from edgekit.kernels.tvm.targets import Arch

# The order in which the kernels number the feature maps of KernelLinearAttention.
_FEATURE_MAPS = {"relu": 0, "elu1": 1, "identity": 2}
# relax fuses elementwise work into functions; this number says that a function must stay as it is.
_OPAQUE = 8
# Bytes that a tensor must be aligned to: those of one element.
_ALIGN = {"float32": 4, "float16": 2}


@dataclass(frozen=True)
class ServedNode:
    """One node of a custom op and the kernel that serves it: `symbol`, specialised to `parameters`."""

    node: str
    op: str
    symbol: str
    parameters: dict[str, int]


@dataclass(frozen=True)
class _Call:
    """What a node asks of a kernel, in the kernel's order: tensors, the output's likeness, scalars; and its sizes.

    A scalar is a float32, an int64 or an expression of symbolic sizes. `check`, where there is one, is a function
    that copies the last tensor and fails where the call breaks the op's contract, made for these `check_key`s.
    """

    tensors: tuple[Any, ...]
    like: Any
    scalars: tuple[Any, ...]
    sizes: Mapping[str, int | None]
    check_key: tuple[Any, ...] = ()
    check: Callable[[], tirx.PrimFunc] | None = None


@dataclass
class KernelCalls:
    """Converters for TVM's importer, and the record of what they emitted."""

    arch: Arch
    uses: list[ServedNode] = field(default_factory=list)
    _kernels: tuple[Kernel, ...] = ()
    _functions: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def converters(self) -> dict[str, Callable[[torch.fx.Node, Any], Any]]:
        """The `custom_convert_map` of `from_exported_program`: torch's name of each op -> its converter."""
        ours = {f"{op.folder}.default": self._converter(op.name, _CALLS[op.folder]) for op in OPS}
        return {**ours, "index_put.default": _index_put, "index_select.default": _index_select}

    def _converter(self, op: str, describe: Callable[..., _Call]) -> Callable[[torch.fx.Node, Any], Any]:
        def convert(node: torch.fx.Node, importer: Any) -> Any:
            arguments = {
                name: importer.env[value] if isinstance(value, torch.fx.Node) else value
                for name, value in _arguments(node).items()
            }
            return self._emit(node.name, op, describe(**arguments), importer)

        return convert

    def _emit(self, node: str, op: str, call: _Call, importer: Any) -> Any:
        kernel = self._choose(node, op, call)
        self.uses.append(ServedNode(node, op, kernel.symbol, dict(kernel.parameters)))
        builder, tensors = importer.block_builder, call.tensors
        if call.check is not None:
            # Whoever calls a kernel vouches for its arguments; taking the copy makes the kernel wait for the check.
            *others, last = tensors
            check = self._function(builder, call.check_key, call.check)
            tensors = (*others, builder.emit(relax.call_tir(check, [*others, last], _type_like(last))))
        function = self._function(
            builder,
            (kernel.symbol,),
            lambda: _outputs_last(_only_function(kernel.module(self.arch)), len(tensors)),
        )
        scalars = [_scalar(value) for value in call.scalars]
        return builder.emit(relax.call_tir(function, [*tensors, *scalars], _type_like(call.like)))

    def _choose(self, node: str, op: str, call: _Call) -> Kernel:
        self._kernels = self._kernels or catalog.kernels(self.arch)
        dtype = str(call.like.ty.dtype)
        for kernel in self._kernels:
            fits = all(call.sizes.get(name) == value for name, value in kernel.parameters)
            if (kernel.op, kernel.dtype) == (op, dtype) and fits:
                return kernel
        raise ExportError(f"there is no TVM kernel of {DOMAIN}::{op} in {dtype} for {self.arch.name} (node {node})")

    def _function(self, builder: Any, key: tuple[Any, ...], make: Callable[[], tirx.PrimFunc]) -> Any:
        if key not in self._functions:
            function = make().without_attr("global_symbol").with_attr({SCHEDULED: True, "op_pattern": _OPAQUE})
            self._functions[key] = builder.add_func(function, key[0])
        return self._functions[key]


def _index_put(node: torch.fx.Node, importer: Any) -> Any:
    """Rows of a tensor set or added to by one list of indices, which TVM's own importer refuses: ONNX's ScatterND."""
    tensor, indices, values, *rest = importer.retrieve_args(node)
    if len(indices) != 1 or tensor.ty.ndim == 1 or indices[0] is None or "int" not in str(indices[0].ty.dtype):
        return importer._index_put(node)  # masks among them
    builder = importer.block_builder
    row, *rest_of_shape = importer.shape_of(tensor)
    rows = builder.emit_te(_from_the_end, indices[0], row)
    # ScatterND would read past the end of values that torch repeats.
    values = builder.emit(relax.op.broadcast_to(values, [*importer.shape_of(indices[0]), *rest_of_shape]))
    rows = builder.emit(relax.op.expand_dims(rows, -1))
    return builder.emit(relax.op.scatter_nd(tensor, rows, values, "add" if rest and rest[0] else "update"))


def _from_the_end(indices: te.Tensor, size: Any) -> te.Tensor:
    """`indices` with those below 0 counted from the end, as torch reads them."""

    def row(*at: Any) -> Any:
        index = indices[at]
        return tirx.if_then_else(index < 0, index + tirx.Cast(indices.dtype, size), index)

    return te.compute(indices.shape, row, name="from_the_end")


def _index_select(node: torch.fx.Node, importer: Any) -> Any:
    """As TVM's own importer has it, but an index out of range reads the nearest row, not memory behind the tensor."""
    tensor, axis, indices = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.take(tensor, indices, axis, mode="clip"))


def _arguments(node: torch.fx.Node) -> dict[str, Any]:
    """The node's arguments by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    given = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))
    given |= node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in node.target._schema.arguments}


def _block_sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    block_index: Any,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None,
    softcap: float,
    window: int,
) -> _Call:
    head_dim = _size(q, 3)
    if scale is None:
        if head_dim is None:
            raise ExportError("block_sparse_attention with a dynamic head_dim needs a scale; pass one")
        scale = head_dim**-0.5
    blocks = (_at_most_axis(block_q, q, 2), _at_most_axis(block_k, k, 2))
    scalars = (float(scale), float(softcap), int(causal), int(window), *blocks)
    sizes = {"head_dim": head_dim, "block_q": int(block_q), "block_k": int(block_k)}
    dtype = str(q.ty.dtype)
    key = ("edgekit_bsa_check", dtype, int(block_q), int(block_k))
    return _Call((q, k, v, block_index), q, scalars, sizes, key, lambda: _bsa_check(*key[1:]))


def _kernel_linear_attention(q: Any, k: Any, v: Any, feature_map: str, eps: float) -> _Call:
    sizes = {"head_dim": _size(q, 3), "value_dim": _size(v, 3)}
    return _Call((q, k, v), v, (float(eps), _FEATURE_MAPS[feature_map]), sizes)


def _selective_scan(
    u: Any,
    delta: Any,
    A: Any,  # noqa: N803 - the names of the torch op's arguments
    B: Any,  # noqa: N803
    C: Any,  # noqa: N803
    D: Any,  # noqa: N803
    z: Any | None,
    delta_softplus: bool,
) -> _Call:
    tensors = (u, delta, A, B, C, D, u if z is None else z)
    return _Call(tensors, u, (int(delta_softplus), int(z is not None)), {"state": _size(A, 1), "channels": _size(A, 0)})


_CALLS: dict[str, Callable[..., _Call]] = {
    "block_sparse_attention": _block_sparse_attention,
    "kernel_linear_attention": _kernel_linear_attention,
    "selective_scan": _selective_scan,
}


def _outputs_last(function: tirx.PrimFunc, tensors: int) -> tirx.PrimFunc:
    """The kernel with its scalars before its output, where relax wants it.

    Fixing the scalars to the node's values instead would fold constants: a division by `softcap` that only runs where
    it is not 0 then fails at compile time.
    """
    inputs, output, scalars = function.params[:tensors], function.params[tensors], function.params[tensors + 1 :]
    return tirx.PrimFunc([*inputs, *scalars, output], function.body, function.ret_type, function.attrs)


def _only_function(module: IRModule) -> tirx.PrimFunc:
    (function,) = (each for _, each in module.functions_items())
    return function


def _bsa_check(dtype: str, block_q: int, block_k: int) -> tirx.PrimFunc:
    """A function that copies block indices and fails where a call breaks the contract of BlockSparseAttention.

    What an export knows, torch has checked; this checks the sizes that it left open, and the indices, at every run.
    """
    align = _ALIGN[dtype]

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def check(  # type: ignore[no-untyped-def]
        q_handle: T.handle, k_handle: T.handle, v_handle: T.handle, index_handle: T.handle, out_handle: T.handle
    ):
        # No two axes share a variable: TVM would compare them, in words of its own.
        batch, heads, queries, dim = T.int64(), T.int64(), T.int64(), T.int64()
        k_batch, k_heads, keys, k_dim = T.int64(), T.int64(), T.int64(), T.int64()
        v_batch, v_heads, values, v_dim = T.int64(), T.int64(), T.int64(), T.int64()
        index_batch, index_heads, rows, listed = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_handle, (batch, heads, queries, dim), dtype, align=align)  # noqa: F841 - its shape
        k = T.match_buffer(k_handle, (k_batch, k_heads, keys, k_dim), dtype, align=align)  # noqa: F841
        v = T.match_buffer(v_handle, (v_batch, v_heads, values, v_dim), dtype, align=align)  # noqa: F841
        index = T.match_buffer(index_handle, (index_batch, index_heads, rows, listed), "int32", align=4)
        out = T.match_buffer(out_handle, (index_batch, index_heads, rows, listed), "int32", align=4)
        with T.sblock("shapes"):
            T.reads()
            T.writes()
            assert batch * heads * queries * dim > 0, contract.EMPTY
            assert k_batch * k_heads * keys * k_dim > 0, contract.EMPTY
            assert index_batch * index_heads * rows * listed > 0, contract.EMPTY
            assert k_batch == v_batch, contract.SAME
            assert k_heads == v_heads, contract.SAME
            assert keys == values, contract.SAME
            assert k_dim == v_dim, contract.SAME
            assert batch == k_batch, contract.SAME
            assert dim == k_dim, contract.SAME
            assert T.truncmod(heads, k_heads) == 0, contract.RATIO
            assert keys >= queries, contract.LENGTH
            assert batch == index_batch, contract.INDEX
            assert rows == T.ceildiv(queries, T.min(T.int64(block_q), queries)), contract.INDEX
            assert T.Or(index_heads == 1, T.Or(index_heads == k_heads, index_heads == heads)), contract.INDEX
        for b, h, i, j in T.grid(index_batch, index_heads, rows, listed):
            with T.sblock("indices"):
                vb, vh, vi, vj = T.axis.remap("SSSS", [b, h, i, j])
                assert index[vb, vh, vi, vj] >= -1, contract.RANGE
                assert T.Cast("int64", index[vb, vh, vi, vj]) * T.min(T.int64(block_k), keys) < keys, contract.RANGE
                out[vb, vh, vi, vj] = index[vb, vh, vi, vj]

    return check


def _scalar(value: Any) -> Any:
    if isinstance(value, float):
        return tirx.const(value, "float32")
    return tirx.const(value, "int64") if isinstance(value, int) else value


def _at_most_axis(block: int, tensor: Any, axis: int) -> Any:
    """`block`, or the size of the axis where that is less: a longer block is the same, but costs the kernel more."""
    size = list(tensor.ty.shape)[axis]
    if isinstance(size, tirx.IntImm):
        return min(int(block), int(size))
    return tirx.min(tirx.const(int(block), "int64"), size)


def _size(tensor: Any, axis: int) -> int | None:
    size = list(tensor.ty.shape)[axis]
    return int(size) if isinstance(size, tirx.IntImm) else None


def _type_like(tensor: Any) -> relax.TensorType:
    return relax.TensorType(tensor.ty.shape, tensor.ty.dtype)


def used_ops(uses: Sequence[ServedNode]) -> dict[str, int]:
    """How many nodes of each op, in the registry's order."""
    counts = {op.name: sum(use.op == op.name for use in uses) for op in OPS}
    return {name: count for name, count in counts.items() if count}
