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

    from edgekit.models.decoder import Decoder


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


def count_macs_per_token(model: Decoder) -> int:
    """Multiply-accumulates that a language model spends on each token whatever the text: its linear layers.

    The logits and the boundary predictor count, the latter once per token where layers share boundaries. What grows
    with the number of tokens does not count: attention, and the choice of what it reads.
    """
    trunk = sum(module.weight.numel() for module in model.model.modules() if isinstance(module, nn.Linear))
    logits = model.config.vocab_size * model.config.hidden_size
    predictor, sparse = model.boundary_predictor, model.config.attention
    if predictor is None:
        return trunk + logits
    # Queries, keys and values once per token; what follows once for each token of the window around it.
    mixer, mlp = predictor.enc.mha, (layer for layer in predictor.mlp if isinstance(layer, nn.Linear))
    projections = mixer.in_proj_weight.numel() + 2 * predictor.window * mixer.out_proj.weight.numel()
    own = projections + sum(layer.weight.numel() for layer in mlp)
    return trunk + logits + own * (1 if sparse.share_boundaries else model.config.num_layers)
