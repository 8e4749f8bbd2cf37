"""A Swift package in every Core ML bundle: one file with an `async` API, and the bundle's samples as its unit test.

The bundle's folder is the package: `Package.swift` stands beside `model.mlpackage`, because SwiftPM takes resources
from inside a target's folder alone (swift-package-manager, TargetSourcesBuilder). So there is one copy of the weights,
and no link that a zip would lose. The model is a `.copy` resource: `swift build` knows no rule for Core ML models and
would take the package apart. It is compiled when it is loaded first and kept for later; an app that lets Xcode compile
it passes the URL of its `.mlmodelc`.

What is written compiles on Linux as well, without the parts that need Apple's frameworks: the arithmetic around the
model is tested there against Python's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import edgekit
from edgekit.errors import ExportError
from edgekit.export.coreml_swift_text import array, comment, number, render, template, text, type_name, value_name
from edgekit.runtime.bundle import SAMPLES
from edgekit.runtime.coreml_info import PACKAGE, CoreMLInfo
from edgekit.runtime.manifest import MANIFEST, REPORT, Manifest, TensorSpec
from edgekit.runtime.samples import Samples
from edgekit.runtime.tensor_specs import DimRange
from edgekit.runtime.tolerances import output_tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgekit.export.coreml_swift_samples import Resources
    from edgekit.runtime.bundle import BundleWriter
    from edgekit.runtime.preprocess import ImagePreprocessing

ROLE = "swift"
# The macOS that came with each iOS: Core ML has the same features in both.
MACOS = {"iOS16": "13.0", "iOS17": "14.0", "iOS18": "15.0"}
# Width and height of the image whose levels the tests compare, and about how many of them.
PATTERN = (53, 37)
_LEVELS = 200


def write_swift(writer: BundleWriter, manifest: Manifest, *, tolerance: float | None = None) -> str:
    """Write the Swift package into a bundle that already holds its `model.mlpackage` and its samples.

    Args:
        writer: of the bundle; the files get the role `swift`.
        manifest: of the bundle, with `coreml`; its `files` may be empty still.
        tolerance: the largest relative L2 error that the unit test lets pass; None: that of the precision.

    Returns:
        The name of the package, its module and its main type.

    Raises:
        ExportError: the manifest is not that of a Core ML package, or the package is not there yet.
    """
    from edgekit.export.coreml_swift_samples import collect

    info = manifest.coreml
    if info is None:
        raise ExportError(f"{manifest.name} is no Core ML package, so there is no Swift package to write for it")
    if tolerance is None:
        tolerance = output_tolerance(manifest.precision, manifest.target)
    samples, decode_samples = stored_samples(writer, manifest)
    name = type_name(manifest.name)
    resources = collect(manifest, samples, decode_samples, tolerance=tolerance, image=_golden(manifest))
    values = {
        "NAME": name,
        "NAME_TEXT": text(name),
        "ORIGIN": comment(manifest.model.source),
        "PRECISION": manifest.precision,
        "SYSTEMS": f"iOS {info.deployment_target.removeprefix('iOS')} and macOS {MACOS[info.deployment_target]}",
        "EDGEKIT": edgekit.__version__,
        "IOS_TEXT": text(f"{info.deployment_target.removeprefix('iOS')}.0"),
        "MACOS_TEXT": text(MACOS[info.deployment_target]),
        "MODEL_KEY": _model_key(writer),
        "RESOURCES": f".copy({text(PACKAGE)})",
        "EXCLUDED": "\n".join(f"{text(file)}," for file in _others(writer, manifest)),
    }
    tests = f"swift/Tests/{name}Tests"
    for file, content in {
        "Package.swift": render(template("Package.swift"), values),
        f"swift/Sources/{name}/{name}.swift": _source(manifest, info, values),
        f"{tests}/{name}Tests.swift": _tests(manifest, values, resources),
        f"{tests}/Samples/samples.json": json.dumps(resources.listing, indent=1) + "\n",
    }.items():
        writer.add(file, ROLE).write_text(content, encoding="utf-8")
    writer.add(f"{tests}/Samples/samples.bin", ROLE).write_bytes(resources.data)
    return name


def stored_samples(writer: BundleWriter, manifest: Manifest) -> tuple[Samples, Samples | None]:
    """The samples that were written already, of the main graph and of `decode`; none where there is no file."""

    def load(file: str | None, described: Manifest) -> Samples:
        path = None if file is None else writer.folder / file
        if path is None or not path.is_file():
            return Samples({}, {})
        return Samples.load(path.read_bytes(), described, where=path.name)

    decode = manifest.decode
    if decode is None:
        return load(SAMPLES, manifest), None
    second = dataclasses.replace(manifest, inputs=decode.inputs, outputs=decode.outputs, dims=decode.dims)
    return load(SAMPLES, manifest), load(decode.samples, second)


def _others(writer: BundleWriter, manifest: Manifest) -> list[str]:
    """The bundle's files that are no part of the Swift package's main target."""
    names = {MANIFEST, REPORT, "check_on_mac.py", "swift/Tests"}
    names |= {path.name for path in writer.folder.iterdir() if path.is_file()}
    if manifest.generation is not None and manifest.generation.tokenizer.file is not None:
        names.add(manifest.generation.tokenizer.file)
    return sorted(names - {"Package.swift"})


def _model_key(writer: BundleWriter) -> str:
    """A name for this very model among those that a device keeps compiled."""
    folder = writer.folder / PACKAGE
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ExportError(f"there is no {PACKAGE} yet; the Swift package is written after it")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def image_of(manifest: Manifest) -> TensorSpec | None:
    """The input that the package's API takes as an image of any size; None where there is none."""
    for spec in manifest.inputs:
        if spec.preprocessing is not None:
            return spec
    return None


