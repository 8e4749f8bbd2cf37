"""Data by name or path: for calibration, and for accuracy on labelled items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from edgekit.errors import InputError
from edgekit.export.shapes import InputShape
from edgekit.models.registry import ModelEntry
from edgekit.runtime.datasets import Dataset, load_dataset
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.session import random_inputs

RANDOM_ITEMS = 16
MAX_CALIBRATION_ITEMS = 256
NAMED = {"digits": "scikit-learn's handwritten digits"}


def image_preprocessing(entry: ModelEntry) -> ImagePreprocessing:
    """The recipe of a zoo model's input, in the form that bundles carry."""
    spec = entry.input
    exact = spec.crop_pct == 1
    return ImagePreprocessing(
        size=(spec.size, spec.size),
        resize="squash" if exact else "shortest",
        crop_pct=spec.crop_pct,
        interpolation=spec.interpolation,
        color="gray" if spec.channels == 1 else "rgb",
        mean=spec.mean,
        std=spec.std,
    )


def digits(part: str, input_name: str, preprocessing: ImagePreprocessing) -> Dataset:
    """One part (`train`, `validation`, `test`) of scikit-learn's digits, preprocessed as an image file would be."""
    from edgekit.models.digits import load_digits_split

    images, labels = load_digits_split(part)  # type: ignore[arg-type]  # its callers here pass literals
    arrays = np.concatenate([preprocessing(image) for image in images])
    return Dataset({input_name: arrays}, labels, f"{NAMED['digits']}, {part} part ({len(labels)} images)")


def load_labelled(
    data: str | Path,
    specs: Sequence[TensorSpec],
    labels: Sequence[str] | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Labelled data for accuracy: the name `digits` (its test part), a folder of class folders, or an .npz."""
    spec = specs[0]
    if str(data) == "digits":
        return digits("test", spec.name, _need_preprocessing(spec.preprocessing, "digits"))
    return load_dataset(
        data,
        input_name=spec.name,
        preprocessing=spec.preprocessing,
        input_shapes={item.name: item.shape for item in specs},
        labels=labels,
        progress=progress,
    )


def load_calibration(
    calibration: str | Path | None,
    shapes: Sequence[InputShape],
    preprocessing: ImagePreprocessing | None,
    dataset: str | None,
    *,
    batch: int = 1,
) -> Dataset:
    """Calibration data for int8: a folder of images, an .npz, `digits`, `random`, or the model's own `dataset`.

    At most `MAX_CALIBRATION_ITEMS`, drawn with a fixed seed, in the dtypes of `shapes`; a whole number of batches.

    Raises `InputError` for none, for data that do not fit the model, and for less than one batch.
    """
    data = _read_calibration(calibration, shapes, preprocessing, dataset)
    arrays = {}
    for shape in shapes:
        array = data.inputs[shape.name]
        if not np.can_cast(array.dtype, shape.dtype, casting="same_kind"):
            raise InputError(f"{data.source} holds {array.dtype} for {shape}; store it as {shape.dtype}")
        arrays[shape.name] = array.astype(shape.dtype, copy=False)
    if len(data) < batch:
        raise InputError(
            f"{data.source} holds {len(data)} items, the model takes {batch} at once; give at least as many"
        )
    kept = min(len(data), max(batch, MAX_CALIBRATION_ITEMS)) // batch * batch
    return Dataset(arrays, None, data.source).take(kept)


def _read_calibration(
    calibration: str | Path | None,
    shapes: Sequence[InputShape],
    preprocessing: ImagePreprocessing | None,
    dataset: str | None,
) -> Dataset:
    if calibration is None:
        if dataset is None:
            raise InputError(
                "int8 needs calibration data: pass --calibration with a folder of typical images or an .npz of inputs "
                "(100 to 300 items; 'random' works for timing only, its accuracy means nothing)"
            )
        calibration = dataset
    first = shapes[0]
    if str(calibration) == "random":
        return _random_data(shapes)
    if str(calibration) == "digits":
        return digits("train", first.name, _need_preprocessing(preprocessing, "digits"))
    return load_dataset(
        calibration,
        input_name=first.name,
        preprocessing=preprocessing,
        input_shapes={shape.name: shape.dims for shape in shapes},
    )


def _random_data(shapes: Sequence[InputShape]) -> Dataset:
    specs = tuple(TensorSpec(shape.name, shape.dtype, shape.dims) for shape in shapes)
    dims = {name: limits for shape in shapes for name, limits in shape.ranges.items()}
    items = [random_inputs(specs, dims, seed=seed) for seed in range(RANDOM_ITEMS)]
    arrays = {spec.name: np.concatenate([item[spec.name] for item in items]) for spec in specs}
    return Dataset(arrays, None, "random normal values (for timing only)")


def _need_preprocessing(recipe: ImagePreprocessing | None, what: str) -> ImagePreprocessing:
    if recipe is None:
        raise InputError(f"the data set {what!r} holds images, but this model has no image preprocessing")
    return recipe
