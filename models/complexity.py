"""How large a model is, and how much arithmetic one forward pass takes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Sequence


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of one eval-mode forward pass, attention's matrix products included.

    Convolutions and matrix products count, element-wise work does not, as in the papers' tables.

    Args:
        model: takes one floating tensor; it is not changed.
        input_shape: with the batch, for instance `(1, 3, 224, 224)`.

    Raises:
        ShapeError: from zoo models, when the shape does not fit.
    """
    first = next(model.parameters(), torch.empty(0))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(torch.zeros(tuple(input_shape), dtype=first.dtype, device=first.device))
    return counter.get_total_flops() // 2
