"""Verify a bundle against the PyTorch outputs stored in it, and measure its accuracy on labelled data. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgekit.errors import InputError, NothingToCompareError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.compare import OutputComparison, compare_outputs, failed_comparison
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.kernel_library import KernelUse, NodeKernel, kernel_uses
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.session import Array, Session, load
from edgekit.runtime.tolerances import output_tolerance

_MOST_SHOWN = 6


@dataclass(frozen=True)
class Check:
    """The bundle against one reference: `against` names it, `inputs` counts what was tried. Truthy when all pass."""

    against: str
    inputs: int
    outputs: tuple[OutputComparison, ...]

    def __bool__(self) -> bool:
        return bool(self.outputs) and all(self.outputs)


def shown_outputs(check: Check) -> list[tuple[str, OutputComparison]]:
    """The outputs to show, with what to call them: all of a few; of many the first, those that fail, and the worst."""
    if len(check.outputs) <= _MOST_SHOWN:
        return [(item.name, item) for item in check.outputs]
    first, *others = check.outputs
    passed = [item for item in others if item]
    shown = [(item.name, item) for item in (first, *(item for item in others if not item))]
    if passed:
        worst = max(passed, key=lambda item: item.rel_l2)
        shown.append((f"{worst.name}, the worst of {len(passed)}", worst))
    return shown


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on labelled data, 0 to 1: the bundle's, and PyTorch's where the model was at hand."""

    data: str
    items: int
    bundle: float
    pytorch: float | None = None


@dataclass(frozen=True)
class LayerComparison:
    """One layer's output in both runtimes; `module` is its path in the PyTorch model, `op` what computes it."""

    layer: str
    module: str
    op: str
    shape: tuple[int, ...]
    comparison: OutputComparison

    def __bool__(self) -> bool:
        return bool(self.comparison)


@dataclass(frozen=True)
class LayerReport:
    """All layers that both runtimes show, in order of computation."""

    layers: tuple[LayerComparison, ...]
    tolerance: float
    first_bad: LayerComparison | None

    def __bool__(self) -> bool:
        return self.first_bad is None


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Truthy when every check passes; holds the figures either way.

    `not_checked` says in words what was left out, and why; `kernels` what served edgekit's own ops in these checks.
    """

    bundle: str
    precision: str
    checks: tuple[Check, ...]
    accuracy: Accuracy | None = None
    layers: LayerReport | None = None
    not_checked: tuple[str, ...] = ()
    kernels: tuple[KernelUse, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.checks) and all(self.checks) and (self.layers is None or bool(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Plain data for strict JSON: infinities and NaN become None."""
        data = finite(asdict(self))
        data["passed"] = bool(self)
        return data  # type: ignore[no-any-return]


def tolerance_for(manifest: Manifest, tolerance: float | None = None) -> float:
    """The largest relative L2 error of an output that passes: the one asked for, else the one that the bundle was
    exported with, else the table's for its precision. Raises `InputError` where it is not a positive number."""
    if tolerance is None:
        recorded = manifest.verification.get("tolerance")
        if not isinstance(recorded, float):
            return output_tolerance(manifest.precision, manifest.target)
        tolerance = recorded
    if not 0 < tolerance < 1:
        raise InputError(f"a tolerance is a relative L2 error between 0 and 1, such as 2e-5; got {tolerance}")
    return tolerance


def verify_samples(session: Session, *, tolerance: float | None = None) -> Check:
    """Run the stored inputs and compare with the stored PyTorch outputs; `tolerance` as for `tolerance_for`.

    Raises `NothingToCompareError` where the bundle stores none.
    """
    limit = tolerance_for(session.bundle.manifest, tolerance)
    samples = session.bundle.samples()
    if not len(samples) or not samples.outputs:
        raise NothingToCompareError(
            f"nothing to compare: {session.bundle.name} stores no samples; compare with the model itself (--model)"
        )
    return check_outputs("stored PyTorch outputs", iter(samples), session.run, limit)


def check_outputs(
    against: str,
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]],
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    tolerance: float,
) -> Check:
    """Run each input of `pairs` and compare with the reference beside it, all inputs taken together.

    Raises `NothingToCompareError` where there are no inputs, or no output in common.
    """
    expected: dict[str, list[Array]] = {}
    got: dict[str, list[Array]] = {}
    count = 0
    for inputs, answers in pairs:
        count += 1
        for store, outputs in ((expected, answers), (got, run(inputs))):
            for name, array in outputs.items():
                store.setdefault(name, []).append(np.asarray(array))
    if not count:
        raise NothingToCompareError(f"nothing to compare with {against}: there are no inputs")
    failed = {}
    for name in expected.keys() & got.keys():
        shapes, wanted = ([array.shape for array in side[name]] for side in (got, expected))
        if shapes != wanted:
            problem = f"the shapes are {_shapes_text(shapes)}, PyTorch gave {_shapes_text(wanted)}"
            failed[name] = failed_comparison(name, tolerance, problem)
    reference, actual = _join(expected), _join(got)
    scores = frozenset(
        name for name, array in reference.items() if is_class_scores(array) or is_token_scores(name, array)
    )
    compared = compare_outputs(reference, actual, tolerance=tolerance, top1=scores)
    return Check(against, count, tuple(failed.get(item.name, item) for item in compared))


def is_class_scores(array: Array) -> bool:
    """Whether an output looks like class scores: floats of shape [batch, classes] with more than one class."""
    return array.ndim == 2 and array.shape[-1] > 1 and np.issubdtype(array.dtype, np.floating)


