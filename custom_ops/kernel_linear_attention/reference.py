"""The PyTorch reference of KernelLinearAttention. It defines the answer; it is written to be read."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.custom_ops.kernel_linear_attention.contract import check_attributes, check_dtypes, check_shapes


def kernel_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str = "relu", eps: float = 1e-6
) -> torch.Tensor:
    """Non-causal linear attention (Katharopoulos et al., arXiv 2006.16236) with means in place of sums.

    Args:
        q: queries `[B, H, N, D]`, float32, float16, bfloat16 or float64.
        k: keys `[B, H, N, D]`, dtype of `q`.
        v: values `[B, H, N, E]`, dtype of `q`; E may differ from D.
        feature_map: phi, applied to every entry of `q` and `k`: `relu`, `elu1` (x + 1 for x > 0, otherwise
            exp(x), which is elu(x) + 1) or `identity`.
        eps: added to the denominator, so that a query whose features are all zero gives zeros; 0 for none, otherwise a
            positive normal number of float32.

    Returns:
        `[B, H, N, E]` in the dtype of `q`. float16 and bfloat16 inputs are computed in float32 and rounded once.

    `contract` says how far sums and features may go.

    Raises:
        ShapeError: the three shapes do not fit together, or an axis is empty.
        UnknownNameError: `feature_map` is not one of `FEATURE_MAPS`.
        InputError: mixed or other dtypes; `eps` is negative, not finite, or no normal float32.
    """
    check_arguments(q, k, v, feature_map, eps)
    if q.dtype in (torch.float16, torch.bfloat16):
        return kernel_linear_attention(q.float(), k.float(), v.float(), feature_map, eps).to(q.dtype)

    q, k = features(q, feature_map), features(k, feature_map)
    k = k / k.shape[-2]  # before the products: a half-precision copy of this graph must not overflow in them
    mean_key = k.sum(dim=-2, keepdim=True)  # [B, H, 1, D]
    mean_key_value = k.transpose(-2, -1) @ v  # [B, H, D, E]
    denominator = q @ mean_key.transpose(-2, -1) + eps  # [B, H, N, 1]
    return (q @ mean_key_value) / denominator


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi(x), entry by entry, for one of `FEATURE_MAPS`; NaN stays NaN."""
    if feature_map == "relu":
        return F.relu(x)
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 would round exp(x) to multiples of 2^-24
    return x


def check_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, feature_map: str, eps: float) -> None:
    """The contract's checks on tensors; see `contract` for the errors."""
    check_attributes(feature_map, eps)
    check_dtypes(*(str(tensor.dtype).removeprefix("torch.") for tensor in (q, k, v)))
    check_shapes(q.shape, k.shape, v.shape)
