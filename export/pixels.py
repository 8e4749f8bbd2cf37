"""Images of levels: the model as one that takes uint8 pixels and normalises them itself, as Core ML's images want it.

Two forms of one arithmetic, `(level * scale - mean) / std` per channel. PyTorch's side, which a bundle is compared
with, computes it as the preprocessing does. The graph computes `(level - centre) * factor`, which keeps more digits in
fp16: levels are integers and `centre` has few digits, so that the difference is all but exact, where `level * factor`
would be rounded before most of it is taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgekit.export.source import LoadedModel
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.preprocess import ImagePreprocessing

_COLORS = ("rgb", "bgr", "gray")


def takes_pixels(recipe: ImagePreprocessing | None) -> bool:
    """Whether a model with this recipe can take a Core ML image: three or one channels, planar."""
    return recipe is not None and recipe.color in _COLORS and recipe.layout == "NCHW"


def with_pixels(loaded: LoadedModel, recipe: ImagePreprocessing) -> LoadedModel:
    """The model whose first input holds levels, uint8 `[N, C, H, W]`, normalised here as `recipe` says.

    Its module stays the one that it was: the levels are turned into its input whenever it is called.
    """
    scale, mean, std = _terms(recipe)

    def normalise(levels: torch.Tensor) -> torch.Tensor:
        return (levels.to(torch.float32) * scale - mean) / std

    return _preparing(loaded, lambda name, tensor, first: normalise(tensor) if first else tensor)


def with_dtypes(loaded: LoadedModel, dtypes: Mapping[str, str]) -> LoadedModel:
    """The model that takes inputs of other dtypes and casts them to `dtypes`, by the inputs' names."""
    kinds = {name: getattr(torch, dtype) for name, dtype in dtypes.items()}
    return _preparing(loaded, lambda name, tensor, _: tensor.to(kinds[name]) if name in kinds else tensor)


def as_exported(loaded: LoadedModel, manifest: Manifest) -> LoadedModel:
    """The model as one that takes what a bundle of this manifest takes: levels for pixels, int32 for int64."""
    if manifest.coreml is not None and manifest.coreml.input_dtypes:
        loaded = with_dtypes(loaded, manifest.coreml.input_dtypes)
    recipe = manifest.inputs[0].preprocessing
    return with_pixels(loaded, recipe) if recipe is not None and recipe.pixels else loaded


class Normalise(nn.Module):
    """Levels, float32 `[N, C, H, W]` of whole numbers, to the model's input, in the form for a graph in fp16."""

    centre: torch.Tensor
    factor: torch.Tensor

    def __init__(self, recipe: ImagePreprocessing) -> None:
        super().__init__()
        scale, mean, std = _terms(recipe)
        self.register_buffer("centre", mean / scale, persistent=False)
        self.register_buffer("factor", scale / std, persistent=False)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        """The normalised image, of the same shape."""
        return (levels - self.centre) * self.factor


def _terms(recipe: ImagePreprocessing) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, mean and std as the preprocessing rounds them, float32; the last two `[1, C, 1, 1]`."""
    mean, std = (torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1) for values in (recipe.mean, recipe.std))
    return torch.tensor(recipe.scale, dtype=torch.float32), mean, std


def _preparing(loaded: LoadedModel, change: Callable[[str, torch.Tensor, bool], torch.Tensor]) -> LoadedModel:
    """`loaded` with `change(name, tensor, is it the first)` applied to its inputs, before what it prepares already."""
    before = loaded.prepare

    def prepare(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        changed = {name: change(name, tensor, index == 0) for index, (name, tensor) in enumerate(tensors.items())}
        return dict(before(changed)) if before is not None else changed

    return replace(loaded, prepare=prepare)