def is_token_scores(name: str, array: Array) -> bool:
    """Whether an output holds a language model's scores of the next token, `[batch, 1, vocabulary]`."""
    return name == "logits" and array.ndim == 3 and array.shape[1] == 1 and np.issubdtype(array.dtype, np.floating)


def classify(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]], data: Dataset, *, output: str, batch: int = 1
) -> Array:
    """The predicted class of every item of `data`, int64 [n], run `batch` items at a time.

    The last batch is filled up with its own last item, because a model may take batches of one size only. Whole inputs
    run once and give a class for each row of the output.
    """
    if data.whole:
        whole: Array = np.argmax(run(data.inputs)[output], axis=-1).astype(np.int64)
        return whole
    classes = []
    for part in data.batches(batch):
        missing = batch - len(part)
        inputs = {
            name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array
            for name, array in part.inputs.items()
        }
        classes.append(np.argmax(run(inputs)[output], axis=-1)[: len(part)])
    return np.concatenate(classes).astype(np.int64)


def batch_size(session: Session) -> int:
    """How many items one run takes: the fixed size of the first axis, or the smallest that its range allows."""
    first = session.inputs[0].shape[0] if session.inputs[0].shape else 1
    return first if isinstance(first, int) else max(1, session.bundle.manifest.dims[first].min)


def measure_accuracy(session: Session, data: Dataset) -> Accuracy:
    """Top-1 accuracy of the bundle on labelled data. Raises `InputError` without labels or without class scores."""
    output = score_output(session)
    if data.labels is None:
        raise InputError(f"{data.source} has no labels; accuracy needs class-named folders or a 'labels' array")
    predicted = classify(session.run, data, output=output, batch=batch_size(session))
    return Accuracy(data.source, int(np.sum(data.labels >= 0)), share_correct(predicted, data))


def share_correct(predicted: Array, data: Dataset) -> float:
    """The share of predicted classes, int64 `[n]`, that are those of `data`; what has the label -1 does not count.

    Raises `InputError` where there are not as many labels as predictions, or none that counts.
    """
    labels = data.labels
    if labels is None or len(labels) != len(predicted):
        found = "no labels" if labels is None else f"{len(labels)} labels"
        raise InputError(f"{data.source} holds {found} for {len(predicted)} rows of class scores; give one for each")
    counted = labels >= 0
    if not counted.any():
        raise InputError(f"{data.source}: every label is -1, so that none counts; give the classes of some rows")
    return float(np.mean(predicted[counted] == labels[counted]))


def score_output(session: Session) -> str:
    """The name of the output that holds class scores. Raises `InputError` where there is none."""
    for spec in session.outputs:
        if len(spec.shape) == 2 and spec.dtype.startswith("float") and spec.shape[-1] != 1:
            return spec.name
    raise InputError(f"{session.bundle.name} has no output with class scores: {', '.join(map(str, session.outputs))}")


def verify(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    data: Dataset | None = None,
    tolerance: float | None = None,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
) -> Verification:
    """Verify on a device without torch: the stored samples, and the accuracy where labelled data is given.

    Args:
        tolerance: as for `tolerance_for`.
        backend, threads, kernels: as for `edgekit.load`.
    """
    opened = Bundle.open(bundle)
    if data is not None:
        refuse_labels(opened)
    accuracy = None
    checks: list[Check] = []
    nodes: list[NodeKernel] = []
    notes: dict[str, None] = {}
    for name, part in opened.parts().items():
        session = load(part, backend=backend, threads=threads, kernels=kernels)
        accuracy = measure_accuracy(session, data) if data is not None else None
        checks.append(of_part(name, verify_samples(session, tolerance=tolerance)))
        nodes += session.kernels
        notes |= dict.fromkeys(not_run(session))
    return Verification(
        opened.name,
        opened.manifest.precision,
        tuple(checks),
        accuracy=accuracy,
        not_checked=("live PyTorch: this is the torch-free runtime", *notes),
        kernels=kernel_uses(tuple(nodes)),
    )


def not_run(session: Session) -> list[str]:
    """What these checks say nothing of, in words: the device's own runtime that the reference runtime stood in for."""
    if not session.backend.startswith("coreml-reference"):
        return []
    notes = [
        "Apple's runtime (CPU, GPU, Neural Engine): these are the answers of edgekit's reference runtime "
        f"({session.backend}); on a Mac, run the bundle's check_on_mac.py"
    ]
    if session.backend.endswith("fp16sum"):
        notes.append(
            "what a device does: this backend adds up in fp16, one term after the other, which is the worst that one "
            "may do. The tolerance is that of sums in fp32: to differ here says how sensitive the model is, not that "
            "the package is wrong"
        )
    return notes


def of_part(name: str, check: Check) -> Check:
    """The check of one of two graphs, which says of which; `name` is empty where there is one."""
    return replace(check, against=f"{name}: {check.against}") if name else check


def refuse_labels(bundle: Bundle) -> None:
    """Raise `InputError` for a language model where labelled data was given."""
    if bundle.manifest.generation is not None:
        raise InputError(
            f"{bundle.name} is a language model, for which labelled data says nothing; verify says without it how "
            "often its next token is that of PyTorch (same top-1)"
        )


def finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, all the way down, so that it is valid JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _join(outputs: Mapping[str, list[Array]]) -> dict[str, Array]:
    """One array per output: along the first axis where the others agree, otherwise flattened end to end."""
    result = {}
    for name, arrays in outputs.items():
        alike = len({array.shape[1:] for array in arrays}) == 1 and all(array.ndim for array in arrays)
        result[name] = np.concatenate(arrays if alike else [array.ravel() for array in arrays])
    return result


def _shapes_text(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
