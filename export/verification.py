"""Verify a bundle with the model at hand: stored samples, live PyTorch on fresh inputs, accuracy, layer by layer."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekit.errors import (
    EdgekitError,
    InputError,
    MissingDependencyError,
    NothingToCompareError,
    UnknownNameError,
)
from edgekit.runtime.bundle import Bundle, Samples
from edgekit.runtime.kernel_library import kernel_uses
from edgekit.runtime.manifest import DimRange, Manifest
from edgekit.runtime.session import Array, Session, load, random_inputs
from edgekit.runtime.verification import (
    Accuracy,
    Check,
    LayerReport,
    Verification,
    batch_size,
    check_outputs,
    classify,
    measure_accuracy,
    not_run,
    refuse_labels,
    score_output,
    share_correct,
    tolerance_for,
    verify_samples,
)
from edgekit.runtime.verification import verify as verify_stored

if TYPE_CHECKING:
    import torch

    from edgekit.export.source import LoadedModel
    from edgekit.models.registry import ModelEntry

FRESH_INPUTS = 4
# Fresh inputs must not repeat the stored samples, whose seeds count up from the export's seed.
FRESH_SEED = 1_000_003


def verify(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    model: str | Path | torch.nn.Module | None = None,
    weights: str | Path | None = None,
    live: bool | None = None,
    data: str | Path | None = None,
    layers: bool = False,
    inputs: int = FRESH_INPUTS,
    tolerance: float | None = None,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Does the bundle answer as PyTorch does? The result is truthy when it does, and holds the figures.

    Args:
        bundle: a folder, a packed file, or an opened bundle.
        model: the PyTorch model to compare with; None rebuilds what the manifest names, proved by its weights' hash.
        weights: the weights file, where the bundle was exported with one.
        live: compare with the running PyTorch model on fresh inputs. None does so where torch is installed and the
            model can be rebuilt, and says in `not_checked` why not otherwise; True makes that an error.
        data: labelled data for the task's accuracy of both sides: `digits`, a folder of class folders, or an .npz.
        layers: also compare layer by layer (needs the live model).
        inputs: how many fresh inputs.
        tolerance: the largest relative L2 error of an output that passes; None takes the one that the bundle was
            exported with, or the table's for its precision.
        backend: as for `edgekit.load`: a tvm bundle needs `tvm`.
        threads: threads for the bundle's session.
        kernels: as for `edgekit.load`; the layers are always compared with function bodies.
        progress: called with the name of each step as it starts.

    Raises:
        NothingToCompareError: neither samples nor a model.
        ExportError, WeightsError: the model was asked for but cannot be rebuilt, or has other weights.
        BundleError: the bundle is damaged.
    """
    step = progress or (lambda _: None)
    if inputs < 1:
        raise InputError(f"inputs must be at least 1, got {inputs}")
    step("open the bundle")
    opened = Bundle.open(bundle)
    target = opened.manifest.target
    if layers and target == "tvm":
        raise InputError(f"layers are compared in onnx and coreml bundles; {opened.name} is one whole library")
    if data is not None:
        refuse_labels(opened)
    required = live is True or layers or model is not None
    language = opened.manifest.generation is not None
    loaded, reason = (
        (None, "not asked for") if live is False and not required else _find_model(opened, model, weights, required)
    )
    if language and loaded is None:
        step("compare with stored samples")
        found = verify_stored(opened, tolerance=tolerance, backend=backend, threads=threads, kernels=kernels)
        return replace(found, not_checked=(f"live PyTorch: {reason}",))
    if language and loaded is not None:
        from edgekit.export.language_verification import verify_language_model

        return verify_language_model(
            opened,
            loaded,
            layers=layers,
            inputs=inputs,
            tolerance=tolerance,
            backend=backend,
            threads=threads,
            kernels=kernels,
            step=step,
        )
    session = load(opened, backend=backend, threads=threads, kernels=kernels)
    checks: list[Check] = []
    notes: list[str] = []
    try:
        step("compare with stored samples")
        checks.append(verify_samples(session, tolerance=tolerance))
    except NothingToCompareError as error:
        if loaded is None:
            raise
        notes.append(str(error))
    if loaded is None:
        notes.append(f"live PyTorch: {reason}")
    else:
        step("compare with live PyTorch")
        checks.append(_check_live(session, loaded, inputs, tolerance_for(session.bundle.manifest, tolerance)))
    accuracy = None
    if data is not None:
        step("measure accuracy")
        accuracy = _accuracy(session, loaded, data)
    report: LayerReport | None = None
    if layers:
        assert loaded is not None  # `layers` makes the model required
        step("compare layer by layer")
        if target == "coreml":
            from edgekit.export.layers_coreml import compare_coreml_layers

            report = compare_coreml_layers(session.bundle, loaded)
        else:
            from edgekit.export.layers import compare_layers

            report = compare_layers(session.bundle, loaded)
    notes += not_run(session)
    manifest = session.bundle.manifest
    uses = kernel_uses(session.kernels)
    return Verification(session.bundle.name, manifest.precision, tuple(checks), accuracy, report, tuple(notes), uses)


