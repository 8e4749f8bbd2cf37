"""Text to tokens and back: bytes, and two kinds of tokenizer.json as Hugging Face's models have them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from edgekit.errors import BundleError, InputError, MissingDependencyError
from edgekit.runtime.generation_info import TokenizerInfo
from edgekit.runtime.tokenization import BytesTokenizer, HuggingFaceTokenizer, load_tokenizer

BYTES = TokenizerInfo("bytes", None, 259, bos=256, eos=(257,), pad=258)
TEXTS = ["plain", "two  spaces and\nlines\t", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family, 🏳️‍🌈", "\x00 \ufffd end"]


def byte_level() -> bytes:
    """As Llama 3 and Qwen 2 have it: every byte is a token, some pairs of them too."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "th"), ("e", "r"), ("Ã", "¯")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return str(tokenizer.to_str()).encode()


def byte_fallback() -> bytes:
    """As Gemma 2 and Llama 2 have it: words begin with ▁, characters that the vocabulary lacks are spelt in bytes."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,.é", "▁t", "▁th"]
    vocabulary = {token: index for index, token in enumerate(letters)}
    merges = [("▁", "t"), ("▁t", "h")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=▁▁▁▁▁▁▁▁)"), "isolated")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    return str(tokenizer.to_str()).encode()


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback}


def hugging_face(kind: str = "byte level", **changes: Any) -> HuggingFaceTokenizer:
    info = {"kind": "huggingface", "file": "tokenizer.json", "vocab_size": 400, "bos": None} | changes
    return HuggingFaceTokenizer(TokenizerInfo(**info), KINDS[kind](), "b.edge/tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_tokens(text: str) -> None:
    tokenizer = BytesTokenizer(BYTES)
    tokens = tokenizer.encode(text)
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == text
    # A character comes with its last byte, never earlier and never in parts.
    assert all(text.encode().startswith("".join(pieces[: i + 1]).encode()) for i in range(len(pieces)))


def test_bytes_begin_with_bos_where_the_model_wants_it() -> None:
    info = TokenizerInfo("bytes", None, 259, bos=256, add_bos=True)
    assert BytesTokenizer(info).encode("a") == [256, 97]
    assert BytesTokenizer(info).decode([256, 97, 258, 98]) == "ab"


def test_bytes_that_are_no_character_become_replacement_characters() -> None:
    stream = BytesTokenizer(BYTES).stream()
    assert stream.push(0xE2) + stream.push(0x82) == ""
    assert stream.push(ord("x")) == "\ufffdx"
    assert stream.push(257) == ""
    assert stream.push(0xF0) == ""
    assert stream.finish() == "\ufffd"
    assert BytesTokenizer(BYTES).decode([0xFF, 97]) == "\ufffda"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "The", "that "], ids=["no prompt", "a word", "a space"])
def test_a_stream_gives_what_decoding_the_whole_gives(kind: str, text: str, prompt: str) -> None:
    tokenizer = hugging_face(kind)
    whole = tokenizer.encode(prompt + text)
    cut = len(tokenizer.encode(prompt)) if prompt else 0
    before, tokens = whole[:cut], whole[cut:]
    stream = tokenizer.stream(before)
    pieces = [stream.push(token) for token in tokens]
    given = "".join(pieces) + stream.finish()
    assert tokenizer.decode(before) + given == tokenizer.decode(whole)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_space_before_a_word_survives_at_the_start_of_an_answer() -> None:
    tokenizer = hugging_face("byte fallback")
    word = tokenizer.encode("x the")[-2:]  # ▁th, e
    assert tokenizer.decode(word) == "the"  # alone, a text begins without the space
    stream = tokenizer.stream(tokenizer.encode("x"))
    assert "".join(map(stream.push, word)) == " the"


@pytest.mark.parametrize("kind", KINDS)
def test_a_special_token_has_no_text_and_takes_no_space(kind: str) -> None:
    tokenizer = hugging_face(kind)
    eos = tokenizer.encode("<eos>")[-1:]
    prompt, word = tokenizer.encode("x"), tokenizer.encode("x the")[-2:]
    stream = tokenizer.stream(prompt)
    assert "".join(map(stream.push, [*word, *eos, *word])) == " the the"


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_run_of_broken_bytes_is_given_before_the_end(kind: str) -> None:
    tokenizer = hugging_face(kind)
    first, *rest = tokenizer.encode("日")[-3:]  # its three bytes
    stream = tokenizer.stream()
    given = [stream.push(first) for _ in range(20)]
    assert len("".join(given)) > 10
    given += [stream.push(token) for token in rest]
    assert "".join(given) + stream.finish() == tokenizer.decode([first] * 20 + rest)
    if kind == "byte level":  # the other one gives up all bytes in a row for one that is wrong
        assert given[-1].endswith("日")


def test_bos_is_added_once() -> None:
    bos = hugging_face().encode("<bos>x")[0]
    wanting = hugging_face(bos=bos, add_bos=True)
    assert wanting.encode("x")[:1] == [bos]
    assert wanting.encode("<bos>x") == wanting.encode("x")
    assert hugging_face(bos=bos).encode("x")[0] != bos
    with pytest.raises(InputError, match="gives no token"):
        wanting.encode("<bos>")


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(BYTES), hugging_face()], ids=["bytes", "huggingface"])
def test_what_is_no_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        tokenizer.encode("")
    with pytest.raises(InputError, match="must be a text, got bytes"):
        tokenizer.encode(b"bytes")
    with pytest.raises(InputError, match="no UTF-8 text: the byte 0xff at character 1"):
        tokenizer.encode("a" + b"\xff".decode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"U\+D800 at character 0 is half of a character"):
        tokenizer.encode("\ud800")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused() -> None:
    largest = max(json.loads(byte_level())["model"]["vocab"].values()) + 2
    with pytest.raises(BundleError, match=f"does not fit the model: .*ids up to {largest}, the model knows {largest}"):
        hugging_face(vocab_size=largest)
    assert hugging_face(vocab_size=largest + 1).encode("a")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_refused(content: bytes) -> None:
    info = TokenizerInfo("huggingface", "tokenizer.json", 400)
    with pytest.raises(BundleError, match=r"b\.edge/tokenizer\.json is no tokenizer"):
        HuggingFaceTokenizer(info, content, "b.edge/tokenizer.json")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgekit\[text\]'"):
        hugging_face()


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "packed"])
def test_a_bundle_brings_its_tokenizer(make_language_model: Any, packed: bool) -> None:
    bundle = make_language_model(vocabulary=400, tokenizer=byte_level())
    tokenizer = load_tokenizer(bundle.pack() if packed else bundle)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.decode(tokenizer.encode("the other")) == "the other"


def test_a_bundle_of_another_kind_has_none(tiny_bundle: Any) -> None:
    with pytest.raises(InputError, match="is no language model and has no tokenizer"):
        load_tokenizer(tiny_bundle)
