"""What a graph costs in the eyes of the lint, near enough to choose between ways of rewriting it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from edgekit.export.ane_rewriter import op_name

_MOVES = frozenset(
    (
        "permute", "transpose", "reshape", "view", "_unsafe_view", "unsqueeze", "squeeze", "cat", "slice", "select",
        "split_with_sizes", "split", "expand", "clone", "flip", "unflatten", "flatten", "stack",
    )
)  # fmt: skip
# The weights of the score in `edgekit.export.lint_score` and of the rule `linear-layout`.
_MOVED, _LINEAR = 0.25, 0.3


class _Counter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.written = self.moved = self.macs = self.linear = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = op_name(n)
        if not name or name == "getitem":
            return result
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        size = sum(tensor.numel() for tensor in tensors)
        self.written += size
        if name in _MOVES:
            self.moved += size
        if name in ("linear", "conv2d", "conv1d"):
            weight = self.fetch_args_kwargs_from_env(n)[0][1]
            macs = size * math.prod(weight.shape[1:])
            self.macs += macs
            self.linear += macs if name == "linear" else 0
        return result


def cost(module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
    """From 0: the share of numbers that ops only move, and of the multiply-accumulates in linear layers, weighted."""
    counter = _Counter(module)
    given = torch.utils._pytree.tree_leaves((tuple(args), dict(kwargs)))
    counter_args = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    with torch.no_grad():
        counter.run(*counter_args, enable_io_processing=False)
    return _MOVED * counter.moved / max(counter.written, 1) + _LINEAR * counter.linear / max(counter.macs, 1)
