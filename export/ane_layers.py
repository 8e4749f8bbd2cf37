"""The rules of the layout rewrite for layers: linear, normalisation, convolution along tokens, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edgekit.export.ane_forms import Form, Heads, Size, heads_of, new_axis, same, shape_of, size_of
from edgekit.export.ane_rewriter import Rewriter, Scores, Value, aten, handles
from edgekit.export.ane_views import mask_parts

# Apple's mask value: the engine does not treat minus infinity in softmax as IEEE does, and exp of this is 0.
_MASKED = -40000.0
_CONV_1X1 = "a 1x1 convolution on (B, C, 1, S)"


@handles("linear")
def linear(rewriter: Rewriter, node: fx.Node) -> Value | None:
    weight, bias = rewriter.value(node.args[1]), rewriter.value(rewriter.argument(node, 2, "bias"))
    if weight is None or weight.constant is None or weight.constant.ndim != 2:
        return None
    return _projection(rewriter, node, weight.constant, bias)


@handles("addmm")
def addmm(rewriter: Rewriter, node: fx.Node) -> Value | None:
    bias, x, weight = (rewriter.value(argument) for argument in node.args[:3])
    if x is None or weight is None or weight.constant is None or bias is None or node.kwargs or bias.constant is None:
        return None
    if bias.constant.ndim != 1:
        return None
    return _projection(rewriter, node, weight.constant.T, bias, x=x)


def _projection(
    rewriter: Rewriter, node: fx.Node, weight: torch.Tensor, bias: Value | None, x: Value | None = None
) -> Value | None:
    """A matrix on the last plain axis as a 1x1 convolution; `weight` `[out, in]`."""
    x, shape = x or rewriter.value(node.args[0]), shape_of(node)
    if x is None or shape is None or (form := rewriter.channels_last(x)) is None:
        return None
    parameters = (rewriter.tensor(weight[:, :, None, None]), None if bias is None else rewriter.plain(bias))
    made = rewriter.call(aten.conv2d.default, form.node, *parameters)
    outputs = weight.shape[0]
    channels = new_axis("c", outputs)
    rewriter.changed(node, _CONV_1X1)
    dims = (form.dims[0], outputs, *form.dims[2:])
    return Value(shape, form=Form(made, dims, form.b, channels, form.s, (*form.axes[:-1], channels)))


@handles("layer_norm")
def layer_norm(rewriter: Rewriter, node: fx.Node) -> Value | None:
    """Over the channels, in the order of operations that Core ML Tools knows as one `layer_norm` on (B, C, 1, S)."""
    x, shape, sizes = rewriter.value(node.args[0]), shape_of(node), node.args[1]
    if x is None or shape is None or not isinstance(sizes, (list, tuple)) or len(sizes) != 1:
        return None
    weight, bias = (
        rewriter.value(rewriter.argument(node, index, name)) for index, name in ((2, "weight"), (3, "bias"))
    )
    if any(given is not None and given.constant is None for given in (weight, bias)):
        return None
    if (form := rewriter.channels_last(x)) is None:
        return None
    eps = float(rewriter.argument(node, 4, "eps", 1e-5))
    centred = rewriter.call(aten.sub.Tensor, form.node, rewriter.call(aten.mean.dim, form.node, [1], True))
    variance = rewriter.call(aten.mean.dim, rewriter.call(aten.mul.Tensor, centred, centred), [1], True)
    scale = rewriter.call(aten.rsqrt.default, rewriter.call(aten.add.Tensor, variance, eps))
    made = rewriter.call(aten.mul.Tensor, centred, scale)
    for given, target in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if given is not None and given.constant is not None:
            made = rewriter.call(target, made, rewriter.tensor(given.constant.reshape(1, -1, 1, 1)))
    rewriter.changed(node, "normalisation over the channels of (B, C, 1, S)")
    return Value(shape, form=replace(form, node=made))


@handles("conv1d")
def conv1d(rewriter: Rewriter, node: fx.Node) -> Value | None:
    x, weight, shape = rewriter.value(node.args[0]), rewriter.value(node.args[1]), shape_of(node)
    if x is None or x.shape is None or shape is None or len(shape) != 3 or weight is None or weight.constant is None:
        return None
    form = x.form
    if form is None or len(form.axes) != 3 or form.axes != (form.b, form.c, form.s):
        b, c, s = (new_axis(kind, size) for kind, size in zip("bcs", x.shape, strict=True))
        form = rewriter.from_plain(x, b, c, s, (b, c, s))
    form = rewriter.flat(form)
    bias = rewriter.value(rewriter.argument(node, 2, "bias"))
    stride, padding, dilation = (
        _number(rewriter.argument(node, index, name, default))
        for index, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )
    groups = rewriter.argument(node, 6, "groups", 1)
    made = rewriter.call(
        aten.conv2d.default,
        form.node,
        rewriter.tensor(weight.constant.unsqueeze(2)),
        None if bias is None else rewriter.plain(bias),
        [1, stride],
        [0, padding],
        [1, dilation],
        groups,
    )
    c, s = new_axis("c", shape[1]), new_axis("s", shape[2])
    rewriter.changed(node, "a convolution on (B, C, 1, S)")
    return Value(shape, form=Form(made, (form.dims[0], shape[1], 1, shape[2]), form.b, c, s, (form.b, c, s)))


@handles("pad", "constant_pad_nd")
def pad(rewriter: Rewriter, node: fx.Node) -> Value | None:
    """Along the tokens of (B, C, S)."""
    x, shape, amounts = rewriter.value(node.args[0]), shape_of(node), node.args[1]
    if x is None or x.form is None or shape is None or not isinstance(amounts, (list, tuple)) or len(amounts) != 2:
        return None
    mode = rewriter.argument(node, 2, "mode", "constant") if "constant_pad" not in str(node.target) else "constant"
    if mode != "constant" or len(x.form.axes) != 3 or x.form.axes[2] != x.form.s or x.form.axes[1] != x.form.c:
        return None
    value = node.args[2] if "constant_pad" in str(node.target) and len(node.args) > 2 else 0.0
    if "constant_pad" not in str(node.target):
        value = rewriter.argument(node, 3, "value", None) or 0.0
    form = rewriter.flat(x.form)
    made = rewriter.call(aten.constant_pad_nd.default, form.node, list(amounts), value)
    s = new_axis("s", shape[2])
    dims = (*form.dims[:3], shape[2])
    return Value(shape, form=Form(made, dims, form.b, form.c, s, (form.axes[0], form.axes[1], s)))


@handles("scaled_dot_product_attention")
def attention(rewriter: Rewriter, node: fx.Node) -> Value | None:
    """One head after the other, as Apple's article has it: scores (B, K, 1, Q), softmax over axis 1."""
    values = [rewriter.value(argument) for argument in node.args[:3]]
    if any(value is None or value.shape is None for value in values) or values[0] is None or values[0].form is None:
        return None
    laid = [_heads_form(rewriter, value) for value in values]
    if any(item is None for item in laid):
        return None
    (q, query), (k, key), (v, _) = (item for item in laid if item is not None)
    shape = shape_of(node)
    dropout = rewriter.argument(node, 4, "dropout_p", 0.0)
    if shape is None or dropout or query.heads % key.heads or _dynamic(q, k, v):
        return None
    scale = rewriter.argument(node, 6, "scale")
    scale = query.width**-0.5 if scale is None else float(scale)
    empty = Scores([], shape[0], query.places, key.places, len(shape) == 4)
    mask = _mask(rewriter, node, empty, query)
    if isinstance(mask, str):
        return None
    scores = _scores(rewriter, rewriter.call(aten.mul.Tensor, q.node, scale), query, k, key, len(shape) == 4)
    nodes = (
        scores.nodes
        if mask is None
        else [rewriter.call(aten.add.Tensor, part, extra) for part, extra in zip(scores.nodes, mask, strict=True)]
    )
    nodes = [rewriter.call(aten.softmax.int, part, 1) for part in nodes]
    rewriter.changed(node, f"{query.heads} single heads (bchq,bkhc->bkhq)", "attention")
    return _attended(rewriter, nodes, v, q, shape)


