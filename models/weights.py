"""Weights: read from a file without running code, load strictly, fill from a seed, and identify by a hash."""

from __future__ import annotations

import argparse
import hashlib
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn

from edgekit.errors import WeightsError

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

_TORCH_SUFFIXES = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")
_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors")
_WRAPPERS = ("model", "state_dict")
_SHOWN = 5


@runtime_checkable
class _Adapting(Protocol):
    """A model that knows other forms of its checkpoints.

    The method takes what a file holds, which may be of another architecture, leaves what it does not know as it is, and
    raises `WeightsError` for what it knows and cannot use.
    """

    def adapt_checkpoint(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a weights file, by key, on the CPU.

    Reads `.safetensors`, and `.pth`, `.pt`, `.pth.tar`, `.bin` and `.ckpt` as `torch.save` writes them, with
    `weights_only=True`: a file that asks to run code is refused. A checkpoint that keeps its weights under `model` or
    `state_dict` is unwrapped, and a `module.` in front of every key (DataParallel) is taken off.

    Args:
        path: a file, or a directory that holds exactly one such file.

    Raises:
        WeightsError: nothing there, another format, damaged, code inside, or something other than tensors.
    """
    file = _weights_file(Path(path))
    content = _read_safetensors(file) if file.name.endswith(".safetensors") else _read_torch(file)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{file} holds a {type(content).__name__}, not a dictionary of tensors; {_RESAVE}")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    return _tensors(content, file)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into `model`, strictly: every key must be there, fit, and hold finite numbers.

    One difference is allowed, as in SHViT's own loader: a linear weight `[O, I]` for a 1x1 convolution `[O, I, 1, 1]`.
    Others are the model's: where it has a method `adapt_checkpoint`, that takes the tensors of the file by key and
    gives those to load, renamed from another library's keys or resized to another image. When anything is refused, the
    model is left as it was.

    Args:
        model: changed in place.
        path: as for `read_state_dict`.

    Raises:
        WeightsError: the file cannot be read, or does not fit; the message names the first keys that differ.
    """
    arrived = read_state_dict(path)
    if isinstance(model, _Adapting):
        arrived = dict(model.adapt_checkpoint(arrived))
    expected = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for key in expected.keys() & arrived.keys():
        if expected[key].shape == (*arrived[key].shape, 1, 1) and arrived[key].ndim == 2:
            arrived[key] = arrived[key][:, :, None, None]

    problems = [
        _listed("missing", (key for key in expected if key not in arrived)),
        _listed("unexpected", (key for key in arrived if key not in expected)),
        _listed("of another shape", _shape_differences(expected, arrived)),
        _listed("of another type", _dtype_differences(expected, arrived)),
    ]
    if any(problems):
        found = "; ".join(problem for problem in problems if problem)
        name = type(model).__name__
        raise WeightsError(f"{path} does not fit this {name}: {found}. Check the model's name, size and num_classes")

    bad = [key for key, value in arrived.items() if not value.to(expected[key].dtype).isfinite().all()]
    if bad:
        raise WeightsError(f"{path} holds NaN or infinite values: {_listed('', bad)}. Take an earlier checkpoint")
    model.load_state_dict(arrived, strict=True)


def seed_weights(model: nn.Module, seed: int) -> None:
    """Fill `model` in place with random weights that make every branch count, with activations of order one.

    An untrained model hides mistakes: batch norms that start at zero and layer scales of 1e-6 silence whole branches.
    Each tensor is drawn from its own name and `seed`, so that the values are the same on every machine. Matrices and
    convolutions are normal with variance 1 / fan-in; running statistics are near mean 0 and variance 1. The scales of
    a normalisation are near 1, or near 1/2 where they are well below 1 now: authors start those at zero which end a
    residual branch. Other buffers are constants of the architecture and stay as they are.

    Args:
        model: freshly built; changed in place.
        seed: any integer.
    """
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = [*module.named_parameters(recurse=False)]
            own += [(key, value) for key, value in module.named_buffers(recurse=False) if key.startswith("running_")]
            for key, tensor in own:
                if tensor.is_floating_point():
                    values = _active_values(key, tensor, f"{seed}:{prefix}.{key}")
                    tensor.copy_(torch.from_numpy(values))


def state_dict_sha256(model: nn.Module) -> str:
    """A hash of the model's tensors: SHA-256 over key, dtype, shape and little-endian bytes, in the order of the keys.

    It does not depend on the device, on the order of registration or on the file format.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_RESAVE = "save the weights alone with torch.save(model.state_dict(), path) or as .safetensors"


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(_SUFFIXES))
        if len(files) == 1:
            return files[0]
        found = _listed("weights files", (file.name for file in files)) if files else "none"
        raise WeightsError(
            f"{path} is a directory that should hold exactly one weights file; found {found}. Name a file"
        )
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}; check the path")
    if not path.name.endswith(_SUFFIXES):
        raise WeightsError(f"{path} does not look like a weights file; expected one of {', '.join(_SUFFIXES)}")
    return path


def _read_torch(file: Path) -> object:
    try:
        # Training scripts keep their arguments beside the weights; a Namespace only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        refused = re.search(r"unsupported (?:global|class):?(?: GLOBAL)? ([\w.]+)", str(error), re.IGNORECASE)
        if refused:
            what = f"asks to run code ({refused[1].rstrip('.')}), which edgekit refuses; {_RESAVE}"
        else:
            what = f"is damaged or not a PyTorch weights file ({type(error).__name__}); fetch it again"
        raise WeightsError(f"{file} {what}") from error


def _read_safetensors(file: Path) -> object:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        raise WeightsError(f"{file} is damaged or not a safetensors file ({error}); fetch it again") from error


def _tensors(content: Mapping[object, object], file: Path) -> dict[str, torch.Tensor]:
    if not content:
        raise WeightsError(f"{file} holds no tensors; {_RESAVE}")
    tensors: dict[str, torch.Tensor] = {}
    strange = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[key] = value
        else:
            strange.append(f"{key} ({type(value).__name__})")
    if strange:
        raise WeightsError(f"{file} holds more than tensors: {_listed('', strange)}; {_RESAVE}")
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _listed(what: str, items: Iterable[str]) -> str:
    """`12 missing (a, b, c, ...)`, or nothing when there are no items."""
    names = list(items)
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} {what} ({shown})" if what else f"{len(names)} ({shown})"


def _shape_differences(expected: dict[str, torch.Tensor], arrived: dict[str, torch.Tensor]) -> list[str]:
    return [
        f"{key}: expected {list(value.shape)}, got {list(arrived[key].shape)}"
        for key, value in expected.items()
        if key in arrived and value.shape != arrived[key].shape
    ]


def _dtype_differences(expected: dict[str, torch.Tensor], arrived: dict[str, torch.Tensor]) -> list[str]:
    """Float widths convert; a quantised or boolean tensor in place of floats does not."""
    return [
        f"{key}: expected {value.dtype}, got {arrived[key].dtype}"
        for key, value in expected.items()
        if key in arrived and value.is_floating_point() != arrived[key].is_floating_point()
    ]


def _active_values(key: str, tensor: torch.Tensor, name: str) -> NDArray[np.float32]:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    x: NDArray[np.float32] = generator.standard_normal(tuple(tensor.shape), dtype=np.float32)
    if key == "running_var":
        variance: NDArray[np.float32] = np.exp(0.2 * x)
        return variance
    if key == "running_mean" or key.endswith("bias"):
        return 0.1 * x
    if tensor.ndim > 1:
        return x / np.float32(np.sqrt(tensor[0].numel()))
    if key == "weight":  # the scale of a normalisation
        return (1 + 0.1 * x) * np.float32(0.5 if tensor.mean() < 0.75 else 1.0)
    return 0.125 + 0.03 * x  # a layer scale: a residual branch that counts, without blowing up a deep sum
