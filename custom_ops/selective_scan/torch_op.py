"""`torch.ops.edgekit.selective_scan`: inference, export, training. Importing this module registers it."""
# ruff: noqa: N803 - A, B, C and D are the paper's names

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from edgekit.custom_ops.selective_scan import eager, reference

_NAME = "edgekit::selective_scan"
_ARGUMENTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z=None, bool delta_softplus=False"
torch.library.define(_NAME, f"({_ARGUMENTS}) -> Tensor")
torch.library.impl(_NAME, "CompositeExplicitAutograd", eager.selective_scan)
# An op of its own, so that torch.compile does not unroll the recurrence over the tokens.
torch.library.define(f"{_NAME}_backward", f"(Tensor gradient, {_ARGUMENTS}) -> Tensor[]")


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """Call the op, which exporters keep as one node; `reference.selective_scan` says what it computes."""
    result: torch.Tensor = torch.ops.edgekit.selective_scan(u, delta, A, B, C, D, z, delta_softplus)
    return result


def _fake(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    reference.check_arguments(u, delta, A, B, C, D, z)
    return torch.empty(u.shape, dtype=u.dtype, device=u.device)


torch.library.register_fake(_NAME, _fake)


def _gradients(gradient: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    """Gradients of all given tensors through the reference, computed again: only the inputs are kept for them."""
    tensors = _tensors(arguments)
    softplus = len(arguments) == 8 and arguments[7]  # the dispatcher leaves out last arguments with their default value
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        u, delta, rates, weights_in, weights_out, skip, *gate = inputs
        z = gate[0] if gate else None
        output = reference.selective_scan(u, delta, rates, weights_in, weights_out, skip, z, softplus)
        return [tensor.contiguous() for tensor in torch.autograd.grad(output, inputs, gradient)]


def _fake_gradients(gradient: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in _tensors(arguments)]


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """u, delta, A, B, C, D and, where there is a gate, z."""
    return [argument for argument in arguments[:7] if argument is not None]


torch.library.impl(f"{_NAME}_backward", "CompositeExplicitAutograd", _gradients)
torch.library.register_fake(f"{_NAME}_backward", _fake_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():  # only with create_graph=True
        raise NotImplementedError("selective_scan has no second derivatives; its reference has them")
    tensors = ctx.saved_tensors
    gradients = torch.ops.edgekit.selective_scan_backward(gradient, *tensors, ctx.delta_softplus)
    return *gradients, *([None] * (8 - len(gradients)))


torch.library.register_autograd(_NAME, _backward, setup_context=_save)


@register_flop_formula(torch.ops.edgekit.selective_scan)
def _flops(u: Any, delta: Any, rates: Any, *_: Any, **__: Any) -> int:
    """Two per multiply-accumulate: each entry of the state takes one to advance and one for the output."""
    batch, channels, length = u
    return int(2 * batch * channels * length * 2 * rates[1])
