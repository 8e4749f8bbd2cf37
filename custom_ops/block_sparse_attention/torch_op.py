"""`torch.ops.edgekit.block_sparse_attention`: the eager implementation as an op of torch's, with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from edgekit.custom_ops.block_sparse_attention import eager
from edgekit.custom_ops.block_sparse_attention.reference import check, check_without_values

_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("edgekit::block_sparse_attention", mutates_args=())
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """See `edgekit.custom_ops.block_sparse_attention.reference`; memory is linear in N and M.

    On a device other than the CPU a block index out of range stops the device asynchronously, without its value.
    """
    attributes = check(q, k, v, block_index, block_q, block_k, causal, scale, softcap, window)
    return eager.forward(q, k, v, block_index, attributes)


@block_sparse_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int = 64,
    block_k: int = 64,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    check_without_values(q, k, v, block_index, block_q, block_k, causal, scale, softcap, window)
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("edgekit::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_index: torch.Tensor,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None,
    softcap: float,
    window: int,
) -> _Gradients:
    """The gradients of q, k, v. An op of its own, so that `torch.compile` need not trace its loops."""
    attributes = check(q, k, v, block_index, block_q, block_k, causal, scale, softcap, window)
    return eager.backward(grad, q, k, v, block_index, attributes)


@block_sparse_attention_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_index: torch.Tensor, *_attributes: Any
) -> _Gradients:
    dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.attributes = inputs[4:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    gradients = block_sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.attributes)
    return (*gradients, None, *(None for _ in ctx.attributes))


block_sparse_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.edgekit.block_sparse_attention)
def _flops(q: Any, k: Any, v: Any, block_index: Any, block_q: int = 64, block_k: int = 64, *_: Any, **__: Any) -> int:
    """Two per multiply-accumulate of both matrix products, as if every entry of the lists were another whole block."""
    batch, heads, queries, head_dim = q
    return int(4 * batch * heads * queries * head_dim * min(k[2], block_index[3] * block_k))
