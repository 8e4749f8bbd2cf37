"""Which token comes next? The likeliest one, or a draw from the likeliest ones.

A draw follows nucleus sampling: Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020
(arXiv 1904.09751): the fewest tokens whose probabilities sum to at least `top_p`, drawn by their probabilities.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

_SEEDS = 2**63
_LIKELY = 512
_FRESH_SEEDS = 2**32  # short enough to be typed again


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen; checked on making.

    Args:
        temperature: 0 takes the likeliest token, of equals that with the lowest id. Above 0, tokens are drawn from
            softmax(logits / temperature): below 1 the likely ones gain, above 1 the unlikely ones.
        top_p: the probability, above 0 and at most 1, that the fewest likeliest tokens must reach together; only these
            may be drawn. 1 admits all. Says nothing at temperature 0.
        seed: 0..2^63-1, makes draws repeatable; None takes a fresh one (see `fixed`).

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature must be a number of at least 0, got {self.temperature!r}; 0 takes the likeliest token, "
                "0.7 is a usual choice for draws"
            )
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(
                f"top_p must be a number above 0 and at most 1, got {self.top_p!r}; 1 admits all tokens, 0.9 is a "
                "usual choice"
            )
        seed = self.seed
        if seed is not None and (
            not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < _SEEDS
        ):
            raise InputError(f"seed must be an integer from 0 to 2^63-1, got {seed!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without any draw."""
        return self.temperature == 0

    def fixed(self) -> Sampling:
        """The same with a seed: a fresh one where there is none and draws need one."""
        if self.greedy or self.seed is not None:
            return self
        return Sampling(self.temperature, self.top_p, secrets.randbelow(_FRESH_SEEDS))


class Sampler:
    """Chooses the tokens of one text.

    Args:
        sampling: how.
        row: the text's place among those generated together. Each has draws of its own, whatever becomes of the others:
            the first one's are those of a text generated alone.
    """

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._generator = None if sampling.greedy else np.random.default_rng([sampling.seed or 0, row])

    def choose(self, logits: NDArray[Any]) -> int:
        """The next token's id for logits `[V]`, any float dtype.

        Raises `InputError` where they hold NaN or +infinity, or nothing but -infinity (which rules a token out).
        """
        best = float(logits.max())  # NaN where any of them is
        if not math.isfinite(best):
            raise InputError(
                "the model's scores for the next token are no numbers (NaN or infinite); check the bundle with: "
                "edgekit verify"
            )
        if self._generator is None:
            return int(logits.argmax())
        with np.errstate(over="ignore"):  # of a tiny temperature: -infinity is then what is meant
            scores = (logits.astype(np.float64) - best) / self._sampling.temperature
        weights = np.exp(scores)
        wanted = self._sampling.top_p * weights.sum()
        tokens = None if self._sampling.top_p == 1 else _nucleus(weights, wanted)
        sums = np.cumsum(weights if tokens is None else weights[tokens])
        point = min(self._generator.random() * sums[-1], np.nextafter(sums[-1], 0))
        drawn = int(np.searchsorted(sums, point, side="right"))
        return drawn if tokens is None else int(tokens[drawn])


def _nucleus(weights: NDArray[np.float64], wanted: float) -> NDArray[np.int64]:
    """The fewest tokens, likeliest first and of equals the lower id first, whose weights sum to at least `wanted`.

    A large vocabulary is not sorted whole where a few likely tokens are enough.
    """
    for count in (_LIKELY, len(weights)):
        tokens = np.arange(len(weights))
        if count < len(weights):
            least = np.partition(weights, len(weights) - count)[len(weights) - count]
            tokens = np.flatnonzero(weights >= least)
        tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
        sums = np.cumsum(weights[tokens])
        if sums[-1] >= wanted:
            break
    return tokens[: int(np.searchsorted(sums, wanted)) + 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
