"""Verify both graphs of a language model with the model at hand.

fp32: both against PyTorch, on text. int4 has three references. The bundle as it is, against PyTorch with the weights
that the four bits stand for: what a device can repeat from the stored samples. The same graph with products in fp32,
against the same PyTorch: a tight bound, which says that graph, packing and weights are right. And the logits against
PyTorch with the weights as they were: what four bits cost.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx

from edgekit.errors import ExportError, InputError, NothingToCompareError
from edgekit.export.language_graphs import LanguageGraph
from edgekit.export.language_samples import TextInputs, fresh_passes
from edgekit.export.layers import session_in_memory
from edgekit.export.source import LoadedModel
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.models.decoder import Decoder
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.kernel_library import kernel_uses
from edgekit.runtime.session import Array, Session, load
from edgekit.runtime.tolerances import INT4_LOGITS_REL_L2, output_tolerance
from edgekit.runtime.verification import (
    Check,
    LayerReport,
    Verification,
    check_outputs,
    of_part,
    tolerance_for,
    verify_samples,
)

if TYPE_CHECKING:
    from edgekit.export.language_model import LanguagePlan

FRESH_SEED = 1_000_003
_LIVE = "live PyTorch on fresh text"


def check_export(
    plan: LanguagePlan, bundle: Bundle, reference: Decoder, texts: TextInputs
) -> tuple[list[Check | None], dict[str, Any]]:
    """Check the graphs of an unfinished bundle: the check of each, on its samples, and what the report shall say.

    Args:
        reference: the decoder with the weights that the bundle has.
        texts: inputs for it.

    Raises `ExportError` where one of them does not answer as PyTorch does.
    """
    checks: list[Check | None] = []
    report: dict[str, Any] = {}
    for name, part in bundle.parts().items():
        plan.step(f"check {name} against PyTorch")
        # The bodies travel with the bundle; native kernels are one machine's, and `edgekit verify` checks them there.
        session = load(part, kernels="portable")
        check = verify_samples(session, tolerance=plan.tolerance)
        checks.append(check)
        limit = tolerance_for(part.manifest, plan.tolerance)
        live = _live_checks(session, name, plan.decoder, reference, texts, 4, limit)
        if failed := [each for each in (check, *live) if not each]:
            raise ExportError(_why_refused(name, plan.precision, failed[0]))
        if plan.precision == "int4":
            logits = live[-1].outputs[0]
            report[name] = {"logits_rel_l2": logits.rel_l2, "top1_agreement": logits.top1_agreement}
    return checks, {"against_fp32": report} if report else {}


def verify_language_model(
    bundle: Bundle,
    loaded: LoadedModel,
    *,
    layers: bool,
    inputs: int,
    tolerance: float | None,
    backend: str | None,
    threads: int | None,
    kernels: str | os.PathLike[str],
    step: Callable[[str], None],
) -> Verification:
    """`edgekit.verify` for a language model with the live one at hand. Raises `InputError` where that is another."""
    if bundle.manifest.target == "coreml":
        from edgekit.export.coreml_language_verification import verify_package

        return verify_package(
            bundle, loaded, layers=layers, inputs=inputs, tolerance=tolerance, backend=backend, step=step
        )
    checks: list[Check] = []
    notes: list[str] = []
    nodes: list[Any] = []
    decoder = loaded.module
    if not isinstance(decoder, Decoder):
        raise InputError(f"{loaded.name} is no language model, and {bundle.name} is one; pass the one it came from")
    reference = _with_weights_of(bundle, decoder)
    tokenizer = tokenizer_of(loaded.name, decoder.config, loaded.folder)
    texts = TextInputs(reference, tokenizer, loaded.folder)
    for name, part in bundle.parts().items():
        session = load(part, backend=backend, threads=threads, kernels=kernels)
        nodes += session.kernels
        step(f"compare {name} with stored samples")
        try:
            checks.append(of_part(name, verify_samples(session, tolerance=tolerance)))
        except NothingToCompareError as error:
            notes.append(str(error))
        step(f"compare {name} with live PyTorch")
        limit = tolerance_for(part.manifest, tolerance)
        checks += [
            of_part(name, each) for each in _live_checks(session, name, decoder, reference, texts, inputs, limit)
        ]
    report: LayerReport | None = None
    if layers:
        from edgekit.export.layers import compare_layers

        step("compare prefill layer by layer")
        report = compare_layers(bundle, replace(loaded, module=reference))
    return Verification(
        bundle.name,
        bundle.manifest.precision,
        tuple(checks),
        None,
        report,
        tuple(notes),
        kernel_uses(tuple(nodes)),
    )


def _with_weights_of(bundle: Bundle, decoder: Decoder) -> Decoder:
    """The decoder with the weights that the bundle holds: of int4, those that its bits stand for."""
    if bundle.manifest.precision != "int4":
        return decoder
    from edgekit.export.int4 import packed_weights, restore

    quantized = copy.deepcopy(decoder)
    restore(quantized, packed_weights(bundle))
    return quantized


def _live_checks(
    session: Session,
    name: str,
    original: Any,
    reference: Decoder,
    texts: TextInputs,
    count: int,
    tolerance: float,
) -> list[Check]:
    """The session against PyTorch on `count` inputs that the bundle has not stored; see the module's docstring."""
    graph = LanguageGraph.of(reference, "prefill" if name == "prefill" else "decode")
    block = reference.config.attention.block_size
    passes = fresh_passes(graph.part, block)
    passes = [passes[index % len(passes)] for index in range(count)]
    items = list(texts.of(graph, passes, seed=FRESH_SEED))
    answers = [graph.run(item) for item in items]
    if session.bundle.manifest.precision != "int4":
        return [check_outputs(_LIVE, zip(items, answers, strict=True), session.run, tolerance)]
    before = LanguageGraph.of(original, graph.part)
    runs = [session.run(item) for item in items]
    as_is = check_outputs(f"{_LIVE}, the same weights", *_pairs(items, answers, runs), tolerance)
    exact = _without_rounding(session.bundle)
    tight = check_outputs(
        f"{_LIVE}, the same weights, products in fp32",
        zip(items, answers, strict=True),
        exact,
        output_tolerance("fp32"),
    )
    unquantized = [{"logits": before.run(item)["logits"]} for item in items]
    logits = [{"logits": run["logits"]} for run in runs]
    cost = check_outputs(f"{_LIVE}, weights before int4", *_pairs(items, unquantized, logits), INT4_LOGITS_REL_L2)
    return [as_is, tight, cost]


