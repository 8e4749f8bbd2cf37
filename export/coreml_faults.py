"""What Core ML Tools 9.0 gets wrong, put right here and nowhere else.

Found by converting about 300 small PyTorch modules and running what came out on the reference runtime. None of it was
mended upstream when this was written; `tests/export/test_coreml_faults.py` runs each fault without its workaround, and
fails once the workaround is no longer needed.

Without a word Core ML Tools

    gelu        computes the exact GELU where the tanh approximation was asked for;
    reciprocal  adds 1e-4 to the argument, so that 1 / x is off by 1e-4 for x = 1 (and `a / b` of numbers and tensors
                takes this way too); rsqrt adds 1e-12;
    rms_norm    adds eps after having divided by the largest value: wrong for small inputs. Without eps it fails;
    diagonal    gives the matrix with zeros beside the diagonal;
    var, std    divide by n, not n - 1, where `correction` is left out;
    argmax, argmin  keep the other dimensions where `dim` is left out;
    softplus    ignores `threshold`;
    interpolate ignores `antialias`: an error here;
    arguments   that it does not know, such as `alpha` of add and sub, are ignored: the rest of these is an error here.

And it fails

    ops         that PyTorch can take apart, such as LSTM, GRU, fmod, lerp, log_sigmoid: they are taken apart;
    or, xor     of truth values (it knows `&` alone), and alias, which PyTorch traces where nothing is copied;
    group_norm  for a dynamic batch;
    labels      of a model with further outputs (an IndexError in its writer);
    constants   of -3.4e38, as attention masks hold them, become -infinity in fp16: a row that is masked throughout is
                then NaN, where PyTorch has equal weights;
    checks      of the whole program between its passes take a third of the time;
    packages    with class labels are not read back by it, so that their weights are compressed before they are written.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from edgekit.errors import ExportError
from edgekit.export.coreml_tools import source_line

aten = torch.ops.aten
Decomposition = Callable[..., Any]

# Arguments that say where and how a tensor lies, or repeat its dtype: nothing is lost where they are not read.
_HARMLESS = frozenset({"dtype", "device", "layout", "pin_memory", "memory_format", "non_blocking", "implicit"})
# Below every finite value of fp16 that a score takes, and above minus infinity.
_MASKED = -6.0e4
_INFINITE = 1e38
_PASSING = ("softmax", "sigmoid", "cast", "reshape", "expand_dims", "squeeze")


def decompositions() -> dict[Any, Decomposition]:
    """Operators to take apart in PyTorch: those with a fault above, and those that Core ML Tools does not know."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    table = {op: rule for op, rule in _all_decompositions() if _TORCH_OPS_REGISTRY.get_func(_name(op)) is None}
    return table | {
        aten.rms_norm.default: _rms_norm,
        aten.group_norm.default: _group_norm,
        aten.diagonal.default: _diagonal,
        aten.var.correction: _var,
        aten.std.correction: _std,
        aten.argmax.default: _argmax,
        aten.argmin.default: _argmin,
        aten.softplus.default: _softplus,
        aten.add.Tensor: _add,
        aten.sub.Tensor: _sub,
        aten.rsub.Scalar: _rsub,
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _baddbmm,
        aten.trunc.default: _trunc,
        aten.fmod.Scalar: _fmod,
        aten.fmod.Tensor: _fmod,
        aten.lerp.Scalar: _lerp,
        aten.lerp.Tensor: _lerp,
        aten.cosine_similarity.default: _cosine_similarity,
        aten.bitwise_or.Tensor: _or,
        aten.bitwise_xor.Tensor: _xor,
        aten.alias.default: torch.clone,
        aten._upsample_bilinear2d_aa.vec: _antialiased,
        aten._upsample_bicubic2d_aa.vec: _antialiased,
    }


