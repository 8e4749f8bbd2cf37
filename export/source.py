"""Where a model comes from: a zoo name, an `nn.Module`, `package.module:factory`, a `.pt2` program, or a folder as
Hugging Face's `save_pretrained` writes it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree

from edgekit import custom_ops, models
from edgekit.errors import ExportError, InputError, ShapeError, UnknownNameError, WeightsError
from edgekit.export.calling import bind_inputs, first_line, tensor_leaves
from edgekit.export.data import image_preprocessing
from edgekit.export.shapes import InputShape
from edgekit.export.zoo import default_shapes
from edgekit.models.decoder_checkpoint import is_decoder_folder, load_decoder
from edgekit.models.decoder_config import FAMILIES
from edgekit.models.registry import ModelEntry
from edgekit.runtime.manifest import Manifest, ModelInfo, WeightsInfo
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.session import Array


@dataclass(frozen=True)
class Defaults:
    """What a model brings along and the caller may override: its inputs, how an image becomes one, its classes."""

    shapes: tuple[InputShape, ...] = ()
    preprocessing: ImagePreprocessing | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for export: `module` is a copy of the original in eval mode on the CPU, `program` is set where it
    came as a .pt2 file, `entry` where it is of the zoo, `folder` where a language model came from one. `prepare` turns
    the inputs of the bundle into those of the module, where they differ (`edgekit.export.pixels`)."""

    name: str
    source: str
    module: torch.nn.Module
    weights: WeightsInfo
    defaults: Defaults = Defaults()
    entry: ModelEntry | None = None
    program: torch.export.ExportedProgram | None = None
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    prepare: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None

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
        order = [str(name) for name in self.program.graph_signature.user_inputs]
        args, kwargs = _pytree.tree_unflatten([tensors[name] for name in order], spec)
        return args, kwargs, order

    def call(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """What the original model returns. Raises `ShapeError` in plain words where it does not run on `tensors`."""
        try:
            with torch.no_grad(), one_thread():
                args, kwargs, _ = self.bind(tensors if self.prepare is None else self.prepare(tensors))
                return self.module(*args, **kwargs)
        except Exception as error:  # whatever the user's forward raises
            shapes = ", ".join(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
            raise ShapeError(f"{self.name} does not run on {shapes}: {first_line(error)}") from error

    def runner(self, output_names: Sequence[str]) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """The original model as a function from arrays by name to arrays by name, as a session's `run`."""

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            outputs = self.call({name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()})
            return dict(zip(output_names, (leaf.numpy() for leaf in tensor_leaves(outputs)), strict=True))

        return run


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: its answers then do not depend on the number of cores, so that samples are the same
    bytes wherever they are made, and hundreds of small runs do not crawl where another program keeps a core busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        InputError: the factory or the program could not be loaded.
    """
    custom_ops.register()  # modules and programs may call torch.ops.edgekit without an import of their own
    options = dict(overrides or {})
    if isinstance(model, torch.nn.Module):
        _own_weights_only(type(model).__name__, weights, options)
        return _from_module(type(model).__name__, f"module:{type(model).__qualname__}", model)
    text = str(model)
    if text in models.list_models():
        return _from_zoo(text, weights, seed, options)
    if text.endswith(".pt2"):
        _own_weights_only(text, weights, options)
        return _from_program(Path(text))
    if Path(text).is_dir():
        if is_decoder_folder(text):
            _own_weights_only(text, weights, {})
            return _from_decoder_folder(Path(text), options)
        _own_weights_only(text, weights, options)
        return _from_folder(Path(text))
    if ":" in text:
        _own_weights_only(text, weights, {})
        return _from_factory(text, seed, options)
    if text.endswith((".pt", ".pth", ".bin", ".ckpt", ".safetensors")):
        raise WeightsError(
            f"{text} is a weights file, which does not say what computes with them: name the architecture and pass the "
            f"file beside it, such as: edgekit export {models.list_models()[0]} --weights {text}"
        )
    raise UnknownNameError("model", text, models.list_models())


def reload_model(
    manifest: Manifest, model: str | Path | torch.nn.Module | None, weights: str | Path | None
) -> LoadedModel:
    """The PyTorch model that a bundle was exported from, rebuilt and proved equal by its weights' hash.

    Args:
        model: overrides what the manifest names; needed where a bundle came from an `nn.Module`, a .pt2 file or a
            folder.
        weights: the weights file, where the bundle was exported with one.

    Raises:
        ExportError: the manifest's model cannot be rebuilt from here.
        InputError: the manifest's factory or the given model is not there.
        WeightsError: the rebuilt model has other weights than the exported one.
    """
    info = manifest.model
    if model is None:
        kind, _, rest = info.source.partition(":")
        if kind not in ("zoo", "factory"):
            raise ExportError(f"{manifest.name} was exported from {info.source}; pass the model to compare with")
        model = rest
    elif manifest.generation is not None and _is_other_folder(model):
        raise InputError(
            f"{model} holds no language model of {', '.join(FAMILIES)}, and {manifest.name} is one; pass the folder it "
            "was exported from"
        )
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


def _is_other_folder(model: str | Path | torch.nn.Module) -> bool:
    """Whether `model` is a folder that holds no decoder: its options would make no sense there."""
    return not isinstance(model, torch.nn.Module) and Path(model).is_dir() and not is_decoder_folder(model)


def _from_zoo(name: str, weights: str | Path | None, seed: int, options: dict[str, Any]) -> LoadedModel:
    """A zoo model. Without `weights`: the shipped ones where there are any and they fit the options, else random."""
    entry = models.model_entry(name)
    module = None
    if weights is None and entry.weights is not None:
        try:
            module = models.create_model(name, **options)
        except WeightsError:
            if not entry.changed(options):
                raise
    if module is not None:
        origin = WeightsInfo("shipped", "")
    elif weights is None or str(weights) == "random":
        module = models.create_model(name, weights="random", seed=seed, **options)
        models.seed_weights(module, seed)
        origin = WeightsInfo("random", "", seed=seed)
    else:
        module = models.create_model(name, weights=weights, **options)
        origin = WeightsInfo("file", "", file=Path(weights).name)
    loaded = _from_module(name, f"zoo:{name}", module)
    labels = None if "num_classes" in entry.changed(options) else entry.labels
    defaults = Defaults(default_shapes(entry, options), image_preprocessing(entry), labels)
    origin = replace(origin, sha256=loaded.weights.sha256)
    return replace(loaded, weights=origin, defaults=defaults, entry=entry, options=dict(options))


def _from_module(name: str, source: str, module: torch.nn.Module, *, fresh: bool = False) -> LoadedModel:
    """`fresh`: the module was made here, so that it need not be copied, which would take its memory again."""
    _check_weights(name, module)
    try:
        # The caller's module keeps its mode, buffers and device.
        own = (module if fresh else copy.deepcopy(module)).cpu().eval()
    except Exception as error:  # whatever the module's attributes raise
        raise ExportError(f"{name} cannot be copied, which export needs: {first_line(error)}") from error
    return LoadedModel(_safe(name), source, own, WeightsInfo("module", models.state_dict_sha256(own)))


def _check_weights(name: str, module: torch.nn.Module) -> None:
    """Refuse tensors without values, and those whose precision would make `fp32` a false name."""
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise ExportError(
                f"{name} is on the meta device: {key} has a shape and no values. Load its weights first, then export"
            )
        if tensor.dtype in (torch.float16, torch.bfloat16):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ExportError(
                f"{name} holds {kind} tensors ({key}); export starts from float32: pass model.float(), and for a half "
                "precision bundle --precision fp16"
            )


def _from_factory(text: str, seed: int, options: dict[str, Any]) -> LoadedModel:
    module_name, _, attribute = text.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise InputError(f"{text!r} is neither a zoo model nor package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's own module lies beside them
    try:
        with _seeded(seed):  # a module may build its models when it is imported
            package = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {module_name!r} ({error}); run from its folder or install it") from error
    except Exception as error:  # whatever the user's module raises
        raise InputError(f"importing {module_name!r} failed: {type(error).__name__}: {first_line(error)}") from error
    if not hasattr(package, attribute):
        raise UnknownNameError(f"factory in {module_name}", attribute, _factories(package))
    factory = getattr(package, attribute)
    module = factory if isinstance(factory, torch.nn.Module) else _call_factory(text, factory, seed, options)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{text} gave a {type(module).__name__}; it must give a torch.nn.Module")
    loaded = _from_module(attribute, f"factory:{text}", module)
    return replace(loaded, weights=replace(loaded.weights, source="factory", seed=seed), options=options)


def _factories(package: object) -> list[str]:
    """The names in a module that may be factories: its own callables and modules."""
    own = [(name, value) for name, value in vars(package).items() if not name.startswith("_")]
    return [name for name, value in own if callable(value) or isinstance(value, torch.nn.Module)]


def _call_factory(text: str, factory: Any, seed: int, options: dict[str, Any]) -> Any:
    if not callable(factory):
        raise InputError(f"{text} is a {type(factory).__name__}; it must be a function that gives a torch.nn.Module")
    try:
        with _seeded(seed):
            return factory(**options)
    except Exception as error:  # whatever the user's factory raises
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InputError(f"{text}({given}) failed: {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers from `seed`; the global state is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _from_program(path: Path) -> LoadedModel:
    if not path.is_file():
        raise InputError(f"no program at {path}; save one with torch.export.save(torch.export.export(...), path)")
    try:
        with _no_pickled_code():
            program = torch.export.load(path)
    except Exception as error:  # torch raises zip, JSON, pickle and its own errors here
        raise InputError(f"{path} is no readable .pt2 program: {first_line(error)}") from error
    module = program.module()
    _check_weights(path.name, module)
    digest = models.state_dict_sha256(module)
    return LoadedModel(
        _safe(path.stem), f"pt2:{path.name}", module, WeightsInfo("program", digest, file=path.name), program=program
    )


@contextlib.contextmanager
def _no_pickled_code() -> Iterator[None]:
    """torch.export.load unpickles parts of a file without limits; this makes torch.load take tensors alone."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _from_folder(path: Path) -> LoadedModel:
    from edgekit.export.huggingface import load_pretrained

    pretrained = load_pretrained(path)
    name = path.resolve().name
    loaded = _from_module(name, f"huggingface:{name}", pretrained.module)
    shapes = (pretrained.shape,) if pretrained.shape is not None else ()
    defaults = Defaults(shapes, pretrained.preprocessing, pretrained.labels)
    return replace(loaded, weights=replace(loaded.weights, source="folder", file=name), defaults=defaults)


def _from_decoder_folder(path: Path, options: dict[str, Any]) -> LoadedModel:
    """A language model of a family that `edgekit.models.decoder` has; `predictor` may lie in the folder itself."""
    predictor = options.get("predictor")
    recorded = dict(options)
    if isinstance(predictor, str | Path):
        inside = path / predictor
        if not inside.is_file() and not Path(predictor).is_file():
            raise WeightsError(
                f"no predictor at {predictor}, and none of that name in {path}; check the path, or put the file into "
                "the folder"
            )
        options = {**options, "predictor": inside if inside.is_file() else Path(predictor)}
        recorded["predictor"] = Path(predictor).name
    name = path.resolve().name
    loaded = _from_module(name, f"huggingface:{name}", load_decoder(path, options), fresh=True)
    origin = replace(loaded.weights, source="folder", file=name)
    return replace(loaded, weights=origin, options=recorded, folder=path)


def _own_weights_only(what: str, weights: object, options: dict[str, Any]) -> None:
    if weights is not None or options:
        given = "--weights" if weights is not None else "constructor options"
        raise WeightsError(f"{what} brings its own weights; {given} are for zoo models")


def _safe(name: str) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")
    return cleaned or "model"
