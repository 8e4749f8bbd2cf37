"""KernelLinearAttention: non-causal attention whose cost grows linearly with the number of tokens.

For queries and keys `[B, H, N, D]`, values `[B, H, N, E]` and a feature map phi, each output token is

    o_i = phi(q_i)^T S / (phi(q_i)^T s + eps),    S = mean_j phi(k_j) v_j^T,    s = mean_j phi(k_j)

S and s are means, not sums: their size does not grow with N, so that half precision does not overflow.
Paper: Katharopoulos et al., "Transformers are RNNs", ICML 2020, arXiv 2006.16236.
"""

from edgekit.custom_ops.kernel_linear_attention.reference import FEATURE_MAPS, FeatureMap, kernel_linear_attention

__all__ = ["FEATURE_MAPS", "FeatureMap", "kernel_linear_attention"]
