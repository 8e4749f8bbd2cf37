"""Run `onnx` bundles in onnxruntime on the CPU."""

from __future__ import annotations

import contextlib
import json
import mmap
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from edgekit.errors import BundleError, InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.onnx_files import external_data
from edgekit.runtime.session import Array, Session

# onnxruntime's names of the dtypes that a manifest may list.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "uint8", "int16", "int32", "int64")},
}


class OnnxRuntimeSession(Session):
    """An onnxruntime `InferenceSession` behind the `Session` contract; see `edgekit.load`."""

    backend = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        start = time.perf_counter()
        self._check_files()
        self._session = self._create(session_options(threads))
        self.load_seconds = time.perf_counter() - start
        self._output_names = [spec.name for spec in self.outputs]
        self._check_tensors("inputs", self.inputs, self._session.get_inputs())
        self._check_tensors("outputs", self.outputs, self._session.get_outputs())

    def _check_files(self) -> None:
        """Refuse a model that would make onnxruntime read any file but its own."""
        name = self.bundle.manifest.model_file
        where = f"{self.bundle.path.name}/{name}"
        try:
            with _mapped(self.bundle, name) as content:
                outside = external_data(content)
        except ValueError as error:  # BundleError says its own
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{where} is no ONNX model: {error}; export it again") from error
        if outside:
            raise BundleError(
                f"{where} keeps tensors in other files ({outside[0][:80]!r}), which no bundle does; refusing to read "
                "them. Save the model in one file and export it again"
            )

    def _check_tensors(self, side: str, specs: tuple[TensorSpec, ...], nodes: Sequence[Any]) -> None:
        """Raise `BundleError` unless the model's tensors are those of the manifest: names, dtypes and fixed sizes."""
        where = f"the model of {self.bundle.path.name}"
        listed, declared = {spec.name: spec for spec in specs}, {node.name: node for node in nodes}
        if declared.keys() != listed.keys():
            raise BundleError(
                f"{where} has the {side} {sorted(declared)}, its manifest says {sorted(listed)}; export it again"
            )
        for name, node in declared.items():
            spec = listed[name]
            same_rank = not node.shape or len(node.shape) == len(spec.shape)  # [] stands for an unknown rank too
            sizes = zip(node.shape, spec.shape, strict=True) if node.shape and same_rank else ()
            differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes)
            if _DTYPES.get(node.type) != spec.dtype or not same_rank or differ:
                raise BundleError(
                    f"{where} has {name!r} as {node.type} {node.shape}, its manifest says {spec}; export it again"
                )

    def _create(self, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        name = self.bundle.manifest.model_file
        path = self.bundle.file(name)
        source: str | bytes = str(path) if path is not None else self.bundle.read(name)
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own per status code, none with a common base
            raise BundleError(
                f"onnxruntime {onnxruntime.__version__} cannot load {self.bundle.path.name}/{name}: {error}"
            ) from error

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(self._output_names, inputs)
        except Exception as error:  # see _create
            raise InputError(f"onnxruntime could not run {self.bundle.name}: {error}") from error
        return dict(zip(self._output_names, values, strict=True))

    def op_times(self, inputs: Mapping[str, Array], *, runs: int) -> list[dict[str, Any]]:
        """Time every node over `runs` runs in a separate, profiled session.

        Returns one entry per node of the optimized graph: `name`, `op`, `microseconds` (a list, one per run).
        """
        with tempfile.TemporaryDirectory(prefix="edgekit-profile-") as folder:
            options = session_options(self.threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ort")
            session = self._create(options)
            for _ in range(runs):
                session.run(self._output_names, inputs)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        nodes: dict[str, dict[str, Any]] = {}
        for event in events:
            if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
                continue
            name = event["name"].removesuffix("_kernel_time")
            node = nodes.setdefault(name, {"name": name, "op": event["args"]["op_name"], "microseconds": []})
            node["microseconds"].append(float(event["dur"]))
        return list(nodes.values())


@contextlib.contextmanager
def _mapped(bundle: Bundle, name: str) -> Iterator[memoryview]:
    """The bytes of a file: of a folder's as the system pages them in, so that they take no memory of their own."""
    path = bundle.file(name)
    if path is None or path.stat().st_size == 0:  # an empty file cannot be mapped
        yield memoryview(bundle.read(name))
        return
    with path.open("rb") as stream:
        # Not closed here: slices may be alive in the traceback of an error. It closes with the last of them.
        yield memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """onnxruntime's defaults (all graph optimizations, spinning threads), warnings silenced, `threads` set."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options
