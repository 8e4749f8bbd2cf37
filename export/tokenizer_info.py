"""Which tokenizer belongs to a language model, and does it fit its vocabulary?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekit.errors import InputError, MissingDependencyError
from edgekit.export.calling import first_line
from edgekit.models.decoder_config import DecoderConfig
from edgekit.runtime.generation_info import TokenizerInfo

TOKENIZER = "tokenizer.json"
BYTES_VOCABULARY = 259


def tokenizer_of(name: str, config: DecoderConfig, folder: Path | None) -> TokenizerInfo:
    """The tokenizer of a model: `tokenizer.json` of its folder, or bytes for a vocabulary of 259.

    Raises:
        InputError: none that is known, or one that does not fit the vocabulary.
        MissingDependencyError: a tokenizer.json without the library that reads it.
    """
    size = config.vocab_size
    for token in (config.bos, config.pad, *config.eos):
        if token is not None and not 0 <= token < size:
            raise InputError(f"{name} names the token {token}, but its vocabulary has {size}; correct its config.json")
    if folder is not None and (folder / TOKENIZER).is_file():
        return _from_folder(folder, config)
    if size == BYTES_VOCABULARY:
        return TokenizerInfo("bytes", None, size, config.bos, config.eos, config.pad, add_bos=config.bos is not None)
    where = f"{folder} has no {TOKENIZER}" if folder is not None else f"{name} comes without a {TOKENIZER}"
    raise InputError(
        f"{where}, and a vocabulary of {size} is not that of bytes ({BYTES_VOCABULARY}): nothing says what its tokens "
        "mean. Export from a folder that holds the tokenizer, as save_pretrained writes it"
    )


def _from_folder(folder: Path, config: DecoderConfig) -> TokenizerInfo:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise MissingDependencyError("tokenizers", "text", f"reading {folder / TOKENIZER}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises Exception itself
        raise InputError(f"{folder / TOKENIZER} is no tokenizer: {first_line(error)}; fetch it again") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values(), default=-1)
    if not 0 <= highest < config.vocab_size:
        raise InputError(
            f"a tokenizer that does not fit the vocabulary: {folder / TOKENIZER} has tokens up to {highest}, the model "
            f"knows {config.vocab_size} (0..{config.vocab_size - 1}); take the tokenizer that belongs to the weights"
        )
    told = _settings(folder / "tokenizer_config.json")
    bos = config.bos if config.bos is not None else vocabulary.get(_content(told.get("bos_token")))
    end = vocabulary.get(_content(told.get("eos_token")))
    eos = config.eos or (() if end is None else (end,))
    pad = config.pad if config.pad is not None else vocabulary.get(_content(told.get("pad_token")))
    adds = told.get("add_bos_token")
    if not isinstance(adds, bool):  # newer folders leave it to the tokenizer itself
        adds = tokenizer.encode("a", add_special_tokens=True).ids[:1] == [bos]
    return TokenizerInfo("huggingface", TOKENIZER, config.vocab_size, bos, eos, pad, add_bos=adds and bos is not None)


def _content(token: object) -> str:
    """The text of a special token, which a file names by itself or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    return data if isinstance(data, dict) else {}
