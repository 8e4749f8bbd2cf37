"""Where a model comes from: a zoo name, an `nn.Module`, `package.module:factory`, or a `.pt2` program."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree

from edgekit import models
from edgekit.errors import ExportError, ShapeError, UnknownNameError, WeightsError
from edgekit.models.registry import ModelEntry
from edgekit.runtime.manifest import Manifest, ModelInfo, WeightsInfo
from edgekit.runtime.session import Array


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for export: `module` is the original in eval mode, `program` is set where it came as a .pt2."""

    name: str
    source: str
    module: torch.nn.Module
    weights: WeightsInfo
    entry: ModelEntry | None = None
    program: torch.export.ExportedProgram | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def info(self, macs: int | None) -> ModelInfo:
        """What the manifest says of the model."""
        parameters = models.count_parameters(self.module)
        return ModelInfo(self.source, self.weights, parameters, macs, self.options)

    def bind(self, tensors: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
        """Positional arguments, keyword arguments and the order of the inputs, for tensors by name."""
        if self.program is None:
            return bind_inputs(self.module, tensors)
        # A program names its inputs itself; its call takes them as they were given to torch.export.
        spec = self.program.call_spec.in_spec
        assert spec is not None  # only programs without inputs have none
        args, kwargs = _pytree.tree_unflatten(list(tensors.values()), spec)
        return args, kwargs, list(tensors)

    def call(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the original model returns. Raises `ShapeError` in plain words where it does not run on `tensors`."""
        args, kwargs, _ = self.bind(tensors)
        try:
            with torch.no_grad():
                return self.module(*args, **kwargs)
        except Exception as error:  # whatever the user's forward raises
            shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
            raise ShapeError(f"{self.name} does not run on {shapes}: {str(error).strip().splitlines()[0]}") from error

    def runner(self, output_names: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """The original model as a function from arrays by name to arrays by name, as a session's `run`."""

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            outputs = self.call({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()})
            return dict(zip(output_names, (leaf.numpy() for leaf in tensor_leaves(outputs)), strict=True))

        return run


def load_model(
    model: str | Path | torch.nn.Module,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    overrides: Mapping[str, object] | None = None,
) -> LoadedModel:
    """Find or build the model that `model` names.

    Raises:
        UnknownNameError: no zoo model of this name.
        WeightsError: weights that do not fit, or weights given for a model that brings its own.
        ExportError: the factory or the program could not be loaded.
    """
    options = dict(overrides or {})
    if isinstance(model, torch.nn.Module):
        _own_weights_only(type(model).__name__, weights, options)
        return _from_module(type(model).__name__, f"module:{type(model).__qualname__}", model)
    text = str(model)
    if text.endswith(".pt2"):
        _own_weights_only(text, weights, options)
        return _from_program(Path(text))
    if ":" in text:
        _own_weights_only(text, weights, {})
        return _from_factory(text, seed, options)
    if text.endswith((".pt", ".pth", ".safetensors", ".onnx")):
        raise UnknownNameError("model", text, models.list_models()) from ExportError(
            "a weights file alone is no model: name the architecture and pass the file with --weights"
        )
    return _from_zoo(text, weights, seed, options)


def reload_model(
    manifest: Manifest, model: str | Path | torch.nn.Module | None, weights: str | Path | None
) -> LoadedModel:
    """The PyTorch model that a bundle was exported from, rebuilt and proved equal by its weights' hash.

    Args:
        model: overrides what the manifest names; needed where a bundle came from an `nn.Module` or a .pt2 file.
        weights: the weights file, where the bundle was exported with one.

    Raises:
        ExportError: the manifest's model cannot be rebuilt from here.
        WeightsError: the rebuilt model has other weights than the exported one.
    """
    info = manifest.model
    if model is None:
        kind, _, rest = info.source.partition(":")
        if kind not in ("zoo", "factory"):
            raise ExportError(f"{manifest.name} was exported from {info.source}; pass the model to compare with")
        model = rest
    if weights is None and info.weights.source in ("random", "file"):
        if info.weights.source == "file":
            raise WeightsError(f"{manifest.name} was exported with the weights file {info.weights.file}; pass it again")
        weights = "random" if info.source.startswith("zoo:") else None
    loaded = load_model(model, weights=weights, seed=info.weights.seed or 0, overrides=info.options)
    if loaded.weights.sha256 != info.weights.sha256:
        raise WeightsError(
            f"the weights of {loaded.source} (SHA-256 {loaded.weights.sha256[:12]}..) are not those that "
            f"{manifest.name} was exported with ({info.weights.sha256[:12]}..)"
        )
    return loaded


def bind_inputs(
    module: torch.nn.Module, tensors: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
    """Match inputs to the parameters of `forward`: by name where every name is one, otherwise by position.

    Returns positional arguments, keyword arguments, and the input names in the order that the exported graph has them.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = [p.name for p in parameters]
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if set(tensors) <= set(names) and set(required) <= set(tensors):
        ordered = [name for name in names if name in tensors]
        return (), {name: tensors[name] for name in ordered}, ordered
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(tensors) < len(required) or (len(tensors) > len(names) and not variadic):
        wanted = ", ".join(required or names)
        raise ShapeError(
            f"{type(module).__name__}.forward takes {wanted}; got shapes for {', '.join(tensors)}. "
            "Give one --shape for each input"
        )
    return tuple(tensors.values()), {}, list(tensors)


def tensor_leaves(outputs: Any) -> list[torch.Tensor]:
    """The tensors in a model's return value, in order, whatever it nests them in."""
    return [leaf.detach() for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def _from_zoo(name: str, weights: str | Path | None, seed: int, options: dict[str, Any]) -> LoadedModel:
    entry = models.model_entry(name)
    if weights is None and entry.weights is not None and "num_classes" not in options:
        module = models.create_model(name, **options)
        origin = WeightsInfo("shipped", "")
    elif weights is None or str(weights) == "random":
        module = models.create_model(name, weights="random", seed=seed, **options)
        models.seed_weights(module, seed)
        origin = WeightsInfo("random", "", seed=seed)
    else:
        module = models.create_model(name, weights=weights, **options)
        origin = WeightsInfo("file", "", file=Path(weights).name)
    loaded = _from_module(name, f"zoo:{name}", module)
    return replace(loaded, weights=replace(origin, sha256=loaded.weights.sha256), entry=entry, options=dict(options))


def _from_module(name: str, source: str, module: torch.nn.Module) -> LoadedModel:
    digest = models.state_dict_sha256(module)
    return LoadedModel(_safe(name), source, module.eval(), WeightsInfo("module", digest))


def _from_factory(text: str, seed: int, options: dict[str, Any]) -> LoadedModel:
    module_name, _, attribute = text.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise ExportError(f"{text!r} is neither a zoo model nor package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's own module lies beside them
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise ExportError(f"cannot import {module_name!r} ({error}); run from its folder or install it") from error
    except AttributeError:
        raise ExportError(f"module {module_name!r} has no {attribute!r}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory if isinstance(factory, torch.nn.Module) else factory(**options)
    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"{text} gave a {type(module).__name__}; it must give a torch.nn.Module")
    loaded = _from_module(attribute, f"factory:{text}", module)
    return replace(loaded, weights=replace(loaded.weights, source="factory", seed=seed), options=options)


def _from_program(path: Path) -> LoadedModel:
    if not path.is_file():
        raise ExportError(f"no program at {path}; save one with torch.export.save(torch.export.export(...), path)")
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises zip, JSON, pickle and its own errors here
        raise ExportError(f"{path} is no readable .pt2 program: {error}") from error
    module = program.module()
    digest = models.state_dict_sha256(module)
    return LoadedModel(
        _safe(path.stem), f"pt2:{path.name}", module, WeightsInfo("program", digest, file=path.name), program=program
    )


def _own_weights_only(what: str, weights: object, options: dict[str, Any]) -> None:
    if weights is not None or options:
        given = "--weights" if weights is not None else "constructor options"
        raise WeightsError(f"{what} brings its own weights; {given} are for zoo models")


def _safe(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")
    return cleaned or "model"
