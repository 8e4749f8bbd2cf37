"""The manifest of a bundle: what was exported, from what, with which tensors, and which files prove it.

A manifest is plain JSON. Reading one validates every field and never runs code. The schema number rises when an older
reader would misunderstand a newer file; a reader refuses numbers above its own. A file gets the lowest number that has
all its fields, so that older readers take what they can: 4 for a package for Core ML, and where a dimension takes
listed sizes alone; 3 where a language model has a second graph and says how it generates text, or where weights lie in
a file of their own; 2 where an input says what its integers point into; else 1.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from edgekit.errors import BundleError
from edgekit.runtime.coreml_info import CoreMLInfo, StateSpec, read_coreml
from edgekit.runtime.generation_info import Generation, TokenizerInfo, read_generation, tensor_names
from edgekit.runtime.json_fields import Fields, parse_object, short
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.tensor_specs import DTYPES, Dim, DimRange, TensorSpec, points

__all__ = [
    "DTYPES",
    "MANIFEST",
    "REPORT",
    "SCHEMA",
    "CoreMLInfo",
    "CustomOp",
    "Dim",
    "DimRange",
    "FileEntry",
    "Generation",
    "Graph",
    "Manifest",
    "ModelInfo",
    "StateSpec",
    "TensorSpec",
    "TokenizerInfo",
    "WeightsInfo",
    "safe_name",
]

MANIFEST = "manifest.json"
REPORT = "report.json"
SCHEMA = 4


# Fields that came with a later schema: left out where they say nothing, so that older files read and are written alike.
_OPTIONAL = frozenset({"index_of", "decode", "generation", "coreml", "function", "values"})


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
class Graph:
    """The second graph of a language model, which reads one token after those in its cache.

    `file` has the role `decode`, `samples` (None where there are none) the role `samples`; the other fields are for
    this graph what those of the same names in `Manifest` are for the first. In a package for Core ML both graphs are
    functions of one file: `function` is the name of this one, and `file` that of the role `model`.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: dict[str, DimRange] = field(default_factory=dict)
    ops: dict[str, int] = field(default_factory=dict)
    custom_ops: tuple[CustomOp, ...] = ()
    samples: str | None = None
    verification: dict[str, Any] = field(default_factory=dict)
    function: str | None = None


@dataclass(frozen=True)
class Manifest:
    """All that a device needs to know of a bundle. Read with `Manifest.from_json`, written with `to_json`.

    `opsets` maps operator domains to versions, `ops` the graph's operators to how many nodes use them; `calibration`
    says what int8 was calibrated on; `verification` holds the figures of the check at export. A language model has
    `decode` and `generation` as well: its main graph reads the tokens of a prompt, `decode` one token at a time.
    `coreml` is there for a Core ML package alone.
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
    decode: Graph | None = None
    generation: Generation | None = None
    coreml: CoreMLInfo | None = None

    @property
    def model_file(self) -> str:
        """The name of the file with the role `model`."""
        for name, entry in self.files.items():
            if entry.role == "model":
                return name
        raise BundleError(f"the manifest of {self.name!r} lists no file with the role 'model'")

    def to_json(self) -> str:
        """The manifest as JSON text, with keys in a fixed order, so that equal exports give equal files."""
        apart = any(entry.role == "weights" for entry in self.files.values())
        second = any(spec.index_of for spec in self.inputs)
        schema = 3 if apart or self.decode is not None or self.generation is not None else 2 if second else 1
        if self.coreml is not None or any(limits.values is not None for limits in self.dims.values()):
            schema = 4
        data: dict[str, Any] = {"schema": schema, **_plain(self)}
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = "manifest.json") -> Manifest:
        """Read and validate a manifest; every fault raises a `BundleError` that names the field."""
        data = parse_object(text, where)
        schema = data.pop("schema", None)
        if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
            raise BundleError(f"{where} has no valid 'schema' number (got {short(schema)}); is this an edgekit bundle?")
        if schema > SCHEMA:
            raise BundleError(
                f"{where} has schema {short(schema)}, this edgekit reads up to {SCHEMA}; "
                "upgrade with: pip install -U edgekit"
            )
        return _Reader(where).manifest(data)


def safe_name(name: str) -> bool:
    """Whether `name` is a relative POSIX path that stays inside the bundle's folder, on every system."""
    if not name or "\\" in name or ":" in name or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and name != "."


