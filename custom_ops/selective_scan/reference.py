"""The PyTorch reference of SelectiveScan: the recurrence, one token after the other. It defines the answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.custom_ops.selective_scan.contract import check_dtypes, check_shapes


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 - the paper's names
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> torch.Tensor:
    """The selective state space recurrence (Gu and Dao, arXiv 2312.00752).

    Args:
        u: inputs `[B, C, L]`, float32, float16, bfloat16 or float64.
        delta: step sizes `[B, C, L]`, dtype of `u`.
        A: rates `[C, S]`, dtype of `u`; usually negative.
        B: input weights `[B, S, L]`, dtype of `u`.
        C: output weights `[B, S, L]`, dtype of `u`.
        D: weights of the skip connection `[C]`, dtype of `u`.
        z: a gate `[B, C, L]`, dtype of `u`; the output is multiplied by silu(z).
        delta_softplus: take softplus(delta), as torch computes it, for delta.

    Returns:
        `[B, C, L]` in the dtype of `u`. float16 and bfloat16 inputs are computed in float32 and rounded once.

    Raises:
        ShapeError: the shapes do not fit together, or an axis is empty.
        InputError: mixed or other dtypes.
    """
    check_arguments(u, delta, A, B, C, D, z)
    if u.dtype in (torch.float16, torch.bfloat16):
        gate = None if z is None else z.float()
        y = selective_scan(
            u.float(), delta.float(), A.float(), B.float(), C.float(), D.float(), gate, delta_softplus=delta_softplus
        )
        return y.to(u.dtype)

    if delta_softplus:
        delta = F.softplus(delta)
    h = torch.zeros_like(u[:, :, :1] * A)  # [B, C, S]
    outputs = []
    for t in range(u.shape[2]):
        u_t, delta_t = u[:, :, t, None], delta[:, :, t, None]  # [B, C, 1]
        b_t, c_t = B[:, None, :, t], C[:, None, :, t]  # [B, 1, S]
        h = torch.exp(delta_t * A) * h + delta_t * b_t * u_t
        outputs.append((h * c_t).sum(dim=-1) + D * u[:, :, t])
    y = torch.stack(outputs, dim=-1)
    return y if z is None else y * F.silu(z)


def check_arguments(*tensors: torch.Tensor | None) -> None:
    """The contract's checks on u, delta, A, B, C, D and z; see `contract` for the errors."""
    check_dtypes(*(None if tensor is None else str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
    check_shapes(*(None if tensor is None else tensor.shape for tensor in tensors))
