"""Language models as bundles: two graphs on one file of weights, with their tokenizer, checked against PyTorch."""

from __future__ import annotations

import copy
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from edgekit.errors import ExportError, InputError
from edgekit.export import onnx as onnx_target
from edgekit.export.bundling import add_kernels, metadata_of, tools, with_figures
from edgekit.export.custom_ops import custom_ops
from edgekit.export.language_graphs import LanguageGraph, Part
from edgekit.export.language_samples import TextInputs, stored_passes
from edgekit.export.source import LoadedModel
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.export.weights_file import Weights, WeightsFile
from edgekit.models.decoder import Decoder
from edgekit.models.decoder_config import DecoderConfig
from edgekit.runtime.bundle import PART, SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.generation_info import Generation, Plain, TokenizerInfo
from edgekit.runtime.manifest import Graph, Manifest
from edgekit.runtime.verification import Check

PRECISIONS = ("fp32", "int4")
FILES: dict[Part, str] = {"prefill": "model.onnx", "decode": "decode.onnx"}
SAMPLE_FILES: dict[Part, str] = {"prefill": SAMPLES, "decode": "samples-decode.npz"}
WEIGHTS = "weights.bin"

# Tokens of a prompt that one pass takes: enough for the products to be efficient, and little memory.
_PASS_TOKENS = 1024


def is_language_model(loaded: LoadedModel) -> bool:
    """Whether this is a decoder that becomes two graphs."""
    return isinstance(loaded.module, Decoder)


@dataclass(frozen=True)
class LanguagePlan:
    """What every step needs to know; made once from the arguments."""

    loaded: LoadedModel
    precision: str
    opset: int
    seed: int
    check: bool
    tolerance: float | None
    step: Callable[[str], None]
    kernels: tuple[str, ...] | None

    @property
    def decoder(self) -> Decoder:
        assert isinstance(self.loaded.module, Decoder)  # see `is_language_model`
        return self.loaded.module


def refuse_options(loaded: LoadedModel, target: str, precision: str, given: dict[str, object | None]) -> None:
    """Raise `InputError` for what makes no sense for a language model; `given` are its options by their names."""
    if target != "onnx":
        raise InputError(f"{loaded.name} is a language model, which is exported to onnx; {target} takes no such models")
    if precision not in PRECISIONS:
        raise InputError(
            f"{loaded.name} is a language model, which is exported as {' or '.join(PRECISIONS)} (weights of "
            f"four bits), not as {precision}"
        )
    for option, value in given.items():
        if value is not None:
            raise InputError(
                f"{option} is not for language models: {loaded.name} takes token ids of any length, up to its context; "
                "leave it out"
            )


def export_language_model(plan: LanguagePlan, destination: Path) -> Bundle:
    """Trace, convert, reduce precision where asked for, check both graphs against PyTorch, and write the bundle.

    Raises:
        ExportError: it could not be converted, or the result differs from PyTorch. Nothing is left behind.
        InputError: a tokenizer that does not fit, or kernels for a model that uses none.
    """
    decoder, loaded = plan.decoder, plan.loaded
    tokenizer = tokenizer_of(loaded.name, decoder.config, loaded.folder)
    graphs = [LanguageGraph.of(decoder, part) for part in FILES]
    with BundleWriter(destination) as writer:
        started = time.perf_counter()
        models = _convert(plan, graphs, writer)
        if tokenizer.file is not None:
            assert loaded.folder is not None  # where its file was found
            shutil.copyfile(loaded.folder / tokenizer.file, writer.add(tokenizer.file, "tokenizer"))
        reference, packed = decoder, {}
        if plan.precision == "int4":
            from edgekit.export.int4 import restore

            packed = models.packed
            reference = copy.deepcopy(decoder)
            restore(reference, packed)
        texts = TextInputs(reference, tokenizer, loaded.folder)
        plan.step("store samples")
        for graph in graphs:
            path = writer.add(SAMPLE_FILES[graph.part], "samples")
            _samples(LanguageGraph.of(reference, graph.part), texts, plan.seed).save(path)
        manifest = _manifest(plan, graphs, models.graphs, generation_of(decoder.config, tokenizer))
        add_kernels(writer, loaded.name, plan.kernels, manifest.custom_ops, step=plan.step)
        bundle = writer.preview(manifest)
        report: dict[str, Any] = {}
        checks: list[Check | None] = [None, None]
        if plan.check:
            from edgekit.export.language_verification import check_export

            checks, measured = check_export(plan, bundle, reference, texts)
            report |= measured
        manifest = _checked(bundle.manifest, checks, plan.tolerance)
        nodes = sum(len(model.graph.node) for model in models.graphs)
        report["export"] = {"seconds": round(time.perf_counter() - started, 3), "nodes": nodes}
        return writer.finish(manifest, report)


