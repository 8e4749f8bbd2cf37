"""Compare a language model's package with PyTorch, function by function.

What is compared where: the stored samples of the main prefill function and of `decode`, states and logits; and, with
the model at hand, the logits of every function on texts that the bundle has not stored. Weights of few bits have two
references: PyTorch with the weights that the bits stand for, which tells whether the package computes what it should,
and PyTorch with those before, which tells what the bits cost.

A selection of blocks hangs on small differences. Where fp16 chooses another block than fp32, answers differ by more
than rounding does, without either being wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError, InputError, NothingToCompareError
from edgekit.export.bundling import with_figures
from edgekit.export.coreml_language_graphs import StateGraph, state_graphs
from edgekit.export.coreml_language_samples import StateTexts, fresh_lengths
from edgekit.export.language_samples import TextInputs
from edgekit.export.source import LoadedModel
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.models.decoder import Decoder
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_generation import prefill_view
from edgekit.runtime.manifest import Manifest
from edgekit.runtime.session import Array, Session, load
from edgekit.runtime.tolerances import INT4_LOGITS_REL_L2, layer_tolerance, output_tolerance
from edgekit.runtime.verification import (
    Check,
    Verification,
    check_outputs,
    not_run,
    of_part,
    tolerance_for,
    verify_samples,
)

if TYPE_CHECKING:
    from edgekit.export.language_model import LanguagePlan

REFERENCE = "coreml-reference"
FRESH_SEED = 1_000_003

# Relative L2 errors of logits, by what the package computes in.
LOGITS_REL_L2 = {"fp32": 1e-5, "fp16": 5e-3}
# Of the stored samples, states and all. States hold fp16 whatever is computed: numbers that are equal within 1e-6
# become neighbouring halves where a rounding edge lies between them.
SAMPLES_REL_L2 = {"fp32": 1e-4, "fp16": 5e-3}


def check_export(
    plan: LanguagePlan, bundle: Bundle, graphs: Sequence[StateGraph], states: StateTexts, original: Decoder
) -> tuple[Manifest, dict[str, Any]]:
    """Check all functions of an unfinished bundle: the manifest with the figures, and what the report shall say.

    Args:
        graphs: with the weights that the bundle has.
        states: inputs for them.
        original: the decoder with the weights as they were.

    Raises:
        ExportError: a function does not answer as PyTorch does.
    """
    manifest = bundle.manifest
    assert manifest.coreml is not None  # of every bundle for Core ML
    assert manifest.decode is not None  # of every language model
    recorded = plan.tolerance or SAMPLES_REL_L2[manifest.coreml.compute_precision]
    limit = plan.tolerance or LOGITS_REL_L2[manifest.coreml.compute_precision]
    figures: list[dict[str, Any]] = []
    for name, part in bundle.parts().items():
        plan.step(f"check {name} against PyTorch")
        check = verify_samples(load(part, backend=REFERENCE), tolerance=recorded)
        _require(check, name, manifest.precision)
        figures.append(with_figures(check, recorded))
    report: dict[str, Any] = {}
    for graph in graphs:
        plan.step(f"check {graph.name} on other texts")
        session = load(_view(bundle, graph), backend=REFERENCE)
        for check in _live(session, graph, states, original, limit, fresh_lengths(graph)):
            _require(check, graph.name, manifest.precision)
        if original is not graph.decoder:
            logits = check.outputs[0]
            report[graph.name] = {"logits_rel_l2": logits.rel_l2, "top1_agreement": logits.top1_agreement}
    manifest = replace(manifest, verification=figures[0], decode=replace(manifest.decode, verification=figures[1]))
    return manifest, {"against_fp32": report} if report else {}


def verify_package(
    bundle: Bundle,
    loaded: LoadedModel,
    *,
    layers: bool = False,
    inputs: int = 3,
    tolerance: float | None = None,
    backend: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> Verification:
    """`edgekit.verify` for a language model's package with the live model at hand: every function of it.

    Args:
        loaded: what the bundle was exported from.
        layers: compare the main prefill function layer by layer, too.
        inputs: how many fresh texts each graph gets; the other prefill functions get one, as long as they take.

    Raises:
        InputError: `loaded` is no language model.
    """
    decoder = loaded.module
    if not isinstance(decoder, Decoder):
        raise InputError(f"{loaded.name} is no language model, and {bundle.name} is one; pass the one it came from")
    manifest = bundle.manifest
    assert manifest.coreml is not None  # of every bundle for Core ML
    reference = _with_weights_of(bundle, decoder)
    graphs = {graph.name: graph for graph in state_graphs(reference, manifest.coreml.states[0].shape[2])}
    tokenizer = tokenizer_of(loaded.name, decoder.config, loaded.folder)
    states = StateTexts(TextInputs(reference, tokenizer, loaded.folder), list(graphs.values()))
    checks: list[Check] = []
    notes: list[str] = []
    for name, part in bundle.parts().items():
        session = load(part, backend=backend)
        step(f"compare {name} with stored samples")
        try:
            checks.append(of_part(name, verify_samples(session, tolerance=tolerance)))
        except NothingToCompareError as error:
            notes.append(str(error))
        step(f"compare {name} with live PyTorch")
        assert part.manifest.coreml is not None  # as of the whole
        graph = graphs[part.manifest.coreml.function]
        lengths = fresh_lengths(graph)
        limit = tolerance_for(part.manifest, tolerance)
        chosen = [lengths[index % len(lengths)] for index in range(inputs)]
        checks += [of_part(name, check) for check in _live(session, graph, states, decoder, limit, chosen)]
    compared = {part.manifest.coreml.function for part in bundle.parts().values() if part.manifest.coreml is not None}
    for graph in (each for each in graphs.values() if each.name not in compared):
        step(f"compare {graph.name} with live PyTorch")
        session = load(_view(bundle, graph), backend=backend)
        limit = tolerance_for(manifest, tolerance)
        checks += [
            of_part(graph.name, check) for check in _live(session, graph, states, decoder, limit, [graph.tokens])
        ]
    notes += not_run(session)
    report = None
    if layers:
        from edgekit.export.layers_coreml import compare_function_layers

        step(f"compare {manifest.coreml.function} layer by layer")
        report = compare_function_layers(bundle, graphs[manifest.coreml.function], _layer_tolerance(manifest))
    return Verification(bundle.name, manifest.precision, tuple(checks), None, report, tuple(notes), ())


def _layer_tolerance(manifest: Manifest) -> float:
    """As far above the table's as the logits of a language model may lie above the outputs of other models."""
    assert manifest.coreml is not None  # of every bundle for Core ML
    compute = manifest.coreml.compute_precision
    return layer_tolerance(compute) * LOGITS_REL_L2[compute] / output_tolerance(compute)


