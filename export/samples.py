"""The inputs that travel in a bundle, and what the original, unfused model answers to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from edgekit.errors import MissingDependencyError
from edgekit.export import onnx as onnx_target
from edgekit.export.calling import tensor_leaves
from edgekit.export.data import digits
from edgekit.export.plan import Plan
from edgekit.export.shapes import input_specs
from edgekit.export.zoo import example_arrays
from edgekit.runtime.bundle import Samples
from edgekit.runtime.datasets import Dataset

SAMPLE_COUNT = 4


def samples_of(plan: Plan, names: list[str]) -> Samples:
    """A few inputs (real ones where the model has data) and what the original, unfused model answers."""
    plan.step("store samples")
    return record_answers(plan, names, _sample_inputs(plan))


def record_answers(plan: Plan, names: Sequence[str], items: Sequence[Mapping[str, torch.Tensor]]) -> Samples:
    """What the original model answers to each item; to the first alone where their sizes differ and do not stack."""
    if len({tuple(tensor.shape for tensor in item.values()) for item in items}) > 1:
        items = items[:1]
    inputs: dict[str, list[np.ndarray[Any, Any]]] = {}
    outputs: dict[str, list[np.ndarray[Any, Any]]] = {}
    for tensors in items:
        leaves = tensor_leaves(plan.loaded.call(tensors))
        for key, tensor in tensors.items():
            inputs.setdefault(key, []).append(tensor.numpy())
        for key, leaf in zip(names, leaves, strict=True):
            outputs.setdefault(key, []).append(leaf.numpy())
    return Samples({k: np.stack(v) for k, v in inputs.items()}, {k: np.stack(v) for k, v in outputs.items()})


def first_items(plan: Plan, data: Dataset) -> list[dict[str, torch.Tensor]]:
    """The first items of the calibration data as samples: int8 answers only inputs like these."""
    parts = islice(data.batches(batch_size(plan)), SAMPLE_COUNT)
    return [{name: torch.from_numpy(array) for name, array in part.inputs.items()} for part in parts]


def batch_size(plan: Plan) -> int:
    """How many items of a data set one run takes: the first axis, at its smallest size."""
    shape = plan.shapes[0]
    first = shape.dims[0] if shape.dims else 1
    return first if isinstance(first, int) else shape.ranges[first].min


def _sample_inputs(plan: Plan) -> list[dict[str, torch.Tensor]]:
    loaded, (specs, dims) = plan.loaded, input_specs(plan.shapes)
    seeds = [plan.seed + index for index in range(SAMPLE_COUNT)]
    real = [example_arrays(loaded.entry, loaded.options, specs, dims, seed=seed) for seed in seeds]
    if arrays := [item for item in real if item is not None]:
        return [{name: torch.from_numpy(array) for name, array in item.items()} for item in arrays]
    drawn = [onnx_target.example_inputs(plan.shapes, seed=seed) for seed in seeds]
    entry = plan.loaded.entry
    if entry is None or entry.dataset != "digits" or plan.preprocessing is None:
        return drawn
    try:
        data = digits("test", plan.shapes[0].name, plan.preprocessing)
    except MissingDependencyError:  # scikit-learn is not installed: samples are then random, as for any other model
        return drawn
    name, size = plan.shapes[0].name, drawn[0][plan.shapes[0].name].shape[0]
    return [{name: torch.from_numpy(part.inputs[name])} for part in islice(data.batches(size), SAMPLE_COUNT)]