def _all_decompositions() -> Iterator[tuple[Any, Decomposition]]:
    table = torch.export.default_decompositions()
    for op in list(table):
        if isinstance(op, torch._ops.OpOverload) and op.namespace == "aten":
            yield op, table[op]


def _name(op: Any) -> str:
    """An operator's name as Core ML Tools looks it up."""
    return str(op.name())


def needs_fp32(op: Any) -> bool:
    """Whether a MIL op must stay in fp32 where the rest becomes fp16: the scores that a topk orders.

    Softmax of many scores gives weights that are nearly equal, and fp16 makes them equal: then others are chosen, or
    the same in another order, and all that follows differs. So topk stays in fp32, with the softmax before it and the
    sums of products that it takes.
    """
    kind = op.op_type
    if kind == "mul":
        return any(child.op_type == "reduce_sum" and _ordered(child) for child in _children(op))
    return kind == "topk" or (kind in (*_PASSING, "reduce_sum") and _ordered(op))


def _ordered(op: Any) -> bool:
    """Whether a topk takes what an op gives, as it is or through ops that keep its order."""
    return any(child.op_type == "topk" or (child.op_type in _PASSING and _ordered(child)) for child in _children(op))


def _children(op: Any) -> Iterator[Any]:
    for output in op.outputs:
        yield from output.child_ops