def _plain(value: Any) -> Any:
    if isinstance(value, ImagePreprocessing):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in fields.items() if item is not None or name not in _OPTIONAL}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Reader(Fields):
    """Turns parsed JSON into a Manifest and names the field in every complaint."""

    def __init__(self, where: str) -> None:
        super().__init__(where, _OPTIONAL)

    def manifest(self, data: dict[str, Any]) -> Manifest:
        self.known(data, Manifest, "")
        dims = self._dims(data)
        files = self._files(self.get(data, "files", dict))
        roles = {name: entry.role for name, entry in files.items()}
        given = {"decode": None, "generation": None, "coreml": None, **data}
        coreml = self.optional(given, "coreml", lambda value, _: read_coreml(self, value))
        manifest = Manifest(
            name=self.word(data, "name"),
            model=self._model(self.get(data, "model", dict)),
            target=self.word(data, "target"),
            precision=self.word(data, "precision"),
            inputs=self._tensors(data, "inputs", dims),
            outputs=self._tensors(data, "outputs", dims),
            dims=dims,
            labels=self.optional(data, "labels", self.strings),
            opsets=self.counts(data, "opsets"),
            ir_version=self.optional(data, "ir_version", self.integer),
            ops=self.counts(data, "ops"),
            custom_ops=tuple(self._custom_ops(data)),
            files=files,
            tools={k: self.text(v, f"tools.{k}") for k, v in self.get(data, "tools", dict).items()},
            calibration=self.optional(data, "calibration", self.text),
            verification=self.get(data, "verification", dict),
            decode=self.optional(given, "decode", lambda value, _: self._graph(value, roles, coreml)),
            generation=self.optional(given, "generation", lambda value, _: read_generation(self, value, roles)),
            coreml=coreml,
        )
        self._check_coreml(manifest)
        self._check_language_model(manifest)
        return manifest

    def _graph(self, value: object, roles: Mapping[str, str], coreml: CoreMLInfo | None) -> Graph:
        prefix = "decode."
        data = self.record(value, Graph, prefix)
        dims = self._dims(data, prefix)
        function = self.optional({"function": None, **data}, "function", self.text, prefix)
        if (function is None) != (coreml is None) or (coreml is not None and function not in coreml.functions):
            raise self.bad(f"{prefix}function", "a function of the package, for Core ML alone", function)
        return Graph(
            file=self._file_of(roles, "decode" if function is None else "model")(data["file"], f"{prefix}file"),
            inputs=self._tensors(data, "inputs", dims, prefix),
            outputs=self._tensors(data, "outputs", dims, prefix),
            dims=dims,
            ops=self.counts(data, "ops", prefix),
            custom_ops=tuple(self._custom_ops(data, prefix)),
            samples=self.optional(data, "samples", self._file_of(roles, "samples"), prefix),
            verification=self.get(data, "verification", dict, prefix),
            function=function,
        )

    def _check_coreml(self, manifest: Manifest) -> None:
        """A package names its image and the tensors of its states: they are there, or the manifest is refused."""
        info = manifest.coreml
        if (info is None) != (manifest.target != "coreml"):
            raise self.bad("coreml", "given for the target coreml, and for no other", None if info is None else "given")
        if info is None:
            return
        inputs, outputs = ([spec.name for spec in side] for side in (manifest.inputs, manifest.outputs))
        if info.image_input is not None and info.image_input not in inputs:
            raise self.bad("coreml.image_input", "the name of an input", info.image_input)
        for state in info.states:
            if state.input not in inputs or state.output not in outputs:
                names = f"{state.input}, {state.output}"
                raise self.bad("coreml.states", "a list of states whose input and output the manifest has", names)

    def _file_of(self, roles: Mapping[str, str], role: str) -> Callable[[Any, str], str]:
        """Reads the name of a listed file with this role."""

        def read(value: Any, path: str) -> str:
            if roles.get(self.text(value, path)) != role:
                raise self.bad(path, f"a listed file with the role {role!r}", value)
            return self.text(value, path)

        return read

    def _check_language_model(self, manifest: Manifest) -> None:
        """Whoever generates text asks both graphs for tensors by name: they are there, or the manifest is refused."""
        generation, decode = manifest.generation, manifest.decode
        if (generation is None) != (decode is None):
            missing = "generation" if generation is None else "decode"
            raise self.bad(missing, "given where the other of 'generation' and 'decode' is", None)
        if generation is None or decode is None:
            return
        for prefix, graph in (("", manifest), ("decode.", decode)):
            layers = min(generation.layers, len(graph.inputs))
            for side, names in tensor_names(layers, states=manifest.coreml is not None).items():
                found = {spec.name for spec in (graph.inputs if side == "inputs" else graph.outputs)}
                if missing_names := [name for name in names if name not in found]:
                    raise self.bad(prefix + side, f"a list with the tensor {missing_names[0]!r}", sorted(found))
            size = generation.tokenizer.vocab_size
            logits = next(spec for spec in graph.outputs if spec.name == "logits")
            if logits.shape[-1:] != (size,):
                raise self.bad("generation.tokenizer.vocab_size", f"the last size of {prefix}{logits}", size)

    def _dims(self, data: dict[str, Any], prefix: str = "") -> dict[str, DimRange]:
        return {
            name: self._dim_range(entry, f"{prefix}dims.{name}.")
            for name, entry in self.get(data, "dims", dict, prefix).items()
        }

    def _dim_range(self, entry: object, prefix: str) -> DimRange:
        data = self.record(entry, DimRange, prefix)
        low, high = self.count(data["min"], f"{prefix}min"), self.optional(data, "max", self.count, prefix)
        if high is not None and high < low:
            raise self.bad(f"{prefix}max", f"at least the min, {low}", high)
        values = self.optional({"values": None, **data}, "values", self._sizes, prefix)
        if values is not None and (low, high) != (values[0], values[-1]):
            raise self.bad(f"{prefix}values", f"a list of sizes from the min, {low}, to the max, {high}", list(values))
        return DimRange(low, high, values)

    def _sizes(self, values: Any, path: str) -> tuple[int, ...]:
        """At least two sizes in ascending order."""
        ordered = isinstance(values, list) and len(values) > 1 and all(type(item) is int for item in values)
        if not ordered or values != sorted(set(values)) or values[0] < 1:
            raise self.bad(path, "a list of at least two sizes in ascending order", values)
        return tuple(values)

    def _files(self, entries: dict[str, Any]) -> dict[str, FileEntry]:
        files = {name: self._file(name, entry) for name, entry in entries.items()}
        if sum(entry.role == "model" for entry in files.values()) != 1:
            raise self.bad("files", "an object with one file of the role 'model'", sorted(files))
        return files

    def _file(self, name: str, entry: object) -> FileEntry:
        if not safe_name(name):
            raise BundleError(
                f"{self.where}: the file name {short(name)} leaves the bundle's folder or is not portable; "
                "refusing to open it"
            )
        if name in (MANIFEST, REPORT):
            raise BundleError(f"{self.where}: {name} cannot be listed in 'files'; the bundle was edited")
        prefix = f"files.{name}."
        data = self.record(entry, FileEntry, prefix)
        role, digest = self.text(data["role"], f"{prefix}role"), self.text(data["sha256"], f"{prefix}sha256")
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise self.bad(f"{prefix}sha256", "64 hexadecimal digits", digest)
        return FileEntry(role, self.count(data["size"], f"{prefix}size"), digest)

    def _model(self, data: dict[str, Any]) -> ModelInfo:
        self.known(data, ModelInfo, "model.")
        weights = self.record(data["weights"], WeightsInfo, "model.weights.")
        return ModelInfo(
            source=self.text(data["source"], "model.source"),
            weights=WeightsInfo(
                source=self.text(weights["source"], "model.weights.source"),
                sha256=self.text(weights["sha256"], "model.weights.sha256"),
                seed=self.optional(weights, "seed", self.integer, "model.weights."),
                file=self.optional(weights, "file", self.text, "model.weights."),
            ),
            parameters=self.count(data["parameters"], "model.parameters"),
            macs=self.optional(data, "macs", self.count, "model."),
            options=self.get(data, "options", dict, "model."),
        )

    def _tensors(
        self, data: dict[str, Any], key: str, dims: dict[str, DimRange], prefix: str = ""
    ) -> tuple[TensorSpec, ...]:
        path = prefix + key
        entries = enumerate(self.get(data, key, list, prefix))
        # The sizes of outputs may be expressions, such as N + 1; those of inputs are names that have a range.
        specs = [self._tensor(entry, f"{path}[{i}].", dims if key == "inputs" else None) for i, entry in entries]
        names = [spec.name for spec in specs]
        if not specs or len(set(names)) < len(names):
            raise self.bad(path, "a list with at least one tensor, each with a name of its own", names)
        sizes = {dim for spec in specs for dim in spec.shape if isinstance(dim, str)} if key == "inputs" else set()
        for index, spec in enumerate(specs):
            if spec.index_of is not None and not points(spec, sizes):
                expected = "a number, a dimension of the inputs or a sum of them, for an input of integers"
                raise self.bad(f"{path}[{index}].index_of", expected, spec.index_of)
        return tuple(specs)

    def _tensor(self, entry: object, prefix: str, dims: dict[str, DimRange] | None) -> TensorSpec:
        data = self.record(entry, TensorSpec, prefix)
        dtype = self.text(data["dtype"], f"{prefix}dtype")
        if dtype not in DTYPES:
            raise self.bad(f"{prefix}dtype", f"one of {', '.join(DTYPES)}", dtype)
        shape = self.get(data, "shape", list, prefix)
        for dim in shape:
            if isinstance(dim, str) and (dims is None or dim in dims):
                continue
            if isinstance(dim, str):
                raise self.bad(f"{prefix}shape", "sizes and names listed in 'dims'", shape)
            self.count(dim, f"{prefix}shape")
        return TensorSpec(
            name=self.text(data["name"], f"{prefix}name"),
            dtype=dtype,
            shape=tuple(shape),
            layout=self.optional(data, "layout", self.text, prefix),
            preprocessing=self.optional(data, "preprocessing", self._preprocessing, prefix),
            index_of=self.optional({"index_of": None, **data}, "index_of", self.text, prefix),
        )

    def _preprocessing(self, recipe: Any, path: str) -> ImagePreprocessing:
        try:
            return ImagePreprocessing.from_json(recipe)
        except BundleError as error:
            raise BundleError(f"{self.where}: {path.removesuffix('preprocessing')}{error}") from error

    def _custom_ops(self, data: dict[str, Any], within: str = "") -> Iterator[CustomOp]:
        for index, entry in enumerate(self.get(data, "custom_ops", list, within)):
            prefix = f"{within}custom_ops[{index}]."
            item = self.record(entry, CustomOp, prefix)
            yield CustomOp(
                domain=self.text(item["domain"], f"{prefix}domain"),
                name=self.text(item["name"], f"{prefix}name"),
                version=self.count(item["version"], f"{prefix}version"),
                nodes=self.count(item["nodes"], f"{prefix}nodes"),
                kernels=self.strings(item["kernels"], f"{prefix}kernels"),
            )
