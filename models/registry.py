"""The model zoo: entry points registered under their own names by the family files.

A new model is a function with `@register_model(...)` in its family's file; a new family is a file and its name in
`FAMILIES`. Importing this module does not import torch; looking up a model does.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from edgekit.errors import EdgekitError, InputError, MissingDependencyError, UnknownNameError, WeightsError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray
    from torch import nn

FAMILIES = ("shvit", "care", "dynamicvis", "lighthgnn", "dhsa")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageInput:
    """What a model wants to see: an image, and how to prepare it. The model takes float32 `[B, channels, size, size]`.

    A photo is resized with `interpolation` so that its shorter side is `size / crop_pct`, cropped to the central
    `size` x `size` pixels, scaled to 0..1, and normalised per channel with `mean` and `std` (RGB order, or gray).
    """

    name: str = "image"
    channels: int = 3
    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 0.875


@dataclass(frozen=True)
class TensorInput:
    """One input of a model that takes no images.

    `dims` holds sizes, names of the factory's keyword parameters, which stand for their values (`num_features`), and
    names of dynamic dimensions (`V`). `index_of` names the dimension that integers point into: they lie in 0..V-1. It
    may be a number or a sum too: `V+Q+1`.
    """

    name: str
    dims: tuple[int | str, ...]
    dtype: Literal["float32", "int64"] = "float32"
    index_of: str | None = None


@dataclass(frozen=True)
class TensorInputs:
    """What a model without images wants to see. `unit` is what one row of the first input stands for, such as vertex.

    `examples(seed, **overrides)` gives inputs that make sense to the model, by name and as numpy arrays with the dtypes
    of `tensors`: real data where the model has a data set. Different seeds give different data; sizes may differ.
    `labelled()` gives labelled inputs of that data set for one run, and the class of each row of the first output,
    int64 `[rows]`, -1 where a row is not to be counted.
    """

    tensors: tuple[TensorInput, ...]
    unit: str
    examples: Callable[..., dict[str, NDArray[Any]]]
    labelled: Callable[[], tuple[dict[str, NDArray[Any]], NDArray[Any]]] | None = None


@dataclass(frozen=True)
class TokenInput:
    """What a language model wants to see: token ids, int64 `[B, N]`, of texts of up to `context` tokens.

    `tokenizer` "bytes": a token is a byte of the text in UTF-8, and the ids from 256 on stand for `bos`, `eos` and
    `pad`, the marks of a text's beginning and end and of padding. The factory may take another `context`.
    """

    vocab_size: int
    context: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    tokenizer: Literal["bytes"] = "bytes"
    name: str = "input_ids"


@dataclass(frozen=True)
class ModelEntry:
    """A registered model.

    `parameters` and `macs` count the model as trained, before `fuse`: multiply-accumulates for one image of
    `input.size`, for one row of the first of `TensorInputs`, or for one token of `TokenInput` without its attention to
    others. `num_classes` of a language model is the size of its vocabulary. `dataset` names the data that the shipped
    `weights` (a file in `models/pretrained`) were trained on. `tolerance`: the relative L2 error that an fp32 bundle
    may have, for a model that answers with larger differences itself when its input changes in the last bit; None: the
    usual one. `half_tolerance`: the same for a Core ML package in fp16.
    """

    name: str
    family: str
    factory: Callable[..., nn.Module]
    input: ImageInput | TensorInputs | TokenInput
    num_classes: int
    parameters: int
    macs: int
    paper: str
    summary: str
    dataset: str | None = None
    weights: str | None = None
    labels: tuple[str, ...] | None = None
    tolerance: float | None = None
    half_tolerance: float | None = None

    def arguments(self, overrides: Mapping[str, object] | None = None) -> dict[str, Any]:
        """The keyword parameters of the factory and their values: the defaults, or what `overrides` says."""
        defaults = {name: item.default for name, item in inspect.signature(self.factory).parameters.items()}
        return defaults | dict(overrides or {})

    def changed(self, overrides: Mapping[str, object]) -> list[str]:
        """The names in `overrides` whose values are not the factory's own."""
        defaults = self.arguments()
        return [name for name, value in overrides.items() if name not in defaults or value != defaults[name]]


_ENTRIES: dict[str, ModelEntry] = {}
Factory = TypeVar("Factory", bound="Callable[..., nn.Module]")


