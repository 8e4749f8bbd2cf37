"""What zoo models want to see: the shapes of their inputs, inputs that make sense to them, and labelled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.errors import InputError, MissingDependencyError
from edgekit.export.shapes import InputShape
from edgekit.models.registry import ImageInput, ModelEntry, TensorInput, TensorInputs, TokenInput
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.manifest import DimRange, TensorSpec
from edgekit.runtime.session import Array, check_inputs

# The data sets that models are trained on and commands know by name.
NAMED = {"digits": "scikit-learn's handwritten digits"}


def default_shapes(entry: ModelEntry, options: Mapping[str, object]) -> tuple[InputShape, ...]:
    """The inputs of a model built with these options: one image, or tensors with the dynamic sizes it names.

    None for a language model: its graphs say themselves what they take.
    """
    if isinstance(entry.input, TokenInput):
        return ()
    arguments = entry.arguments(options)
    if isinstance(entry.input, ImageInput):
        channels, size = arguments.get("in_chans", entry.input.channels), arguments.get("img_size", entry.input.size)
        height, width = (size, size) if isinstance(size, int) else size
        return (InputShape(entry.input.name, (1, int(channels), int(height), int(width))),)
    return tuple(_tensor_shape(tensor, arguments) for tensor in entry.input.tensors)


def _tensor_shape(tensor: TensorInput, arguments: Mapping[str, Any]) -> InputShape:
    dims = tuple(int(arguments[dim]) if isinstance(dim, str) and dim in arguments else dim for dim in tensor.dims)
    terms = (tensor.index_of or "").split("+")
    index_of = tensor.index_of and "+".join(str(arguments.get(term, term)) for term in terms)
    ranges = {dim: DimRange() for dim in dims if isinstance(dim, str)}
    return InputShape(tensor.name, dims, tensor.dtype, ranges, index_of)


def example_arrays(
    entry: ModelEntry | None,
    options: Mapping[str, object],
    specs: Sequence[TensorSpec],
    dims: Mapping[str, DimRange],
    *,
    seed: int,
) -> dict[str, Array] | None:
    """Inputs that make sense to a zoo model without images; None where there are none for these shapes.

    A model with one input takes rows of it, so many as its shape allows.
    """
    if entry is None or not isinstance(entry.input, TensorInputs):
        return None
    try:
        arrays = dict(entry.input.examples(seed, **options))
    except MissingDependencyError:  # the data set's library is not installed: inputs are then drawn
        return None
    if len(specs) == 1 and arrays.keys() == {specs[0].name}:
        arrays = {specs[0].name: arrays[specs[0].name][: _most_rows(specs[0], dims)]}
    arrays = _in_dtypes(arrays, specs)
    try:
        check_inputs({spec.name: (spec, np.dtype(spec.dtype)) for spec in specs}, arrays, dims)
    except InputError:  # the caller asked for other sizes than the data have
        return None
    return arrays


def labelled_data(entry: ModelEntry, specs: Sequence[TensorSpec], dims: Mapping[str, DimRange]) -> Dataset:
    """The labelled items of the data set that a model without images was made for.

    One run's inputs as a whole; rows, for a model of one input whose shape takes fewer of them at once.

    Raises:
        InputError: it has no such data.
        MissingDependencyError: the data set's library is not installed.
    """
    if not isinstance(entry.input, TensorInputs) or entry.input.labelled is None:
        raise InputError(
            f"{entry.name} has no labelled data of its own; give an .npz with its inputs "
            f"({', '.join(spec.name for spec in specs)}) and 'labels'"
        )
    inputs, labels = entry.input.labelled()
    labels = labels.astype(np.int64, copy=False)
    counted = labels >= 0
    name = NAMED.get(str(entry.dataset), str(entry.dataset))
    source = f"{name}, {int(counted.sum())} of {len(labels)} rows counted (each is one {entry.input.unit})"
    if len(specs) == 1 and inputs.keys() == {specs[0].name} and _most_rows(specs[0], dims) < len(labels):
        return Dataset({specs[0].name: inputs[specs[0].name][counted]}, labels[counted], source)
    return Dataset(_in_dtypes(inputs, specs), labels, source, whole=True)


def _in_dtypes(arrays: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Integers in the integer dtypes of `specs`: a target may know int32 alone where the model takes int64."""
    wanted = {spec.name: np.dtype(spec.dtype) for spec in specs}
    return {
        name: array.astype(wanted[name]) if array.dtype.kind == wanted.get(name, array.dtype).kind == "i" else array
        for name, array in arrays.items()
    }


def _most_rows(spec: TensorSpec, dims: Mapping[str, DimRange]) -> int:
    """How many rows one run takes at most."""
    first = spec.shape[0] if spec.shape else 1
    limit = first if isinstance(first, int) else dims[first].max
    return np.iinfo(np.int64).max if limit is None else limit
