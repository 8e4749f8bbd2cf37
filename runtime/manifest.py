"""The manifest of a bundle: what was exported, from what, with which tensors, and which files prove it.

A manifest is plain JSON. Reading one validates every field and never runs code. The schema number rises when an older
reader would misunderstand a newer file; a reader refuses numbers above its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgekit.errors import BundleError
from edgekit.runtime.preprocess import ImagePreprocessing

SCHEMA = 1
DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")

Dim = int | str


@dataclass(frozen=True)
class DimRange:
    """The sizes that a symbolic dimension may take: `min` to `max`, both included; `max` None means no upper bound."""

    min: int = 1
    max: int | None = None

    def __contains__(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        return f"{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` holds ints and the names of symbolic dimensions, `layout` letters such as NCHW."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    layout: str | None = None
    preprocessing: ImagePreprocessing | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes, its SHA-256 in hex, and what it is for (`model`, `samples`, ...)."""

    role: str
    size: int
    sha256: str


@dataclass(frozen=True)
class WeightsInfo:
    """Where the weights came from: `shipped`, `random` (then with the seed), `file` or `program`; and their hash."""

    source: str
    sha256: str
    seed: int | None = None
    file: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """The exported PyTorch model: `source` is a zoo name, `package.module:factory`, a .pt2 file's name or a class."""

    source: str
    weights: WeightsInfo
    parameters: int
    macs: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CustomOp:
    """A custom op in the graph, how many nodes use it, and the kernels known to serve it."""

    domain: str
    name: str
    version: int
    nodes: int
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """All that a device needs to know of a bundle. Read with `Manifest.from_json`, written with `to_json`.

    `opsets` maps operator domains to versions, `ops` the graph's operators to how many nodes use them; `calibration`
    says what int8 was calibrated on; `verification` holds the figures of the check at export.
    """

    name: str
    model: ModelInfo
    target: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    opsets: dict[str, int] = field(default_factory=dict)
    ir_version: int | None = None
    ops: dict[str, int] = field(default_factory=dict)
    custom_ops: tuple[CustomOp, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    calibration: str | None = None
    verification: dict[str, Any] = field(default_factory=dict)

    @property
    def model_file(self) -> str:
        """The name of the file with the role `model`."""
        for name, entry in self.files.items():
            if entry.role == "model":
                return name
        raise BundleError(f"the manifest of {self.name!r} lists no file with the role 'model'")

    def to_json(self) -> str:
        """The manifest as JSON text, with keys in a fixed order, so that equal exports give equal files."""
        data: dict[str, Any] = {"schema": SCHEMA}
        data.update(_plain(self))
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "manifest.json") -> Manifest:
        """Read and validate a manifest; every fault raises a `BundleError` that names the field."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise BundleError(f"{where} is not valid JSON ({error}); the bundle is damaged, export it again") from error
        if not isinstance(data, dict):
            raise BundleError(f"{where} must hold a JSON object, got {type(data).__name__}")
        schema = data.pop("schema", None)
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise BundleError(f"{where} has no valid 'schema' number (got {schema!r}); is this an edgekit bundle?")
        if schema > SCHEMA:
            raise BundleError(
                f"{where} has schema {schema}, this edgekit reads up to {SCHEMA}; upgrade with: pip install -U edgekit"
            )
        return _Reader(where).manifest(data)


def safe_name(name: str) -> bool:
    """Whether `name` is a relative POSIX path that stays inside the bundle's folder."""
    if not name or "\\" in name or "\0" in name or ":" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def _plain(value: Any) -> Any:
    if isinstance(value, ImagePreprocessing):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Reader:
    """Turns parsed JSON into a Manifest and names the field in every complaint."""

    def __init__(self, where: str) -> None:
        self.where = where

    def manifest(self, data: dict[str, Any]) -> Manifest:
        self._known(data, Manifest, "")
        dims = {
            name: self._dim_range(entry, f"dims.{name}") for name, entry in self._get(data, "dims", dict, "").items()
        }
        files = {name: self._file(name, entry) for name, entry in self._get(data, "files", dict, "").items()}
        labels = data.get("labels")
        manifest = Manifest(
            name=self._get(data, "name", str, ""),
            model=self._model(self._get(data, "model", dict, "")),
            target=self._get(data, "target", str, ""),
            precision=self._get(data, "precision", str, ""),
            inputs=tuple(self._tensors(data, "inputs", dims)),
            outputs=tuple(self._tensors(data, "outputs", dims)),
            dims=dims,
            labels=None if labels is None else tuple(self._strings(labels, "labels")),
            opsets={str(k): v for k, v in self._get(data, "opsets", dict, "").items() if self._int(v, "opsets")},
            ir_version=data.get("ir_version"),
            ops={str(k): v for k, v in self._get(data, "ops", dict, "").items() if self._int(v, f"ops.{k}")},
            custom_ops=tuple(self._custom_ops(data)),
            files=files,
            tools={str(k): str(v) for k, v in self._get(data, "tools", dict, "").items()},
            calibration=data.get("calibration"),
            verification=self._get(data, "verification", dict, ""),
        )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", manifest.name):
            raise self._bad("name", "letters, digits, '.', '_' and '-'", manifest.name)
        return manifest

    def _bad(self, path: str, expected: str, got: object) -> BundleError:
        return BundleError(f"{self.where}: field {path!r} must be {expected}, got {got!r}; the bundle was edited")

    def _get(self, data: dict[str, Any], key: str, kind: type, prefix: str) -> Any:
        path = f"{prefix}{key}"
        if key not in data:
            raise BundleError(f"{self.where}: field {path!r} is missing; the bundle is damaged, export it again")
        value = data[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._bad(path, f"of type {kind.__name__}", value)
        return value

    def _int(self, value: object, path: str) -> bool:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._bad(path, "an integer", value)
        return True

    def _known(self, data: dict[str, Any], cls: type, path: str) -> None:
        unknown = sorted(set(data) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise BundleError(f"{self.where}: unknown field(s) {', '.join(path + name for name in unknown)}")

    def _strings(self, values: object, path: str) -> list[str]:
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self._bad(path, "a list of strings", values)
        return values

    def _dim_range(self, entry: object, path: str) -> DimRange:
        if not isinstance(entry, dict):
            raise self._bad(path, "an object with min and max", entry)
        low, high = entry.get("min"), entry.get("max")
        if not isinstance(low, int) or low < 0 or not (high is None or (isinstance(high, int) and high >= low)):
            raise self._bad(path, "an object with 0 <= min <= max", entry)
        return DimRange(low, high)

    def _file(self, name: str, entry: object) -> FileEntry:
        path = f"files.{name}"
        if not safe_name(name):
            raise BundleError(
                f"{self.where}: the file name {name!r} leaves the bundle's folder or is not portable; refusing to open it"
            )
        if not isinstance(entry, dict):
            raise self._bad(path, "an object", entry)
        self._known(entry, FileEntry, f"{path}.")
        digest = self._get(entry, "sha256", str, f"{path}.")
        size = self._get(entry, "size", int, f"{path}.")
        if size < 0:
            raise self._bad(f"{path}.size", "a number of bytes", size)
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise self._bad(f"{path}.sha256", "64 hexadecimal digits", digest)
        return FileEntry(self._get(entry, "role", str, f"{path}."), size, digest)

    def _model(self, data: dict[str, Any]) -> ModelInfo:
        self._known(data, ModelInfo, "model.")
        weights = self._get(data, "weights", dict, "model.")
        self._known(weights, WeightsInfo, "model.weights.")
        return ModelInfo(
            source=self._get(data, "source", str, "model."),
            weights=WeightsInfo(
                source=self._get(weights, "source", str, "model.weights."),
                sha256=self._get(weights, "sha256", str, "model.weights."),
                seed=weights.get("seed"),
                file=weights.get("file"),
            ),
            parameters=self._get(data, "parameters", int, "model."),
            macs=data.get("macs"),
            options=self._get(data, "options", dict, "model."),
        )

    def _tensors(self, data: dict[str, Any], key: str, dims: dict[str, DimRange]) -> list[TensorSpec]:
        specs = []
        for index, entry in enumerate(self._get(data, key, list, "")):
            path = f"{key}[{index}]"
            if not isinstance(entry, dict):
                raise self._bad(path, "an object", entry)
            self._known(entry, TensorSpec, f"{path}.")
            dtype = self._get(entry, "dtype", str, f"{path}.")
            if dtype not in DTYPES:
                raise self._bad(f"{path}.dtype", f"one of {', '.join(DTYPES)}", dtype)
            shape = self._get(entry, "shape", list, f"{path}.")
            for dim in shape:
                is_size = isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0
                if not is_size and not (isinstance(dim, str) and (dim in dims or key == "outputs")):
                    raise self._bad(f"{path}.shape", "sizes and names listed in 'dims'", shape)
            recipe = entry.get("preprocessing")
            specs.append(
                TensorSpec(
                    name=self._get(entry, "name", str, f"{path}."),
                    dtype=dtype,
                    shape=tuple(shape),
                    layout=entry.get("layout"),
                    preprocessing=None if recipe is None else ImagePreprocessing.from_json(recipe),
                )
            )
        if not specs:
            raise self._bad(key, "a list with at least one tensor", [])
        return specs

    def _custom_ops(self, data: dict[str, Any]) -> list[CustomOp]:
        ops = []
        for index, entry in enumerate(self._get(data, "custom_ops", list, "")):
            path = f"custom_ops[{index}]."
            if not isinstance(entry, dict):
                raise self._bad(path, "an object", entry)
            self._known(entry, CustomOp, path)
            ops.append(
                CustomOp(
                    domain=self._get(entry, "domain", str, path),
                    name=self._get(entry, "name", str, path),
                    version=self._get(entry, "version", int, path),
                    nodes=self._get(entry, "nodes", int, path),
                    kernels=tuple(self._strings(entry.get("kernels", []), f"{path}kernels")),
                )
            )
        return ops