@dataclass(frozen=True)
class _Models:
    graphs: list[onnx.ModelProto]
    packed: dict[str, Any]


def _convert(plan: LanguagePlan, graphs: Sequence[LanguageGraph], writer: BundleWriter) -> _Models:
    """Write both graphs and their weights."""
    metadata = metadata_of(plan.loaded, plan.precision)
    made: list[onnx.ModelProto] = []
    quantizer = None
    if plan.precision == "int4":
        from edgekit.export.int4 import Int4

        quantizer = Int4(precise_keys=plan.decoder.boundary_predictor is not None)
    with WeightsFile(writer.add(WEIGHTS, "weights"), WEIGHTS) as file:
        for graph in graphs:
            plan.step(f"trace and convert {graph.part}")
            weights: Weights
            model, weights, _ = graph.convert(plan.opset)
            if quantizer is not None:
                plan.step(f"quantize {graph.part}")
                quantizer.apply(model, weights)
            onnx_target.tidy(model, metadata=metadata)
            file.place(model, weights)
            made.append(model)
    for graph, model in zip(graphs, made, strict=True):
        path = writer.add(FILES[graph.part], "model" if graph.part == "prefill" else PART)
        path.write_bytes(model.SerializeToString(deterministic=True))
        onnx_target.check(str(path))
    return _Models(made, quantizer.packed if quantizer is not None else {})


def _samples(graph: LanguageGraph, texts: TextInputs, seed: int) -> Samples:
    block = graph.module.decoder.config.attention.block_size
    items = texts.of(graph, stored_passes(graph.part, block), seed=seed)
    return Samples.of((inputs, graph.run(inputs)) for inputs in items)


def generation_of(config: DecoderConfig, tokenizer: TokenizerInfo) -> Generation:
    """What the manifest says for generating text."""
    attention = config.attention
    shown: dict[str, Plain] = {"kind": attention.kind}
    if attention.kind != "dense":
        shown |= {"budget": attention.budget, "local": attention.local, "decode": attention.decode}
    if attention.has_chunks:
        shown["chunks_per_block"] = attention.capacity
        shown["heads"] = attention.heads
    size = attention.block_size
    most = min(_PASS_TOKENS, config.context) // size * size
    return Generation(config.context, config.num_layers, size, max(size, most), tokenizer, shown)


def _manifest(
    plan: LanguagePlan, graphs: Sequence[LanguageGraph], models: Sequence[onnx.ModelProto], generation: Generation
) -> Manifest:
    first, second = (_graph(graph, model) for graph, model in zip(graphs, models, strict=True))
    opsets: dict[str, int] = {}
    for model in models:
        opsets |= {item.domain or "ai.onnx": item.version for item in model.opset_import}
    return Manifest(
        name=plan.loaded.name,
        model=plan.loaded.info(macs_of(plan)),
        target="onnx",
        precision=plan.precision,
        inputs=first.inputs,
        outputs=first.outputs,
        dims=first.dims,
        opsets=opsets,
        ir_version=models[0].ir_version,
        ops=first.ops,
        custom_ops=first.custom_ops,
        tools=tools(),
        decode=second,
        generation=generation,
    )


def _graph(graph: LanguageGraph, model: onnx.ModelProto) -> Graph:
    inputs, outputs = onnx_target.tensor_specs(model, graph.shapes)
    ops = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node)
    return Graph(
        file=FILES[graph.part],
        inputs=tuple(replace(spec, layout=None) for spec in inputs),
        outputs=outputs,
        dims=graph.dims,
        ops=dict(sorted(ops.items())),
        custom_ops=custom_ops(model),
        samples=SAMPLE_FILES[graph.part],
    )


def macs_of(plan: LanguagePlan) -> int | None:
    """The registry's figure, for one token, where no option changes the model."""
    entry = plan.loaded.entry
    return None if entry is None or entry.changed(plan.loaded.options) else entry.macs


def _checked(manifest: Manifest, checks: Sequence[Check | None], tolerance: float | None) -> Manifest:
    """The manifest with the figures of the check of both graphs."""
    first, second = (with_figures(check, tolerance) for check in checks)
    if manifest.decode is None:
        raise ExportError("a language model has two graphs")
    return replace(manifest, verification=first, decode=replace(manifest.decode, verification=second))
