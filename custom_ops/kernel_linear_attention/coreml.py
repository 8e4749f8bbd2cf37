"""KernelLinearAttention in MIL: two matrix products and a sum, in any precision, at any deployment target.

In half precision the plain sums overflow: with 64 features and standard normal inputs from 576 tokens on. Here

    k' = a phi(k),   S = (k'^T v) b,   s = (sum_j k'_j) b,   q' = f phi(q),   o = q' S / (q' s + f eps)

with a b = 1 / N, so that S and s are the contract's means. a is near N^-1/2. Were it 1 / N, features below 0.25 would
be subnormal at 4,096 tokens in half precision, and some hardware takes these for 0; were it 1, sums would overflow.
Now k'^T v stays below 65,504 while |phi(k)| |v| averages less than 65,504 N^-1/2 (1,023 at 4,096 tokens), and all that
follows is bounded by the largest |phi(q)|, |phi(k)| and |v|. f is near 1 / D. a and f are powers of two: scaling
rounds nothing. In half precision a small f eps becomes 0 or the smallest subnormal number, so a denominator of 0 is
replaced by 1: a query without features gives zeros there too.

Hardware may also add up in half precision, where a sum of thousands of like terms stands still: at 4,096 tokens that
is an error of 2 to 10 %. So from `SPLIT` tokens on (where their number is fixed) k' and v are cut into about N^1/2
runs of tokens, each run has its own k'^T v and sum, and these are added up. The work is the same, the memory N^1/2 D E
per head.

Batch, heads and tokens may be dynamic (up to 65,504 tokens in half precision). Core ML has no op for the whole; all of
these ops may run on the Neural Engine but for `select` and `equal` on `[B, H, N, 1]`.
"""

from __future__ import annotations

import math
from typing import Any

from edgekit.custom_ops.coreml_graph import Graph, arguments, fixed, number
from edgekit.custom_ops.kernel_linear_attention.contract import NAME, NAMES, check_attributes
from edgekit.errors import ExportError

SPLIT = 512
"""From so many tokens on, sums over tokens are sums of about N^1/2 sums."""


def lower(context: Any, node: Any) -> None:
    """Lower one node. Raises `ExportError` for a symbolic D, else as `contract.check_attributes`."""
    given = arguments(context, node, (*NAMES, "feature_map", "eps"), NAMES)
    q, k, v = (given[name] for name in NAMES)
    feature_map, eps = given.get("feature_map", "relu"), float(given.get("eps", 1e-6))
    check_attributes(feature_map, eps)
    head_dim = fixed(q.shape[3])
    if head_dim is None:
        raise ExportError(f"{NAME} needs a fixed head_dim in Core ML; got q of shape {list(q.shape)}")

    g = Graph(node.name)
    shrink = 2.0 ** -math.ceil(math.log2(head_dim))
    q, k = (_features(g, x, feature_map) for x in (q, k))
    q = g.scaled(q, shrink)
    tokens = fixed(k.shape[2])
    if tokens is None:
        before = after = _inverse_root(g, k)
        k = g.op("mul", x=k, y=before)
    else:
        half = 2.0 ** -round(math.log2(tokens) / 2)
        k, after = g.scaled(k, half), number(1 / (tokens * half), k)
    mean_key_value, mean_key = (g.op("mul", x=x, y=after) for x in _sums(g, k, v))
    numerator = g.op("matmul", x=q, y=mean_key_value)
    denominator = g.op("matmul", x=q, y=mean_key, transpose_y=True)  # [B, H, N, 1]
    denominator = g.op("add", x=denominator, y=number(eps * shrink, q))
    empty = g.op("equal", x=denominator, y=number(0.0, q))
    denominator = g.op("select", cond=empty, a=number(1.0, q), b=denominator)
    context.add(g.op("real_div", x=numerator, y=denominator, name=node.name))


def _sums(g: Graph, k: Any, v: Any) -> tuple[Any, Any]:
    """sum_j k_j v_j^T `[B, H, D, E]` and sum_j k_j `[B, H, 1, D]`; of many tokens as sums of sums."""
    heads, tokens, head_dim, width = (fixed(size) for size in (*k.shape[1:], v.shape[3]))
    if tokens is None or tokens < SPLIT or heads is None or width is None:
        return g.op("matmul", x=k, y=v, transpose_x=True), g.op("reduce_sum", x=k, axes=[2], keep_dims=True)
    size = 2 ** round(math.log2(tokens) / 2)
    groups = -(-tokens // size)
    k, v = (g.reshape(g.padded(x, 2, groups * size - tokens), -1, groups, size, x.shape[3]) for x in (k, v))
    products = g.op("reduce_sum", x=g.op("matmul", x=k, y=v, transpose_x=True), axes=[1], keep_dims=False)
    keys = g.op("reduce_sum", x=g.op("reduce_sum", x=k, axes=[2], keep_dims=True), axes=[1], keep_dims=False)
    return g.reshape(products, -1, heads, head_dim or -1, width), g.reshape(keys, -1, heads, 1, head_dim or -1)


def _inverse_root(g: Graph, k: Any) -> Any:
    """N^-1/2 as a scalar, for a symbolic N."""
    shape = g.op("shape", x=k)
    tokens = g.op("slice_by_index", x=shape, begin=[2], end=[3], squeeze_mask=[True])
    return g.op("rsqrt", x=g.cast(tokens, "fp16" if number(0.0, k).itemsize == 2 else "fp32"))


def _features(g: Graph, x: Any, feature_map: str) -> Any:
    """phi(x). elu1 is exp(x) up to 0 and x + 1 above; MIL's elu, plus 1, would lose the digits of small exp(x)."""
    if feature_map == "relu":
        return g.op("relu", x=x)
    if feature_map == "elu1":
        return g.op("add", x=g.op("exp", x=g.op("minimum", x=x, y=number(0.0, x))), y=g.op("relu", x=x))
    return x
