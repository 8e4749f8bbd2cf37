"""What generating text gives: pieces while it runs, the whole at the end, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import InputError
from edgekit.runtime.sampling import Sampler
from edgekit.runtime.tokenization import TokenStream

MAX_NEW_TOKENS = 64
"""How many tokens are generated at most where nobody says."""


@dataclass(frozen=True)
class Piece:
    """One new token of one text.

    Attributes:
        row: which of the prompts it continues.
        text: what it adds to the text; empty in the midst of a character.
        token: its id.
        finish: why the text ends here, see `Generated`; None where it goes on.
    """

    row: int
    text: str
    token: int
    finish: str | None = None


@dataclass(frozen=True)
class Statistics:
    """What generating took. Times are in seconds and leave out what the caller did between two pieces.

    Attributes:
        prompt_tokens, new_tokens: of all texts together, without padding.
        passes: how many tokens per text each pass over the prompts took, padding included.
        load_seconds: loading both graphs.
        first_token_seconds: from the call to the first new token, without loading.
        prefill_seconds: reading the prompts.
        decode_seconds: reading the new tokens, and choosing all but the first.
        prompt_tokens_per_second: of reading the prompts.
        tokens_per_second: new tokens after the first of each text; None where there was none.
        cache_bytes: keys and values that the longest text could have needed.
        needed_bytes: what was expected to be needed besides the loaded model, see `MemoryPlan`.
        peak_memory_bytes: the largest resident memory of the process so far; None where the system does not tell.
        seed: what makes the draws repeatable; None where nothing was drawn.
    """

    prompt_tokens: int
    new_tokens: int
    passes: tuple[int, ...]
    load_seconds: float
    first_token_seconds: float
    prefill_seconds: float
    decode_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float | None
    cache_bytes: int
    needed_bytes: int
    peak_memory_bytes: int | None
    seed: int | None


@dataclass(frozen=True)
class Generated:
    """The answers, one per prompt.

    Attributes:
        texts: what follows each prompt.
        tokens: the ids, with the one that ended the text.
        finish: why each text ends: `end` (the model ended it), `stop` (a stop text came), `length` (it has
            `max_new_tokens`).
        statistics: what it took.
    """

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finish: tuple[str, ...]
    statistics: Statistics

    @property
    def text(self) -> str:
        """The answer to the one prompt. Raises `InputError` where there were several."""
        if len(self.texts) != 1:
            raise InputError(f"there are {len(self.texts)} texts; take them from .texts")
        return self.texts[0]


class Row:
    """One text in the making."""

    def __init__(
        self,
        prompt: list[int],
        sampler: Sampler,
        stream: TokenStream,
        ends: frozenset[int],
        stops: tuple[str, ...],
        limit: int,
    ) -> None:
        self.prompt = prompt
        self.sampler = sampler
        self.limit = limit
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self.finish: str | None = None
        self._stream, self._ends, self._stops = stream, ends, stops
        self._held = ""  # the end of the text so far, where a stop text may have begun

    def take(self, token: int) -> str:
        """Add a token; the text that it makes certain."""
        self.tokens.append(token)
        if token in self._ends:
            self.finish, text = "end", self._stream.finish()
        else:
            text = self._stream.push(token)
            if len(self.tokens) == self.limit:
                self.finish = "length"
                text += self._stream.finish()
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.finish, text = "stop", text[: min(places)]
        kept = 0 if self.finish is not None else _beginning(text, self._stops)
        self._held = text[len(text) - kept :]
        text = text[: len(text) - kept]
        self.texts.append(text)
        return text


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InputError(f"stop must be texts that are not empty, got {text!r}")
    return stops


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[len(text) - length :]) for stop in stops):
            return length
    return 0
