"""What the boundary predictor learns from: where the attention of later tokens changes from one token to the next.

"Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (Xiong et al. 2025,
arXiv:2510.24606): a gap is a boundary where the tokens on one side of it get at least twice the attention, from all
later queries together, of the tokens on the other side. The authors read this off a table of sums over the whole
matrix of attention weights. Here the matrix is made a few rows at a time, and what a gap needs is kept per token: sums
of positive numbers in float64, and memory linear in the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_ROWS = 128  # queries whose attention weights are held at a time
_SLACK = 1e-6  # added to both sides of the ratio


@dataclass(frozen=True)
class Masses:
    """The attention that the `window` tokens before and behind each gap get from all queries behind those.

    Attributes:
        before, behind: float64 `[B, N]`, means over the heads; entry i is for the gap behind token i. Tokens beyond the
            ends of the text get nothing.
    """

    before: torch.Tensor
    behind: torch.Tensor

    def labels(self) -> torch.Tensor:
        """How much each gap is a boundary, float32 `[B, N]`: 0.5 where one side gets twice the other's attention."""
        high, low = torch.maximum(self.before, self.behind), torch.minimum(self.before, self.behind)
        ratio = (high + _SLACK) / (low + _SLACK)
        return torch.sigmoid(2 * (ratio.log() - torch.tensor(2.0, dtype=ratio.dtype).log())).float()


def dense_attention_masses(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, side: int, scale: float, softcap: float = 0.0, window: int = 0
) -> tuple[torch.Tensor, Masses]:
    """Causal attention and the masses that it gives.

    Args:
        q: `[B, Hq, N, D]`.
        k, v: `[B, Hkv, N, D]`.
        side: tokens on either side of a gap.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        window: keys at this distance from the query or further are hidden; 0 for none.

    Returns:
        The attention's output `[B, Hq, N, D]`, and the masses.
    """
    batch, key_heads, count, _ = k.shape
    far = torch.zeros(batch, count, dtype=torch.float64)  # from the queries at least 2 * side behind a key
    near = torch.zeros(batch, count, 2 * side, dtype=torch.float64)  # of a query to the keys 0, 1, .. before it
    grouped = torch.unflatten(q, 1, (key_heads, -1)) * scale
    out = []
    for begin in range(0, count, _ROWS):
        end = min(begin + _ROWS, count)
        weights = _weights(grouped[:, :, :, begin:end], k[:, :, :end], begin, softcap, window)
        out.append((weights @ v[:, :, None, :end]).flatten(1, 2))
        mean = weights.flatten(1, 2).mean(dim=1, dtype=torch.float64)  # [B, rows, end]
        row = torch.arange(begin, end).unsqueeze(1)
        distance = row - torch.arange(end)
        far[:, :end] += torch.where(distance >= 2 * side, mean, 0).sum(dim=1)
        at = row - torch.arange(2 * side)
        close = mean.gather(2, at.clamp(min=0).expand(batch, -1, -1))
        near[:, begin:end] = torch.where(at >= 0, close, 0)
    return torch.cat(out, dim=2), _masses(far, near, side)


def _weights(q: torch.Tensor, k: torch.Tensor, begin: int, softcap: float, window: int) -> torch.Tensor:
    """The attention weights `[B, Hkv, group, rows, keys]` of the scaled queries from `begin` on."""
    scores = q @ k.unsqueeze(2).transpose(3, 4)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(begin, begin + q.shape[3]).unsqueeze(1) - torch.arange(k.shape[2])
    seen = (distance >= 0) & (distance < window) if window > 0 else distance >= 0
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=4)


def _masses(far: torch.Tensor, near: torch.Tensor, side: int) -> Masses:
    """Sums over both sides of each gap, from what far and near queries give to each key."""
    count = far.shape[1]
    # From "to the key d before me" to "from the query d behind me".
    by_key = torch.stack([F.pad(near[:, d:, d], [0, min(d, count)]) for d in range(2 * side)], dim=2)
    # [:, j, d]: what key j gets from the queries more than d behind it.
    beyond = far.unsqueeze(2) + F.pad(by_key[:, :, 1:], [0, 1]).flip(2).cumsum(2).flip(2)
    before, behind = torch.zeros_like(far), torch.zeros_like(far)
    for step in range(min(side, count)):
        before[:, step:] += beyond[:, : count - step, side + step]
    for step in range(1, min(side, count - 1) + 1):
        behind[:, : count - step] += beyond[:, step:, side - step]
    return Masses(before, behind)
