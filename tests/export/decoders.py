"""Small random decoders, and folders of them as `save_pretrained` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.sparse_attention import SparseAttention

BLOCK = 8
SPARSE = SparseAttention(
    kind="block", budget=32, block_size=BLOCK, local=8, predictor_heads=2, predictor_hidden=16, chunks_per_block=4
)


def bytes_decoder(attention: SparseAttention = SPARSE, **changes: Any) -> Decoder:
    """Two layers of Gemma 2 on the vocabulary of bytes, for texts of up to 96 tokens."""
    settings: dict[str, Any] = {
        "family": "gemma2",
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "context": 96,
        "query_scale": 0.25,
        "activation": "gelu_pytorch_tanh",
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "sliding_window": 24,
        "sliding_layers": (True, False),
        "embedding_scale": 32**0.5,
        "bos": 256,
        "eos": (257,),
        "pad": 258,
        "attention": attention,
    }
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**settings, **changes})).eval()
    with torch.no_grad():  # larger than at the start of a training, so that the answers differ from token to token
        for name, parameter in decoder.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    return decoder


def llama_folder(folder: Path, *, tokens: int | None = 97, **changes: Any) -> Path:
    """Two layers of Llama with logits of their own, a vocabulary of 97, and a tokenizer of so many tokens."""
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig.from_huggingface(config))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    save_file({key: value.contiguous() for key, value in decoder.state_dict().items()}, folder / "model.safetensors")
    if tokens is not None:
        write_tokenizer(folder / "tokenizer.json", tokens)
    return folder


def write_tokenizer(path: Path, tokens: int) -> None:
    """A tokenizer of single characters: `<s>` is 1."""
    import tokenizers

    words = ["<unk>", "<s>", "</s>", "<end>", *(chr(32 + index) for index in range(tokens - 4))]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(path))
