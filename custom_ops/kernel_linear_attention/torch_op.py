"""`torch.ops.edgekit.kernel_linear_attention`: inference, export, training. Importing this module registers it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from edgekit.custom_ops.kernel_linear_attention import eager, reference

_NAME = "edgekit::kernel_linear_attention"
torch.library.define(_NAME, '(Tensor q, Tensor k, Tensor v, str feature_map="relu", float eps=1e-6) -> Tensor')
torch.library.impl(_NAME, "CompositeExplicitAutograd", eager.kernel_linear_attention)


def kernel_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str = "relu", eps: float = 1e-6
) -> torch.Tensor:
    """Call the op, which exporters keep as one node; `reference.kernel_linear_attention` says what it computes."""
    result: torch.Tensor = torch.ops.edgekit.kernel_linear_attention(q, k, v, feature_map, eps)
    return result


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str = "relu", eps: float = 1e-6
) -> torch.Tensor:
    reference.check_arguments(q, k, v, feature_map, eps)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


torch.library.register_fake(_NAME, _fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients through the reference, computed again: only q, k and v are kept for them."""
    if torch.is_grad_enabled():  # only with create_graph=True
        raise NotImplementedError("kernel_linear_attention has no second derivatives; its reference has them")
    with torch.enable_grad():
        q, k, v = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        output = reference.kernel_linear_attention(q, k, v, ctx.feature_map, ctx.eps)
        return *torch.autograd.grad(output, (q, k, v), gradient), None, None


torch.library.register_autograd(_NAME, _backward, setup_context=_save)


@register_flop_formula(torch.ops.edgekit.kernel_linear_attention)
def _flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-accumulate of the three matrix products: keys with values, queries with both means."""
    batch, heads, tokens, d = q
    return int(2 * batch * heads * tokens * d * (2 * v[3] + 1))