def _find_model(
    bundle: Bundle, model: str | Path | torch.nn.Module | None, weights: str | Path | None, required: bool
) -> tuple[LoadedModel | None, str]:
    """The live model, or None and the reason in words. A model that was asked for and is not there is an error."""
    if importlib.util.find_spec("torch") is None and not required:
        return None, "torch is not installed (pip install 'edgekit[export]')"
    from edgekit.export.pixels import as_exported
    from edgekit.export.source import reload_model

    try:
        return as_exported(reload_model(bundle.manifest, model, weights), bundle.manifest), ""
    except EdgekitError as error:
        if required:
            raise
        return None, str(error)


def fresh_inputs(session: Session, count: int) -> Iterator[dict[str, Array]]:
    """Seeded inputs that the bundle has not stored; dynamic dimensions take several of the sizes they allow.

    An int8 bundle holds only on inputs like those it was calibrated on, and its stored samples are such: its fresh
    inputs are weighted means of two of them. All other bundles get normal random values.
    """
    dims = session.bundle.manifest.dims
    samples = session.bundle.samples()
    calibrated = session.bundle.manifest.target == "onnx" and session.bundle.manifest.precision == "int8"
    mixed = calibrated and len(samples) > 1
    generator = np.random.default_rng(FRESH_SEED)
    for index in range(count):
        if mixed:
            first, second = generator.choice(len(samples), size=2, replace=False)
            weight = np.float32(generator.uniform(0.1, 0.4))
            yield {name: _mix(array[first], array[second], weight) for name, array in samples.inputs.items()}
            continue
        sizes = {name: _fresh_size(limits, index) for name, limits in dims.items()}
        yield random_inputs(session.inputs, dims, seed=FRESH_SEED + index, sizes=sizes)


def _fresh_size(limits: DimRange, index: int) -> int:
    """The smallest size first, then others far apart, as long as they are not too costly.

    A length must not always be a multiple of some block, or too short to have a second one.
    """
    if limits.values is not None:
        return limits.values[index % len(limits.values)]
    smallest = max(1, limits.min)
    largest = 3 * smallest + 64 if limits.max is None else min(limits.max, 3 * smallest + 64)
    count = largest - smallest + 1
    return smallest + index * max(1, round(0.38 * count)) % count


def _mix(first: Array, second: Array, weight: np.float32) -> Array:
    if not np.issubdtype(first.dtype, np.floating):
        return first
    return ((1 - weight) * first + weight * second).astype(first.dtype)


def _check_live(session: Session, loaded: LoadedModel, count: int, tolerance: float) -> Check:
    run = loaded.runner([spec.name for spec in session.outputs])
    fresh = example_inputs(session, loaded, count) or own_images(session, loaded, count) or fresh_inputs(session, count)
    pairs = ((arrays, run(arrays)) for arrays in fresh)
    return check_outputs("live PyTorch on fresh inputs", pairs, session.run, tolerance)


def check_other_sizes(session: Session, loaded: LoadedModel, tolerance: float) -> Check | None:
    """Compare on fresh inputs of several sizes; the stored samples all have one.

    None where the model takes none of the sizes: they are drawn independently of each other. A lower precision than
    fp32 may not hold on drawn values that its model never sees; a model with data of its own is then asked on those.
    """
    run = loaded.runner([spec.name for spec in session.outputs])
    pairs = []
    own = example_inputs(session, loaded, FRESH_INPUTS)
    drawn = not own or session.bundle.manifest.precision == "fp32"
    for arrays in (*own, *(fresh_inputs(session, FRESH_INPUTS) if drawn else ())):
        with contextlib.suppress(Exception):  # whatever the user's forward raises on sizes that do not fit together
            pairs.append((arrays, run(arrays)))
    return check_outputs("live PyTorch on other sizes", iter(pairs), session.run, tolerance) if pairs else None


