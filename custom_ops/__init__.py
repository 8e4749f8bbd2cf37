"""What each custom op means: contract, PyTorch reference, torch op, ONNX body. One folder per op.

Importing this package loads neither torch nor onnx. `register()` makes `torch.ops.edgekit.*` callable; the ONNX side
is in `edgekit.custom_ops.registry`.
"""

from __future__ import annotations

import importlib

__all__ = ["register"]

_TORCH_OPS = ("block_sparse_attention", "kernel_linear_attention", "selective_scan")


def register() -> None:
    """Make `torch.ops.edgekit.*` callable: for inference, training, `torch.compile` and `torch.export`.

    May be called any number of times. Each op's `torch_op` module also registers itself when it is imported.
    """
    for folder in _TORCH_OPS:
        importlib.import_module(f"edgekit.custom_ops.{folder}.torch_op")
