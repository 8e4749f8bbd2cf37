"""KernelLinearAttention: non-causal attention whose cost grows linearly with the number of tokens.

For queries and keys `[B, H, N, D]`, values `[B, H, N, E]` and a feature map phi, each output token is

    o_i = phi(q_i)^T S / (phi(q_i)^T s + eps),    S = mean_j phi(k_j) v_j^T,    s = mean_j phi(k_j)

S and s are means: their size does not grow with N, so that half precision copies of this formula do not overflow. In
float32 a form of the op may add up first and divide then; `contract` says what that asks of the inputs.
Paper: Katharopoulos et al., "Transformers are RNNs", ICML 2020, arXiv 2006.16236.

`contract` checks arguments without torch; `reference` defines the answer in PyTorch, `eager` computes it faster,
`torch_op` is `torch.ops.edgekit.kernel_linear_attention`, and `onnx_op` the ONNX schema and function body.
"""

from typing import TYPE_CHECKING, Any

from edgekit.custom_ops.kernel_linear_attention.contract import FEATURE_MAPS, FeatureMap

if TYPE_CHECKING:
    from edgekit.custom_ops.kernel_linear_attention.reference import kernel_linear_attention

__all__ = ["FEATURE_MAPS", "FeatureMap", "kernel_linear_attention"]


def __getattr__(name: str) -> Any:
    """The reference, on first use: the contract alone needs no torch."""
    if name == "kernel_linear_attention":
        from edgekit.custom_ops.kernel_linear_attention.reference import kernel_linear_attention

        return kernel_linear_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
