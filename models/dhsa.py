"""DHSA: dynamic hierarchical sparse attention, in a small language model of bytes.

Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", arXiv 2510.24606.
The authors put it into Gemma 2; `dhsa_bytes` is a Gemma 2 (arXiv 2408.00118) of a size that trains and runs on a CPU.
Larger models come from Hugging Face folders, see `edgekit.models.decoder_checkpoint`.
"""

from __future__ import annotations

from dataclasses import replace

from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.decoder_options import attention_from_options
from edgekit.models.registry import TokenInput, register_model
from edgekit.models.sparse_attention import SparseAttention

PAPER = "arXiv 2510.24606"

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 259
"""The vocabulary of bytes: 0..255 are themselves, then the marks of beginning, end and padding."""

BYTES = DecoderConfig(
    family="gemma2",
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context=8704,
    query_scale=32**-0.5,
    rope_theta=1e6,
    activation="gelu_pytorch_tanh",
    final_softcap=30.0,
    sliding_window=128,
    sliding_layers=(True, False, True, False),
    embedding_scale=192**0.5,
    bos=BOS,
    eos=(EOS,),
    pad=PAD,
    # What finds needles best at this size (benchmarks/results/dhsa_quality.md). As in the authors' code, question and
    # answer attend to everything.
    attention=SparseAttention(
        kind="dhsa",
        budget=512,
        block_size=32,
        nms_radius=4,
        dense_last=64,
        decode="dense",
        predictor_heads=4,
    ),
)


@register_model(
    family="dhsa",
    input=TokenInput(VOCAB_SIZE, BYTES.context, BOS, (EOS,), PAD),
    num_classes=VOCAB_SIZE,
    parameters=1_610_625,
    macs=1_635_392,
    paper=PAPER,
    summary="a small language model of bytes with DHSA, with weights",
    dataset="Python's docs",
    weights="dhsa_bytes.safetensors",
)
def dhsa_bytes(
    attention: str = "dhsa",
    budget: int = BYTES.attention.budget,
    block_size: int = BYTES.attention.block_size,
    local: int = BYTES.attention.local,
    decode: str = BYTES.attention.decode,
    share_boundaries: bool = True,
    share_masks: bool = False,
    heads: str = "kv",
    dense_last: int = BYTES.attention.dense_last,
    chunks_per_block: int = BYTES.attention.chunks_per_block,
    nms_radius: int = BYTES.attention.nms_radius,
    boundary_threshold: float | None = None,
    context: int = BYTES.context,
) -> Decoder:
    """A Gemma 2 of bytes with DHSA; the parameters are those of `SparseAttention`, `attention` being its kind."""
    options: dict[str, object] = {
        "attention": attention,
        "budget": budget,
        "block_size": block_size,
        "local": local,
        "decode": decode,
        "share_boundaries": share_boundaries,
        "share_masks": share_masks,
        "heads": heads,
        "dense_last": dense_last,
        "chunks_per_block": chunks_per_block,
        "nms_radius": nms_radius,
        "boundary_threshold": boundary_threshold,
        # The boundary predictor's sizes belong to the weights.
        "predictor_heads": BYTES.attention.predictor_heads,
        "predictor_hidden": BYTES.attention.predictor_hidden,
        "window": BYTES.attention.window,
    }
    return Decoder(replace(BYTES, attention=attention_from_options(options), context=context))