def why_refused(bundle: Bundle, loaded: LoadedModel, check: Check) -> str:
    """Why an export is refused, and what to do: it depends on how much rounding moves PyTorch's own answer."""
    precision, coreml = bundle.manifest.precision, bundle.manifest.coreml
    computed = precision if coreml is None else coreml.compute_precision  # Core ML's weights of few bits are no inputs
    figures = "; ".join(
        output.problem or f"{output.name}: relative L2 error {output.rel_l2:.2e}, tolerance {output.tolerance:.2g}"
        for output in check.outputs
        if not output
    )
    moves = own_sensitivity(bundle.samples(), loaded, computed)
    sensitive = "a model known to be this sensitive to rounding takes a larger --tolerance"
    if moves is not None and np.isfinite(moves):
        sensitive = (
            f"PyTorch's own answer moves by {moves:.1e} when its input changes by one rounding of {computed}: if that "
            "is as much, the model is this sensitive to rounding, and a larger --tolerance says so"
        )
    return (
        f"the {precision} bundle does not answer as PyTorch does ({figures}). Nothing was written; {sensitive}. "
        "Otherwise keep the bundle with --no-check and find the layer with 'edgekit verify --layers'"
    )


def own_sensitivity(samples: Samples, loaded: LoadedModel, precision: str = "fp32") -> float | None:
    """How much PyTorch's own outputs move when the inputs are changed by about one rounding of `precision`.

    The largest relative L2 change of an output over the samples: no runtime can be expected to agree better than this.
    None where no input holds floats.
    """
    if not any(np.issubdtype(array.dtype, np.floating) for inputs, _ in samples for array in inputs.values()):
        return None
    run = loaded.runner(list(samples.outputs))
    generator = np.random.default_rng(FRESH_SEED)
    largest = 0.0
    for inputs, expected in samples:
        moved = {name: _moved(array, precision, generator) for name, array in inputs.items()}
        for name, answer in run(moved).items():
            before = expected[name].astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinite answers give NaN
                change = np.linalg.norm(answer - before) / max(float(np.linalg.norm(before)), np.finfo(np.float64).tiny)
            largest = float(np.maximum(largest, change))  # NaN stays NaN
    return largest


def _moved(array: Array, precision: str, generator: np.random.Generator) -> Array:
    """Floats changed by a unit in the last place of `precision`; for int8 by half a step of 255 over their range."""
    if not np.issubdtype(array.dtype, np.floating) or not array.size:
        return array
    if precision == "int8":
        step = (array.max() - array.min()) / 255
        moved = array + step * generator.uniform(-0.5, 0.5, array.shape)
    else:
        unit = float(np.finfo(np.float16 if precision == "fp16" else np.float32).eps)
        moved = array * (1 + unit * generator.standard_normal(array.shape))
    return np.asarray(moved, array.dtype)


def _accuracy(session: Session, loaded: LoadedModel | None, source: str | Path) -> Accuracy:
    from edgekit.export.data import load_labelled

    manifest = session.bundle.manifest
    entry = loaded.entry if loaded is not None else _zoo_entry(manifest)
    data = load_labelled(source, session.inputs, manifest.dims, manifest.labels, entry=entry)
    accuracy = measure_accuracy(session, data)
    if loaded is None:
        return accuracy
    run = loaded.runner([spec.name for spec in session.outputs])
    predicted = classify(run, data, output=score_output(session), batch=batch_size(session))
    return replace(accuracy, pytorch=share_correct(predicted, data))


def _zoo_entry(manifest: Manifest) -> ModelEntry | None:
    """The zoo model that a bundle was made of; None where it is none, or where the zoo cannot be asked here."""
    from edgekit.models import model_entry

    kind, _, name = manifest.model.source.partition(":")
    try:
        return model_entry(name) if kind == "zoo" else None
    except (MissingDependencyError, UnknownNameError):
        return None


def example_inputs(session: Session, loaded: LoadedModel, count: int) -> list[dict[str, Array]]:
    """Fresh inputs from a zoo model's own data, none where it has none for the shapes of this bundle."""
    from edgekit.export.zoo import example_arrays

    dims = session.bundle.manifest.dims
    seeds = [FRESH_SEED + index for index in range(count)]
    found = [example_arrays(loaded.entry, loaded.options, session.inputs, dims, seed=seed) for seed in seeds]
    return [arrays for arrays in found if arrays is not None]


def own_images(session: Session, loaded: LoadedModel, count: int) -> list[dict[str, Array]]:
    """Unseen images of the data set that a zoo model's shipped weights were trained on, for precisions below fp32.

    A lower precision may not hold on drawn pixels that its model never sees: fp16 weights alone move the answers of
    shvit_digits to noise by 2e-3. Empty where there are none for this bundle.
    """
    from edgekit.export.data import digits

    spec, entry = session.inputs[0], loaded.entry
    if session.bundle.manifest.precision == "fp32" or entry is None or entry.dataset != "digits":
        return []
    if loaded.weights.source != "shipped" or spec.preprocessing is None or spec.shape[0] != 1:
        return []
    try:
        data = digits("validation", spec.name, spec.preprocessing)
    except MissingDependencyError:
        return []
    order = np.random.default_rng(FRESH_SEED).permutation(len(data))[:count]
    return [{spec.name: data.inputs[spec.name][index : index + 1]} for index in order]
