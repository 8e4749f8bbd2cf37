"""BlockSparseAttention: attention in which each block of queries reads only the blocks of keys that it lists.

Queries `[B, Hq, N, D]`, keys and values `[B, Hkv, M, D]`; `block_index` int32 `[B, Hm, ceil(N / block_q), K]` names the
key blocks of each query block. Over the keys j that a query i may see,

    o_i = sum_j softmax_j(scale q_i . k_j) v_j

Cost and memory grow with the number of listed blocks, not with N M. Which blocks to list is the model's decision, as in
BigBird (Zaheer et al., arXiv 2007.14062) or Native Sparse Attention (Yuan et al., arXiv 2502.11089); scores, softcap,
window and grouped heads follow the ONNX op Attention.
"""
