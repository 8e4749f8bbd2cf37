"""How large a model is, and how much arithmetic one forward pass takes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters; a shared one counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Sequence[int] | Mapping[str, torch.Tensor | NDArray[Any]]) -> int:
    """Multiply-accumulates of one eval-mode forward pass, attention's matrix products included.

    Convolutions and matrix products count, element-wise work, gathers and sums do not, as in the papers' tables.

    Args:
        model: not changed. On the meta device it costs neither memory nor time.
        inputs: the shape of its one floating input with the batch, for instance `(1, 3, 224, 224)`, or its inputs by
            name.

    Raises:
        ShapeError: from zoo models, when the shape does not fit.
    """
    first = next(model.parameters(), torch.empty(0))
    counter = FlopCounterMode(display=False)
    copied = copy.deepcopy(model).eval()
    if isinstance(inputs, Mapping):
        arguments = {name: torch.as_tensor(value).to(first.device) for name, value in inputs.items()}
        with torch.no_grad(), counter:
            copied(**arguments)
    else:
        image = torch.zeros(tuple(inputs), dtype=first.dtype, device=first.device)
        with torch.no_grad(), counter:
            copied(image)
    return counter.get_total_flops() // 2
