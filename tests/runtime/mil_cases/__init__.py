"""The cases of `test_mil_ops.py`: uses of ops with what PyTorch or numpy say of them, by family."""

from .arithmetic import activations, elementwise, products
from .case import Case, listed
from .images import images, quantized, recurrent
from .indexing import indexing
from .layers import convolutions, norms, pools, reductions
from .shaping import layouts, makers

FAMILIES = (
    elementwise,
    activations,
    products,
    convolutions,
    pools,
    norms,
    reductions,
    layouts,
    makers,
    indexing,
    images,
    quantized,
    recurrent,
)

__all__ = ["FAMILIES", "Case", "listed"]
