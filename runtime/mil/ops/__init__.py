"""The kernels of all ops, one file per family. Semantics are those of coremltools' op documentation (opsets iOS15-18):
https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html
"""

from edgekit.runtime.mil.ops import (
    activation,
    attention,
    compressed,
    convolution,
    elementwise,
    gathering,
    images,
    indexing,
    layout,
    matmul,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resampling,
    sorting,
    tensors,
)
from edgekit.runtime.mil.registry import KERNELS

__all__ = [
    "KERNELS",
    "activation",
    "attention",
    "compressed",
    "convolution",
    "elementwise",
    "gathering",
    "images",
    "indexing",
    "layout",
    "matmul",
    "normalization",
    "pooling",
    "quantization",
    "recurrent",
    "reduction",
    "resampling",
    "sorting",
    "tensors",
]
