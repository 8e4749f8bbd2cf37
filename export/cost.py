"""What a lower precision costs in accuracy and gains in time, measured on this machine when it is exported."""

from __future__ import annotations

from typing import Any

from edgekit.errors import InputError, MissingDependencyError
from edgekit.export.data import load_labelled
from edgekit.export.source import LoadedModel
from edgekit.export.zoo import NAMED
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.profiler import ProfileComparison, profile_pair
from edgekit.runtime.session import load
from edgekit.runtime.verification import (
    batch_size,
    classify,
    finite,
    measure_accuracy,
    score_output,
    share_correct,
)


def measure_cost(loaded: LoadedModel, reference: Bundle, reduced: Bundle, data: Dataset | None) -> dict[str, Any]:
    """What a lower precision costs in accuracy and gains in time here, as measured, with a verdict in words."""
    timing = profile_pair(reference, reduced, sizes=_sizes(reduced), ops=False, max_seconds=3.0)
    precision = reduced.manifest.precision
    cost: dict[str, Any] = {
        "size_ratio": reduced.size_of_model / reference.size_of_model,
        "speed": _speed(timing, precision),
    }
    accuracy = _accuracy(loaded, reference, reduced)
    if accuracy is not None:
        cost["accuracy"] = accuracy
    elif data is not None:
        cost["agreement"] = _agreement(reference, reduced, data)
    return finite(cost)  # type: ignore[no-any-return]


def _sizes(bundle: Bundle) -> dict[str, int]:
    """The dynamic sizes of the first stored sample: both bundles are timed at these, whatever the other one stores."""
    inputs = next(iter(bundle.samples()), ({}, {}))[0]
    shapes = [(spec.shape, inputs[spec.name].shape) for spec in bundle.manifest.inputs if spec.name in inputs]
    pairs = [pair for dims, shape in shapes for pair in zip(dims, shape, strict=True)]
    return {dim: size for dim, size in pairs if isinstance(dim, str)}


def _speed(timing: ProfileComparison, precision: str) -> dict[str, Any]:
    """`speedup` is fp32's median latency over the other's, with its 95 % interval."""
    ratio = timing.ratio
    speedup, low, high = 1 / ratio.value, 1 / ratio.high, 1 / ratio.low
    if low > 1.0:
        verdict = f"{precision} is {speedup:.2f}x faster than fp32 on this machine"
    elif high < 1.0:
        verdict = f"{precision} is {ratio.value:.2f}x SLOWER than fp32 on this machine: use it for size, not for speed"
    else:
        verdict = f"{precision} is no faster than fp32 on this machine: use it for size, not for speed"
    return {
        "fp32_p50_ms": timing.a.latency_ms.p50,
        f"{precision}_p50_ms": timing.b.latency_ms.p50,
        "speedup": speedup,
        "interval_95": [low, high],
        "threads": timing.a.threads,
        "verdict": verdict,
        "machine": timing.a.to_json()["machine"],
    }


def _accuracy(loaded: LoadedModel, reference: Bundle, reduced: Bundle) -> dict[str, Any] | None:
    """Accuracy of PyTorch and both bundles on the data set that the model's shipped weights were trained for."""
    entry, manifest = loaded.entry, reference.manifest
    if entry is None or entry.dataset not in NAMED or loaded.weights.source != "shipped":
        return None
    session = load(reference, kernels="portable")
    try:
        data = load_labelled(entry.dataset, manifest.inputs, manifest.dims, manifest.labels, entry=entry)
        output = score_output(session)
    except (InputError, MissingDependencyError):
        # No labelled data, no class scores, or no scikit-learn here: the report then tells agreement instead.
        return None
    run = loaded.runner([spec.name for spec in manifest.outputs])
    predicted = classify(run, data, output=output, batch=batch_size(session))
    return {
        "data": data.source,
        "pytorch": share_correct(predicted, data),
        "fp32": measure_accuracy(session, data).bundle,
        reduced.manifest.precision: measure_accuracy(load(reduced, kernels="portable"), data).bundle,
    }


def _agreement(reference: Bundle, reduced: Bundle, data: Dataset) -> dict[str, Any] | None:
    """How often both bundles choose the same class on the calibration data, where they give class scores."""
    full, small = load(reference, kernels="portable"), load(reduced, kernels="portable")
    try:
        output = score_output(full)
    except InputError:  # no output holds class scores
        return None
    size = batch_size(full)
    same = classify(full.run, data, output=output, batch=size) == classify(small.run, data, output=output, batch=size)
    return {"data": f"{data.source} (calibration data, no labels used)", "items": len(same), "top1": float(same.mean())}
