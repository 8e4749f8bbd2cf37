"""Data by name or path: for calibration, and for accuracy on labelled items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edgekit.errors import InputError
from edgekit.export.shapes import InputShape, input_specs
from edgekit.export.zoo import NAMED, example_arrays, labelled_data
from edgekit.models.registry import ImageInput, ModelEntry, TensorInputs
from edgekit.runtime.datasets import Dataset, load_dataset
from edgekit.runtime.manifest import DimRange, TensorSpec
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.session import Array, random_inputs

RANDOM_ITEMS = 16
MAX_CALIBRATION_ITEMS = 256


def image_preprocessing(entry: ModelEntry) -> ImagePreprocessing | None:
    """The recipe of a zoo model's input, in the form that bundles carry; None for a model that takes no images."""
    spec = entry.input
    if not isinstance(spec, ImageInput):
        return None
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
    dims: Mapping[str, DimRange],
    labels: Sequence[str] | None,
    *,
    entry: ModelEntry | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """Labelled data for accuracy: the name `digits` (its test part), a folder of class folders, or an .npz.

    A zoo model that takes no images (`entry`) has its own part of the data set that it was made for.
    """
    spec = specs[0]
    if str(data) in NAMED:
        if entry is not None and isinstance(entry.input, TensorInputs):
            if entry.dataset != str(data):
                raise InputError(
                    f"{entry.name} has no data of its own in {str(data)!r}; give an .npz with its inputs and 'labels'"
                )
            return labelled_data(entry, specs, dims)
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
    entry: ModelEntry | None = None,
    options: Mapping[str, object] | None = None,
    *,
    batch: int = 1,
) -> Dataset:
    """Calibration data for int8: a folder of images, an .npz, `digits`, `random`, or the zoo model's own data set.

    At most `MAX_CALIBRATION_ITEMS`, drawn with a fixed seed, in the dtypes of `shapes`; a whole number of batches. A
    model whose inputs belong together, such as a graph and its edges, is calibrated on them as a whole.

    Raises `InputError` for none, for data that do not fit the model, and for less than one batch.
    """
    own = calibration is None or (entry is not None and str(calibration) == entry.dataset)
    if own and entry is not None and isinstance(entry.input, TensorInputs):
        data = _own_data(entry, options or {}, shapes)
    else:
        data = _read_calibration(calibration, shapes, preprocessing, entry.dataset if entry else None)
    arrays = {}
    for shape in shapes:
        array = data.inputs[shape.name]
        if not np.can_cast(array.dtype, shape.dtype, casting="same_kind"):
            raise InputError(f"{data.source} holds {array.dtype} for {shape}; store it as {shape.dtype}")
        arrays[shape.name] = array.astype(shape.dtype, copy=False)
    if data.whole:
        return Dataset(arrays, None, data.source, whole=True)
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


def _own_data(entry: ModelEntry, options: Mapping[str, object], shapes: Sequence[InputShape]) -> Dataset:
    """Inputs of the data set that a zoo model without images was made for: rows of its one input, else the whole.

    Of rows, none that the model's accuracy is measured on. Raises `InputError` where it has no such data, and
    `MissingDependencyError` where the data set's library is not installed.
    """
    assert isinstance(entry.input, TensorInputs)
    specs, dims = input_specs(shapes)
    seeds = range(RANDOM_ITEMS) if len(specs) == 1 else range(1)
    found = [example_arrays(entry, options, specs, dims, seed=seed) for seed in seeds if entry.dataset is not None]
    items = [item for item in found if item is not None]
    if not items:
        raise InputError(
            f"int8 needs calibration data, and {entry.name} has none of its own for these shapes: pass --calibration "
            "with an .npz of its inputs ('random' works for timing only, its accuracy means nothing)"
        )
    arrays = {spec.name: np.concatenate([item[spec.name] for item in items]) for spec in specs}
    if entry.input.labelled is not None:
        inputs, labels = entry.input.labelled()  # without the library, examples are drawn, which would be no such data
        if len(specs) == 1:
            name = specs[0].name
            arrays = {name: _without(arrays[name], inputs[name][labels >= 0])}
    return Dataset(arrays, None, f"{NAMED[str(entry.dataset)]}, as inputs of {entry.name}", whole=len(specs) > 1)


def _without(rows: Array, others: Array) -> Array:
    """The rows that are not among the others, bit for bit."""
    known = {row.tobytes() for row in others.astype(rows.dtype, copy=False)}
    left: Array = rows[[row.tobytes() not in known for row in rows]]
    return left


def _random_data(shapes: Sequence[InputShape]) -> Dataset:
    specs, dims = input_specs(shapes)
    if len({spec.shape[:1] for spec in specs}) > 1:
        sizes = {name: min(max(RANDOM_ITEMS, limits.min), limits.max or RANDOM_ITEMS) for name, limits in dims.items()}
        return Dataset(random_inputs(specs, dims, sizes=sizes), None, "random normal values (for timing only)", True)
    items = [random_inputs(specs, dims, seed=seed) for seed in range(RANDOM_ITEMS)]
    arrays = {spec.name: np.concatenate([item[spec.name] for item in items]) for spec in specs}
    return Dataset(arrays, None, "random normal values (for timing only)")


def _need_preprocessing(recipe: ImagePreprocessing | None, what: str) -> ImagePreprocessing:
    if recipe is None:
        raise InputError(f"the data set {what!r} holds images, but this model has no image preprocessing")
    return recipe
