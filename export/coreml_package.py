"""Write an ML program as the files of a package inside a bundle: the same bytes for equal exports."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgekit
from edgekit.export.source import LoadedModel
from edgekit.runtime.bundle import BundleWriter
from edgekit.runtime.coreml_info import ITEM_INFO, MODEL, WEIGHTS, CoreMLInfo
from edgekit.runtime.manifest import TensorSpec

# What Core ML's tools call an item of theirs in a package's Manifest.json.
_AUTHOR = "com.apple.CoreML"
_KEY = "com.github.edgekit."
# Core ML Tools notes these of itself; its date would make equal exports differ.
_OWN_KEYS = ("com.github.apple.coremltools.version", "com.github.apple.coremltools.source")


def describe(
    spec: Any,
    loaded: LoadedModel,
    info: CoreMLInfo,
    precision: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    labels: Sequence[str] | None = None,
) -> None:
    """Put into the protobuf what Xcode shows of a model: author, license, versions, and what each tensor is."""
    metadata = spec.description.metadata
    metadata.author = "exported by edgekit"
    metadata.shortDescription = f"{loaded.name}: {loaded.source}, {precision}, {info.layout} layout"
    metadata.versionString = edgekit.__version__
    metadata.license = "the license of the exported model's weights"
    kept = {key: metadata.userDefined[key] for key in _OWN_KEYS if key in metadata.userDefined}
    metadata.userDefined.clear()
    facts: dict[str, str] = {
        "version": edgekit.__version__,
        "model": loaded.source,
        "weights_sha256": loaded.weights.sha256,
        "precision": precision,
        "compute_precision": info.compute_precision,
        "layout": info.layout,
    }
    if labels:
        facts["classes"] = json.dumps(list(labels), ensure_ascii=False)
    for key, value in sorted((kept | {_KEY + key: value for key, value in facts.items()}).items()):
        metadata.userDefined[key] = value
    texts = {each.name: _text(each) for each in (*inputs, *outputs)}
    for feature in (*spec.description.input, *spec.description.output):
        if feature.name in texts:
            feature.shortDescription = texts[feature.name]


def _text(tensor: TensorSpec) -> str:
    recipe = tensor.preprocessing
    if recipe is None:
        return str(tensor)
    return f"{tensor}; {recipe.describe()}"


def write_package(writer: BundleWriter, spec: Any, weights: str | Path | None) -> None:
    """Write model, weights and the list of items.

    Args:
        spec: the protobuf.
        weights: the folder with `weight.bin`; None, or a folder without it, where the model has none.
    """
    content = spec.SerializeToString(deterministic=True)
    writer.add(MODEL, "model").write_bytes(content)
    source = None if weights is None else Path(weights) / Path(WEIGHTS).name
    digest = hashlib.sha256(content)
    entries: dict[str, tuple[str, str]] = {"model.mlmodel": ("CoreML Model Specification", "model.mlmodel")}
    if source is not None and source.is_file():
        blob = source.read_bytes()
        digest.update(blob)
        writer.add(WEIGHTS, "weights").write_bytes(blob)
        entries["weights"] = ("CoreML Model Weights", "weights")
    writer.add(ITEM_INFO, "package").write_text(_item_info(entries, digest.hexdigest()), encoding="utf-8")


def _item_info(entries: Mapping[str, tuple[str, str]], digest: str) -> str:
    """Core ML Tools draws the identifiers of the items; these follow from what the items hold."""
    names = {name: str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest}/{name}")).upper() for name in entries}
    items = {
        names[name]: {"author": _AUTHOR, "description": text, "name": name, "path": f"{_AUTHOR}/{path}"}
        for name, (text, path) in entries.items()
    }
    data = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": items,
        "rootModelIdentifier": names["model.mlmodel"],
    }
    return json.dumps(data, indent=4) + "\n"