def _view(bundle: Bundle, graph: StateGraph) -> Bundle:
    return bundle.part("decode") if graph.part == "decode" else prefill_view(bundle, graph.tokens)


def _live(
    session: Session,
    graph: StateGraph,
    states: StateTexts,
    original: Decoder,
    limit: float,
    lengths: Sequence[int],
) -> Iterator[Check]:
    """The logits on other texts, against PyTorch with the bundle's weights, and with those before where they differ."""
    items = list(states.of(graph, lengths, seed=FRESH_SEED))
    runs = [_logits(session.run(item)) for item in items]
    compressed = original is not graph.decoder
    references = [("live PyTorch on fresh text" + (", the same weights" if compressed else ""), graph, limit)]
    if compressed:
        before = replace(graph, decoder=original)
        references.append((f"live PyTorch on fresh text, weights before {session.bundle.manifest.precision}", before,
                           INT4_LOGITS_REL_L2))  # fmt: skip
    for against, oracle, tolerance in references:
        pairs = [(item, _logits(oracle.run(item))) for item in items]
        yield check_outputs(against, pairs, _given(runs), tolerance)


def _given(runs: Sequence[Mapping[str, Array]]) -> Callable[[Mapping[str, Array]], Mapping[str, Array]]:
    """Answers that are there already, in the form that `check_outputs` takes."""
    left = iter(runs)
    return lambda _: next(left)


def _logits(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"logits": outputs["logits"]}


def _with_weights_of(bundle: Bundle, decoder: Decoder) -> Decoder:
    """The decoder with the weights that the bundle holds: of few bits, those that its bits stand for."""
    if bundle.manifest.precision in ("fp32", "fp16"):
        return decoder
    from edgekit.export.coreml_language_weights import packed_weights, restore

    reference = copy.deepcopy(decoder)
    restore(reference, packed_weights(bundle, decoder))
    return reference


def _require(check: Check, function: str, precision: str) -> None:
    if check:
        return
    figures = "; ".join(
        output.problem or f"{output.name}: relative L2 error {output.rel_l2:.2e}, tolerance {output.tolerance:.2g}"
        for output in check.outputs
        if not output
    )
    raise ExportError(
        f"{function} of the {precision} package does not answer as PyTorch does ({check.against}: {figures}). Nothing "
        "was written. A larger --tolerance lets it pass where the model is that sensitive to rounding; otherwise "
        "export it with --precision fp32"
    )
