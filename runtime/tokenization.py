"""Text to token ids and back, piece by piece.

Two kinds: `bytes` needs nothing (a token is a byte of UTF-8 text), `huggingface` reads a `tokenizer.json` with the
library `tokenizers`, the extra `text`.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from edgekit.errors import BundleError, InputError, MissingDependencyError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generation_info import TokenizerInfo

BYTES = 256
_UNKNOWN = "\ufffd"
_SURROGATE_BYTES = range(0xDC80, 0xDD00)  # how Python writes a byte that is no UTF-8 in an argument
# A character has at most four bytes and a token at least one, so that no more than three tokens wait for a fourth.
_WAITING = 3
# Tokens of the prompt that the decoder sees before the first new one: what a token looks like depends on what precedes.
_BEFORE = 8


class TokenStream(ABC):
    """Turns the tokens of one answer into text as they come. Characters appear whole, when their last byte is there."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that is certain after this token; often empty in the midst of a character."""

    @abstractmethod
    def finish(self) -> str:
        """The rest, when no token follows: bytes that are no character become U+FFFD."""


class Tokenizer(ABC):
    """Token ids of texts, for a model of the vocabulary that `info` says.

    Attributes:
        info: the ids that begin, end and fill up a text.
    """

    def __init__(self, info: TokenizerInfo) -> None:
        self.info = info

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the one that begins a text where the model wants it.

        Raises:
            InputError: `text` is no text, cannot be written as UTF-8, is empty, or gives no token or one that the model
                does not know.
        """
        check_text(text)
        if not text:
            raise InputError("the prompt is empty; give the model a text to continue")
        ids = self._encode(text)
        bos = self.info.bos
        if not [token for token in ids if token != bos]:
            raise InputError(f"the prompt {text[:40]!r} gives no token; give the model a text to continue")
        if (worst := max(ids)) >= self.info.vocab_size:
            raise InputError(
                f"the prompt holds the token {worst}, but the model knows {self.info.vocab_size} tokens; the tokenizer "
                "belongs to another model, export the bundle again with its own"
            )
        if self.info.add_bos and bos is not None and ids[0] != bos:
            ids.insert(0, bos)
        return ids

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """The ids of a text that was checked, without the one that begins a text."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids; those that stand for no text are left out, bytes that are no character become U+FFFD."""

    @abstractmethod
    def stream(self, prompt: Sequence[int] = ()) -> TokenStream:
        """For the tokens that follow those of `prompt`."""


class BytesTokenizer(Tokenizer):
    """A token is a byte of UTF-8 text; ids from 256 on stand for no text."""

    def _encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < BYTES).decode("utf-8", errors="replace")

    def stream(self, prompt: Sequence[int] = ()) -> TokenStream:
        return _ByteStream()


class _ByteStream(TokenStream):
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < BYTES else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the library `tokenizers`.

    The model's special tokens are recognised where a prompt spells them out, such as `<start_of_turn>`; none are added
    but `bos`.

    Args:
        content: the file's bytes.
        where: the file's name for messages.

    Raises:
        BundleError: the file is no tokenizer, or has more tokens than the model.
        MissingDependencyError: the library `tokenizers` is not installed.
    """

    def __init__(self, info: TokenizerInfo, content: bytes, where: str) -> None:
        super().__init__(info)
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise MissingDependencyError("tokenizers", "text", f"the tokenizer of {where}") from error
        try:
            self._library: Any = Library.from_buffer(content)
        except Exception as error:  # the library raises plain Exceptions and ValueErrors
            raise BundleError(
                f"{where} is no tokenizer that the library tokenizers can read: {error}; export the bundle again"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        largest = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest < 0:
            raise BundleError(f"{where} knows no token; export the bundle again with the model's own tokenizer")
        if largest >= info.vocab_size:
            raise BundleError(
                f"the tokenizer does not fit the model: {where} has token ids up to {largest}, the model knows "
                f"{info.vocab_size} tokens, 0..{info.vocab_size - 1}; export the bundle again with the model's own "
                "tokenizer"
            )

    def _encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._library.decode(list(tokens), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int] = ()) -> TokenStream:
        return _RunningText(self, prompt)


class _RunningText(TokenStream):
    """Decodes the last tokens again with every new one, and gives what was added to their text.

    What a token looks like depends on its neighbours: the first token of a text loses its leading space with many
    tokenizers, and several tokens may make one character. So decoding begins some tokens back, at the end of the prompt
    at first, and a text that ends in U+FFFD waits for the tokens that complete its character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_BEFORE:])
        self._given = len(self._tokens)  # tokens whose text was given
        self._text = self._tokenizer.decode(self._tokens)  # of these

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(_UNKNOWN):
            return self._give(text, len(self._tokens))
        if len(self._tokens) - self._given <= _WAITING:
            return ""
        settled = len(self._tokens) - _WAITING  # what nothing will complete any more
        return self._give(self._tokenizer.decode(self._tokens[:settled]), settled)

    def finish(self) -> str:
        return self._give(self._tokenizer.decode(self._tokens), len(self._tokens))

    def _give(self, text: str, tokens: int) -> str:
        added = text[len(self._text) :]
        if added:  # those just given are the neighbours of the next ones; ones without a text are none
            self._tokens = self._tokens[self._given :]
            tokens -= self._given
        self._given = tokens
        self._text = self._tokenizer.decode(self._tokens[:tokens])
        return added


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a language model's bundle, packed or not.

    Raises:
        BundleError: it is damaged or does not fit the model.
        InputError: the bundle holds no language model.
        MissingDependencyError: it needs the library `tokenizers`, which is not installed.
    """
    generation = bundle.manifest.generation
    if generation is None:
        raise InputError(f"{bundle.name} is no language model and has no tokenizer")
    info = generation.tokenizer
    if info.file is None:
        return BytesTokenizer(info)
    return HuggingFaceTokenizer(info, bundle.read(info.file), f"{bundle.path.name}/{info.file}")


def check_text(text: object, what: str = "the prompt") -> None:
    """Raise `InputError` unless `text` is a text that UTF-8 can write: Python's may hold halves of characters."""
    if not isinstance(text, str):
        raise InputError(f"{what} must be a text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if code in _SURROGATE_BYTES:
            problem = f"the byte 0x{code - 0xDC00:02x} at character {error.start} belongs to no character"
        else:
            problem = f"U+{code:04X} at character {error.start} is half of a character"
        raise InputError(f"{what} is no UTF-8 text: {problem}; convert it to UTF-8 first") from error
