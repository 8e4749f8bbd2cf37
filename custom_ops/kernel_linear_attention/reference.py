"""The PyTorch reference of KernelLinearAttention. It defines the answer; it is written to be read."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from edgekit.errors import ShapeError, UnknownNameError

FeatureMap = Literal["relu", "elu1", "identity"]
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)


def kernel_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: FeatureMap = "relu",
    eps: float = 1e-6,
) -> torch.Tensor:
    """Non-causal linear attention (Katharopoulos et al., arXiv 2006.16236) with means in place of sums.

    Args:
        q: queries `[B, H, N, D]`, any floating dtype.
        k: keys `[B, H, N, D]`, dtype of `q`.
        v: values `[B, H, N, E]`, dtype of `q`; E may differ from D.
        feature_map: phi, applied to every entry of `q` and `k`: `relu`, `elu1` (elu(x) + 1) or `identity`.
        eps: added to the denominator, so that a query whose features are all zero gives zeros.

    Returns:
        `[B, H, N, E]` in the dtype of `v`. float16 and bfloat16 inputs are computed in float32.

    Raises:
        ShapeError: the three shapes do not fit together.
        UnknownNameError: `feature_map` is not one of `FEATURE_MAPS`.
    """
    _check_shapes(q, k, v)
    if v.dtype in (torch.float16, torch.bfloat16):
        return kernel_linear_attention(q.float(), k.float(), v.float(), feature_map, eps).to(v.dtype)

    q, k = _features(q, feature_map), _features(k, feature_map)
    k = k / k.shape[-2]  # before the products: a half-precision copy of this graph must not overflow in them
    mean_key = k.sum(dim=-2, keepdim=True)  # [B, H, 1, D]
    mean_key_value = k.transpose(-2, -1) @ v  # [B, H, D, E]
    denominator = q @ mean_key.transpose(-2, -1) + eps  # [B, H, N, 1]
    return (q @ mean_key_value) / denominator


def _features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "elu1":
        return F.elu(x) + 1
    if feature_map == "identity":
        return x
    raise UnknownNameError("feature map", feature_map, FEATURE_MAPS)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim == v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]:
        return
    arrived = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in (("q", q), ("k", k), ("v", v)))
    raise ShapeError(f"kernel_linear_attention takes q and k [B, H, N, D] and v [B, H, N, E]; got {arrived}")
