"""Arithmetic, activations, matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from .case import Case, binary, normal, positive, truth, unary, unit, whole


def elementwise() -> Iterator[Case]:
    yield binary("add", torch.add)
    yield binary("add", torch.add, whole(-9, 9, 4, 1), whole(-9, 9, 3), label="int")
    yield binary("sub", torch.sub)
    yield binary("mul", torch.mul)
    yield binary("real_div", torch.div, y=positive(7, 1))
    yield binary("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"), y=positive(7, 1))
    numbers, divisors = whole(-9, 9, 11), np.array([1, -2, 3, -4, 5, -1, 2, -3, 4, -5, 7], np.int32)
    yield binary("floor_div", lambda x, y: torch.div(x, y, rounding_mode="floor"), numbers, divisors, label="int")
    yield binary("mod", torch.remainder, numbers, divisors, label="int")
    yield binary("mod", torch.remainder, y=positive(7, 1))
    yield binary("pow", torch.pow, positive(3, 4), normal(4))
    yield binary("maximum", torch.maximum)
    yield binary("minimum", torch.minimum)
    same = whole(0, 3, 4, 5)
    comparisons = {"equal": torch.eq, "not_equal": torch.ne, "greater": torch.gt, "greater_equal": torch.ge}
    for op, function in (comparisons | {"less": torch.lt, "less_equal": torch.le}).items():
        yield binary(op, function, same, whole(0, 3, 5))
    for op in ("logical_and", "logical_or", "logical_xor"):
        yield binary(op, getattr(torch, op), truth(4, 5), truth(5))
    yield unary("logical_not", torch.logical_not, truth(3, 5))
    for op in (
        "abs",
        "sign",
        "ceil",
        "floor",
        "exp",
        "sin",
        "cos",
        "tan",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "erf",
        "exp2",
    ):
        yield unary(op, getattr(torch, op))
    yield unary("round", torch.round, np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.375], np.float32))
    yield unary("sqrt", torch.sqrt, positive(3, 7))
    yield unary("square", torch.square)
    for op in ("asin", "acos", "atanh"):
        yield unary(op, getattr(torch, op), unit(3, 7))
    yield unary("rsqrt", lambda x: torch.rsqrt(x + 0.25), positive(3, 7), epsilon=np.float32(0.25))
    yield unary("inverse", lambda x: 1 / (x + 0.5), positive(3, 7), epsilon=np.float32(0.5))
    yield unary("log", lambda x: torch.log(x + 0.125), positive(3, 7), epsilon=np.float32(0.125))
    yield unary("clip", lambda x: x.clip(-0.5, 0.75), alpha=np.float32(-0.5), beta=np.float32(0.75))
    yield unary("threshold", lambda x: x.clip(0.25), alpha=np.float32(0.25))
    yield Case("cast", {"x": normal(3, 5) * 4}, lambda x: x.to(torch.int32), {"dtype": "int32"}, label="toward-zero")
    yield Case("cast", {"x": whole(-1, 2, 9)}, lambda x: x != 0, {"dtype": "bool"}, label="bool")
    yield Case("cast", {"x": whole(-70000, 70000, 9)}, lambda x: x.float(), {"dtype": "fp32"}, label="float")
    given = {"cond": truth(3, 5), "a": normal(3, 5), "b": normal(3, 5)}
    yield Case("select", given, lambda cond, a, b: torch.where(cond, a, b))
    yield unary("identity", lambda x: x)


def activations() -> Iterator[Case]:
    yield unary("relu", torch.relu)
    yield unary("relu6", F.relu6, normal(3, 7) * 5)
    yield unary("sigmoid", torch.sigmoid, normal(3, 7) * 30)
    yield unary("silu", F.silu)
    yield unary("softplus", F.softplus, normal(3, 7) * 30)
    yield unary("softsign", F.softsign)
    yield unary("elu", lambda x: F.elu(x, 1.5), alpha=np.float32(1.5))
    yield unary("leaky_relu", lambda x: F.leaky_relu(x, 0.25), alpha=np.float32(0.25))
    yield unary("thresholded_relu", lambda x: torch.where(x >= 0.5, x, 0.0), alpha=np.float32(0.5))
    yield unary("linear_activation", lambda x: 2.5 * x + 0.5, alpha=np.float32(2.5), beta=np.float32(0.5))
    yield unary("scaled_tanh", lambda x: 1.5 * torch.tanh(0.5 * x), alpha=np.float32(1.5), beta=np.float32(0.5))
    yield unary("sigmoid_hard", lambda x: (0.25 * x + 0.5).clip(0, 1), alpha=np.float32(0.25), beta=np.float32(0.5))
    clamped = lambda x: torch.minimum(torch.where(x >= 0, x, 0.25 * x), torch.tensor(0.75))  # noqa: E731
    yield unary("clamped_relu", clamped, alpha=np.float32(0.25), beta=np.float32(0.75))
    alpha, beta = np.array([0.25, 0.5, 2], np.float32), np.array([0.5, 1, 2], np.float32)
    image = normal(2, 3, 4, 5)
    yield unary("prelu", lambda x: F.prelu(x, torch.tensor(alpha)), image, alpha=alpha)
    parametric = lambda x: torch.tensor(alpha)[:, None, None] * F.softplus(torch.tensor(beta)[:, None, None] * x)  # noqa: E731
    yield unary("softplus_parametric", parametric, image, alpha=alpha, beta=beta)
    yield Case("gelu", {"x": normal(3, 7) * 2}, F.gelu, {"mode": "EXACT"}, label="exact")
    tanh = partial(F.gelu, approximate="tanh")
    yield Case("gelu", {"x": normal(3, 7) * 2}, lambda x: tanh(x), {"mode": "TANH_APPROXIMATION"}, label="tanh")
    logistic = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
    yield Case("gelu", {"x": normal(3, 7)}, logistic, {"mode": "SIGMOID_APPROXIMATION"}, label="sigmoid")
    for axis in (-1, 1):
        function = partial(torch.softmax, dim=axis)
        yield Case("softmax", {"x": normal(3, 5, 7) * 9}, lambda x, f=function: f(x), {"axis": axis}, label=str(axis))


def products() -> Iterator[Case]:
    weight, bias = normal(5, 7), normal(5)
    yield Case(
        "linear",
        {"x": normal(2, 3, 7)},
        lambda x: F.linear(x, torch.tensor(weight), torch.tensor(bias)),
        {"weight": weight, "bias": bias},
    )
    yield binary("matmul", torch.matmul, normal(2, 1, 3, 5), normal(4, 5, 7))
    yield binary("matmul", torch.matmul, normal(5), normal(5, 7), label="vector")
    turned = lambda x, y: x.mT @ y.mT  # noqa: E731
    yield Case(
        "matmul",
        {"x": normal(2, 5, 3), "y": normal(2, 7, 5)},
        turned,
        {"transpose_x": True, "transpose_y": True},
        label="transposed",
    )
    for equation, left, right in (
        ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 7)),
        ("chw,whr->chr", (3, 4, 5), (5, 4, 7)),
        ("nchw,nwhu->nchu", (2, 3, 1, 5), (1, 5, 4, 7)),
    ):
        function = partial(torch.einsum, equation)
        yield Case(
            "einsum",
            {"values": [normal(*left), normal(*right)]},
            lambda values, f=function: f(*values),
            {"equation": equation},
            label=f"{len(left)}d-{left[-2]}",
        )
    q, k, v = normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 4)
    attention = F.scaled_dot_product_attention
    tensors = {"query": q, "key": k, "value": v}
    name = "scaled_dot_product_attention"
    yield Case(name, tensors, lambda query, key, value: attention(query, key, value), opset="iOS18")
    for label, mask in (("bool", truth(5, 7) | np.eye(5, 7, dtype=bool)), ("float", normal(1, 5, 7))):
        yield Case(
            name,
            {**tensors, "attn_mask": mask},
            lambda query, key, value, attn_mask: attention(
                query, key, value, attn_mask.to(query.dtype) if attn_mask.dtype != torch.bool else attn_mask
            ),
            opset="iOS18",
            label=label,
        )
