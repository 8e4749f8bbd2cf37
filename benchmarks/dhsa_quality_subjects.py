"""What `benchmarks.dhsa_quality` measures: the shipped language model under different attention, needles and text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgekit.models import create_model
from edgekit.models.decoder import Decoder
from edgekit.models.needles import Needle, needle
from edgekit.models.train_dhsa import corpus_text, exact_logits

KINDS = ("dense", "dhsa", "block", "window")
MODEL = "dhsa_bytes"
DENSE_LAST = 64  # the authors' instruction tokens
CONTEXT = 8192
REGIMES = {
    "sparse": (0, "sparse", "sparse throughout"),
    "question": (DENSE_LAST, "sparse", f"the last {DENSE_LAST} tokens of the prompt dense, generated ones sparse"),
    "authors": (DENSE_LAST, "dense", f"the last {DENSE_LAST} tokens of the prompt and generated ones dense"),
}
"""`dense_last`, `decode`, and what that is; the last is how the authors evaluate."""
REACHES = ((0, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
"""Where in a passage bits per byte are averaged."""


@dataclass(frozen=True)
class Setting:
    """One attention, in the words of `SparseAttention`; all but the kind is idle where the attention is dense."""

    kind: str
    budget: int = CONTEXT
    block_size: int = 64
    heads: str = "kv"
    chunks_per_block: int = 8
    nms_radius: int = 8
    decode: str = "sparse"
    dense_last: int = 0

    @property
    def text(self) -> str:
        """What was chosen for this kind."""
        if self.kind == "dense":
            return "dense"
        words = [f"blocks of {self.block_size}"]
        if self.kind in ("block", "dhsa"):
            words.append("per key head" if self.heads == "kv" else "heads together")
        if self.kind == "dhsa":
            words.append(f"{self.chunks_per_block} chunks a block, radius {self.nms_radius}")
        return ", ".join(words)

    def under(self, regime: str) -> Setting:
        """The same in one of `REGIMES`."""
        if self.kind == "dense":
            return self
        dense_last, decode, _ = REGIMES[regime]
        return replace(self, dense_last=dense_last, decode=decode)

    def within(self, budget: int) -> Setting:
        """The same at another budget."""
        return self if self.kind == "dense" else replace(self, budget=budget)

    def model(self) -> Decoder:
        """The shipped model with this attention."""
        return _model(self)


@dataclass(frozen=True)
class Cell:
    """Needles of one length and depth under one attention."""

    length: int
    depth: float
    tasks: int
    found: int


def candidates(kind: str, budget: int) -> list[Setting]:
    """The settings of a kind among which the best is chosen."""
    if kind == "dense":
        return [Setting(kind)]
    heads = ("kv", "shared") if kind in ("block", "dhsa") else ("kv",)
    # Block size, chunks per block, radius.
    sizes = ((16, 8, 2), (16, 8, 8), (32, 8, 4), (64, 8, 8), (64, 16, 2), (64, 32, 1))
    if kind != "dhsa":
        sizes = ((16, 8, 8), (32, 8, 8), (64, 8, 8))
    return [Setting(kind, budget, size, head, chunks, radius) for size, chunks, radius in sizes for head in heads]


def tasks(lengths: Iterable[int], depths: Iterable[float], trials: int, seed: int) -> list[tuple[float, Needle]]:
    """Needle tasks with their depths, each from a seed of its own: the same for every attention."""
    text = corpus_text("validation")
    return [
        (depth, needle(text, length, depth, np.random.default_rng([seed, length, round(1000 * depth), trial])))
        for length in lengths
        for depth in depths
        for trial in range(trials)
    ]


@torch.no_grad()
def is_found(model: Decoder, task: Needle) -> bool:
    """Whether greedy decoding gives every digit: one pass over the prompt, then token by token."""
    ids = torch.tensor([list(task.prompt)])
    if model.config.attention.kind == "dense":
        # Each digit after the right ones before it: all are right in just the same cases, in one fast pass.
        answer = torch.tensor(list(task.answer))
        whole = torch.cat([ids[0], answer[:-1]])
        logits = exact_logits(model, whole[None])[0, len(whole) - len(answer) :]
        return bool((logits.argmax(-1) == answer).all())
    mask = torch.ones_like(ids)
    logits, cache_ = model.prefill(ids, mask, model.empty_cache(1))
    for place, wanted in enumerate(task.answer):
        token = int(logits[0, -1].argmax())
        if token != wanted:
            return False
        if place + 1 < len(task.answer):
            mask = F.pad(mask, (0, 1), value=1)
            logits, cache_ = model.decode(torch.tensor([[token]]), mask, cache_)
    return True


def grid(setting: Setting, wanted: list[tuple[float, Needle]]) -> list[Cell]:
    """Needles found, by length and depth."""
    model = setting.model()
    counts: dict[tuple[int, float], list[bool]] = {}
    for depth, task in wanted:
        counts.setdefault((len(task.prompt), depth), []).append(is_found(model, task))
    return [Cell(length, depth, len(found), sum(found)) for (length, depth), found in counts.items()]


def passages() -> torch.Tensor:
    """Held-out text in pieces that do not overlap, int64 `[n, CONTEXT + 1]`."""
    text = corpus_text("validation")
    count = len(text) // (CONTEXT + 1)
    ids = np.frombuffer(text, dtype=np.uint8)[: count * (CONTEXT + 1)].reshape(count, -1)
    return torch.from_numpy(ids.astype(np.int64))


@torch.no_grad()
def bits(setting: Setting, texts: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean bits per byte of each text `[n, CONTEXT + 1]` within each of `REACHES`: `[n, len(REACHES)]`."""
    model = setting.model()
    rows = []
    for text in texts:
        logits = exact_logits(model, text[None, :-1])[0]
        entropy = F.cross_entropy(logits, text[1:], reduction="none") / math.log(2)
        rows.append([float(entropy[low:high].mean()) for low, high in REACHES])
    return np.asarray(rows)


def over_all(rows: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bits per byte of whole texts, `[n]`, from those of their `REACHES`."""
    sizes = np.asarray([high - low for low, high in REACHES])
    return np.asarray(rows @ sizes / sizes.sum())


def wilson(found: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.959964, found / of
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of)) / (1 + z * z / of)
    return max(0.0, middle - half), min(1.0, middle + half)


@cache
def _model(setting: Setting) -> Decoder:
    options = asdict(setting)
    kind = options.pop("kind")
    model = create_model(MODEL, attention=kind, **(options if kind != "dense" else {}))
    if not isinstance(model, Decoder):
        raise TypeError(f"{MODEL} is a {type(model).__name__}, not a Decoder")
    return model.eval()
