"""Checkpoints of a training that takes long: what it takes to go on after an interruption as if there had been none."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import InputError


def save_checkpoint(
    path: Path,
    step: int,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
) -> None:
    """Write the state after `step` steps, at once and whole; `recipe` is plain data that says what is trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "recipe": repr(recipe),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    temporary = path.with_name(f".{path.name}.new")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    recipe: Mapping[str, Any],
) -> int:
    """Put the state in `path` into `model` and `optimizers`; gives the steps that were made, 0 where there is no file.

    Reading runs no code of the file (`weights_only`).

    Raises:
        InputError: the file is damaged, or of another recipe.
    """
    if not path.exists():
        return 0
    mend = f"delete {path} to begin anew"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        same = state["recipe"] == repr(recipe)
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} is no checkpoint that can be read ({type(error).__name__}); {mend}") from error
    if not same:
        raise InputError(f"{path} is of a training with another seed or recipe; {mend}")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