def _source(manifest: Manifest, info: CoreMLInfo, values: dict[str, str]) -> str:
    """The one file of the package."""
    image = image_of(manifest)
    imports = ["CoreML"]
    if manifest.generation is not None:
        parts, extra = _language(manifest, info)
    else:
        parts, extra = _predictor(manifest, info)
        if image is not None and image.preprocessing is not None:
            parts += ["pixels.swift", "recipe.swift", "apple_images.swift"]
            parts += ["image_feature.swift"] if info.image_input is not None else []
            imports += ["CoreGraphics", "CoreVideo", "ImageIO", "VideoToolbox"]
            extra |= _recipe(image.preprocessing)
    lines = [line for module in sorted(imports) for line in (f"#if canImport({module})", f"import {module}", "#endif")]
    values = values | extra
    rendered = [render(template(part), values) for part in ["header.swift", *parts]]
    rendered[0] = rendered[0].rstrip("\n") + "\n" + "\n".join(lines) + "\n"
    return "\n".join(rendered)


def _predictor(manifest: Manifest, info: CoreMLInfo) -> tuple[list[str], dict[str, str]]:
    """Templates and values of a model that takes images or arrays."""
    names: dict[str, str] = {}
    for spec in manifest.outputs:
        names[spec.name] = value_name(spec.name, names.values())
    inputs: dict[str, str] = {}
    for spec in manifest.inputs:
        inputs[spec.name] = value_name(spec.name, (*inputs.values(), "answer"))
    image = image_of(manifest)
    alone = image is not None and len(manifest.inputs) == 1
    scores = manifest.outputs[0]
    classifies = alone and len(scores.shape) == 2
    values = {
        "OUTPUT_NAMES": array(text(spec.name) for spec in manifest.outputs),
        "OUTPUT_FIELDS": "\n".join(
            f"/// {comment(str(spec))}\npublic let {names[spec.name]}: Tensor<{_scalar(spec)}>"
            for spec in manifest.outputs
        ),
        "OUTPUT_VALUES": ",\n".join(
            f"{names[spec.name]}: try Self.tensor({text(spec.name)}, of: answer, as: {_scalar(spec)}.self)"
            for spec in manifest.outputs
        ),
        "SCORES": names[scores.name],
        "LABELS": "nil" if manifest.labels is None else array(map(text, manifest.labels)),
        "FUNCTION_NAME": "",
        "TRY": "try " if info.image_input else "",
        "IMAGE_CASE": "case .image(let levels): return try Self.feature(levels: levels)" if info.image_input else "",
        "IMAGE_KIND": "case image(levels: [UInt8])" if info.image_input else "",
    }
    if alone:
        spec = manifest.inputs[0]
        values |= {"INPUT_TEXT": text(spec.name), "IMAGE_INPUT": _input(spec, "image", info)}
        methods = ["outputs_image.swift", *(["predict_image.swift"] if classifies else [])]
        call = "let best = try await model.predict(Pixels(contentsOf: photo))[0]  // .label, .probability"
    else:
        values |= {
            "PARAMETERS": ", ".join(f"{inputs[s.name]}: {_kind(s)}" for s in manifest.inputs),
            "PARAMETER_DOCS": "\n".join(_documented(manifest, inputs)),
            "CHECKS": "\n".join(
                f"try Self.check({text(s.name)}, {inputs[s.name]}.shape, against: {_axes(s, manifest.dims)})"
                for s in manifest.inputs
                if s.preprocessing is None
            ),
            "INPUT_PAIRS": ", ".join(f"{text(s.name)}: {_input(s, inputs[s.name], info)}" for s in manifest.inputs),
        }
        methods = ["outputs_arrays.swift"]
        call = f"let answer = try await model.outputs({', '.join(f'{n}: ..' for n in inputs.values())})"
    if alone and not classifies:
        call = "let answer = try await model.outputs(for: Pixels(contentsOf: photo))"
    name = type_name(manifest.name)
    call = call.replace("Pixels(", f"{name}.Pixels(")
    values["EXAMPLE"] = f"     let model = try await {name}.load()\n//     {call}"
    values["METHODS"] = "\n\n".join(_inner(render(template(part), values)) for part in methods)
    parts = ["model.swift", "loading.swift", "failure.swift", "tensor.swift"]
    return parts + (["classes.swift"] if classifies or manifest.labels else []), values


