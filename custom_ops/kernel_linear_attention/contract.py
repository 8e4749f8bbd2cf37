"""What KernelLinearAttention accepts. Works on plain shapes and names, so that no part needs torch to check them.

What holds of the numbers in every form of the op, all of which compute in float32 (or in float64 for float64):

* phi of elu1 is exp(x) for x <= 0, not elu(x) + 1, which would be a multiple of 2^-24. The native kernels take what is
  below 2^-64 (x < -44.3) for 0, and its relative error there grows to |x| times 6e-8.
* The op is defined by means over the keys, but a form may add up first and divide then: where the sums of phi(k_j) or
  of phi(k_j) v_j over all N keys pass float32's range, the answer may be infinite or NaN. float16 values never get
  there.
* Where phi(q_i)^T s + eps, s the mean of phi(k_j), is no normal number of float32, o_i may be infinite or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from edgekit.errors import InputError, ShapeError, UnknownNameError

FeatureMap = Literal["relu", "elu1", "identity"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)

NAME = "KernelLinearAttention"
NAMES = ("q", "k", "v")
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The positive normal numbers of float32: eps is one in ONNX and in the kernels, whatever it is in torch."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
SHAPES = (
    "KernelLinearAttention takes q and k [B, H, N, D] and v [B, H, N, E] with the same B, H and N, each axis at least 1"
)


def check_shapes(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> None:
    """Raise `ShapeError` unless q and k are `[B, H, N, D]` and v is `[B, H, N, E]`, no axis empty."""
    q, k, v = tuple(q), tuple(k), tuple(v)
    if len(q) == len(k) == len(v) == 4 and q == k and q[:3] == v[:3] and all(size >= 1 for size in (*q, v[3])):
        return
    raise ShapeError(f"{SHAPES}; got q {list(q)}, k {list(k)}, v {list(v)}")


def check_dtypes(q: str, k: str, v: str) -> None:
    """Raise `InputError` unless all three have the same one of `DTYPES` (names as torch and numpy have them)."""
    if q in DTYPES and q == k == v:
        return
    raise InputError(
        f"KernelLinearAttention takes q, k and v of one dtype out of {', '.join(DTYPES)}; got q {q}, k {k}, v {v}. "
        "Convert them to one dtype"
    )


def check_attributes(feature_map: str, eps: float) -> None:
    """Raise `UnknownNameError` for another feature map, `InputError` for an eps that is no finite float32 >= 0.

    An eps below the normal numbers of float32 is refused too: as 0, or with an inverse that overflows, it would not do
    what it is there for.
    """
    if feature_map not in FEATURE_MAPS:
        raise UnknownNameError("feature map", feature_map, FEATURE_MAPS)
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"KernelLinearAttention takes a finite eps >= 0; got {eps}. The usual one is 1e-6")
    if eps != 0 and not SMALLEST <= eps <= LARGEST:
        raise InputError(
            f"KernelLinearAttention takes eps 0 or a normal float32 number ({SMALLEST:g} to {LARGEST:g}); got {eps:g}. "
            "The usual one is 1e-6"
        )
