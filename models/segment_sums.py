"""Sums of rows by group: by the tables that models take as inputs, and by pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


def table_sums(x: torch.Tensor, rows: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """The sums `[S, C]` over the groups that `SumTables` lists, of `x` float `[n, C]`.

    For export ONNX Gather, ReduceSum and Concat, which are deterministic and right with any number of threads; in eager
    PyTorch embedding_bag, which makes no copy of the gathered rows.

    Args:
        x: floats `[n, C]`.
        rows: int64 `[S, W]` in 0..n+Q: a row of `x`, or the sum of chunk e - n, or for n + Q nothing.
        chunks: int64 `[Q, L]` in 0..n+Q: a row of `x`, or from n on nothing.
    """
    zero = x.new_zeros(1, x.shape[1])
    chunk_sums = _sums(torch.cat([x, zero]), chunks.clamp(max=x.shape[0]))
    return _sums(torch.cat([x, chunk_sums, zero]), rows)


def _sums(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return F.embedding(table, x).sum(1)
    return F.embedding_bag(table, x, mode="sum")


@dataclass(frozen=True)
class Bags:
    """Which rows make up each sum: `rows[starts[t]:starts[t + 1]]` for sum t."""

    rows: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(source: torch.Tensor, target: torch.Tensor, count: int) -> Bags:
        """For pairs of a row and the sum it goes into, in any order."""
        if not bool((target[1:] >= target[:-1]).all()):
            target, order = torch.sort(target, stable=True)
            source = source[order]
        sums = torch.arange(count + 1, device=target.device)
        return Bags(source, torch.searchsorted(target.contiguous(), sums))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, C]` to the sums `[count, C]`."""
        if len(self.rows) == 0:
            return x.new_zeros(len(self.starts) - 1, x.shape[1]) + 0 * x.sum()
        return F.embedding_bag(self.rows, x, self.starts, mode="sum", include_last_offset=True)
