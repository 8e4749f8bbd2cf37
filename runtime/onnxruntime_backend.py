"""Run `onnx` bundles in onnxruntime on the CPU."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime

from edgekit.errors import BundleError, InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.session import Array, Session


class OnnxRuntimeSession(Session):
    """An onnxruntime `InferenceSession` behind the `Session` contract; see `edgekit.load`."""

    backend = "onnxruntime-cpu"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        start = time.perf_counter()
        self._session = self._create(session_options(threads))
        self.load_seconds = time.perf_counter() - start
        self._output_names = [spec.name for spec in self.outputs]
        declared = {item.name for item in self._session.get_inputs()}, {o.name for o in self._session.get_outputs()}
        listed = {spec.name for spec in self.inputs}, set(self._output_names)
        if declared != listed:
            raise BundleError(
                f"the model of {bundle.path.name} has inputs {sorted(declared[0])} and outputs {sorted(declared[1])}, "
                f"its manifest says {sorted(listed[0])} and {sorted(listed[1])}; export it again"
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


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """onnxruntime's defaults (all graph optimizations, spinning threads), warnings silenced, `threads` set."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options
