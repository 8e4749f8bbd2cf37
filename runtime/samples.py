"""Samples: a few inputs and what PyTorch answered to them, stored in the bundle so that any device can check itself."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import BundleError
from edgekit.runtime.manifest import Manifest, TensorSpec
from edgekit.runtime.storage import COMPRESSIONS

# Samples are a few inputs; a file of megabytes that unfolds to more than this was made to fill the memory.
UNFOLDED_LIMIT = 2 * 2**30
# What numpy raises on files that are damaged or hold Python objects.
_LOAD_ERRORS = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Samples:
    """Stored inputs and what PyTorch answered: both map a tensor's name to an array with a leading sample axis.

    Sample i of input `image` is `inputs["image"][i]`, with the batch axis that the model takes (usually 1). Samples of
    different sizes are a list of arrays instead.
    """

    inputs: Mapping[str, NDArray[Any] | Sequence[NDArray[Any]]]
    outputs: Mapping[str, NDArray[Any] | Sequence[NDArray[Any]]]

    @staticmethod
    def of(pairs: Iterable[tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]]) -> Samples:
        """Samples of any sizes, from inputs and outputs of each; all have the same names."""
        sides: tuple[dict[str, list[NDArray[Any]]], dict[str, list[NDArray[Any]]]] = ({}, {})
        for pair in pairs:
            for side, arrays in zip(sides, pair, strict=True):
                for name, array in arrays.items():
                    side.setdefault(name, []).append(array)
        return Samples(*sides)

    def __len__(self) -> int:
        return next((len(array) for array in self.inputs.values()), 0)

    def __iter__(self) -> Iterator[tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]]:
        for index in range(len(self)):
            yield (
                {name: array[index] for name, array in self.inputs.items()},
                {name: array[index] for name, array in self.outputs.items()},
            )

    def save(self, path: Path) -> None:
        """Write as .npz with the names `inputs/NAME` and `outputs/NAME`; `inputs.0/NAME` and so on for lists."""
        arrays: dict[str, NDArray[Any]] = {}
        for side, values in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, value in values.items():
                if isinstance(value, np.ndarray):
                    arrays[f"{side}/{name}"] = value
                else:
                    arrays |= {f"{side}.{index}/{name}": array for index, array in enumerate(value)}
        np.savez_compressed(path, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own options

    @classmethod
    def load(cls, content: bytes, manifest: Manifest, *, where: str) -> Samples:
        """Read what `save` wrote. Raises `BundleError` where it is damaged, needs pickle or does not fit `manifest`."""
        try:
            arrays = _load(content)
        except _LOAD_ERRORS as error:
            raise BundleError(
                f"{where} cannot be read ({error}); it must hold plain number arrays, export the bundle again"
            ) from error
        pieces: dict[str, dict[str, dict[int | None, NDArray[Any]]]] = {"inputs": {}, "outputs": {}}
        for key, array in arrays.items():
            match = re.fullmatch(r"(inputs|outputs)(?:\.(0|[1-9][0-9]{0,5}))?/(.+)", key, re.DOTALL)
            if match is None:
                raise BundleError(f"{where} holds the unexpected array {key[:80]!r}; export the bundle again")
            if array.dtype.kind not in "biuf" or (array.ndim == 0 and match[2] is None):
                raise BundleError(f"{where}: {key[:80]!r} must hold numbers of several samples, got {array.dtype}")
            pieces[match[1]].setdefault(match[3], {})[None if match[2] is None else int(match[2])] = array
        sides = {side: {name: _whole(parts, where) for name, parts in named.items()} for side, named in pieces.items()}
        lengths = {len(array) for side in sides.values() for array in side.values()}
        if len(lengths) > 1:
            raise BundleError(f"{where} holds different numbers of samples: {sorted(lengths)}; export the bundle again")
        if arrays:
            _check_names(sides["inputs"], [spec.name for spec in manifest.inputs], where)
            for spec in manifest.inputs:
                found = sides["inputs"][spec.name]
                for array in [found[:1]] if isinstance(found, np.ndarray) else [item[None] for item in found]:
                    _check_input(array, spec, manifest, where)
        return cls(sides["inputs"], sides["outputs"])


def _whole(parts: dict[int | None, NDArray[Any]], where: str) -> NDArray[Any] | list[NDArray[Any]]:
    """One array of all samples, or the list of its pieces, numbered from 0."""
    if parts.keys() == {None}:
        return parts[None]
    if parts.keys() != set(range(len(parts))):
        raise BundleError(f"{where} lacks a sample of one of its arrays; export the bundle again")
    return [parts[index] for index in range(len(parts))]


def _load(content: bytes) -> dict[str, NDArray[Any]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("an array stands there twice")
    if sum(entry.file_size for entry in entries) > UNFOLDED_LIMIT:
        raise ValueError(f"it unfolds to more than {UNFOLDED_LIMIT // 2**30} GiB")
    if any(entry.compress_type not in COMPRESSIONS for entry in entries):
        raise ValueError("it is compressed by a method other than deflate")
    with np.load(io.BytesIO(content), allow_pickle=False) as data:
        return {name: np.asarray(data[name]) for name in data.files}


def _check_names(found: Collection[str], wanted: Sequence[str], where: str) -> None:
    if set(found) != set(wanted):
        raise BundleError(
            f"{where} holds samples of the inputs {sorted(found)}, the manifest lists {sorted(wanted)}; export it again"
        )


def _check_input(array: NDArray[Any], spec: TensorSpec, manifest: Manifest, where: str) -> None:
    shape = array.shape[1:]
    fits = len(shape) == len(spec.shape) and all(
        size == dim if isinstance(dim, int) else size in manifest.dims[dim]
        for size, dim in zip(shape, spec.shape, strict=True)
    )
    if array.dtype != np.dtype(spec.dtype) or not fits:
        raise BundleError(
            f"{where}: expected samples of {spec}, got {array.dtype} {list(shape)}; export the bundle again"
        )
