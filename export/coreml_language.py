"""Language models for Core ML: one package with several functions on shared weights, its cache in states (iOS 18).

`decode` takes one token, each `prefill_N` a prompt of up to N. Every size is fixed, which the Neural Engine wants; a
runtime takes the smallest function that holds a prompt. The functions are converted one by one, stored in few bits
where asked for, and merged by Core ML Tools, which keeps equal weights once.

Every function is compared with PyTorch on the reference runtime before the bundle stands.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit.errors import ExportError, InputError
from edgekit.export import coreml as coreml_target
from edgekit.export.calling import first_line
from edgekit.export.coreml_bundle import NOT_RUN
from edgekit.export.coreml_compress import SMALL, facts
from edgekit.export.coreml_faults import checked_once
from edgekit.export.coreml_language_graphs import DECODE, RULES, StateGraph, state_graphs
from edgekit.export.coreml_language_samples import StateTexts, stored_lengths
from edgekit.export.coreml_language_verification import REFERENCE, SAMPLES_REL_L2, check_export
from edgekit.export.coreml_language_weights import restore, stays_precise, stored_weights
from edgekit.export.coreml_options import CoreMLOptions, require
from edgekit.export.coreml_package import describe, write_package
from edgekit.export.coreml_swift import write_swift
from edgekit.export.coreml_tools import import_coremltools, quiet_tools, tools
from edgekit.export.coreml_trace import Traced
from edgekit.export.language_model import LanguagePlan, generation_of, macs_of
from edgekit.export.language_samples import TextInputs
from edgekit.export.mac_check import write_check
from edgekit.export.shapes import InputShape
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.models.decoder import Decoder
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.coreml_info import MODEL, SPECIFICATIONS, CoreMLInfo
from edgekit.runtime.generation_info import TokenizerInfo
from edgekit.runtime.manifest import Graph, Manifest

__all__ = ["export_language_coreml", "state_capacity"]

DECODE_SAMPLES = "samples-decode.npz"
LEAST_TARGET = "iOS18"  # states and several functions in a package came with it
# Slots of the state where nobody says: Core ML holds all of them from the start, whatever the text needs.
_CAPACITY = 2048
# And where somebody does: the largest prefill function reads as many at once, with scores of each pair of them.
_MOST = 16_384


def state_capacity(decoder: Decoder, options: Mapping[str, object]) -> int:
    """How many tokens the states hold: the option `context` where it was given, else the model's, at most 2048.

    Raises `InputError` for more than a package can take.
    """
    context = decoder.config.context
    if options.get("context") is not None and context > _MOST:
        raise InputError(
            f"a Core ML package holds texts of up to {_MOST:,} tokens: all of its state is there from the start, and "
            f"its largest function reads as many at once; got a context of {context:,}. Ask for less"
        )
    return context if options.get("context") is not None else min(context, _CAPACITY)


def export_language_coreml(
    plan: LanguagePlan, options: CoreMLOptions, destination: Path, given: Mapping[str, object | None] | None = None
) -> Bundle:
    """Convert, store, merge, check every function against PyTorch, and write the bundle.

    Args:
        plan: the model and what to do with it; `opset` and `kernels` mean nothing here.
        options: precision and deployment target. One that nobody chose becomes iOS 18.
        given: options that are not for language models, by the names that the caller knows; None: not given.

    Raises:
        InputError: what makes no sense for such a model, a deployment target before iOS 18, a sparse decoding, or a
            tokenizer that does not fit.
        ExportError: it could not be converted, or the result differs from PyTorch. Nothing is left behind.
        MissingDependencyError: Core ML Tools is not installed.
    """
    options = _checked_options(plan, options, given or {})
    decoder, loaded = plan.decoder, plan.loaded
    tokenizer = tokenizer_of(loaded.name, decoder.config, loaded.folder)
    graphs = state_graphs(decoder, state_capacity(decoder, loaded.options))
    import_coremltools()  # said before any work is done
    with BundleWriter(destination) as writer, tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        started = time.perf_counter()
        models = {graph.name: _convert(plan, graph, options, Path(folder)) for graph in graphs}
        reference = decoder
        if models[DECODE].weights:
            reference = copy.deepcopy(decoder)
            restore(reference, models[DECODE].weights)
            graphs = [replace(graph, decoder=reference) for graph in graphs]
        texts = TextInputs(reference, tokenizer, loaded.folder)
        states = StateTexts(texts, graphs)
        main = _main(graphs, texts.most)
        plan.step("merge the functions")
        spec, weights = _merge({name: model.path for name, model in models.items()}, main.name, Path(folder))
        manifest = _manifest(plan, options, graphs, main, spec, tokenizer)
        assert manifest.coreml is not None  # see `_manifest`
        _describe(spec, plan, manifest, graphs)
        write_package(writer, spec, weights)
        if tokenizer.file is not None:
            assert loaded.folder is not None  # where its file was found
            shutil.copyfile(loaded.folder / tokenizer.file, writer.add(tokenizer.file, "tokenizer"))
        plan.step("store samples")
        for graph, file in ((main, SAMPLES), (graphs[-1], DECODE_SAMPLES)):
            lengths = stored_lengths(graph.part, decoder.config.attention, min(texts.most, graphs[-1].module.capacity))
            inputs = states.of(graph, lengths, seed=plan.seed)
            Samples.of((each, graph.run(each)) for each in inputs).save(writer.add(file, "samples"))
        tolerance = plan.tolerance or SAMPLES_REL_L2[options.compute_precision]
        write_swift(writer, manifest, tolerance=tolerance)
        write_check(writer, manifest, tolerance=tolerance)
        bundle = writer.preview(manifest)
        report: dict[str, Any] = {}
        if plan.check:
            manifest, report = check_export(plan, bundle, graphs, states, decoder)
        else:
            manifest = bundle.manifest
        ran = {"runtime": REFERENCE} if plan.check else {}
        manifest = replace(manifest, verification={**manifest.verification, **ran, "not_run": NOT_RUN})
        report["export"] = {
            "seconds": round(time.perf_counter() - started, 3),
            "functions": {graph.name: sum(models[graph.name].ops.values()) for graph in graphs},
        }
        return writer.finish(manifest, report)


def _checked_options(plan: LanguagePlan, options: CoreMLOptions, given: Mapping[str, object | None]) -> CoreMLOptions:
    name, attention = plan.loaded.name, plan.decoder.config.attention
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} is not for language models: {name} takes token ids in sizes of its own")
    if options.input is not None:
        raise InputError(f"{name} is a language model: its input is no image, and always an array; leave input out")
    if options.layout != "standard":
        raise InputError(f"the layout {options.layout} is for models of images, and {name} is none; leave it out")
    if attention.kind != "dense" and attention.decode == "sparse":
        raise InputError(
            f"{name} selects blocks of keys for each generated token (decode=sparse), which a Core ML package does "
            "not: its state has a fixed size, and reading all of it is what the hardware does well. Choose "
            "decode=dense (--option decode=dense); prompts are read with sparse attention all the same"
        )
    if options.chosen:
        require(options.deployment_target, LEAST_TARGET, "a language model, whose cache is a state of the package,")
    return replace(
        options, deployment_target=max(options.deployment_target, LEAST_TARGET, key=SPECIFICATIONS.__getitem__)
    )


@dataclass(frozen=True)
class _Function:
    """A converted function: its package, its ops, and the values of weights of few bits by parameter."""

    path: Path
    ops: dict[str, int]
    weights: dict[str, Any]


def _convert(plan: LanguagePlan, graph: StateGraph, options: CoreMLOptions, folder: Path) -> _Function:
    plan.step(f"trace and convert {graph.name}")
    shapes = tuple(
        InputShape(spec.name, spec.shape, spec.dtype, {}, spec.index_of)
        for spec in graph.inputs
        if not spec.name.startswith("past_")
    )
    traced = Traced(graph.trace(), shapes, ("logits",))
    exported = coreml_target.convert(traced, shapes, options, keep=stays_precise, rules=RULES)
    model, weights = exported.model, {}
    if options.precision in SMALL and graph.name == DECODE:
        weights = stored_weights(model._mil_program, "main", plan.decoder)
    path = folder / f"{graph.name}.mlpackage"
    with quiet_tools():
        model.save(str(path))
    return _Function(path, exported.ops, weights)


def _merge(packages: Mapping[str, Path], default: str, folder: Path) -> tuple[Any, Path]:
    """One program of the functions in these packages, and the folder of its weights."""
    ct = import_coremltools()
    path = folder / "merged.mlpackage"
    try:
        with quiet_tools(), checked_once():
            functions = ct.utils.MultiFunctionDescriptor()
            for name, package in packages.items():
                functions.add_function(str(package), src_function_name="main", target_function_name=name)
            functions.default_function_name = default
            ct.utils.save_multifunction(functions, str(path))
            return ct.utils.load_spec(str(path)), path / "Data" / "com.apple.CoreML" / "weights"
    except Exception as error:  # it raises errors of many kinds
        raise ExportError(f"Core ML Tools cannot merge the functions: {first_line(error)}") from error


def _main(graphs: Sequence[StateGraph], most: int) -> StateGraph:
    """The prefill function that the manifest describes: the smallest that reads all stored samples."""
    prefills = [graph for graph in graphs if graph.part == "prefill"]
    longest = max(stored_lengths("prefill", graphs[0].decoder.config.attention, most))
    return next((graph for graph in prefills if graph.tokens >= longest), prefills[-1])


def _manifest(
    plan: LanguagePlan,
    options: CoreMLOptions,
    graphs: Sequence[StateGraph],
    main: StateGraph,
    spec: Any,
    tokenizer: TokenizerInfo,
) -> Manifest:
    decode, config = graphs[-1], plan.decoder.config
    info = CoreMLInfo(
        deployment_target=options.deployment_target,
        specification_version=spec.specificationVersion,
        function=main.name,
        functions=tuple(graph.name for graph in graphs),
        compute_precision=options.compute_precision,
        states=main.states,
        compression=facts(spec, options.precision) if options.precision not in ("fp32", "fp16") else {},
    )
    return Manifest(
        name=plan.loaded.name,
        model=plan.loaded.info(macs_of(plan)),
        target="coreml",
        precision=options.precision,
        inputs=main.inputs,
        outputs=main.outputs,
        opsets={"coreml": spec.specificationVersion},
        ops=coreml_target.count_ops(spec, main.name),
        tools=tools(),
        decode=Graph(
            file=MODEL,
            inputs=decode.inputs,
            outputs=decode.outputs,
            ops=coreml_target.count_ops(spec, decode.name),
            samples=DECODE_SAMPLES,
            function=decode.name,
        ),
        generation=generation_of(replace(config, context=decode.module.capacity), tokenizer),
        coreml=info,
    )


def _describe(spec: Any, plan: LanguagePlan, manifest: Manifest, graphs: Sequence[StateGraph]) -> None:
    """Put into the protobuf what Xcode shows of the model, and of the tensors of each function."""
    assert manifest.coreml is not None  # see `_manifest`
    describe(spec, plan.loaded, manifest.coreml, manifest.precision, (), ())
    by_name = {graph.name: graph for graph in graphs}
    for function in spec.description.functions:
        graph = by_name[function.name]
        texts = {each.name: str(each) for each in (*graph.inputs, *graph.outputs)}
        texts |= {state.name: f"the {state.input} of {state.shape[2]} tokens" for state in graph.states}
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = texts[feature.name]