def _documented(manifest: Manifest, inputs: Mapping[str, str]) -> list[str]:
    lines = ["    /// - Parameters:"]
    for spec in manifest.inputs:
        lines.append(f"    ///   - {inputs[spec.name].strip('`')}: {comment(str(spec))}")
    return lines


def _inner(content: str) -> str:
    """A method's text without the indentation that its place in a type gives it again."""
    return "\n".join(line.removeprefix("    ") for line in content.rstrip("\n").splitlines())


def _scalar(spec: TensorSpec) -> str:
    return "Float" if spec.dtype.startswith("float") else "Int32"


def _kind(spec: TensorSpec) -> str:
    return "Pixels" if spec.preprocessing is not None else f"Tensor<{_scalar(spec)}>"


def _input(spec: TensorSpec, value: str, info: CoreMLInfo) -> str:
    """An expression of the kind of an input, for the parameter `value`."""
    recipe = spec.preprocessing
    if recipe is None:
        return f".{'floats' if _scalar(spec) == 'Float' else 'integers'}({value})"
    if spec.name == info.image_input:
        return f".image(levels: Self.recipe.bytes(of: {value}))"
    shape = array(map(str, recipe.output_shape))
    return f".floats(try Tensor(shape: {shape}, values: Self.recipe.normalized({value})))"


def _axes(spec: TensorSpec, dims: Mapping[str, DimRange]) -> str:
    axes = []
    for dim in spec.shape:
        limits = dims[dim] if isinstance(dim, str) else None
        if limits is None:
            axes.append(f".fixed({dim})")
        elif limits.values is not None:
            axes.append(f".choice({array(map(str, limits.values))})")
        else:
            axes.append(f".range({limits.min}, {'nil' if limits.max is None else limits.max})")
    return array(axes)


def _recipe(recipe: ImagePreprocessing) -> dict[str, str]:
    return {
        "RECIPE": comment(recipe.describe()),
        "HEIGHT": str(recipe.size[0]),
        "WIDTH": str(recipe.size[1]),
        "RESIZE": recipe.resize,
        "CROP": repr(float(recipe.crop_pct)),
        "FILTER": recipe.interpolation,
        "GRAY": str(recipe.color == "gray").lower(),
        "BLUE_FIRST": str(recipe.color == "bgr").lower(),
        "CHANNELS_FIRST": str(recipe.layout == "NCHW").lower(),
        "PAD": number(recipe.pad_value),
        "SCALE": number(recipe.scale),
        "MEAN": array(map(number, recipe.mean)),
        "STD": array(map(number, recipe.std)),
    }


