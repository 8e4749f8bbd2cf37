"""What to export and how: decided once from the caller's arguments, and checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekit.errors import InputError, ShapeError
from edgekit.export.shapes import InputShape, parse_shapes, program_shapes
from edgekit.export.source import LoadedModel
from edgekit.models.decoder_config import FAMILIES
from edgekit.runtime.preprocess import ImagePreprocessing


@dataclass(frozen=True)
class Plan:
    """What every step needs to know; made once from the arguments."""

    loaded: LoadedModel
    shapes: tuple[InputShape, ...]
    preprocessing: ImagePreprocessing | None
    labels: tuple[str, ...] | None
    opset: int
    seed: int
    check: bool
    tolerance: float | None
    step: Callable[[str], None]
    kernels: tuple[str, ...] | None = None


def make_plan(
    loaded: LoadedModel,
    shapes: str | Sequence[str] | None,
    labels: Sequence[str] | None,
    preprocessing: Mapping[str, Any] | ImagePreprocessing | None,
    opset: int,
    seed: int,
    check: bool,
    tolerance: float | None,
    step: Callable[[str], None],
) -> Plan:
    defaults = loaded.defaults
    if loaded.program is not None:
        if shapes is not None:
            raise ShapeError(f"{loaded.source} fixed its shapes when it was exported; leave --shape out")
        parsed = program_shapes(loaded.program)
    elif shapes is not None:
        parsed = parse_shapes(shapes)
    else:
        parsed = defaults.shapes
    if not parsed:
        raise _unknown_shapes(loaded)
    recipe: ImagePreprocessing | None
    if preprocessing is None:
        recipe = defaults.preprocessing and _at_size(defaults.preprocessing, parsed[0])
    else:
        if isinstance(preprocessing, Mapping):
            preprocessing = ImagePreprocessing.from_user(preprocessing)
        elif preprocessing.pixels:
            raise InputError(
                "this preprocessing is that of a bundle which normalises pixels itself; give it with pixels=False, as "
                "the model takes the image"
            )
        _check_recipe(preprocessing, parsed[0])
        recipe = preprocessing
    if isinstance(labels, str):
        raise InputError(f"labels must be a list of names, got the text {labels!r}")
    names = tuple(labels) if labels is not None else defaults.labels
    return Plan(loaded, parsed, recipe, names or None, opset, seed, check, tolerance, step)


def _unknown_shapes(loaded: LoadedModel) -> ShapeError:
    """What to do about it; transformers' models of text say what they are and how many tokens they know."""
    config = getattr(loaded.module, "config", None)
    vocabulary, kind = getattr(config, "vocab_size", None), getattr(config, "model_type", None)
    if type(loaded.module).__name__.endswith("ForCausalLM"):
        return ShapeError(
            f"{loaded.name} is a language model of another architecture, {kind}; those that become bundles which "
            f"generate text are {', '.join(FAMILIES)}"
        )
    what = f"'input_ids:1x64@int64<{vocabulary}'" if isinstance(vocabulary, int) else "NAME:1x3x224x224"
    return ShapeError(f"the input shapes of {loaded.name} are unknown; pass --shape {what}, once for each input")


def _at_size(recipe: ImagePreprocessing, shape: InputShape) -> ImagePreprocessing | None:
    """The model's own recipe at the size asked for; None where the input is no image of fixed size any more."""
    if len(shape.dims) != 4 or shape.dims[1] != recipe.channels:
        return None
    height, width = shape.dims[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return replace(recipe, size=(height, width))


def _check_recipe(recipe: ImagePreprocessing, shape: InputShape) -> None:
    made = recipe.output_shape
    fits = len(shape.dims) == 4 and all(
        isinstance(dim, str) or dim == size for dim, size in zip(shape.dims[1:], made[1:], strict=True)
    )
    if not fits:
        raise InputError(
            f"the preprocessing makes {list(made)}, the model's first input is {shape}; change one of them"
        )