def _rms_norm(
    x: torch.Tensor, shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), divided by the largest value first: squares of fp16 leave its range above 256.

    The divisor is at least sqrt(eps), so that eps is added where it belongs: to the mean, divided by the same square.
    """
    root = math.sqrt(torch.finfo(x.dtype).eps if eps is None else eps)
    dims = list(range(-len(shape), 0))
    largest = torch.clamp(torch.amax(torch.abs(x), dims, keepdim=True), min=root)
    y = torch.div(x, largest)
    mean = torch.mean(torch.mul(y, y), dims, keepdim=True)
    extra = torch.div(torch.full_like(largest, root), largest)
    y = torch.div(y, torch.sqrt(torch.add(mean, torch.mul(extra, extra))))
    return y if weight is None else torch.mul(y, weight)


def _group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if all(isinstance(size, int) for size in x.shape):
        return NotImplemented
    y = torch.reshape(x, [x.shape[0], groups, -1])
    centred = torch.sub(y, torch.mean(y, [-1], keepdim=True))
    variance = torch.mean(torch.mul(centred, centred), [-1], keepdim=True)
    y = torch.reshape(torch.div(centred, torch.sqrt(torch.add(variance, eps))), x.shape)
    sizes = [1, -1, *[1] * (x.ndim - 2)]
    y = y if weight is None else torch.mul(y, torch.reshape(weight, sizes))
    return y if bias is None else torch.add(y, torch.reshape(bias, sizes))


def _diagonal(x: torch.Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> torch.Tensor:
    rows, columns = x.shape[dim1], x.shape[dim2]
    length = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    first, last = dim1 % x.ndim, dim2 % x.ndim
    others = [axis for axis in range(x.ndim) if axis not in (first, last)]
    flat = torch.reshape(
        torch.permute(x, [*others, first, last]), [*(x.shape[axis] for axis in others), rows * columns]
    )
    start = max(offset, 0) - min(offset, 0) * columns
    places = torch.arange(start, start + length * (columns + 1), columns + 1)
    return torch.index_select(flat, -1, places[:length])


def _var(x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    if correction is not None:
        return NotImplemented
    return torch.var(x, dim, correction=1, keepdim=keepdim)


def _std(x: torch.Tensor, dim: Any = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    if correction is not None:
        return NotImplemented
    return torch.std(x, dim, correction=1, keepdim=keepdim)


def _argmax(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _over_all(torch.argmax, x, dim, keepdim)


def _argmin(x: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    return _over_all(torch.argmin, x, dim, keepdim)


def _over_all(op: Callable[..., torch.Tensor], x: torch.Tensor, dim: int | None, keepdim: bool) -> Any:
    if dim is not None:
        return NotImplemented
    found = op(torch.reshape(x, [-1]), 0)
    return torch.reshape(found, [1] * x.ndim) if keepdim else found


def _softplus(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    if float(beta) == 1.0 and float(threshold) == 20.0:  # beyond 20 the term that the threshold drops is below 2e-9
        return NotImplemented
    scaled = torch.mul(x, beta)
    return torch.where(torch.gt(scaled, threshold), x, torch.div(aten.softplus.default(scaled), beta))


def _add(x: torch.Tensor, y: Any, *, alpha: float = 1) -> torch.Tensor:
    return NotImplemented if alpha == 1 else torch.add(x, torch.mul(y, alpha))


def _sub(x: torch.Tensor, y: Any, *, alpha: float = 1) -> torch.Tensor:
    return NotImplemented if alpha == 1 else torch.sub(x, torch.mul(y, alpha))


def _rsub(x: torch.Tensor, y: float, alpha: float = 1) -> torch.Tensor:
    return NotImplemented if alpha == 1 else torch.add(torch.mul(x, -alpha), y)


def _addmm(a: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if alpha == beta == 1:
        return NotImplemented
    return torch.add(torch.mul(a, float(beta)), torch.mul(torch.mm(x, y), float(alpha)))


def _baddbmm(a: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    return torch.add(torch.mul(a, float(beta)), torch.mul(torch.bmm(x, y), float(alpha)))


def _trunc(x: torch.Tensor) -> torch.Tensor:
    return torch.mul(torch.sign(x), torch.floor(torch.abs(x)))


def _fmod(x: torch.Tensor, y: Any) -> torch.Tensor:
    return torch.sub(x, torch.mul(_trunc(torch.div(x, y)), y))


def _lerp(x: torch.Tensor, y: torch.Tensor, weight: Any) -> torch.Tensor:
    return torch.add(x, torch.mul(torch.sub(y, x), weight))


def _cosine_similarity(x: torch.Tensor, y: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    norms = (torch.clamp(torch.sqrt(torch.sum(torch.mul(z, z), dim)), min=eps) for z in (x, y))
    left, right = norms
    return torch.div(torch.div(torch.sum(torch.mul(x, y), dim), left), right)


def _or(x: torch.Tensor, y: torch.Tensor) -> Any:
    return torch.logical_or(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


def _xor(x: torch.Tensor, y: torch.Tensor) -> Any:
    return torch.logical_xor(x, y) if x.dtype == y.dtype == torch.bool else NotImplemented


def _antialiased(*_: Any, **__: Any) -> torch.Tensor:
    raise ExportError(
        "Core ML has no antialiased resizing, and Core ML Tools would leave the antialiasing out without a word; "
        "resize with antialias=False, or before the model"
    )


def _conversions() -> dict[str, Callable[[Any, Any], None]]:
    """Conversions that take the place of Core ML Tools' own."""
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.mil import types

    def gelu(context: Any, node: Any) -> None:
        # The argument is read as it stands: Core ML Tools would look a text up among the tensors, by their names.
        (approximate,) = (node.kwinputs or {}).get("approximate") or ("none",)
        mode = "TANH_APPROXIMATION" if approximate == "tanh" else "EXACT"
        context.add(mb.gelu(x=_get_inputs(context, node)[0], mode=mode, name=node.name))

    def reciprocal(context: Any, node: Any) -> None:
        x = _get_inputs(context, node, expected=1)[0]
        x = mb.cast(x=x, dtype="fp32") if types.is_int(x.dtype) else x
        context.add(mb.real_div(x=1.0, y=x, name=node.name))

    def rsqrt(context: Any, node: Any) -> None:
        # Still one op: Core ML Tools knows a layer norm over channels, as in the layout `ane`, by its rsqrt.
        x = _get_inputs(context, node, expected=1)[0]
        context.add(mb.rsqrt(x=x, epsilon=types.nptype_from_builtin(x.dtype)(0), name=node.name))

    return {"gelu": gelu, "reciprocal": reciprocal, "rsqrt": rsqrt}


