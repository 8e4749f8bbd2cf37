"""Train the small language model that ships with its weights: `python -m edgekit.models.train_dhsa`.

`dhsa_bytes` reads bytes. It learns from the docstrings that come with Python (`edgekit.models.corpus`), and from needle
tasks (`edgekit.models.needles`) to look up facts far back in its context. Sequences grow from 256 to 8192 tokens:
looking up is learned where many answers stand close together, and stretched afterwards. It attends densely all the
while; in the last phase a further loss (`edgekit.models.selection_loss`) makes what it attends to visible in the means
by which sparse attention selects. Then the boundary predictor of DHSA (arXiv 2510.24606) is trained on frozen weights.

The run is seeded and takes about an hour of one core. Matrix products are in bfloat16, so other processors and versions
round otherwise and give other weights. Beside the weights a JSON file records recipe and figures.

The shipped weights cannot be had again to the bit: their phases were trained by a forerunner of this script, on the
same sequences with the same losses, from other first weights. `origin` in their JSON says what differs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes

from edgekit.models import needles
from edgekit.models.complexity import count_parameters
from edgekit.models.corpus import PARTS, Part, load_corpus
from edgekit.models.decoder import Decoder
from edgekit.models.dense_attention import DenseAttention
from edgekit.models.dhsa_recipe import Phase, Recipe
from edgekit.models.registry import create_model
from edgekit.models.selection_loss import selection_loss
from edgekit.models.train_boundaries import BoundaryTraining, train_boundaries
from edgekit.models.training import reproducible
from edgekit.models.training_checkpoint import load_checkpoint, save_checkpoint
from edgekit.models.weights import state_dict_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

NAME = "dhsa_bytes"
SEPARATOR = b"\n\n\n"  # between documents
SPACING = 9000  # bytes between the passages on which bits per byte are measured
CHECKPOINT = f"{NAME}.checkpoint.pt"
CHECKPOINT_STEPS = 100


@dataclass(frozen=True)
class Training:
    """A finished run: the model with float16 numbers as its weights, in eval mode, and what to write beside them."""

    model: Decoder
    report: dict[str, Any]


class Losses(NamedTuple):
    """Scalars: mean cross-entropies in nats of text and of answers, and `selection_loss` of the last layer."""

    text: torch.Tensor
    answers: torch.Tensor
    selection: torch.Tensor


@dataclass
class Progress:
    """What `train_base` has reached, for its log: mean losses since the last look."""

    text_bits: list[float] = field(default_factory=list)
    answer_nats: list[float] = field(default_factory=list)

    def line(self) -> str:
        """Both means, and begin anew."""
        shown = f"text {np.mean(self.text_bits):.3f} bits per byte, answers {np.mean(self.answer_nats):.3f} nats"
        self.text_bits.clear()
        self.answer_nats.clear()
        return shown


class BlockedAttention:
    """Dense attention for training: that of sliding layers in blocks of their window, so that it costs no more.

    Args:
        decoder: whose layers these are.
        count: tokens per row.

    Attributes:
        last: queries and keys of the last call.
    """

    def __init__(self, decoder: Decoder, count: int) -> None:
        self.layers = decoder.layer_attention
        self.count = count
        self.dense = DenseAttention(self.layers, count, None, torch.device("cpu"))
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q `[B, Hq, N, D]`, k and v `[B, Hkv, N, D]` to `[B, Hq, N, D]`."""
        attention = self.layers[layer]
        window = attention.window
        groups = q.shape[1] // k.shape[1]
        q, k = q.to(v.dtype), k.to(v.dtype)
        self.last = q, k
        if not window or attention.softcap or self.count % window or self.count <= 2 * window:
            return self.dense(layer, q, k, v)
        blocks = self.count // window

        def reach(x: torch.Tensor) -> torch.Tensor:
            x = torch.unflatten(x, 2, (blocks, window))
            before = F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
            both = torch.cat([before, x], dim=3)  # [B, Hkv, blocks, 2 * window, D]
            return both.transpose(1, 2).flatten(0, 1).repeat_interleave(groups, dim=1)

        own = torch.unflatten(q, 2, (blocks, window)).transpose(1, 2).flatten(0, 1)
        mask = self._mask(window, q.shape[0])
        out = F.scaled_dot_product_attention(own, reach(k), reach(v), attn_mask=mask, scale=attention.scale)
        return torch.unflatten(out, 0, (-1, blocks)).transpose(1, 2).flatten(2, 3)

    def _mask(self, window: int, batch: int) -> torch.Tensor:
        """bool `[batch * blocks, 1, window, 2 * window]`; the first block of a row has none before it."""
        if (window, batch) not in self._masks:
            distance = torch.arange(window).unsqueeze(1) + window - torch.arange(2 * window)
            seen = (distance >= 0) & (distance < window)
            first = seen & (torch.arange(2 * window) >= window)
            row = torch.stack([first] + [seen] * (self.count // window - 1))
            self._masks[window, batch] = row.repeat(batch, 1, 1).unsqueeze(1)
        return self._masks[window, batch]


def corpus_text(part: Part) -> bytes:
    """All documents of a part of the corpus, one after the other."""
    return SEPARATOR.join(load_corpus(part).documents)


def training_batch(
    text: bytes, phase: Phase, length: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Sequences of `length + 1` bytes: ids int64 and kinds int8, both `[B, length + 1]`; see `needles.TEXT`."""
    rows = max(1, phase.tokens // length)
    ids = np.empty((rows, length + 1), dtype=np.int64)
    kinds = np.empty((rows, length + 1), dtype=np.int8)
    facts, questions, pool = phase.ranges(length)
    for row in range(rows):
        kind = generator.random()
        if kind < phase.copies:
            made = needles.copy_sequence(text, length + 1, generator)
        elif kind < phase.copies + phase.texts:
            piece = np.frombuffer(needles.draw_text(text, length + 1, generator), dtype=np.uint8)
            made = piece, np.full(length + 1, needles.TEXT, dtype=np.int8)
        elif kind < phase.copies + phase.texts + phase.pairs:
            size = int(generator.integers(pool[0], pool[1] + 1))
            made = needles.pair_sequence(text, length + 1, size, phase.templates, generator, alike=phase.alike)
        else:
            stated = int(generator.integers(facts[0], facts[1] + 1))
            asked = min(stated, int(generator.integers(questions[0], questions[1] + 1)))
            made = needles.recall_sequence(
                text, length + 1, stated, asked, phase.templates, generator, alike=phase.alike
            )
        ids[row], kinds[row] = made
    return ids, kinds


def train(recipe: Recipe, log: Callable[[str], None] = print, *, checkpoint: Path | None = None) -> Training:
    """Train `dhsa_bytes` from its initialisation: all weights with dense attention, then the boundary predictor.

    Args:
        recipe: all hyper-parameters.
        log: takes a line now and then.
        checkpoint: a file for the state of the training with dense attention, written now and then; where it exists,
            the training goes on from it. None writes none. It is left where it is.

    Raises:
        InputError: a checkpoint that is damaged, or of another recipe.
    """
    started = time.perf_counter()
    with reproducible(recipe.threads, recipe.seed):
        dense = _built("dense")
        done = train_base(dense, recipe, log, checkpoint)
        training = finish(dense, recipe, started, log)
    if done:
        training.report["resumed_after_step"] = done  # `seconds` counts from there
    return training


def finish(dense: Decoder, recipe: Recipe, started: float, log: Callable[[str], None] = print) -> Training:
    """Train the boundary predictor on the weights of `dense`, round all to float16, and measure.

    Args:
        dense: a trained `dhsa_bytes` with dense attention.
        recipe: of the whole training.
        started: `time.perf_counter()` when it began.
        log: takes a line now and then.
    """
    model = _built("dhsa")
    model.load_state_dict({**model.state_dict(), **dense.state_dict()})
    boundaries = train_predictor(model, recipe, log)
    model.load_state_dict({key: value.half().float() for key, value in model.state_dict().items()})
    dense.load_state_dict({key: value for key, value in model.state_dict().items() if key in dense.state_dict()})
    model.eval()
    report: dict[str, Any] = {
        "model": NAME,
        "dataset": "docstrings of Python's standard library and the topics of its help, as bytes",
        "corpus": {part: {"bytes": load_corpus(part).bytes, "sha256": load_corpus(part).sha256} for part in PARTS},
        "recipe": asdict(recipe),
        "tokens": sum(phase.steps * phase.tokens for phase in recipe.phases),
        "boundaries": asdict(boundaries),
        "dense": measure(dense),
        "parameters": count_parameters(model),
        "weights_sha256": state_dict_sha256(model),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "machine": platform.machine(),
    }
    return Training(model, report)


def train_predictor(model: Decoder, recipe: Recipe, log: Callable[[str], None] = print) -> BoundaryTraining:
    """Train the boundary predictor of `model`, in place, on facts in text with questions; the rest is frozen."""

    def texts(part: Part, count: int) -> list[torch.Tensor]:
        text, generator = corpus_text(part), np.random.default_rng([recipe.seed, PARTS.index(part), count])
        sequences = [
            needles.recall_sequence(text, recipe.boundary_length, 8, 4, len(needles.TEMPLATES), generator, alike=0.5)
            for _ in range(count)
        ]
        return [torch.from_numpy(ids.astype(np.int64)).unsqueeze(0) for ids, _ in sequences]

    def progress(step: int, loss: float) -> None:
        if step % 50 == 0:
            log(f"boundaries, step {step}/{recipe.boundary_steps}: loss {loss:.4f}")

    return train_boundaries(
        model,
        texts("train", recipe.boundary_texts),
        held_out=texts("validation", max(1, recipe.boundary_texts // 8)),
        steps=recipe.boundary_steps,
        seed=recipe.seed,
        learning_rate=recipe.boundary_rate,
        progress=progress,
    )


def measure(decoder: Decoder) -> dict[str, object]:
    """Needles found and bits per byte of validation text, by length, as plain data."""
    return {
        "needles": {
            str(length): {"tasks": tasks, "found": retrieval(decoder, length, tasks, distractors=0)[0]}
            for length, tasks in ((512, 33), (2048, 33), (8192, 17))
        },
        "needles_among_four": {
            str(length): {"tasks": tasks, "found": retrieval(decoder, length, tasks)[0]}
            for length, tasks in ((512, 33), (2048, 33))
        },
        "bits_per_byte": {str(length): bits_per_byte(decoder, length) for length in (1024, 8192)},
    }


def save(training: Training, directory: Path) -> Path:
    """Write `dhsa_bytes.safetensors` (float16) and `dhsa_bytes.json`; gives the path of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{NAME}.safetensors"
    path.write_bytes(safetensors_bytes({key: value.half() for key, value in training.model.state_dict().items()}))
    path.with_suffix(".json").write_text(json.dumps(training.report, indent=2) + "\n")
    return path


def train_base(
    decoder: Decoder, recipe: Recipe, log: Callable[[str], None] = print, checkpoint: Path | None = None
) -> int:
    """Train all of `decoder` but its boundary predictor, in place; it must attend densely (`attention="dense"`).

    `log` and `checkpoint` as for `train`. Each step draws its data from a generator of its own, so that a training that
    goes on from a checkpoint is the one that was interrupted. Gives the steps that a checkpoint has spared.
    """
    text = corpus_text("train")
    matrices, others = _initialise(decoder, recipe)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (
            torch.optim.Muon(matrices, lr=1.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay),
            recipe.matrix_rate,
        ),
        (torch.optim.AdamW(others, lr=1.0, betas=(0.9, 0.95), weight_decay=0.0), recipe.other_rate),
    ]
    progress, step, started = Progress(), 0, time.perf_counter()
    total = sum(phase.steps for phase in recipe.phases)
    every = [optimizer for optimizer, _ in optimizers]
    done = load_checkpoint(checkpoint, decoder, every, asdict(recipe)) if checkpoint is not None else 0
    if done:
        log(f"going on after step {done}, from {checkpoint}")
    for phase in recipe.phases:
        for index in range(phase.steps):
            if step < done:
                step += 1
                continue
            generator = np.random.default_rng([recipe.seed, step])
            lengths = phase.lengths
            length = lengths[0] if len(lengths) == 1 else int(generator.choice(lengths))
            ids, kinds = training_batch(text, phase, length, generator)
            first, last = phase.rate
            rate = (first + (last - first) * index / phase.steps) * min(1.0, (step + 1) / recipe.warmup)
            for optimizer, highest in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = highest * rate
                optimizer.zero_grad(set_to_none=True)
            losses = training_losses(decoder, torch.from_numpy(ids), torch.from_numpy(kinds), phase.selection)
            torch.autograd.backward(losses.text + losses.answers + phase.selection * losses.selection)
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer in every:
                optimizer.step()
            step += 1
            if checkpoint is not None and (step % CHECKPOINT_STEPS == 0 or step == total):
                save_checkpoint(checkpoint, step, decoder, every, asdict(recipe))
            progress.text_bits.append(float(losses.text.detach()) / math.log(2))
            progress.answer_nats.append(float(losses.answers.detach()))
            if step % 50 == 0 or step == total:
                log(f"step {step}/{total}: {progress.line()}, {time.perf_counter() - started:.0f} s")
    decoder.eval()
    return done


def training_losses(decoder: Decoder, ids: torch.Tensor, kinds: torch.Tensor, selection: float = 0.0) -> Losses:
    """The losses of sequences int64 and their kinds, `[B, N + 1]`; that of the selection only where it has a weight."""
    logits, attention = training_logits(decoder, ids[:, :-1])
    entropies = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    targets = kinds[:, 1:]
    answers = entropies[targets.flatten() == needles.ANSWER]
    looked_up = answers.new_zeros(())
    if selection and attention.last is not None:
        scale = attention.layers[-1].scale
        looked_up = selection_loss(*attention.last, targets == needles.ANSWER, scale)
    text = entropies[targets.flatten() == needles.TEXT].mean()
    return Losses(text, answers.mean() if len(answers) else answers.sum(), looked_up)


def training_logits(decoder: Decoder, ids: torch.Tensor) -> tuple[torch.Tensor, BlockedAttention]:
    """The logits `[B, N, vocab_size]` of dense attention for int64 `[B, N]`: as `Decoder.forward`, but in bfloat16."""
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    attention = BlockedAttention(decoder, ids.shape[1])
    with torch.autocast("cpu", torch.bfloat16):
        return decoder.logits(decoder.model(ids, positions, attention)), attention


def exact_logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """`Decoder.forward` for int64 `[B, N]`; where the attention is dense, without its masks of N x N."""
    if decoder.config.attention.kind != "dense":
        logits: torch.Tensor = decoder(ids)
        return logits
    count = ids.shape[1]
    window = max(1, *(layer.window for layer in decoder.layer_attention))
    padded = F.pad(ids, (0, -count % window))  # on the right, where nobody sees it
    positions = torch.arange(padded.shape[1]).unsqueeze(0)
    return decoder.logits(decoder.model(padded, positions, BlockedAttention(decoder, padded.shape[1])))[:, :count]


@torch.no_grad()
def retrieval(decoder: Decoder, length: int, tasks: int, *, distractors: int = 3, seed: int = 1) -> tuple[float, float]:
    """How many needles of the validation text are found, all digits, and how many single digits are right.

    Depths are spread evenly. Each digit is predicted from the right digits before it, which finds the same needles as
    greedy decoding does.

    Args:
        decoder: with any attention.
        length: bytes of the prompt.
        tasks: how many.
        distractors: other facts in each text.
        seed: of the tasks.
    """
    text, generator = corpus_text("validation"), np.random.default_rng([seed, length])
    found = digits = 0
    for index in range(tasks):
        depth = index / max(1, tasks - 1)
        task = needles.needle(text, length, depth, generator, distractors=distractors)
        ids = torch.tensor([list(task.prompt + task.answer[:-1])])
        right = exact_logits(decoder, ids)[0, -needles.DIGITS :].argmax(-1) == torch.tensor(list(task.answer))
        digits += int(right.sum())
        found += bool(right.all())
    return found / tasks, digits / (tasks * needles.DIGITS)


@torch.no_grad()
def bits_per_byte(decoder: Decoder, length: int, passages: int = 8) -> float:
    """Mean cross-entropy on passages of the validation text, `length` bytes each."""
    text = corpus_text("validation")
    starts = [(index * SPACING) % (len(text) - length - 1) for index in range(passages)]
    ids = torch.tensor([list(text[start : start + length + 1]) for start in starts])
    nats = [F.cross_entropy(exact_logits(decoder, row[None, :-1])[0], row[1:]) for row in ids]
    return float(torch.stack(nats).mean()) / math.log(2)


def _initialise(decoder: Decoder, recipe: Recipe) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Draw the weights anew; gives the layers' matrices, and embedding and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    with torch.no_grad():
        for name, parameter in decoder.model.named_parameters():
            if name == "embed_tokens.weight":
                parameter.normal_(std=decoder.config.hidden_size**-0.5)
            elif parameter.ndim == 2:
                parameter.normal_(std=recipe.matrix_gain * parameter.shape[1] ** -0.5)
            elif "post_" in name:
                parameter.fill_(recipe.norm_weight)
            (matrices if parameter.ndim == 2 and name != "embed_tokens.weight" else others).append(parameter)
    return matrices, others


def _built(attention: str) -> Decoder:
    model = create_model(NAME, weights="random", attention=attention)
    if not isinstance(model, Decoder):
        raise TypeError(f"{NAME} is a {type(model).__name__}, not a Decoder")
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.models.train_dhsa", description=__doc__)
    shipped = Path(str(resources.files("edgekit.models"))) / "pretrained"
    parser.add_argument("--out", type=Path, default=shipped, metavar="DIR")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args(arguments)
    checkpoint = options.out / CHECKPOINT
    training = train(Recipe(seed=options.seed), log=lambda line: print(line, flush=True), checkpoint=checkpoint)
    path = save(training, options.out)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
