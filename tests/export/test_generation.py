"""Generated text is PyTorch's own: a decoder through the exporter and the runtime against a greedy loop over it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import edgekit
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.models.sparse_attention import SparseAttention
from edgekit.runtime.generation import Generator, load_generator

NEW = 16
SENTENCE = "The keys of a block are read together, or not at all. "
PROMPTS = {
    "one token": "a",
    "a block less one": SENTENCE[:15],
    "several blocks": SENTENCE,
    "beyond the budget": 2 * SENTENCE,
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """One layer with all that a cache holds: keys, values, chunks; weights large enough that its text varies."""
    attention = SparseAttention(
        kind="dhsa",
        budget=64,
        block_size=16,
        local=16,
        chunks_per_block=4,
        nms_radius=2,
        predictor_heads=4,
        predictor_hidden=24,
    )
    config = DecoderConfig(
        family="gemma2",
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        context=256,
        query_scale=8**-0.5,
        attention_softcap=50.0,
        final_softcap=30.0,
        activation="gelu_pytorch_tanh",
        tied=False,
        bos=256,
        eos=(257,),
        pad=258,
        attention=attention,
    )
    decoder = Decoder(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return decoder


@pytest.fixture(scope="module")
def generator(decoder: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Generator:
    bundle = edgekit.export(decoder, "onnx", tmp_path_factory.mktemp("decoder"), name="tiny", check=False)
    return load_generator(bundle, threads=1)


def greedy(decoder: Decoder, prompts: list[list[int]], passes: Sequence[int]) -> list[list[int]]:
    """PyTorch's own loop: the prompts in these passes, filled up on the right, then the likeliest tokens."""
    width = sum(passes)
    ids = torch.tensor([[*tokens, *[258] * (width - len(tokens))] for tokens in prompts])
    mask = torch.ones(len(prompts), width + NEW, dtype=torch.int64)
    mask[:, :width] = ids != 258
    cache, done = decoder.empty_cache(len(prompts)), 0
    last: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    with torch.no_grad():
        for size in passes:
            start, done = done, done + size
            logits, cache = decoder.prefill(ids[:, start:done], mask[:, :done], cache)
            last = [logits[row, -1] if start < len(tokens) else last[row] for row, tokens in enumerate(prompts)]
        answers = [torch.stack(last).argmax(-1)]
        while len(answers) < NEW:
            done += 1
            logits, cache = decoder.decode(answers[-1][:, None], mask[:, :done], cache)
            answers.append(logits[:, -1].argmax(-1))
    return torch.stack(answers, dim=1).tolist()


def tokens_of(prompt: str) -> list[int]:
    return [256, *prompt.encode()]


@pytest.mark.parametrize("pass_tokens", [None, 32], ids=["one pass", "passes of 32"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_greedy_text_is_that_of_pytorch(
    decoder: Decoder, generator: Generator, prompt: str, pass_tokens: int | None
) -> None:
    result = generator.generate(prompt, max_new_tokens=NEW, pass_tokens=pass_tokens, eos=())
    passes = result.statistics.passes
    assert sum(passes) == len(tokens_of(prompt))
    assert max(passes) <= (pass_tokens or 256)
    (wanted,) = greedy(decoder, [tokens_of(prompt)], passes)
    assert list(result.tokens[0]) == wanted
    assert len(set(wanted)) > 4  # else a cache that is fed wrongly might not show


@pytest.mark.parametrize("pass_tokens", [None, 32], ids=["one pass", "passes of 32"])
def test_texts_together_are_those_of_pytorch_together(
    decoder: Decoder, generator: Generator, pass_tokens: int | None
) -> None:
    prompts = list(PROMPTS.values())
    together = generator.generate(prompts, max_new_tokens=NEW, pass_tokens=pass_tokens, eos=())
    wanted = greedy(decoder, list(map(tokens_of, prompts)), together.statistics.passes)
    assert [list(tokens) for tokens in together.tokens] == wanted
    ends = (together.tokens[0][2], together.tokens[2][5])
    early = generator.generate(prompts, max_new_tokens=NEW, pass_tokens=pass_tokens, eos=ends)
    assert len({len(tokens) for tokens in early.tokens}) > 1
    for tokens, whole in zip(early.tokens, together.tokens, strict=True):
        assert tokens == whole[: len(tokens)]


def test_texts_together_are_those_of_each_alone(generator: Generator) -> None:
    prompts = list(PROMPTS.values())
    together = generator.generate(prompts, max_new_tokens=NEW, eos=())
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert tokens == generator.generate(prompt, max_new_tokens=NEW, eos=()).tokens[0]
