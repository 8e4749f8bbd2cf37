"""Rotary position embedding (Su et al., arXiv 2104.09864), with the stretched frequencies of Llama 3.1."""

from __future__ import annotations

import math

import torch
from torch import nn

from edgekit.models.decoder_config import RopeScaling


class Rotary(nn.Module):
    """Positions to the cosines and sines of their angles; channel i turns with channel i + head_dim / 2."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        # On the CPU even where the weights are built on the meta device: it is not in checkpoints.
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / (theta ** (channels / head_dim))
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", _stretched(frequencies, scaling), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 `[B, N]` to cosines and sines float32 `[B, 1, N, head_dim / 2]`."""
        angles = positions.unsqueeze(1).unsqueeze(-1).float() * self.frequencies
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads `[B, H, N, D]`, turned by the angles whose cosines and sines `[B, 1, N, D / 2]` these are."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _stretched(frequencies: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    # How many turns a frequency makes within the original context: few are stretched, many are kept.
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies
