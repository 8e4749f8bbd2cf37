"""What `edgekit inspect` says of tensors, of a language model and of a Core ML package, line by line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import mac_command
from edgekit.runtime.generation_info import Generation
from edgekit.runtime.manifest import Manifest

# Tensors of the layers from the second on, in a language model's cache.
_LAYER = re.compile(r"(past|present)\w*\.[1-9]\d*(\.(key|value))?$")


def generation_lines(generation: Generation, sizes: Sequence[int] = ()) -> list[str]:
    """What a language model's bundle says of generating text; `sizes` are those of a Core ML package's functions."""
    attention = ", ".join(f"{key} {value}" for key, value in generation.attention.items() if key != "kind")
    tokenizer = generation.tokenizer
    marks = (("bos", tokenizer.bos), ("eos", ", ".join(map(str, tokenizer.eos)) or None), ("pad", tokenizer.pad))
    named = ", ".join(f"{key} {value}" for key, value in marks if value is not None)
    kind = "bytes" if tokenizer.file is None else tokenizer.file
    kind_of = str(generation.attention.get("kind", "unknown"))
    passes = f"passes of {generation.pass_tokens:,}"
    if sizes:
        passes = f"one pass of {' or '.join(f'{size:,}' for size in sizes)}"
    return [
        f"text       up to {generation.context:,} tokens, {generation.layers} layers; a prompt is read in "
        f"{passes}, in blocks of {generation.block_size}",
        f"attention  {kind_of}" + (f": {attention}" if attention else ""),
        f"tokenizer  {kind}, {tokenizer.vocab_size:,} tokens" + (f" ({named})" if named else ""),
    ]


def tensor_lines(manifest: Manifest) -> list[str]:
    """Inputs, outputs and dimensions of one graph; of a cache, the first layer's."""
    lines = []
    for side, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            if _LAYER.match(spec.name):
                continue
            lines.append(f"{side:10} {spec}")
            if spec.preprocessing is not None:
                lines.append(f"           {spec.preprocessing.describe()}")
        if more := sum(_LAYER.match(spec.name) is not None for spec in specs):
            lines.append(f"           and {more} more, the same of further layers")
    return [*lines, *(f"dimension  {name} in {limits}" for name, limits in manifest.dims.items())]


# The systems of a deployment target: those of one year share a version of Core ML.
_SYSTEMS = {"iOS16": "iOS 16, macOS 13", "iOS17": "iOS 17, macOS 14", "iOS18": "iOS 18, macOS 15"}


def coreml_lines(manifest: Manifest) -> list[str]:
    """What a package for Core ML needs, computes in and stores, and what it was checked on; empty for other bundles."""
    info = manifest.coreml
    if info is None:
        return []
    system = _SYSTEMS.get(info.deployment_target, info.deployment_target)
    lines = [
        f"runs from  {system} (specification {info.specification_version}); computes in {info.compute_precision}, "
        f"{info.layout} layout"
    ]
    if info.functions != ("main",):
        lines.append(f"functions  {', '.join(info.functions)}; this graph is {info.function}")
    if info.image_input is not None:
        lines.append(f"image      {info.image_input} is a Core ML image; the package normalises it itself")
    if info.label_outputs:
        lines.append(f"labels     also given as {', '.join(info.label_outputs)}")
    for state in info.states[:1]:
        more = f", and {len(info.states) - 1} more" if len(info.states) > 1 else ""
        lines.append(f"state      {state.name}: {state.dtype}[{', '.join(map(str, state.shape))}]{more}")
    if info.compression:
        counts = {key: value for key, value in info.compression.items() if key not in ("weights", "share")}
        facts = ", ".join(f"{key} {value}" for key, value in counts.items())
        share = f"{100 * float(info.compression.get('share', 0)):.0f} %"
        lines.append(f"stored     {share} of the weights' values in few bits ({facts} values)")
    runtime, not_run = manifest.verification.get("runtime"), manifest.verification.get("not_run")
    lines.append(f"checked on {runtime or 'nothing'}" + (f"; never on {not_run}" if not_run else ""))
    return lines


def coreml_export_lines(bundle: Bundle) -> list[str]:
    """What an export to Core ML tells at its end: the sizes, the accuracy, and what nobody checked."""
    manifest = bundle.manifest
    if manifest.coreml is None:
        return []
    lines, report = [], bundle.report()
    before = report.get("precision_before")
    if before:
        ratio = bundle.size_of_model / before["size"]
        lines.append(f"the model is {100 * ratio:.0f} % of its size in fp16")
    if "layout" in report:
        lines.append(str(report["layout"]))
    accuracy = report.get("accuracy")
    if accuracy:
        lines.append(
            f"accuracy: PyTorch {100 * accuracy['pytorch']:.2f} %, {manifest.precision} "
            f"{100 * accuracy[manifest.precision]:.2f} % on {accuracy['data']}, by edgekit's reference runtime"
        )
    if manifest.labels and not manifest.coreml.label_outputs:
        twice = len(set(manifest.labels)) < len(manifest.labels)
        reason = "a name stands for two classes" if twice else "its output is not one row of scores"
        lines.append(f"labels are in the bundle's manifest, not in the package: {reason}")
    if not_run := manifest.verification.get("not_run"):
        lines.append(f"not run: {not_run}; on a Mac: {mac_command(bundle.path)}")
    return lines
