"""Run `onnx` bundles in onnxruntime on the CPU, with native kernels for edgekit's own ops where they fit."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime

from edgekit.errors import BundleError, InputError
from edgekit.runtime import kernel_library
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.kernel_library import DOMAIN, Choice, KernelLibrary
from edgekit.runtime.manifest import TensorSpec
from edgekit.runtime.onnx_files import (
    CustomNode,
    adds_in_place,
    custom_nodes,
    external_data,
    mapped,
    weights_problem,
)
from edgekit.runtime.op_times import Event, node_times
from edgekit.runtime.session import Array, Session

GUARD = "edgekit: "
"""Names of nodes in function bodies that begin so are messages: see `edgekit.custom_ops.onnx_function`, which writes
them. The runtime imports nothing of edgekit's but itself, so a test holds both to be equal."""

MAPPED_FROM = 256 * 2**20
"""Bytes of fp32 weights from which on sessions leave them in their file: see `OnnxRuntimeSession`."""

_LOG = logging.getLogger("edgekit")
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

    def __init__(self, bundle: Bundle, *, threads: int | None = None, kernels: str | os.PathLike[str] = "auto") -> None:
        super().__init__(bundle, threads)
        start = time.perf_counter()
        self._nodes, one_thread = self._look_into_file()
        if one_thread and self.threads != 1:
            self.threads = 1
            self.threads_note = (
                "one thread: the model adds up rows with ScatterND, whose threads onnxruntime lets write the same row "
                "at once, which loses some of the sums"
            )
            _LOG.info("%s: %s", bundle.name, self.threads_note)
        self._library, self._session = self._create_with(kernels)
        self.load_seconds = time.perf_counter() - start
        self._output_names = [spec.name for spec in self.outputs]
        self._check_tensors("inputs", self.inputs, self._session.get_inputs())
        self._check_tensors("outputs", self.outputs, self._session.get_outputs())

    def _look_into_file(self) -> tuple[tuple[CustomNode, ...], bool]:
        """The nodes of our own ops, and whether only one thread computes the right answers (onnxruntime issue 18048).

        Refuses a model that would make onnxruntime read any file but its own and the bundle's weights.
        """
        name = self.bundle.manifest.model_file
        where = f"{self.bundle.path.name}/{name}"
        try:
            with mapped(self.bundle, name) as content:
                outside = external_data(content)
                nodes = custom_nodes(content, DOMAIN)
                one_thread = adds_in_place(content)
        except ValueError as error:  # BundleError says its own
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"{where} is no ONNX model: {error}; export it again") from error
        files = self.bundle.manifest.files
        self._weights = {file: entry.size for file, entry in files.items() if entry.role == "weights"}
        beside = {} if "/" in name else self._weights  # a location counts from the folder of the model
        for tensor in outside:
            problem = weights_problem(tensor, beside)
            if problem is not None:
                raise BundleError(
                    f"{where} keeps tensors in other files ({str(tensor)[:80]!r}), and {problem}; refusing to read "
                    "them. Export the model again"
                )
        self._outside = bool(outside)
        return nodes, one_thread

    def _create_with(
        self, kernels: str | os.PathLike[str]
    ) -> tuple[KernelLibrary | None, onnxruntime.InferenceSession]:
        """A session on the kernels asked for; sets `kernels` and `kernels_note`."""
        choice = Choice(None, "")
        if self._nodes or kernels not in ("auto", "portable"):  # else nothing is to be looked for
            host = kernel_library.this_host(onnxruntime.__version__)
            choice = kernel_library.choose(self._nodes, kernels, host, bundle=self.bundle.path)
        session = None
        if self._nodes and choice.library is not None:
            path = choice.library.path
            try:
                session = self._create(session_options(self.threads), choice.library)
            except BundleError as error:
                if kernels != "auto":
                    raise InputError(f"cannot use the kernels in {path}: {error}") from error
                choice = Choice(None, f"the kernels in {path} could not be used: {error}")
        self.kernels = choice.kernels(self._nodes)
        if self._nodes and choice.library is None and kernels == "auto":
            self.kernels_note = f"function bodies instead of native kernels: {choice.reason}"
            _LOG.info("%s: %s", self.bundle.name, self.kernels_note)
        if session is not None:
            return choice.library, session
        if bare := sorted({node.op for node in self._nodes if not node.has_body}):
            ops = ", ".join(f"{DOMAIN}::{op}" for op in bare)
            raise BundleError(
                f"{self.bundle.path.name} holds no function bodies for {ops}, so it needs native kernels; "
                f"{choice.reason}"
            )
        return None, self._create(session_options(self.threads), None)

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

    def _create(
        self, options: onnxruntime.SessionOptions, library: KernelLibrary | None
    ) -> onnxruntime.InferenceSession:
        name = self.bundle.manifest.model_file
        path = self.bundle.file(name)
        source: str | bytes = str(path) if path is not None else self.bundle.read(name)
        try:
            if library is not None:
                options.register_custom_ops_library(str(library.path))
            if self._outside:
                self._give_weights(options, packed=path is None)
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own per status code, none with a common base
            raise BundleError(
                f"onnxruntime {onnxruntime.__version__} cannot load {self.bundle.path.name}/{name}: {error}"
            ) from error

    def _give_weights(self, options: onnxruntime.SessionOptions, *, packed: bool) -> None:
        """Let a session read the weights that lie beside its model, with as few copies of them as it can.

        A session lays out the weights of its matrix products anew, for itself: two sessions hold them twice. Without
        that they stay mapped from the file, which all sessions share, and a product with many rows takes a tenth
        longer, one with several up to three times (one with one is faster). That pays where weights are large. Those
        of four bits must be laid out anew: their products take a hundred times longer otherwise.
        """
        if maps_weights(self.bundle):
            options.add_session_config_entry("session.disable_prepacking", "1")
        if packed:
            self._content = {file: self.bundle.read(file) for file in self._weights}  # must outlive the session
            give_weights(options, self._content)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            values = self._session.run(self._output_names, inputs)
        except Exception as error:  # see _create
            raise self._failed(error) from error
        return dict(zip(self._output_names, values, strict=True))

    @staticmethod
    def value(array: Array) -> onnxruntime.OrtValue:
        """A tensor for `run_values` on the memory of an array (C-contiguous): what is written there later, it holds."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def run_values(
        self, inputs: Mapping[str, onnxruntime.OrtValue], *, interruptible: bool = False
    ) -> dict[str, onnxruntime.OrtValue]:
        """Run on tensors that onnxruntime holds and leave the answers with it, for loops that feed answers back.

        Nothing is copied, and nothing is checked but what onnxruntime checks: the caller answers for names, dtypes,
        shapes and indices. Raises `InputError` where the run fails.

        Args:
            interruptible: for long runs: Ctrl-C ends the run at its next node, rather than after it. Costs a thread.
        """
        options = onnxruntime.RunOptions()
        try:
            if not interruptible:
                values = self._session.run_with_ort_values(self._output_names, inputs, options)
            else:
                with ThreadPoolExecutor(1) as pool:  # leaving the block waits for the run
                    try:
                        run = pool.submit(self._session.run_with_ort_values, self._output_names, inputs, options)
                        values = run.result()
                    except KeyboardInterrupt:
                        options.terminate = True
                        raise
        except Exception as error:  # see _create
            raise self._failed(error) from error
        return dict(zip(self._output_names, values, strict=True))

    def _failed(self, error: Exception) -> InputError:
        message = op_error(str(error), {node.op for node in self._nodes})
        return InputError(message or f"onnxruntime could not run {self.bundle.name}: {error}")

    def op_times(self, inputs: Mapping[str, Array], *, runs: int) -> list[dict[str, Any]]:
        """Time every node over `runs` runs in a separate, profiled session on the same kernels.

        Returns one entry per node of the optimized graph: see `edgekit.runtime.op_times.node_times`.
        """
        with tempfile.TemporaryDirectory(prefix="edgekit-profile-") as folder:
            options = session_options(self.threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "ort")
            session = self._create(options, self._library)
            for _ in range(runs):
                session.run(self._output_names, inputs)
            trace = Path(session.end_profiling()).read_text(encoding="utf-8")
        events = json.loads(trace, object_hook=_kept)
        timed = [
            Event(event["name"].removesuffix("_kernel_time"), event["args"]["op_name"], event["ts"], event["dur"])
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        ]
        return node_times(timed, {node.op for node in self._nodes}, DOMAIN)


def give_weights(options: onnxruntime.SessionOptions, contents: Mapping[str, bytes]) -> None:
    """Let a model in memory find its weights there too: contents by the names that it calls their files.

    They must stay as long as the session.
    """
    values = list(contents.values())
    options.add_external_initializers_from_files_in_memory(list(contents), values, list(map(len, values)))


def maps_weights(bundle: Bundle) -> bool:
    """Whether sessions leave this bundle's weights in their file: see `MAPPED_FROM`."""
    weights = sum(entry.size for entry in bundle.manifest.files.values() if entry.role == "weights")
    return bundle.manifest.precision == "fp32" and weights >= MAPPED_FROM


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    """The few fields of a trace that are read: the others would take several times the memory of the trace's text."""
    return {key: item[key] for key in ("cat", "name", "args", "op_name", "ts", "dur") if key in item}


def op_error(text: str, ops: set[str]) -> str | None:
    """The message of an op of ours in onnxruntime's account of a failed run; None where another node failed.

    A native kernel's message is the status; a function body has none, so its message is the name of its guard.
    """
    if match := re.search(rf"Name:'[^']*?{re.escape(GUARD)}(.*?)' Status Message: ", text, re.DOTALL):
        return match[1]
    names = "|".join(map(re.escape, sorted(ops)))
    match = re.search(rf"while running (?:{names}) node\. Name:'.*?' Status Message: (.+)", text, re.DOTALL)
    return match[1].strip() if match and names else None


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """onnxruntime's defaults (all graph optimizations, spinning threads), `threads` set.

    Its log is silenced: warnings are not for users of a finished model, and errors come as exceptions too.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options
