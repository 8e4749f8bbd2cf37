"""Train the small models that ship with their weights: `python -m edgekit.models.train_digits`.

The data come with scikit-learn, the run is seeded, and the same machine gives the same bytes again. The epoch to keep
is chosen on the validation part; the test part is looked at once, at the end. Beside each weights file a JSON file
records how it was made and how well it does.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes

from edgekit.models.complexity import count_parameters
from edgekit.models.digits import SPLIT_SEED, SPLIT_SIZES, digits_batch, enlarge, load_digits_split, normalise
from edgekit.models.registry import ImageInput, create_model, list_models, model_entry
from edgekit.models.training import reproducible
from edgekit.models.weights import state_dict_sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


@dataclass(frozen=True)
class Recipe:
    """All hyper-parameters. AdamW (arXiv 1711.05101) with linear warm-up and a cosine to zero.

    Each image of a batch is turned by up to `rotation` degrees, scaled by up to 1 +- `scaling`, sheared and shifted
    by up to these fractions of its width, and given Gaussian noise of standard deviation `noise` (pixels in 0..1).
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 3
    label_smoothing: float = 0.1
    rotation: float = 12.0
    scaling: float = 0.12
    shear: float = 0.12
    shift: float = 0.08
    noise: float = 0.05
    seed: int = 0
    threads: int = 1


@runtime_checkable
class Progressive(Protocol):
    """A model whose training changes with the epochs, such as DynamicVis, whose routers' noise falls."""

    def set_progress(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, counted from 0."""


@dataclass(frozen=True)
class Training:
    """A finished run: the model with the weights of its best epoch, in eval mode, and what to write beside them."""

    model: nn.Module
    report: dict[str, object]


def digits_models() -> list[str]:
    """The registered models that see the digits as images and are trained on them."""
    entries = [model_entry(name) for name in list_models()]
    return [entry.name for entry in entries if entry.dataset == "digits" and isinstance(entry.input, ImageInput)]


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The fraction of right answers and the mean cross-entropy, for inputs `[n, 1, 32, 32]` and int64 labels `[n]`."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    correct = int((logits.argmax(1) == labels).sum())
    return correct / len(labels), float(F.cross_entropy(logits, labels))


def train(name: str, recipe: Recipe, log: Callable[[str], None] = print) -> Training:
    """Train one digits model from its initialisation.

    Raises:
        UnknownNameError: no model has this name.
        MissingDependencyError: scikit-learn is not installed.
    """
    started = time.perf_counter()
    images, labels = load_digits_split("train")
    pixels, targets = enlarge(images), torch.from_numpy(labels)
    validation = _part("validation")
    with reproducible(recipe.threads, recipe.seed):
        generator = torch.Generator().manual_seed(recipe.seed)
        model = create_model(name, weights="random", seed=recipe.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: _rate(epoch, recipe))
        best: tuple[float, float] = (-1.0, -math.inf)
        kept, kept_epoch = model, 0
        for epoch in range(1, recipe.epochs + 1):
            if isinstance(model, Progressive):
                model.set_progress(epoch - 1, recipe.epochs)
            loss = _train_epoch(model, optimizer, pixels, targets, generator, recipe)
            schedule.step()
            right, entropy = accuracy(model, *validation)
            if (right, -entropy) > best:
                best, kept, kept_epoch = (right, -entropy), deepcopy(model), epoch
            if epoch % 5 == 0 or epoch == recipe.epochs:
                seconds = time.perf_counter() - started
                log(f"{name} epoch {epoch}/{recipe.epochs}: loss {loss:.3f}, validation {right:.2%}, {seconds:.0f} s")
        test, _ = accuracy(kept, *_part("test"))
    report: dict[str, object] = {
        "model": name,
        "dataset": "digits (scikit-learn)",
        "recipe": asdict(recipe),
        "split": {"seed": SPLIT_SEED, **SPLIT_SIZES},
        "epoch": kept_epoch,
        "validation_accuracy": best[0],
        "test_accuracy": test,
        "parameters": count_parameters(kept),
        "weights_sha256": state_dict_sha256(kept),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        "machine": platform.machine(),
    }
    return Training(kept.eval(), report)


def save(training: Training, directory: Path) -> Path:
    """Write `<model>.safetensors` (float32) and `<model>.json`; gives the path of the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{training.report['model']}.safetensors"
    path.write_bytes(safetensors_bytes(training.model.state_dict()))
    path.with_suffix(".json").write_text(json.dumps(training.report, indent=2) + "\n")
    return path


def augment(pixels: torch.Tensor, generator: torch.Generator, recipe: Recipe) -> torch.Tensor:
    """A random affine map and noise for each image of float `[n, 1, H, W]` in 0..1; outside of an image is dark."""
    n = len(pixels)
    turn, scale, shear, right, down = (torch.rand(5, n, generator=generator) * 2 - 1).unbind()
    angle, scale = torch.deg2rad(turn * recipe.rotation), 1 + scale * recipe.scaling
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    right, down = right * 2 * recipe.shift, down * 2 * recipe.shift  # an image is two units wide
    rows = torch.stack([cos, shear * recipe.shear - sin, right, sin, cos, down], dim=1)
    grid = F.affine_grid(rows.reshape(n, 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, align_corners=False)
    return moved + recipe.noise * torch.randn(moved.shape, generator=generator)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m edgekit.models.train_digits", description=__doc__)
    parser.add_argument("--model", choices=[*digits_models(), "all"], default="all")
    shipped = Path(str(resources.files("edgekit.models"))) / "pretrained"
    parser.add_argument("--out", type=Path, default=shipped, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=recipe.epochs)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    options = parser.parse_args(arguments)

    recipe = replace(recipe, epochs=options.epochs, seed=options.seed)
    names = digits_models() if options.model == "all" else [options.model]
    written = []
    for name in names:
        training = train(name, recipe, log=lambda line: print(line, flush=True))
        print(f"{name}: test accuracy {training.report['test_accuracy']:.2%} in {training.report['seconds']} s")
        written.append(save(training, options.out))
    for path in written:
        print(f"wrote {path} and {path.with_suffix('.json').name}")


def _part(part: Literal["validation", "test"]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits_split(part)
    return digits_batch(images), torch.from_numpy(labels)


def _rate(epoch: int, recipe: Recipe) -> float:
    """The learning rate of an epoch, counted from 0, as a fraction of the highest."""
    if epoch < recipe.warmup_epochs:
        return (epoch + 1) / (recipe.warmup_epochs + 1)
    progress = (epoch - recipe.warmup_epochs) / max(1, recipe.epochs - recipe.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: torch.Tensor,
    targets: torch.Tensor,
    generator: torch.Generator,
    recipe: Recipe,
) -> float:
    """One pass over the training part in random order; gives the mean loss."""
    model.train()
    total = 0.0
    for chosen in torch.split(torch.randperm(len(pixels), generator=generator), recipe.batch_size):
        batch = normalise(augment(pixels[chosen], generator, recipe))
        outputs = model(batch)
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [F.cross_entropy(head, targets[chosen], label_smoothing=recipe.label_smoothing) for head in heads]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += float(loss.detach()) * len(chosen)
    return total / len(pixels)


if __name__ == "__main__":
    main()
