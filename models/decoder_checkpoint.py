"""Decoders from folders as Hugging Face's `save_pretrained` writes them: config.json and safetensors, whole or sharded.

Nothing is downloaded, no code of the folder runs, and transformers is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from edgekit.errors import EdgekitError, InputError, WeightsError
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import FAMILIES, DecoderConfig
from edgekit.models.decoder_options import (
    DECODER_OPTIONS,
    attention_from_options,
    check_options,
    refuse_idle_options,
)
from edgekit.models.weights import read_state_dict

if TYPE_CHECKING:
    import os

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREDICTOR = "boundary_predictor."
_WIDTH = "mlp.0.weight"  # [hidden, 4 C + 1]: the predictor's hidden width
_SHOWN = 5


def is_decoder_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a config.json with a model_type that `load_decoder` reads.

    Raises:
        InputError: a config.json that is not readable JSON.
    """
    file = Path(folder) / _CONFIG
    return file.is_file() and _json(file).get("model_type") in FAMILIES


def load_decoder(folder: str | os.PathLike[str], options: Mapping[str, object] | None = None) -> Decoder:
    """The decoder of a folder, in float32 and eval mode, on the CPU.

    Weights are read tensor by tensor: memory holds the model and one tensor more.

    Args:
        folder: with config.json of model_type gemma2, llama or qwen2, and model.safetensors, or its shards with
            model.safetensors.index.json.
        options: `attention` ("dense" where it is not given) and the other fields of `SparseAttention` by their names;
            `context`, the tokens to take; `predictor`, a file with the weights of the boundary predictor under its
            authors' keys, for attention "dhsa". The file decides on the predictor's hidden width.

    Raises:
        InputError: another architecture or variant, an unknown option, one out of range or one without effect.
        WeightsError: tensors missing, unknown or of another shape or type, a shard that is missing or lies outside of
            the folder, or attention "dhsa" without a predictor.
    """
    folder, options = Path(folder), dict(options or {})
    check_options(options, DECODER_OPTIONS)
    refuse_idle_options(options)
    extra = _read_predictor(options.pop("predictor", None))
    if extra is not None:
        options.setdefault("predictor_hidden", extra[1][_WIDTH].shape[0])
    config = read_config(folder, options)
    with torch.device("meta"):
        model = Decoder(config)

    filling = _Filling(model)
    for file, key, tensor in _tensors(folder):
        if extra is None or not key.startswith(_PREDICTOR):
            filling.take(key, tensor, file)
    if extra is not None:
        for key, tensor in extra[1].items():
            filling.take(_PREDICTOR + key, tensor, extra[0])
    filling.finish(folder)
    return model.eval()


def read_config(folder: str | os.PathLike[str], options: Mapping[str, object] | None = None) -> DecoderConfig:
    """The configuration of a folder for `load_decoder`, whose options it takes.

    Tokens that end a text are those of generation_config.json, where it names some.

    Raises:
        InputError: no config.json, another architecture or variant, or an option out of range.
    """
    folder, options = Path(folder), options or {}
    if not (folder / _CONFIG).is_file():
        raise InputError(f"{folder} has no {_CONFIG}; expected a folder as Hugging Face's save_pretrained writes it")
    values = _json(folder / _CONFIG)
    if (folder / _GENERATION).is_file():
        ends = _json(folder / _GENERATION).get("eos_token_id")
        values = values if ends is None else {**values, "eos_token_id": ends}
    context = options.get("context")
    if context is not None and (isinstance(context, bool) or not isinstance(context, int)):
        raise InputError(f"context is a number of tokens, such as 4096; got {context!r}")
    attention = attention_from_options(options)
    try:
        return DecoderConfig.from_huggingface(values, attention=attention, context=context)
    except EdgekitError as error:
        raise InputError(f"{folder / _CONFIG}: {error}") from error


