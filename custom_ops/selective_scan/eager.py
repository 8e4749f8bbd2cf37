"""SelectiveScan in chunks of tokens: what `torch.ops.edgekit.selective_scan` runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgekit.custom_ops.selective_scan.reference import check_arguments

# Elements of the decays and inputs that one chunk holds at a time: they stay in a core's cache, and memory bounded.
CHUNK_ELEMENTS = 1 << 17
MAX_CHUNK = 256


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
    """The reference's answer; see there for arguments and errors. Not differentiable: it works in place.

    Decays, inputs and outputs are computed for a whole chunk of tokens at once; per token one `addcmul` remains, the
    recurrence itself. It takes no product or quotient of decays, so that it is exact whatever the sign of A.
    """
    check_arguments(u, delta, A, B, C, D, z)
    with torch.no_grad():
        dtype = torch.promote_types(u.dtype, torch.float32)
        steps = delta.to(dtype)
        if delta_softplus:
            steps = F.softplus(steps)
        y = _scan(u.to(dtype), steps, A.to(dtype), B.to(dtype), C.to(dtype))
        y.addcmul_(u.to(dtype), D.to(dtype).unsqueeze(-1))
        if z is not None:
            y.mul_(F.silu(z.to(dtype)))
        return y.to(u.dtype)


def _scan(
    u: torch.Tensor, delta: torch.Tensor, rates: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
) -> torch.Tensor:
    """y_t = C_t . h_t as `[B, C, L]`, from u, delta, A, B and C."""
    batch, channels, length = u.shape
    # The token leads and the channel comes last, so that one token's state is one run of memory.
    rates = rates.t().contiguous()  # [S, C]
    step = _tokens_first(delta).unsqueeze(2)  # [L, B, 1, C]
    driven = _tokens_first(u).unsqueeze(2).mul_(step)  # [L, B, 1, C]
    inputs, outputs = _tokens_first(inputs).unsqueeze(3), _tokens_first(outputs).unsqueeze(2)  # [L, B, S, 1], ..
    y = u.new_empty(length, batch, 1, channels)
    chunk = max(1, min(MAX_CHUNK, length, CHUNK_ELEMENTS // (batch * rates.numel())))
    h = u.new_zeros(batch, *rates.shape)  # [B, S, C]
    decays, states = (u.new_empty(chunk, *h.shape) for _ in range(2))  # [T, B, S, C], written again for each chunk
    tokens = list(zip(decays.unbind(), states.unbind(), strict=True))
    for start in range(0, length, chunk):
        part = slice(start, min(start + chunk, length))
        decay, state = decays[: part.stop - start], states[: part.stop - start]
        torch.mul(step[part], rates, out=decay).exp_()
        torch.mul(inputs[part], driven[part], out=state)  # delta_t B_t u_t, and in the loop h_t
        for decay_t, state_t in tokens[: len(state)]:
            h = state_t.addcmul_(decay_t, h)
        torch.matmul(outputs[part], state, out=y[part])
        h = h.clone()  # its place is written again
    return y.view(length, -1).t().contiguous().view(u.shape)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """`[B, X, L]` as a new, contiguous `[L, B, X]`. As a matrix: torch transposes those several times as fast."""
    batch, rows, length = x.shape
    return x.reshape(-1, length).t().clone(memory_format=torch.contiguous_format).view(length, batch, rows)
