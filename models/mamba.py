"""The Mamba mixer over a sequence and its reverse, on SelectiveScan.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752; in both directions as
DynamicVis has it (Chen et al., arXiv 2503.16426). The keys are those of the authors' checkpoints.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.custom_ops.selective_scan.torch_op import selective_scan
from edgekit.models.fusion import Fusable

STATES = 16  # per channel
CONV_TAPS = 4


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, arXiv 1910.07467) with eps 1e-5, computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        # A quotient and not a product with rsqrt: onnxruntime knows this form as one op.
        normed = wide / torch.sqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return normed.to(x.dtype) * self.weight


class MambaMixer(Fusable):
    """One Mamba mixer over a sequence and over its reverse: the mean of both answers.

    The input and output projections act on single tokens, and the gate too, so that both directions share them.
    """

    A_log: nn.Parameter | None
    A: nn.Parameter | None

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.parts = [rank, STATES, STATES]
        self.A_log = nn.Parameter(torch.arange(1.0, STATES + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.conv1d = nn.Conv1d(inner, inner, CONV_TAPS, groups=inner)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.x_proj = nn.Linear(inner, sum(self.parts), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.register_parameter("A", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to the same shape.

        Tokens come last for the convolution and the scan, and first elsewhere: there to reverse them moves whole rows.
        """
        to_u, to_gate = self.in_proj.weight.chunk(2)
        u, gate = F.linear(x, to_u), F.silu(F.linear(x, to_gate))  # [B, L, 2C]
        both = torch.cat([u, u.flip(1)]).transpose(1, 2)  # [2B, 2C, L]
        both = F.silu(self.conv1d(F.pad(both, (CONV_TAPS - 1, 0))))
        low_rank, weights_in, weights_out = torch.split(_project(both, self.x_proj), self.parts, dim=1)
        delta = _project(low_rank, self.dt_proj)
        rates = -torch.exp(self.A_log) if self.A_log is not None else self.A
        assert rates is not None
        y = selective_scan(both, delta, rates, weights_in, weights_out, self.D, delta_softplus=True).transpose(1, 2)
        gated = (y[: x.shape[0]] + y[x.shape[0] :].flip(1)) * gate  # [B, L, 2C]
        scale = 0.5 if self.A_log is not None else 1.0
        return F.linear(gated, self.out_proj.weight * scale)

    def fuse(self) -> nn.Module:
        """A is computed, and out_proj takes the mean's factor 1/2."""
        if self.A_log is not None:
            self.A = nn.Parameter(-torch.exp(self.A_log.double()).to(self.A_log.dtype))
            self.A_log = None
            self.out_proj.weight.mul_(0.5)
        return self


def _project(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """The layer on `[B, C, L]`, channels second."""
    return F.conv1d(x, layer.weight.unsqueeze(-1), layer.bias)


class MambaBlock(nn.Module):
    """Norm and mixer around a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(dim)
        self.mamba_layer = MambaMixer(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, L, C]` to the same shape."""
        y: torch.Tensor = x + self.mamba_layer(self.pre_norm(x))
        return y
