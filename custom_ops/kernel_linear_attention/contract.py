"""What KernelLinearAttention accepts. Works on plain shapes and names, so that no part needs torch to check them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from edgekit.errors import InputError, ShapeError, UnknownNameError

FeatureMap = Literal["relu", "elu1", "identity"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)

NAME = "KernelLinearAttention"
NAMES = ("q", "k", "v")
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
    """Raise `UnknownNameError` for another feature map, `InputError` for an eps that is negative or not finite."""
    if feature_map not in FEATURE_MAPS:
        raise UnknownNameError("feature map", feature_map, FEATURE_MAPS)
    if not (math.isfinite(eps) and eps >= 0):
        raise InputError(f"KernelLinearAttention takes a finite eps >= 0; got {eps}. The usual one is 1e-6")