def _language(manifest: Manifest, info: CoreMLInfo) -> tuple[list[str], dict[str, str]]:
    """Templates and values of a language model: functions `prefill_N` and the one of `decode`, with states."""
    generation, decode = manifest.generation, manifest.decode
    assert generation is not None  # asked by the caller
    matches = [match for function in info.functions if (match := re.fullmatch(r"(\D+)([1-9]\d*)", function))]
    stems = {match[1] for match in matches}
    if decode is None or decode.function is None or len(stems) != 1:
        found = ", ".join(info.functions)
        raise ExportError(f"a language model's package has functions prefill_N and one that decodes; got {found}")
    sizes = sorted(int(match[2]) for match in matches)
    tokenizer = generation.tokenizer
    (prefill_ids, length), (decode_ids, position) = (_integers(side) for side in (manifest.inputs, decode.inputs))
    values = {
        "FUNCTION_NAME": "configuration.functionName = function",
        "CONTEXT": str(min(generation.context, sizes[-1])),
        "VOCABULARY": str(tokenizer.vocab_size),
        "END_TOKENS": array(map(str, tokenizer.eos)),
        "PAD_TOKEN": str(tokenizer.pad or 0),
        "DECODE_TEXT": text(decode.function),
        "PREFILL_TEXT": text(stems.pop()),
        "PREFILL_SIZES": array(map(str, sizes)),
        "PREFILL_IDS": text(prefill_ids),
        "PREFILL_LENGTH": text(length),
        "DECODE_IDS": text(decode_ids),
        "DECODE_POSITION": text(position),
        "SCORES_TEXT": text("logits"),
        "BOS_TEXT": f", behind the id {tokenizer.bos} that begins a text" if tokenizer.add_bos else "",
        "BOS_PREFIX": f"[{tokenizer.bos}] + " if tokenizer.add_bos else "",
        "TEXT_METHODS": "",
    }
    name = type_name(manifest.name)
    parts = ["language.swift", "loading.swift", "failure.swift", "tensor.swift", "sampling.swift"]
    if tokenizer.kind == "bytes":
        values["TEXT_METHODS"] = _inner(template("language_text.swift"))
        parts.append("bytes.swift")
        call = 'for try await piece in model.stream("A list is") { print(piece, terminator: "") }'
    else:
        call = f"let ids = try await model.generate(tokens: ids)  // {tokenizer.file} makes ids of a text"
    values["EXAMPLE"] = f"     let model = try await {name}.load()\n//     {call}"
    return parts, values


def _integers(inputs: tuple[TensorSpec, ...]) -> tuple[str, str]:
    """The names of the token ids and of the number beside them: how many there are, or where the one stands."""
    names = [spec.name for spec in inputs if "int" in spec.dtype]
    if len(names) != 2:
        raise ExportError(f"a language model's function takes token ids and one number, got {', '.join(names)}")
    first, second = sorted(names, key=lambda name: name != "input_ids")
    return first, second


def _tests(manifest: Manifest, values: dict[str, str], resources: Resources) -> str:
    """The unit tests of the package."""
    image = image_of(manifest)
    language = manifest.generation is not None
    run = "run_language.swift" if language else "run_arrays.swift"
    image_sample = 'case "image": inputs[entry.name] = .image(levels: bytes(entry, data, width: 1))'
    takes_image = manifest.coreml is not None and manifest.coreml.image_input is not None
    values = values | {
        "IMAGE_SAMPLE": image_sample if takes_image else "",
        "SCORES_TEXT": text("logits"),
        "PATTERN_WIDTH": str(PATTERN[0]),
        "PATTERN_HEIGHT": str(PATTERN[1]),
        "PATTERN_STEP": str(resources.image_step),
    }
    values["RUN_SAMPLE"] = render(template(run), values).rstrip("\n")
    parts = ["test_samples.swift"]
    if language:
        parts.append("test_sampling.swift")
        if manifest.generation is not None and manifest.generation.tokenizer.kind == "bytes":
            parts.append("test_text.swift")
    elif image is not None:
        parts.append("test_image.swift")
        if len(manifest.inputs) == 1 and len(manifest.outputs[0].shape) == 2:
            parts.append("test_classes.swift")
    values["TESTS"] = "\n\n".join(_inner(render(template(part), values)) for part in parts)
    return render(template("tests.swift"), values)


def pattern(width: int, height: int) -> NDArray[np.uint8]:
    """The image of stripes and ramps that the Swift tests draw as well, uint8 `[height, width, 3]`."""
    y, x, channel = np.ogrid[:height, :width, :3]
    levels: NDArray[Any] = (x * 7 + y * 13 + x * y * 3 + channel * 101) % 256
    return levels.astype(np.uint8)


def _golden(manifest: Manifest) -> tuple[NDArray[np.float32], int] | None:
    """Some levels of the pattern after resizing, as Python computes them, and the step between them."""
    spec = image_of(manifest)
    if spec is None or spec.preprocessing is None:
        return None
    recipe = spec.preprocessing
    plain = dataclasses.replace(
        recipe,
        color="rgb" if recipe.color == "bgr" else recipe.color,
        scale=1.0,
        mean=(0.0,) * recipe.channels,
        std=(1.0,) * recipe.channels,
        layout="NHWC",
        pixels=False,
    )
    levels = plain(pattern(*PATTERN)).reshape(-1)
    step = max(1, levels.size // _LEVELS) | 1  # odd: rows and channels take turns
    return levels[::step].astype(np.float32), step