class _Filling:
    """A model on the meta device whose tensors arrive one by one."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        self.missing = dict.fromkeys(self.expected)
        self.strange: list[str] = []

    def take(self, key: str, tensor: torch.Tensor, file: Path) -> None:
        """Put a tensor in its place, in float32.

        Raises:
            WeightsError: its shape, dtype or values do not fit.
        """
        if key not in self.expected:
            self.strange += self.model.adapt_checkpoint({key: tensor})
            return
        shape = self.expected[key]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise WeightsError(
                f"{key} in {file} must be {list(shape)} of floats; got {list(tensor.shape)} of {tensor.dtype}. Take "
                f"weights that belong to the {_CONFIG}"
            )
        # A copy of its own: the tensor may be a view on the file.
        values = tensor.to(torch.float32, copy=True)
        if not values.isfinite().all():
            raise WeightsError(f"{key} in {file} holds NaN or infinite values; fetch the file again")
        self.model.load_state_dict({key: values}, strict=False, assign=True)
        self.missing.pop(key, None)

    def finish(self, folder: Path) -> None:
        """Refuse a model that is not complete, and tensors that have no place in it.

        Raises:
            WeightsError: names the first of them.
        """
        absent = [key for key in self.missing if key.startswith(_PREDICTOR)]
        if absent and len(absent) == sum(key.startswith(_PREDICTOR) for key in self.expected):
            raise WeightsError(
                f"attention 'dhsa' needs the weights of its boundary predictor, and {folder} has none; pass "
                "predictor=FILE, or take attention 'block', which needs none"
            )
        if problems := [_listed("lacks", self.missing), _listed("has, and the model does not,", self.strange)]:
            found = "; ".join(problem for problem in problems if problem)
            if found:
                raise WeightsError(f"{folder} does not fit its {_CONFIG}: it {found}")


def _tensors(folder: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """The tensors of a folder's safetensors, with their files; of sharded ones those that the index names.

    Raises:
        WeightsError: no weights, a missing or unreadable file, a path that leaves the folder, or a tensor that is not
            where the index has it.
    """
    for file, wanted in _files(folder).items():
        if not file.is_file():
            raise WeightsError(f"{folder} lacks {file.name}, which {_INDEX} names; fetch it again")
        yield from _read(file, wanted)


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Each file of weights and the tensors to take from it; None for all."""
    if (folder / _SINGLE).is_file():
        return {folder / _SINGLE: None}
    if not (folder / _INDEX).is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".gguf", ".pth", ".pt"))
        found = f"found {', '.join(others[:_SHOWN])}" if others else "found no weights"
        raise WeightsError(f"{folder} has neither {_SINGLE} nor {_INDEX}; {found}. Save the model as safetensors")
    index = _json(folder / _INDEX).get("weight_map")
    if not isinstance(index, Mapping) or not index or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(f"{folder / _INDEX} must map tensors to files under weight_map; fetch it again")
    files: dict[Path, set[str] | None] = {}
    for key, name in index.items():
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise WeightsError(f"{folder / _INDEX} names {name!r}, which is not a file of this folder; do not trust it")
        wanted = files.setdefault(folder / name, set())
        assert wanted is not None  # only the single file is taken whole
        wanted.add(key)
    return files


def _read(file: Path, wanted: set[str] | None) -> Iterator[tuple[Path, str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as content:
            keys = list(content.keys())
            if wanted is not None and (gone := sorted(wanted - set(keys))):
                raise WeightsError(f"{file} lacks {gone[0]}, which {_INDEX} places there; fetch it again")
            for key in keys:
                if wanted is None or key in wanted:
                    yield file, key, content.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is damaged or not a safetensors file ({error}); fetch it again") from error


def _read_predictor(path: object) -> tuple[Path, dict[str, torch.Tensor]] | None:
    """The predictor's file and its tensors under the authors' keys."""
    if path is None:
        return None
    if not isinstance(path, str | Path):
        raise InputError(f"predictor is a file of weights; got {path!r}")
    tensors = {key.removeprefix(_PREDICTOR): value for key, value in read_state_dict(path).items()}
    if _WIDTH not in tensors or tensors[_WIDTH].ndim != 2:
        raise WeightsError(
            f"{path} holds no boundary predictor: expected the keys enc.mha.*, enc.norm.* and mlp.*; got "
            f"{', '.join(sorted(tensors)[:_SHOWN])}"
        )
    return Path(path), tensors


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object; got a {type(data).__name__}")
    return data


def _listed(what: str, keys: Mapping[str, None] | list[str]) -> str:
    names = sorted(keys)
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return f"{what} {shown}" if names else ""
