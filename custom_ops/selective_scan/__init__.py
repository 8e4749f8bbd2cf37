"""SelectiveScan: the state space recurrence of Mamba, whose step size, input and output weights depend on the token.

For inputs u and steps delta `[B, C, L]`, rates A `[C, S]`, weights B and C `[B, S, L]` and a skip D `[C]`, with a state
h `[B, C, S]` that starts at zero,

    h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t,    y_t = C_t . h_t + D u_t

Optional: delta is softplus(delta), and y is gated by silu(z). The state is float32 (float64 for float64 inputs).
Paper: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv 2312.00752.

`contract` checks arguments without torch; `reference` defines the answer in PyTorch, `eager` computes it faster,
`torch_op` is `torch.ops.edgekit.selective_scan`, and `onnx_op` the ONNX schema and function body.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.custom_ops.selective_scan.reference import selective_scan

__all__ = ["selective_scan"]


def __getattr__(name: str) -> Any:
    """The reference, on first use: the contract alone needs no torch."""
    if name == "selective_scan":
        from edgekit.custom_ops.selective_scan.reference import selective_scan

        return selective_scan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
