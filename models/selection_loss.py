"""A loss that lets mean keys and mean queries find what single ones attend to.

Sparse attention scores a chunk of keys by their mean, and heads that share their keys by their mean query. Nothing in
dense training keeps such means meaningful: in a small model one head that looks up a fact and one that does not drown
each other. This loss compares the scores of means with the dense attention that they stand for, in the manner of
DeepSeek-V3.2's training of its indexer (arXiv 2512.02556), but for the model's own queries and keys.
"""

from __future__ import annotations

import math

import torch

CHUNK, BLOCK, FIRST = 8, 64, 64
SHARPNESS = 4.0


def selection_loss(
    q: torch.Tensor, k: torch.Tensor, answers: torch.Tensor, scale: float, sizes: tuple[int, ...] = (1, 16, 64)
) -> torch.Tensor:
    """Cross-entropy of mean scores against the dense attention that falls on far chunks; 0 where there is none.

    Args:
        q: `[B, Hq, N, D]` after their rotation; N a multiple of 64.
        k: `[B, Hkv, N, D]`.
        answers: bool `[B, N]`: which queries foresee an answer. Only these, and blocks of queries with one, count.
        scale: factor of the attention scores.
        sizes: queries whose mean is taken; each divides 64.

    Returns:
        A scalar: nats per unit of far attention, the mean over `sizes`.
    """
    total = q.new_zeros(())
    weight = q.new_zeros(())
    for row in range(len(q)):
        chosen = torch.unflatten(answers[row], 0, (-1, BLOCK)).any(1).nonzero().flatten()
        if not len(chosen):
            continue
        rows = (chosen.unsqueeze(1) * BLOCK + torch.arange(BLOCK)).flatten()
        keys = k[row].float()
        queries = torch.unflatten(q[row].float()[:, rows], 0, (len(keys), -1))  # [Hkv, group, R, D]
        with torch.no_grad():
            scores = queries @ keys.unsqueeze(1).transpose(2, 3) * scale
            scores = scores.masked_fill(torch.arange(keys.shape[1]) > rows.unsqueeze(1), -torch.inf)
            target = torch.unflatten(scores.softmax(-1).mean(1), 2, (-1, CHUNK)).sum(-1)  # [Hkv, R, chunks]
        chunks = torch.unflatten(keys, 1, (-1, CHUNK)).mean(2) * math.sqrt(CHUNK)
        starts = torch.arange(target.shape[2]) * CHUNK
        far = (starts >= FIRST) & (starts + CHUNK <= (rows // BLOCK - 1).unsqueeze(1) * BLOCK)  # [R, chunks]
        mean = queries.mean(1)
        for size in sizes:
            kept = torch.unflatten(answers[row][rows], 0, (-1, size)).any(1)
            means = torch.unflatten(mean, 1, (-1, size)).mean(2)[:, kept]
            seen = torch.unflatten(far, 0, (-1, size))[:, 0][kept]
            share = (torch.unflatten(target, 1, (-1, size)).mean(2)[:, kept]) * seen
            logits = (means @ chunks.transpose(1, 2) * (scale * SHARPNESS)).masked_fill(~seen, -1e4)
            total = total - (share * logits.log_softmax(-1)).sum() * size
            weight = weight + share.sum() * size
    return total / weight.clamp(min=1e-6)
