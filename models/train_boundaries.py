"""Train the boundary predictor of a language model whose own weights stay as they are.

After "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (Xiong et al. 2025,
arXiv:2510.24606) and its authors' settings: labels are the model's own dense attention (`boundary_labels`), hardened at
0.5; the loss is binary cross-entropy with positives weighted 1.3 and focal weights of exponent 2 (Lin et al. 2017,
arXiv:1708.02002); the optimizer is Adam; gaps near the ends of a text are left out.

A predictor learns what it will be asked for. Where all layers share their boundaries, it sees layer 0's keys, and a
label is the attention of all layers that select blocks together; otherwise it sees each such layer's keys with that
layer's labels. (The authors train on all layers' keys and then show it layer 0's.) Layers whose sliding window fits
into the budget select nothing and teach nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from edgekit.errors import InputError
from edgekit.models.boundaries import BoundaryPredictor
from edgekit.models.boundary_labels import Masses, dense_attention_masses

if TYPE_CHECKING:
    from edgekit.models.decoder import Decoder

POSITIVE_WEIGHT, FOCUS = 1.3, 2.0


@dataclass(frozen=True)
class BoundaryFigures:
    """How well logits above 0 meet the labels of texts that were not trained on.

    Attributes:
        gaps: how many were judged.
        base_rate: share of them that are boundaries; the precision of a guess.
        precision, recall, f1: of the predicted boundaries.
        average_precision: mean precision over all thresholds, weighted by the recall that each adds; a random order
            has the base rate.
    """

    gaps: int
    base_rate: float
    precision: float
    recall: float
    f1: float
    average_precision: float


@dataclass(frozen=True)
class BoundaryTraining:
    """What a training did.

    Attributes:
        steps, seed, learning_rate: as called.
        tokens: trained on, repeats counted.
        layers: whose attention gave the labels.
        first_loss, last_loss: means over the first and the last tenth of the steps.
        held_out: figures on the held-out texts.
    """

    steps: int
    seed: int
    learning_rate: float
    tokens: int
    layers: tuple[int, ...]
    first_loss: float
    last_loss: float
    held_out: BoundaryFigures


@dataclass(frozen=True)
class Lesson:
    """One batch as the predictor sees it: keys `[B, N, channels]` and labels `[B, N]` of one or more layers."""

    keys: list[torch.Tensor]
    labels: list[torch.Tensor]


def train_boundaries(
    model: Decoder,
    batches: Sequence[torch.Tensor],
    *,
    held_out: Sequence[torch.Tensor],
    steps: int,
    seed: int = 0,
    learning_rate: float = 1e-3,
    progress: Callable[[int, float], None] | None = None,
) -> BoundaryTraining:
    """Train `model.boundary_predictor` from new weights, in place; all other weights keep every bit.

    Args:
        model: a decoder with attention of kind "dhsa".
        batches: token ids, int64 `[B, N]` without padding; each step takes one, in a new random order each time round.
        held_out: the same, for the figures.
        steps: optimizer steps.
        seed: of the new weights and the order.
        learning_rate: of Adam. The authors' is 1e-4, for many more steps.
        progress: called after each step with its number, from 1, and the loss.

    Raises:
        InputError: a model without a predictor or without a layer that selects blocks; no batches; texts too short to
            judge a gap in; no steps.
    """
    predictor = _checked(model, batches, held_out, steps)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        predictor.load_state_dict(_like(predictor).state_dict())
    order = np.random.default_rng(seed)
    trained = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    losses: list[float] = []
    queue: list[int] = []
    tokens = 0
    for step in range(steps):
        queue = queue or [int(each) for each in order.permutation(len(batches))]
        batch = batches[queue.pop()]
        tokens += batch.numel()
        lesson = lesson_of(model, batch)
        optimizer.zero_grad()
        loss = torch.stack([_loss(predictor, *pair) for pair in zip(lesson.keys, lesson.labels, strict=True)]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(step + 1, losses[-1])
    tenth = max(1, steps // 10)
    return BoundaryTraining(
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        tokens=tokens,
        layers=tuple(_selecting(model)),
        first_loss=float(np.mean(losses[:tenth])),
        last_loss=float(np.mean(losses[-tenth:])),
        held_out=evaluate_boundaries(model, held_out),
    )


@torch.no_grad()
def evaluate_boundaries(model: Decoder, batches: Sequence[torch.Tensor]) -> BoundaryFigures:
    """The figures of `model.boundary_predictor` on token ids, int64 `[B, N]` each.

    Raises:
        InputError: as `train_boundaries`.
    """
    predictor = _checked(model, batches, batches, 1)
    logits, truths = [], []
    for batch in batches:
        lesson = lesson_of(model, batch)
        for keys, labels in zip(lesson.keys, lesson.labels, strict=True):
            inner = _inner(keys.shape[1], predictor.window)
            logits.append(predictor.logits(keys)[:, inner].flatten())
            truths.append(labels[:, inner].flatten() >= 0.5)
    return _figures(torch.cat(logits), torch.cat(truths))


@torch.no_grad()
def lesson_of(model: Decoder, batch: torch.Tensor) -> Lesson:
    """Run the model densely on token ids, int64 `[B, N]`, and note keys and labels."""
    sparse = model.config.attention
    selecting = _selecting(model)
    keys: list[torch.Tensor] = []
    masses: list[Masses] = []

    def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layer = model.layer_attention[index]
        out, mass = dense_attention_masses(
            q, k, v, side=sparse.window, scale=layer.scale, softcap=layer.softcap, window=layer.window
        )
        if index in selecting:
            masses.append(mass)
        if index == 0 if sparse.share_boundaries else index in selecting:
            keys.append(k.transpose(1, 2).flatten(2))
        return out

    model.model(batch, torch.arange(batch.shape[1]).unsqueeze(0), attend)
    if sparse.share_boundaries:
        before, behind = (
            torch.stack([getattr(mass, side) for mass in masses]).mean(dim=0) for side in ("before", "behind")
        )
        masses = [Masses(before, behind)]
    return Lesson(keys, [mass.labels() for mass in masses])


def _selecting(model: Decoder) -> list[int]:
    """The layers that select blocks."""
    sparse = model.config.attention
    return [index for index, layer in enumerate(model.layer_attention) if not sparse.covers(layer.window)]


def _checked(
    model: Decoder, batches: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor], steps: int
) -> BoundaryPredictor:
    predictor = model.boundary_predictor
    if predictor is None:
        raise InputError(
            f"a boundary predictor is trained for attention 'dhsa'; this model attends {model.config.attention.kind!r}"
        )
    if not _selecting(model):
        raise InputError(
            "every layer's sliding window fits into the budget, so that none selects blocks; choose a smaller budget"
        )
    if steps < 1 or not batches or not held_out:
        raise InputError(
            "training a boundary predictor needs at least 1 step, batches and held-out batches; "
            f"got {steps}, {len(batches)} and {len(held_out)}"
        )
    shortest = min(batch.shape[1] for batch in (*batches, *held_out))
    if shortest <= 4 * predictor.window:
        raise InputError(
            f"gaps within {2 * predictor.window} tokens of a text's ends are left out, which leaves none of "
            f"{shortest} tokens; give longer texts"
        )
    return predictor


def _like(predictor: BoundaryPredictor) -> BoundaryPredictor:
    """A new predictor of the same sizes."""
    return BoundaryPredictor(
        predictor.enc.mha.embed_dim,
        heads=predictor.enc.mha.num_heads,
        hidden=predictor.hidden,
        window=predictor.window,
        window_pool=predictor.pool is not None,
    )


def _inner(count: int, window: int) -> slice:
    """The gaps that count: neither side's labels reach beyond the text, nor do the windows next to them."""
    return slice(2 * window, count - 2 * window)


def _loss(predictor: BoundaryPredictor, keys: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The focal cross-entropy of keys `[B, N, channels]` against labels `[B, N]`."""
    inner = _inner(keys.shape[1], predictor.window)
    logits, truth = predictor.logits(keys)[:, inner], (labels[:, inner] >= 0.5).float()
    entropy = F.binary_cross_entropy_with_logits(
        logits, truth, pos_weight=torch.tensor(POSITIVE_WEIGHT), reduction="none"
    )
    probability = torch.sigmoid(logits)
    missed = torch.where(truth > 0, 1 - probability, probability)
    return (missed**FOCUS * entropy).mean()


def _figures(logits: torch.Tensor, truth: torch.Tensor) -> BoundaryFigures:
    """Figures of flat logits and bools."""
    found = logits > 0
    hits, positives = int((found & truth).sum()), int(truth.sum())
    precision, recall = hits / max(1, int(found.sum())), hits / max(1, positives)
    ranked = truth[torch.argsort(logits, descending=True, stable=True)].double()
    precisions = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    return BoundaryFigures(
        gaps=len(truth),
        base_rate=positives / len(truth),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / max(1e-12, precision + recall),
        average_precision=float((precisions * ranked).sum()) / max(1, positives),
    )
