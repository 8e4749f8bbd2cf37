"""A folder as Hugging Face's `save_pretrained` writes it: config.json, safetensors, perhaps preprocessor_config.json.

Nothing is downloaded and no code from the folder runs: the class comes from transformers itself, the weights from
safetensors.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekit.errors import InputError, MissingDependencyError, WeightsError
from edgekit.export.calling import first_line
from edgekit.export.shapes import InputShape
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.resize import Interpolation

# PIL's numbers, which image processors store.
_INTERPOLATIONS: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Pretrained:
    """The model of a folder and what its files say of inputs and classes; None where they do not say it."""

    module: torch.nn.Module
    shape: InputShape | None
    preprocessing: ImagePreprocessing | None
    labels: tuple[str, ...] | None


def load_pretrained(folder: Path) -> Pretrained:
    """Load the model that `folder` describes, in float32.

    Raises:
        InputError: no config.json, or an architecture that transformers itself does not ship.
        WeightsError: no safetensors, or weights that do not fit the architecture.
        MissingDependencyError: transformers is not installed.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise InputError(
            f"{folder} is a folder without config.json; expected what Hugging Face's save_pretrained writes"
        )
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputError(f"{folder}/config.json names no class in 'architectures'; save the model with save_pretrained")
    module = _load(_architecture(names[0], folder), folder)
    shape = _shape(module.config)
    recipe = _read_json(folder / "preprocessor_config.json")
    preprocessing = None if recipe is None or shape is None else _preprocessing(recipe, shape)
    return Pretrained(module, shape, preprocessing, _labels(config))


def _architecture(name: str, folder: Path) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformers", "huggingface", f"loading {folder}") from error
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise InputError(
            f"{folder} holds a {name}, which transformers {transformers.__version__} does not ship; code in the folder "
            "is never run. Build the model yourself and pass it as package.module:factory"
        )
    return found


def _load(architecture: Any, folder: Path) -> torch.nn.Module:
    log, bars = logging.getLogger("transformers"), importlib.import_module("transformers.utils.logging")
    level, bars_shown = log.level, bars.is_progress_bar_enabled()
    log.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        module, report = architecture.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises OSError, ValueError and safetensors' own errors
        raise WeightsError(f"{folder} could not be loaded: {first_line(error)}") from error
    finally:
        log.setLevel(level)
        if bars_shown:
            bars.enable_progress_bar()
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise WeightsError(
            f"{folder} has no fitting weights for {len(missing)} tensors of {architecture.__name__} "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); save the whole model again"
        )
    loaded: torch.nn.Module = module.float()
    return loaded


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, got a {type(data).__name__}")
    return data


def _shape(config: Any) -> InputShape | None:
    """One image `[1, C, H, W]` named `pixel_values`, for a config with a fixed image size."""
    size: Any = getattr(config, "image_size", None)
    channels: Any = getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not all(isinstance(number, int) and number > 0 for number in (channels, height, width)):
        return None
    return InputShape("pixel_values", (1, int(channels), int(height), int(width)))


def _labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """`id2label` where it names every class from 0 on; transformers' placeholders LABEL_0, ... name none."""
    names = config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(index) for index in range(len(names))} or not names:
        return None
    labels = tuple(str(names[str(index)]) for index in range(len(names)))
    return None if labels == tuple(f"LABEL_{index}" for index in range(len(labels))) else labels


def _preprocessing(recipe: Mapping[str, Any], shape: InputShape) -> ImagePreprocessing | None:
    """The recipe of an image processor, for the image size of `shape`; None where it does what a bundle cannot say."""
    size, crop, channels = recipe.get("size"), recipe.get("crop_size"), shape.dims[1]
    if isinstance(size, int):
        size = {"shortest_edge": size}
    known = recipe.get("do_resize", True) and recipe.get("do_rescale", True) and not recipe.get("do_pad", False)
    interpolation = _INTERPOLATIONS.get(recipe.get("resample", 2))
    if not known or not isinstance(size, dict) or interpolation is None or channels not in (1, 3):
        return None
    crops = recipe.get("do_center_crop", False)
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    crop_pct = 1.0
    if set(size) == {"shortest_edge"}:
        if not crops or not isinstance(crop, dict) or crop.get("height") != crop.get("width"):
            return None
        crop_pct = crop["height"] / size["shortest_edge"]
        if not 0 < crop_pct <= 1:
            return None
    elif set(size) != {"height", "width"} or (crops and crop != size):
        return None
    normalises = recipe.get("do_normalize", True)
    mean, std = (recipe.get("image_mean"), recipe.get("image_std")) if normalises else ([0.0] * 3, [1.0] * 3)
    if mean is None or std is None:
        return None
    try:
        return ImagePreprocessing(
            size=(int(shape.dims[2]), int(shape.dims[3])),
            resize="shortest" if set(size) == {"shortest_edge"} else "squash",
            crop_pct=crop_pct,
            interpolation=interpolation,
            color="gray" if channels == 1 else "bgr" if recipe.get("do_flip_channel_order", False) else "rgb",
            scale=float(recipe.get("rescale_factor", 1 / 255)),
            mean=tuple(mean)[:channels],
            std=tuple(std)[:channels],
        )
    except (InputError, TypeError, ValueError):  # values that no recipe has
        return None