def _pairs(
    items: Sequence[Mapping[str, Array]], answers: Sequence[Mapping[str, Array]], runs: Sequence[Mapping[str, Array]]
) -> tuple[Any, Callable[[Mapping[str, Array]], Mapping[str, Array]]]:
    """Answers that are there already, in the form that `check_outputs` takes."""
    left = iter(runs)
    return zip(items, answers, strict=True), lambda _: next(left)


def _without_rounding(bundle: Bundle) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """The bundle's graph with products in fp32, as a session's `run`."""
    from edgekit.export.int4 import without_rounding

    graph = without_rounding(onnx.load_from_string(bundle.read(bundle.manifest.model_file)))
    session = session_in_memory(bundle, graph)
    names = [spec.name for spec in bundle.manifest.outputs]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _why_refused(part: str, precision: str, check: Check) -> str:
    figures = "; ".join(
        output.problem or f"{output.name}: relative L2 error {output.rel_l2:.2e}, tolerance {output.tolerance:.2g}"
        for output in check.outputs
        if not output
    )
    return (
        f"{part} of the {precision} bundle does not answer as PyTorch does ({check.against}: {figures}). Nothing was "
        "written. A larger --tolerance lets it pass where the model is that sensitive to rounding; otherwise keep the "
        "bundle with --no-check and find the layer with 'edgekit verify --layers'"
    )
