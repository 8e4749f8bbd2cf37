"""Folders of Core ML bundles without a model: what is written around one needs its manifest and samples alone."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.export.coreml_swift import write_swift
from edgekit.export.mac_check import write_check
from edgekit.runtime.bundle import MANIFEST, REPORT, SAMPLES, BundleWriter
from edgekit.runtime.coreml_info import ITEM_INFO, MODEL, WEIGHTS, CoreMLInfo, StateSpec
from edgekit.runtime.generation_info import Generation, TokenizerInfo
from edgekit.runtime.manifest import DimRange, FileEntry, Graph, Manifest, ModelInfo, TensorSpec, WeightsInfo
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.samples import Samples

DECODE_SAMPLES = "samples-decode.npz"
_MODEL = ModelInfo("shvit_s1", WeightsInfo("random", "0" * 64, 0), 10)
_RECIPE: Mapping[str, Any] = {
    "size": (9, 12),
    "resize": "shortest",
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.4, 0.5, 0.6),
    "std": (0.2, 0.25, 0.3),
    "pixels": True,
}

Case = tuple[Manifest, Samples, Samples | None]


def image_case(name: str = "shvit_s1", labels: tuple[str, ...] | None = ("cat", "dog", "fox"), **recipe: Any) -> Case:
    """A classifier of one image; its score of class k is (k + 1) times the mean of the input."""
    steps = ImagePreprocessing(**{**_RECIPE, **recipe})
    pixels = steps.pixels
    spec = TensorSpec("image", "uint8" if pixels else "float32", steps.output_shape, steps.layout, steps)
    info = CoreMLInfo("iOS16", 7, image_input="image" if pixels else None)
    manifest = _manifest(name, (spec,), (TensorSpec("logits", "float32", (1, 3)),), info, labels=labels)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (3, *steps.output_shape)).astype(spec.dtype)
    scores = images.astype(np.float64).mean(axis=(1, 2, 3, 4))[:, None] * [1, 2, 3]
    return manifest, Samples({"image": images}, {"logits": scores[:, None].astype(np.float32)}), None


def arrays_case(name: str = "light-hgnn.v2") -> Case:
    """A model of arrays of several sizes, with names that Swift must not take as they are."""
    inputs = (
        TensorSpec("features", "float32", ("V", 5)),
        TensorSpec("index.0", "int32", ("V",), index_of="V"),
        TensorSpec("class", "float32", ("S", 2)),
    )
    outputs = (TensorSpec("out", "float32", ("V", 3)), TensorSpec("out_", "int32", (2,)))
    dims = {"V": DimRange(1, None), "S": DimRange(2, 8, (2, 4, 8))}
    manifest = _manifest(name, inputs, outputs, CoreMLInfo("iOS17", 8, compute_precision="fp32"), "fp32", dims=dims)
    generator = np.random.default_rng(0)
    pairs = []
    for nodes in (3, 4):
        given = {
            "features": generator.standard_normal((nodes, 5)).astype(np.float32),
            "index.0": np.arange(nodes, dtype=np.int32),
            "class": np.ones((2, 2), np.float32),
        }
        pairs.append((given, {"out": given["features"][:, :3] * 2, "out_": np.array([7, 0], np.int32)}))
    return manifest, Samples.of(pairs), None


def language_case(kind: str = "bytes", name: str = "dhsa_bytes") -> Case:
    """A language model with states; the scores are the sum of ids, number and states, times 0, 1, 2 and so on."""
    states = tuple(
        StateSpec(f"{kind}_0", "float16", (1, 2, 64, 4), f"past_key_values.0.{kind}", f"present.0.{kind}")
        for kind in ("key", "value")
    )
    past = tuple(TensorSpec(state.input, state.dtype, state.shape) for state in states)
    present = tuple(TensorSpec(state.output, state.dtype, state.shape) for state in states)
    logits = TensorSpec("logits", "float32", (1, 1, 258))
    sides = {
        "length": (TensorSpec("input_ids", "int32", (1, 16)), TensorSpec("length", "int32", (1,)), *past),
        "position": (TensorSpec("input_ids", "int32", (1, 1)), TensorSpec("position", "int32", (1,)), *past),
    }
    info = CoreMLInfo("iOS18", 9, "prefill_16", ("prefill_16", "prefill_64", "decode"), states=states)
    file = None if kind == "bytes" else "tokenizer.json"
    tokenizer = TokenizerInfo(kind, file, 258, bos=256, eos=(257,), pad=0, add_bos=kind == "bytes")
    manifest = replace(
        _manifest(name, sides["length"], (logits, *present), info),
        decode=Graph(MODEL, sides["position"], (logits, *present), samples=DECODE_SAMPLES, function="decode"),
        generation=Generation(64, 1, 16, 64, tokenizer),
    )
    generator = np.random.default_rng(0)

    def samples(number: str, empty: bool) -> Samples:
        held = {
            state.input: np.zeros(state.shape, np.float16)
            if empty
            else generator.integers(-8, 8, state.shape).astype(np.float16) / 4
            for state in states
        }
        for array in held.values():
            array[:, :, 5:] = 0  # no text reaches these slots
        ids = generator.integers(0, 256, sides[number][0].shape).astype(np.int32)
        scores = (ids.sum() + 5 + sum(float(array.astype(np.float64).sum()) for array in held.values())) * np.arange(
            258
        )
        left = {state.output: held[state.input] + np.float16(1) for state in states}
        given = {"input_ids": ids, number: np.array([5], np.int32), **held}
        return Samples.of([(given, {"logits": scores.astype(np.float32)[None, None], **left})])

    return manifest, samples("length", True), samples("position", False)


CASES = {
    "image": image_case,
    "gray": lambda: image_case(
        color="gray", mean=(0.5,), std=(0.5,), interpolation="bilinear", resize="letterbox", crop_pct=1.0
    ),
    "bgr-tensor": lambda: image_case(pixels=False, color="bgr", resize="squash", crop_pct=1.0, labels=None),
    "arrays": arrays_case,
    "language": language_case,
    "huggingface": lambda: language_case("huggingface"),
}


def write_folder(case: Case, folder: Path, *, swift: bool = True) -> Path:
    """The bundle's folder as an export leaves it, with other bytes in place of the model."""
    manifest, samples, decode_samples = case
    with BundleWriter(folder / "made.edge") as writer:
        roles = {ITEM_INFO: "package", MODEL: "model", WEIGHTS: "weights"}
        for name, role in roles.items():
            writer.add(name, role).write_text(f"not a model: {name}", encoding="utf-8")
        samples.save(writer.add(SAMPLES, "samples"))
        roles[SAMPLES] = "samples"
        if decode_samples is not None:
            decode_samples.save(writer.add(DECODE_SAMPLES, "samples"))
            roles[DECODE_SAMPLES] = "samples"
        if manifest.generation is not None and manifest.generation.tokenizer.file is not None:
            writer.add("tokenizer.json", "tokenizer").write_text("{}", encoding="utf-8")
            roles["tokenizer.json"] = "tokenizer"
        if swift:
            write_swift(writer, manifest)
        write_check(writer, manifest)
        target = folder / f"{manifest.name}-coreml.edge"
        shutil.copytree(writer.folder, target)
    files = {}
    for path in sorted(target.rglob("*")):
        if path.is_file():
            name, content = path.relative_to(target).as_posix(), path.read_bytes()
            role = roles.get(name, "tool" if name == "check_on_mac.py" else "swift")
            files[name] = FileEntry(role, len(content), hashlib.sha256(content).hexdigest())
    (target / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    (target / REPORT).write_text('{"export": {"seconds": 1.5}}\n', encoding="utf-8")
    return target


def _manifest(
    name: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    info: CoreMLInfo,
    precision: str = "fp16",
    **rest: Any,
) -> Manifest:
    return Manifest(name, _MODEL, "coreml", precision, inputs, outputs, coreml=info, **rest)
