"""`fuse`: the exact re-parameterisation of a trained model for deployment.

At inference a batch norm is a fixed affine map per channel, so it folds into the convolution or linear layer beside
it (Jacob et al., arXiv 1712.05877, section 3.2), and x + depthwise(x) is one depthwise convolution whose centre tap
is one larger (RepVGG, Ding et al., arXiv 2101.03697). The arithmetic is done in float64 and rounded once.

A module that knows a cheaper form of itself derives from `Fusable`.
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import pairwise
from typing import TypeGuard, TypeVar

import torch
from torch import nn

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class Fusable(nn.Module):
    """A module that can be replaced, in eval mode, by an equal but cheaper one."""

    def fuse(self) -> nn.Module:
        """The replacement, which may be this module, changed. Its children are fused already."""
        raise NotImplementedError


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, with what is constant at inference folded into the weights.

    Every `Fusable` is replaced by what its `fuse` returns; then, in each plain `nn.Sequential`, Conv2d -> BatchNorm2d
    and BatchNorm2d -> unpadded Conv2d neighbours become one convolution and an `nn.Identity`, which keeps the keys of
    the other layers. Shared, hooked and parametrised layers stay as they are. The answers are the same up to float
    rounding. A model without such parts, or one fused before, comes back as an eval-mode copy. `model` is not changed.
    """
    fused = copy.deepcopy(model)
    with torch.no_grad():
        fused = _replace_fusable(fused, {})
        uses = Counter(module for _, module in fused.named_modules(remove_duplicate=False))
        for module in list(uses):
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                _fold_neighbours(module, uses)
    return fused.eval()


def _replace_fusable(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Children first, each shared module once."""
    if module not in done:
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _replace_fusable(child, done)
        done[module] = module.fuse() if isinstance(module, Fusable) else module
    return done[module]


def _fold_neighbours(sequence: nn.Sequential, uses: Counter[nn.Module]) -> None:
    for left, right in pairwise(range(len(sequence))):
        first, second = sequence[left], sequence[right]
        if uses[first] > 1 or uses[second] > 1:
            continue
        if _is_plain_conv(first) and _is_plain_norm(second):
            sequence[left], sequence[right] = fold_norm_after(first, second), nn.Identity()
        elif _is_plain_norm(first) and _is_plain_conv(second) and second.padding in ((0, 0), "valid"):
            sequence[left], sequence[right] = nn.Identity(), fold_norm_before(first, second)


def fold_norm_after(layer: Layer, norm: BatchNorm) -> Layer:
    """The layer equal to `norm(layer(x))`, for a batch norm over the layer's output channels."""
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.double() * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    return _with_weights(layer, weight, _bias(layer) * scale + shift)


def fold_norm_before(norm: BatchNorm, layer: Layer) -> Layer:
    """The layer equal to `layer(norm(x))`. A convolution must not pad: its zeros would have to become shifts."""
    scale, shift = _scale_and_shift(norm)
    weight = layer.weight.double()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    # The input channels that each output channel reads, in the layout of the weight.
    channels = torch.arange(len(scale), device=scale.device).reshape(groups, -1)
    channels = channels.repeat_interleave(weight.shape[0] // groups, dim=0)
    channels = channels.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    shifts = (weight * shift[channels]).flatten(1).sum(1)
    return _with_weights(layer, weight * scale[channels], _bias(layer) + shifts)


def scale_outputs(layer: Layer, scale: torch.Tensor) -> Layer:
    """The layer equal to `scale * layer(x)`, with one factor per output channel, shape `[out]`."""
    weight = layer.weight.double() * scale.double().reshape(-1, *[1] * (layer.weight.ndim - 1))
    return _with_weights(layer, weight, _bias(layer) * scale.double())


def add_identity(conv: nn.Conv2d) -> nn.Conv2d:
    """The depthwise convolution equal to `x + conv(x)`, for one that keeps the shape (see `keeps_shape_depthwise`)."""
    weight = conv.weight.double()
    tap = torch.zeros_like(weight)
    tap[:, :, conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = 1
    return _with_weights(conv, weight + tap, _bias(conv))


def keeps_shape_depthwise(module: nn.Module) -> bool:
    """Whether `module` is a depthwise Conv2d of odd kernel that is centred on each pixel and keeps height and width."""
    if not isinstance(module, nn.Conv2d) or not module.in_channels == module.out_channels == module.groups:
        return False
    centred = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return all(k % 2 for k in module.kernel_size) and module.stride == (1, 1) and module.padding == centred


def mean_layer(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The linear layer equal to the mean of two that read the same input."""
    weight = (first.weight.double() + second.weight.double()) / 2
    return _with_weights(first, weight, (_bias(first) + _bias(second)) / 2)


def fold_affine_before(norm: nn.LayerNorm, layer: nn.Linear) -> nn.Linear:
    """The linear layer that takes in the weight and bias of the layer norm before it."""
    weight = layer.weight.double()
    return _with_weights(layer, weight * norm.weight.double(), _bias(layer) + weight @ norm.bias.double())


def _scale_and_shift(norm: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift + norm.bias.double() if norm.affine else shift


def _bias(layer: nn.Conv2d | nn.Linear) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros(layer.weight.shape[0], dtype=torch.float64, device=layer.weight.device)
    return layer.bias.double()


def _with_weights(layer: Layer, weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """A copy of `layer` with these weights, in the dtype that it had."""
    replaced = copy.deepcopy(layer)
    replaced.weight = nn.Parameter(weight.to(layer.weight.dtype))
    replaced.bias = nn.Parameter(bias.to(layer.weight.dtype))
    return replaced


def _is_plain_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return type(module) is nn.Conv2d and not _hooked(module)


def _is_plain_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
