"""KernelLinearAttention in few passes over memory: what `torch.ops.edgekit.kernel_linear_attention` runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.custom_ops.kernel_linear_attention.reference import check_arguments


def kernel_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str = "relu", eps: float = 1e-6
) -> torch.Tensor:
    """The reference's answer; see there for arguments and errors. Not differentiable: it works in place.

    The mean is taken of the `[D, E]` and `[D]` sums and not of the `[N, D]` keys, and the division is in place: beside
    the matrix products, the time goes into passes over tensors of N rows, and these are two fewer. The sums must then
    stay in the range of the dtype that is computed in; see `contract`.
    """
    check_arguments(q, k, v, feature_map, eps)
    with torch.no_grad():
        return _compute(q, k, v, feature_map, eps)


def _compute(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float) -> torch.Tensor:
    if q.dtype in (torch.float16, torch.bfloat16):
        return _compute(q.float(), k.float(), v.float(), feature_map, eps).to(q.dtype)
    k = _features(k, feature_map)
    tokens = k.shape[-2]
    mean_key = k.sum(dim=-2).div_(tokens).unsqueeze(-1)  # [B, H, D, 1]
    mean_key_value = (k.transpose(-2, -1) @ v).div_(tokens)  # [B, H, D, E]
    q = _features(q, feature_map)
    return (q @ mean_key_value).div_((q @ mean_key).add_(eps))


def _features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """As `reference.features`, in fewer passes."""
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "elu1":
        return x.clamp(max=0).exp_().add_(x.clamp(min=0))
    return x