def _heads_form(rewriter: Rewriter, value: Value | None) -> tuple[Form, Heads] | None:
    """A plain (B, H, S, D) or (B, S, D) as a form; converted where it has none that fits."""
    if value is None or value.shape is None:
        return None
    found = rewriter.heads(value)
    if found is not None and not found[1].transposed:
        return found
    if len(value.shape) not in (3, 4):
        return None
    b = new_axis("b", value.shape[0])
    h = new_axis("c", value.shape[1]) if len(value.shape) == 4 else ()
    s, d = new_axis("s", value.shape[-2]), new_axis("c", value.shape[-1])
    axes = (b, h, s, d) if len(value.shape) == 4 else (b, s, d)
    form = rewriter.from_plain(replace(value), b, (*h, *d), s, axes)
    return rewriter.flat(form), Heads(size_of(h), size_of(d), size_of(s), False)


def _scores(rewriter: Rewriter, q: fx.Node, query: Heads, k: Form, key: Heads, has_heads: bool) -> Scores:
    turned = rewriter.call(aten.transpose.int, k.node, 1, 3)  # (B, K, 1, H * D): the one transpose
    group = query.heads // key.heads
    queries = rewriter.parts(q, [query.width] * query.heads, 1)
    keys = rewriter.parts(turned, [key.width] * key.heads, 3)
    nodes = [
        rewriter.call(aten.einsum.default, "bchq,bkhc->bkhq", [part, keys[head // group]])
        for head, part in enumerate(queries)
    ]
    return Scores(nodes, k.dims[0], query.places, key.places, has_heads)


def _attended(rewriter: Rewriter, weights: Sequence[fx.Node], v: Form, q: Form, shape: Sequence[Size]) -> Value:
    """The weighted values of every head, side by side; plain (B, H, Q, E) or (B, Q, E)."""
    heads = len(weights)
    width = int(shape[-1])
    kept = v.dims[1] // width  # of the values, fewer where several queries share one
    values = rewriter.parts(v.node, [width] * kept, 1)
    made = [
        rewriter.call(aten.einsum.default, "bkhq,bchk->bchq", [weight, values[head // (heads // kept)]])
        for head, weight in enumerate(weights)
    ]
    node = rewriter.call(aten.cat.default, made, 1) if heads > 1 else made[0]
    h, e, s = new_axis("c", heads) if len(shape) == 4 else (), new_axis("c", width), new_axis("s", shape[-2])
    axes = (q.b, h, s, e) if len(shape) == 4 else (q.b, s, e)
    dims = (q.dims[0], heads * width, 1, shape[-2])
    return Value(tuple(shape), form=Form(node, dims, q.b, (*h, *e), s, axes))


def _mask(rewriter: Rewriter, node: fx.Node, scores: Scores, query: Heads) -> list[fx.Node] | str | None:
    """The mask's parts, None without one, or why there is none in this form."""
    argument = rewriter.argument(node, 3, "attn_mask")
    mask = rewriter.value(argument)
    given = replace(scores, nodes=[node] * query.heads)  # for the number of heads alone
    if rewriter.argument(node, 5, "is_causal", False):
        if not isinstance(scores.queries, int) or not isinstance(scores.keys, int):
            return "dynamic sizes"
        allowed = torch.ones(scores.queries, scores.keys, dtype=torch.bool).tril()
        mask = Value((scores.queries, scores.keys), constant=allowed)
    if mask is None:
        return None
    if mask.constant is not None:
        constant = mask.constant
        if constant.dtype == torch.bool:
            constant = torch.where(constant, 0.0, -math.inf)
        if bool(torch.isneginf(constant).all(-1).any()):
            return "a row without any key"  # softmax of a row of minus infinities is not that of a row of -40000
        mask = Value(mask.shape, constant=constant.clamp(min=_MASKED))
    elif argument.meta["val"].dtype == torch.bool:
        return "truth values"
    return mask_parts(rewriter, mask, given) or "a mask of another shape"


@handles("matmul", "bmm")
def matmul(rewriter: Rewriter, node: fx.Node) -> Value | None:
    """Tokens times a matrix, queries times keys, or scores times values; other products stay."""
    x, y = (rewriter.value(argument) for argument in node.args[:2])
    shape = shape_of(node)
    if x is None or y is None or shape is None:
        return None
    if y.constant is not None and y.constant.ndim == 2 and x.form is not None:
        return _projection(rewriter, node, y.constant.T, None)
    if x.scores is not None or y.scores is not None:
        return _weighted_values(rewriter, node, x, y, shape)
    first, second = rewriter.value(node.args[0]), rewriter.value(node.args[1])
    if first is None or second is None or first.form is None or second.form is None:
        return None
    left, right = rewriter.heads(first), rewriter.heads(second)
    if left is None or right is None or left[1].transposed or not right[1].transposed:
        return None
    (q, query), (k, key) = left, right
    if _dynamic(q, k) or query.heads != key.heads or query.width != key.width or len(shape) != len(first.form.axes):
        return None
    rewriter.changed(node, f"{query.heads} single heads (bchq,bkhc->bkhq)", "attention")
    return Value(shape, scores=_scores(rewriter, q.node, query, k, key, len(shape) == 4))


def _weighted_values(rewriter: Rewriter, node: fx.Node, x: Value, y: Value, shape: tuple[Size, ...]) -> Value | None:
    """`scores @ v`, or `v^T @ scores^T`."""
    scores, other = (x.scores, y) if x.scores is not None else (y.scores, x)
    if scores is None or other.form is None:
        return None
    leading = x.scores is not None
    found = rewriter.heads(other)
    if found is None or scores.transposed == leading or found[1].transposed == leading or _dynamic(found[0]):
        return None
    v, value = found
    if value.heads != len(scores.nodes) or not same(value.places, scores.keys):
        return None
    plain = shape if leading else (*shape[:-2], shape[-1], shape[-2])
    made = _attended(rewriter, scores.nodes, v, v, plain)
    if leading or made.form is None:
        return made
    axes = made.form.axes
    return Value(shape, form=replace(made.form, axes=(*axes[:-2], axes[-1], axes[-2])))


@handles("softmax", "_softmax")
def softmax(rewriter: Rewriter, node: fx.Node) -> Value | None:
    x, shape = rewriter.value(node.args[0]), shape_of(node)
    if x is None or x.scores is None or shape is None:
        return None
    dim = int(rewriter.argument(node, 1, "dim")) % len(shape)
    if dim != len(shape) - (2 if x.scores.transposed else 1):
        return None
    made = [rewriter.call(aten.softmax.int, part, 1) for part in x.scores.nodes]
    return Value(shape, scores=replace(x.scores, nodes=made))


@handles("edgekit::kernel_linear_attention")
def kernel_linear_attention(rewriter: Rewriter, node: fx.Node) -> Value | None:
    """Channels first: no transpose. Scaled as in `edgekit.custom_ops.kernel_linear_attention.coreml`."""
    values = [rewriter.value(argument) for argument in node.args[:3]]
    forms = [value.form for value in values if value is not None and value.form is not None]
    found = [heads for form in forms if (heads := heads_of(form)) is not None and not heads.transposed]
    shape = shape_of(node)
    if len(found) != 3 or shape is None:
        return None
    (q, k, v), (query, key, value) = forms, found
    feature_map, eps = rewriter.argument(node, 3, "feature_map", "relu"), float(rewriter.argument(node, 4, "eps", 1e-6))
    if not isinstance(query.places, int) or not isinstance(key.places, int) or not isinstance(q.dims[0], int):
        return None
    tokens = key.places
    shrink, half = 2.0 ** -math.ceil(math.log2(query.width)), 2.0 ** -round(math.log2(tokens) / 2)

    def per_head(node_: fx.Node, width: int, places: int) -> fx.Node:
        return rewriter.call(aten.reshape.default, node_, [int(q.dims[0]), query.heads, width, places])

    def featured(form: Form, factor: float) -> fx.Node:
        return rewriter.call(aten.mul.Tensor, _features(rewriter, form.node, feature_map), factor)

    queries = per_head(featured(q, shrink), query.width, query.places)
    keys = per_head(featured(k, half), query.width, tokens)
    held = per_head(v.node, value.width, tokens)
    after = 1 / (tokens * half)

    def product(equation: str, first: fx.Node, second: fx.Node) -> fx.Node:
        return rewriter.call(aten.einsum.default, equation, [first, second])  # aten.matmul is traced as views and bmm

    mean = rewriter.call(aten.mul.Tensor, product("bhdn,bhen->bhde", keys, held), after)
    total = rewriter.call(aten.mul.Tensor, rewriter.call(aten.sum.dim_IntList, keys, [-1], True), after)  # [B, H, D, 1]
    numerator = product("bhde,bhdn->bhen", mean, queries)
    denominator = rewriter.call(aten.add.Tensor, product("bhde,bhdn->bhen", total, queries), eps * shrink)
    # Half precision may round the denominator of a query without features to 0; see the lowering.
    empty = rewriter.call(aten.eq.Scalar, denominator, 0.0)
    denominator = rewriter.call(aten.where.ScalarSelf, empty, 1.0, denominator)
    made = rewriter.call(aten.div.Tensor, numerator, denominator)
    made = rewriter.call(aten.reshape.default, made, [int(q.dims[0]), query.heads * value.width, 1, query.places])
    h, e, s = new_axis("c", query.heads), new_axis("c", value.width), new_axis("s", query.places)
    rewriter.changed(node, "products with the channels first, without transposes")
    dims = (q.dims[0], query.heads * value.width, 1, query.places)
    return Value(shape, form=Form(made, dims, q.b, (*h, *e), s, (q.b, h, s, e)))


def _features(rewriter: Rewriter, node: fx.Node, feature_map: str) -> fx.Node:
    if feature_map == "relu":
        return rewriter.call(aten.relu.default, node)
    if feature_map == "elu1":
        low = rewriter.call(aten.exp.default, rewriter.call(aten.clamp_max.default, node, 0.0))
        return rewriter.call(aten.add.Tensor, low, rewriter.call(aten.relu.default, node))
    return node


def _dynamic(*forms: Form) -> bool:
    return any(not isinstance(size, int) for form in forms for size in (form.dims[1], form.dims[3]))


def _number(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
