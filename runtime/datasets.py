"""Inputs by the hundred, for calibration and accuracy: arrays from .npz and .npy files, images from directories."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import InputError
from edgekit.runtime.images import IMAGE_SUFFIXES, is_image

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgekit.runtime.preprocess import ImagePreprocessing

LABEL_NAMES = ("labels", "label", "y")
_SHOWN = 6  # names in a message

# What numpy.load raises on files that are damaged, or that hold Python objects.
_LOAD_ERRORS = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Dataset:
    """Model inputs and, where known, the right answers.

    Attributes:
        inputs: arrays by the model's input names, `[N, ...]` each, ready for `Session.run`.
        labels: int64 `[N]`, class indices; None where unknown.
        source: where it came from and how it was read, for reports.
        whole: the inputs are one run's, such as a graph with its edges, and are never cut: the data set has one item.
            Labels then name the class of each row of the model's first output, and -1 one that does not count.

    Raises:
        InputError: no inputs, no samples, or unequal numbers of samples.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64] | None
    source: str
    whole: bool = False

    def __post_init__(self) -> None:
        if self.whole:
            if not self.inputs or (self.labels is not None and not len(self.labels)):
                raise InputError(f"{self.source}: expected inputs, and labels of at least one row where there are any")
            return
        arrays = dict(self.inputs) if self.labels is None else {**self.inputs, "labels": self.labels}
        if scalars := [name for name, array in arrays.items() if array.ndim == 0]:
            raise InputError(f"{self.source}: expected samples along the first axis, got a scalar {scalars[0]!r}")
        lengths = {name: len(array) for name, array in arrays.items()}
        if not self.inputs or 0 in lengths.values():
            raise InputError(f"{self.source}: expected at least one sample, got none")
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise InputError(f"{self.source}: expected as many samples in every array, got {counts}")

    def __len__(self) -> int:
        return 1 if self.whole else len(next(iter(self.inputs.values())))

    def batches(self, size: int) -> Iterator[Dataset]:
        """Consecutive parts of `size` samples, views of this data set; the last may be smaller.

        Raises:
            InputError: a size below 1.
        """
        if size < 1:
            raise InputError(f"expected a batch size of at least 1, got {size}")
        if self.whole:
            return iter((self,))
        return (self._pick(slice(start, start + size), self.source) for start in range(0, len(self), size))

    def take(self, n: int, seed: int = 0) -> Dataset:
        """`n` samples drawn at random without repetition, in their original order; all of them if there are fewer.

        Raises:
            InputError: an n below 1.
        """
        if n < 1:
            raise InputError(f"expected to take at least 1 sample, got {n}")
        if n >= len(self):
            return self
        drawn = np.sort(np.random.default_rng(seed).choice(len(self), size=n, replace=False))
        return self._pick(drawn, f"{self.source}, {n} drawn of {len(self)} (seed {seed})")

    def _pick(self, which: slice | NDArray[Any], source: str) -> Dataset:
        inputs = {name: array[which] for name, array in self.inputs.items()}
        return Dataset(inputs, None if self.labels is None else self.labels[which], source)