@contextlib.contextmanager
def checked_once() -> Iterator[None]:
    """Core ML Tools with one check of the program per pipeline, where it makes one after each of about 70 passes.

    Those take a third of a conversion's time. What is written is checked as ever.
    """
    from coremltools.converters.mil.mil import Program
    from coremltools.converters.mil.mil.passes.pass_pipeline import PassPipelineManager

    apply, check = PassPipelineManager.apply_pipeline, Program.validate

    def applied(program: Any, pipeline: Any) -> None:
        Program.validate = lambda *_, **__: None
        try:
            apply(program, pipeline)
        finally:
            Program.validate = check
        program.validate()

    PassPipelineManager.apply_pipeline = staticmethod(applied)
    try:
        yield
    finally:
        PassPipelineManager.apply_pipeline = staticmethod(apply)


@contextlib.contextmanager
def conversion(
    program: torch.export.ExportedProgram | None = None, *, finish: Callable[[Any], None] | None = None
) -> Iterator[None]:
    """Core ML Tools with its faults put right, for one conversion: what it shares with the process is put back.

    Args:
        program: what will be converted; its constants that stand for minus infinity are made finite in fp16, in place.
        finish: called with Core ML Tools' own program when all its passes have run, before it is written.
    """
    from coremltools.converters.mil.backend.mil import load
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    if program is not None:
        finite_masks(program)
    registry = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before, single, classify, write = dict(registry), ops.convert_single_node, load._add_classify_op, load.load
    registry.update(_conversions())
    ops.convert_single_node = _reading_all(single)
    load._add_classify_op = _with_types(classify)

    def finished(program: Any, *args: Any, **options: Any) -> Any:
        if finish is not None:
            finish(program)
        return write(program, *args, **options)

    load.load = finished
    try:
        with checked_once():
            yield
    finally:
        ops.convert_single_node = single
        load._add_classify_op, load.load = classify, write
        registry.clear()
        registry.update(before)


def finite_masks(program: torch.export.ExportedProgram) -> None:
    """Replace finite constants below -1e38 by one that fp16 holds, in the arguments of the program's nodes."""

    def held(value: Any) -> Any:
        return _MASKED if isinstance(value, float) and -math.inf < value < -_INFINITE else value

    for node in program.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(held(value) for value in node.args)
    for values in (program.state_dict, program.constants):
        for name, tensor in values.items():
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                masked = (tensor < -_INFINITE) & torch.isfinite(tensor)
                if bool(masked.any()):
                    values[name] = torch.where(masked, _MASKED, tensor.detach())


def _with_types(classify: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The op for labels adds an output, and the list of the outputs' types must grow with it."""

    def added(program: Any, config: Any) -> Any:
        import coremltools as ct

        names = classify(program, config)
        main = program.functions["main"]
        if main.output_types is not None:
            main.output_types = [ct.TensorType() for _ in main.outputs]
        return names

    return added


def _reading_all(convert: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`convert_single_node` that refuses what it ignores: conversions read the keyword arguments that they know."""

    def checked(context: Any, node: Any) -> None:
        given = _Watched(node.kwinputs or {})
        node.kwinputs = given or None
        convert(context, node)
        if ignored := sorted(given.keys() - given.read - _HARMLESS):
            line = source_line((node.meta or {}).get("stack_trace"))
            value = dict.__getitem__(given, ignored[0])
            raise ExportError(
                f"Core ML Tools would ignore the argument {ignored[0]}={value} of the op {node.kind}"
                f"{f' ({line})' if line else ''} and compute something else; leave it at its default, or write that "
                "part of forward with other ops"
            )

    return checked


class _Watched(dict[str, Any]):
    """A dictionary that knows which of its keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)