def register_model(
    *,
    family: str,
    input: ImageInput | TensorInputs | TokenInput,
    num_classes: int,
    parameters: int,
    macs: int,
    paper: str,
    summary: str,
    dataset: str | None = None,
    weights: str | None = None,
    labels: tuple[str, ...] | None = None,
    tolerance: float | None = None,
    half_tolerance: float | None = None,
) -> Callable[[Factory], Factory]:
    """Register the decorated function under its own name. Its keyword parameters are what `create_model` accepts.

    Raises:
        ValueError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        name = factory.__name__
        if name in _ENTRIES:
            raise ValueError(
                f"model {name!r} is registered twice: by {_ENTRIES[name].factory.__module__} and now by "
                f"{factory.__module__}; rename one"
            )
        _ENTRIES[name] = ModelEntry(
            name,
            family,
            factory,
            input,
            num_classes,
            parameters,
            macs,
            paper,
            summary,
            dataset,
            weights,
            labels,
            tolerance,
            half_tolerance,
        )
        return factory

    return register


def list_models() -> list[str]:
    """The names of all models, sorted.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    _import_families()
    return sorted(_ENTRIES)


def model_entry(name: str) -> ModelEntry:
    """The entry of one model.

    Raises:
        UnknownNameError: no model has this name; the message proposes the nearest ones.
        MissingDependencyError: torch is not installed.
    """
    _import_families()
    if name not in _ENTRIES:
        raise UnknownNameError("model", name, _ENTRIES)
    return _ENTRIES[name]


def create_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **overrides: object,
) -> nn.Module:
    """Build a model in eval mode, on the CPU, in float32.

    Args:
        name: one of `list_models()`.
        weights: a file, or a directory that holds one weights file. None: the shipped weights where the model has
            them, otherwise the authors' initialisation. "random": always the initialisation. Shipped weights also serve
            a model with changed overrides, where they fit it.
        seed: of the initialisation. The global random state is left as it was.
        overrides: keyword parameters of the model's factory, such as `num_classes`, `in_chans`, `distillation`.

    Raises:
        UnknownNameError: no model has this name.
        EdgekitError: an override that the model does not take; the message lists those it takes.
        ShapeError: an override out of range.
        InputError, ShapeError: an override of the wrong kind, or out of range.
        WeightsError: the weights cannot be read or do not fit. It never falls back to random weights.
    """
    entry = model_entry(name)
    accepted = entry.arguments()
    unknown = sorted(overrides.keys() - accepted.keys())
    if unknown:
        raise EdgekitError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(accepted)}")
    for key, value in overrides.items():
        _check_kind(key, value, accepted[key])

    model = _initialised(entry, seed, overrides)
    if weights is None and entry.weights is not None:
        _load_shipped(model, entry, entry.weights, entry.changed(overrides))
    elif weights is not None and weights != "random":
        _load(model, weights)
    return model.eval()


def _check_kind(name: str, value: object, default: object) -> None:
    """Refuse a text for a switch or a number: "no" would switch on. Models check sizes themselves."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise InputError(f"{name} is true or false; got {value!r}")
    if isinstance(default, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise InputError(f"{name} is a number, such as {default}; got {value!r}")


def _initialised(entry: ModelEntry, seed: int, overrides: dict[str, object]) -> nn.Module:
    import torch

    # Only the CPU generator is seeded, so only it has to be put back.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return entry.factory(**overrides)


def _load_shipped(model: nn.Module, entry: ModelEntry, file: str, changed: list[str]) -> None:
    """Load the shipped weights. `changed` names the options that may make them unfit, for the message."""
    try:
        with resources.as_file(resources.files("edgekit.models") / "pretrained" / file) as path:
            _load(model, path)
    except WeightsError as error:
        if not changed:
            raise
        raise WeightsError(
            f"the weights that ship with {entry.name} do not fit a changed {', '.join(changed)}; "
            f'pass a weights file, or weights="random" to start from the initialisation'
        ) from error


def _load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    from edgekit.models.weights import load_weights

    load_weights(model, path)


@cache
def _import_families() -> None:
    try:
        importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("torch", "export", "the model zoo") from error
    for family in FAMILIES:
        importlib.import_module(f"edgekit.models.{family}")