def load_dataset(
    path: str | os.PathLike[str],
    *,
    input_name: str,
    preprocessing: ImagePreprocessing | None,
    input_shapes: Mapping[str, Sequence[int | str | None]],
    labels: Sequence[str] | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Read a data set from disk, in the same order every time.

    Args:
        path: one of
            - `.npz`: one array `[N, ...]` per model input, by name, and optionally the class indices `[N]` as
              `labels`, `label` or `y`. A lone array may have any name if the model has one input. Where the first axes
              of the model's inputs count different things, such as vertices and edges, the arrays are one run's inputs
              as a whole, and the labels are for the rows of its first output, -1 where one does not count;
            - `.npy`: the array of the model's only input;
            - a directory of images, without labels;
            - a directory of class folders with images. A folder stands for the class of `labels` that it is named
              after; if all folders have integer names, for that index; else folders count in sorted order, and
              `source` says so.
        input_name: the input that images are for.
        preprocessing: how an image becomes that input; None if the model does not take images.
        input_shapes: the shape of every input, batch axis first. Names and None match any size, as the batch does.
        labels: the names of the model's classes, if known.
        limit: at most so many samples, spread evenly over the whole so that every class keeps its share.
        progress: called after each image with the number done and the number of all.

    Returns:
        A `Dataset`; images as float32 by `preprocessing`, arrays as they were stored.

    Raises:
        InputError: nothing there, a damaged or unsafe file (pickled objects), no image, an unreadable image, arrays
            that do not fit the model or each other, NaN values, or labels out of range.
        MissingDependencyError: there are images to read and Pillow is not installed.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InputError(f"expected a limit of at least 1 sample, got {limit}")
    if path.is_dir():
        files, targets, source = _find_images(path, labels)
        if preprocessing is None or list(input_shapes) != [input_name]:
            raise InputError(
                f"{path} is a directory of images, but the model has no image preprocessing or several inputs; "
                f"store its inputs ({', '.join(input_shapes)}) in a .npz file"
            )
        _check_shape(input_name, preprocessing.output_shape, input_shapes[input_name], "the image preprocessing")
        kept = _spread(len(files), limit)
        images = _read_images([files[index] for index in kept], preprocessing, progress)
        source += _spread_text(len(kept), len(files))
        dataset = Dataset({input_name: images}, None if targets is None else targets[kept], source)
    elif path.suffix.lower() in (".npz", ".npy"):
        dataset = _from_arrays(_load_arrays(path), path, input_shapes)
        kept = _spread(len(dataset), limit)
        if len(kept) < len(dataset):
            dataset = dataset._pick(kept, dataset.source + _spread_text(len(kept), len(dataset)))
    elif path.exists():
        raise InputError(f"expected a data set as .npz, .npy or a directory of images, got the file {path}")
    else:
        raise InputError(f"no such data set: {path}")
    _check_labels(dataset, labels)
    return dataset


def _spread(count: int, limit: int | None) -> NDArray[np.int64]:
    """The indices of at most `limit` of `count` samples, evenly spread, the first one included."""
    kept = count if limit is None else min(count, limit)
    return np.arange(kept, dtype=np.int64) * count // kept


def _spread_text(kept: int, count: int) -> str:
    return "" if kept == count else f", {kept} of {count} spread evenly"


def _load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name; that of an .npy file under the empty name."""
    if not path.is_file():
        raise InputError(f"no such data set: {path}")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            return {name: loaded[name] for name in loaded.files}
    except _LOAD_ERRORS as error:
        raise InputError(
            f"{path} cannot be read: {error}. Expected plain number arrays written by numpy.save or numpy.savez; "
            "pickled objects are refused because loading them can run code"
        ) from error


def _listed(names: Sequence[str]) -> str:
    """The names; of many, such as those of a language model's cache, the first."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _from_arrays(arrays: dict[str, NDArray[Any]], path: Path, input_shapes: Mapping[str, Sequence[Any]]) -> Dataset:
    label_names = [name for name in LABEL_NAMES if name in arrays and name not in input_shapes]
    if len(label_names) > 1:
        raise InputError(f"{path}: expected one array of labels, got {', '.join(label_names)}; keep one")
    inputs = {name: array for name, array in arrays.items() if name not in label_names}
    if len(inputs) == len(input_shapes) == 1:
        inputs = dict(zip(input_shapes, inputs.values(), strict=True))
    if inputs.keys() != input_shapes.keys():
        raise InputError(
            f"{path}: expected an array for each input ({_listed(list(input_shapes))}) and optionally labels, "
            f"got {_listed([name or 'one array' for name in arrays]) or 'no array'}"
        )
    whole = len({tuple(shape[:1]) for shape in input_shapes.values()}) > 1
    for name, array in inputs.items():
        if array.dtype.kind not in "biuf":
            raise InputError(f"{path}: expected numbers for {name!r}, got {array.dtype}")
        _check_shape(name, array.shape, input_shapes[name], str(path))
        if array.dtype.kind == "f" and np.isnan(array).any():
            sample = int(np.argmax(np.isnan(array).reshape(len(array), -1).any(axis=1)))
            what = "row" if whole else "sample"
            raise InputError(f"{path}: {name!r} holds NaN, first in {what} {sample}; remove it or mend the file")
    targets = None
    if label_names:
        found = arrays[label_names[0]]
        if found.ndim != 1 or found.dtype.kind not in "iu":
            raise InputError(
                f"{path}: expected {label_names[0]!r} to hold one integer per {'row' if whole else 'sample'}, [N], "
                f"got {found.dtype} {list(found.shape)}"
            )
        targets = found.astype(np.int64)
    return Dataset(inputs, targets, str(path), whole)


def _check_shape(name: str, shape: Sequence[int], wanted: Sequence[int | str | None], origin: str) -> None:
    """Raise unless `shape` fits `wanted` in every axis but the first, which counts samples."""
    fits = len(shape) == len(wanted) > 0 and all(
        not isinstance(want, int) or have == want for have, want in zip(shape[1:], wanted[1:], strict=True)
    )
    if not fits:
        expected = ", ".join(["N", *("any" if want is None else str(want) for want in wanted[1:])])
        raise InputError(f"{origin}: expected {name!r} of shape [{expected}] for N samples, got {list(shape)}")


def _check_labels(dataset: Dataset, labels: Sequence[str] | None) -> None:
    if dataset.labels is None:
        return
    low, high = int(dataset.labels.min()), int(dataset.labels.max())
    least = -1 if dataset.whole else 0
    if low < least or (labels is not None and high >= len(labels)):
        allowed = (
            f"of at least {least}" if labels is None else f"from {least} to {len(labels) - 1}, as the model has classes"
        )
        raise InputError(f"{dataset.source}: expected labels {allowed}, got {low} to {high}")


def _read_images(
    files: Sequence[Path], preprocessing: ImagePreprocessing, progress: Callable[[int, int], None] | None
) -> NDArray[Any]:
    """Preprocess images one at a time, so that only the results are held."""
    result = np.empty((len(files), *preprocessing.output_shape[1:]), preprocessing.dtype)
    for index, file in enumerate(files):
        result[index] = preprocessing(file)[0]
        if progress is not None:
            progress(index + 1, len(files))
    return result


def _find_images(path: Path, labels: Sequence[str] | None) -> tuple[list[Path], NDArray[np.int64] | None, str]:
    """The images below a directory in sorted order, the class of each (None if it has no class folders), the source."""
    flat = [file for file in _visible(path) if is_image(file) and file.is_file()]
    classes = {
        folder.name: sorted(file for file in folder.rglob("*") if is_image(file) and not file.name.startswith("."))
        for folder in _visible(path)
        if folder.is_dir()
    }
    if flat and any(classes.values()):
        raise InputError(f"{path} holds images beside folders of images; put all of them into class folders, or none")
    if flat:
        return flat, None, f"{path}: {len(flat)} images without labels"
    if not any(classes.values()):
        raise InputError(f"{path} holds no image; known endings: {', '.join(IMAGE_SUFFIXES)}")
    if empty := [name for name, files in classes.items() if not files]:
        raise InputError(f"{path}: the class folder {empty[0]!r} holds no image; fill or remove it")
    indices, rule = _class_indices(path, list(classes), labels)
    files = [file for name in classes for file in classes[name]]
    targets = np.repeat(np.array(indices, np.int64), [len(found) for found in classes.values()])
    return files, targets, f"{path}: {len(files)} images in {len(classes)} classes, {rule}"


def _visible(path: Path) -> list[Path]:
    """The entries of a directory, sorted, without hidden ones (macOS leaves `._photo.jpg` beside `photo.jpg`)."""
    return sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))


def _class_indices(path: Path, folders: list[str], labels: Sequence[str] | None) -> tuple[list[int], str]:
    """The class index of each folder, and the rule that gave it."""
    known = set(labels or ())
    unknown = [name for name in folders if name not in known]
    if labels is not None and not unknown:
        if repeated := [name for name in folders if list(labels).count(name) > 1]:
            raise InputError(f"{path}: the model has several classes named {repeated[0]!r}; name folders by index")
        return [list(labels).index(name) for name in folders], "matched to the model's labels by name"
    if all(name.isascii() and name.isdecimal() for name in folders):
        return [int(name) for name in folders], "folder names taken as class indices"
    if labels is not None and (len(unknown) < len(folders) or len(folders) != len(labels)):
        raise InputError(
            f"{path}: expected folders named after the model's {len(labels)} labels or by index, "
            f"got {unknown[0]!r}{' and others' if len(unknown) > 1 else ''}; rename them"
        )
    return list(range(len(folders))), "classes numbered in the sorted order of their folders"
