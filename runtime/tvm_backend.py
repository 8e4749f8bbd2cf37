"""Run `tvm` bundles: native code for one kind of processor, loaded only when the caller asks for it."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.errors import BundleError, InputError, MissingDependencyError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.kernel_library import DOMAIN, NodeKernel, this_host
from edgekit.runtime.session import Array, Session
from edgekit.runtime.system import this_machine

if TYPE_CHECKING:
    from edgekit.runtime.kernel_library import Host

BUILD = "build.json"
_SCHEMA = 1
_NO_ACTION = 0  # an instrument's answer: go on
_ALL_THREADS_ON_ALL_CORES = -3  # TVM's affinity mode that pins no thread to one core

# TVM has one thread pool per thread that runs a model; this is the size that each was given last.
_pools = threading.local()


class TvmSession(Session):
    """A library made by TVM behind the `Session` contract; see `edgekit.load`. One run at a time: calls wait."""

    backend = "tvm-cpu"

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        description = read_build(bundle)
        check_host(description, this_host(), bundle.name)
        self.kernels = tuple(
            NodeKernel(entry["node"], f"{DOMAIN}::{entry['op']}", f"tvm {description['arch']}", entry["symbol"])
            for entry in description["kernels"]
        )
        self._tvm = import_tvm()
        self._pool_size = threads or _default_threads()
        self._lock = threading.Lock()
        start = time.perf_counter()
        self._machine = self._load()
        self.load_seconds = time.perf_counter() - start
        self._main = self._machine["main"]

    def _load(self) -> Any:
        import tvm_ffi
        from tvm import relax

        name = self.bundle.manifest.model_file
        path = self.bundle.file(name)
        try:
            # The system loads libraries from files alone, and takes a name that it has loaded before for the same file
            # although another export has replaced it: hence a name of its own, needed only while loading.
            with tempfile.TemporaryDirectory(prefix="edgekit-tvm-") as folder:
                place = Path(folder) / "model.so"
                if path is not None:
                    place.symlink_to(path.resolve())
                else:
                    place.write_bytes(self.bundle.read(name))
                library = tvm_ffi.load_module(str(place))  # tvm.runtime's takes the name behind a link
            return relax.VirtualMachine(library, self._tvm.cpu())
        except Exception as error:  # TVM raises built-in errors of several kinds
            raise BundleError(
                f"TVM {self._tvm.__version__} cannot load {self.bundle.path.name}/{name}: {_first_line(error)}; a "
                "library runs with the version of TVM that made it (see the manifest's tools)"
            ) from error

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        arguments = [self._tvm.runtime.tensor(np.ascontiguousarray(inputs[spec.name])) for spec in self.inputs]
        with self._lock:
            resize_pool(self._pool_size)
            try:
                values = self._main(*arguments)
            except Exception as error:  # see _load
                raise InputError(run_error(str(error), self.kernels, self.bundle.name)) from error
            outputs = [values[index].numpy() for index in range(len(self.outputs))]
        return {spec.name: array for spec, array in zip(self.outputs, outputs, strict=True)}

    def op_times(self, inputs: Mapping[str, Array], *, runs: int) -> list[dict[str, Any]]:
        """Time every call of a function of the library over `runs` runs, with a second machine.

        Returns one entry per call in a run: `name`, `op` (the operators fused in it), `microseconds` (one per run).
        """
        arguments = [self._tvm.runtime.tensor(np.ascontiguousarray(inputs[spec.name])) for spec in self.inputs]
        nodes: dict[tuple[str, int], dict[str, Any]] = {}
        calls: Counter[str] = Counter()
        starts: list[float] = []

        def instrument(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> int:
            if before:
                starts.append(time.perf_counter())
                return _NO_ACTION
            microseconds = 1e6 * (time.perf_counter() - starts.pop())
            node = nodes.setdefault((name, calls[name]), {"name": name, "op": _op(name), "microseconds": []})
            calls[name] += 1
            node["microseconds"].append(microseconds)
            return _NO_ACTION

        machine = self._load()
        machine.set_instrument(instrument)
        main = machine["main"]
        resize_pool(self._pool_size)
        for _ in range(runs):
            calls.clear()
            main(*arguments)
        return list(nodes.values())


def run_error(text: str, kernels: Sequence[NodeKernel], name: str) -> str:
    """What to say of a failed run of the bundle `name`, given TVM's account of it.

    A check of ours in the library says what one of our ops needs; a kernel called with shapes that do not fit names
    itself, and the two sizes in question.
    """
    first, *_, last = (text.strip() or "no reason given").splitlines() * 2
    ops = {use.reason: use.op.removeprefix(f"{DOMAIN}::") for use in kernels}
    if first.startswith(tuple(f"{op} " for op in ops.values())):
        return first
    called = re.search(r" when calling:\s+`(\w+)\(", text)
    if not called:
        return f"TVM could not run {name}: {first}"
    problem = f"{first.removesuffix(' when calling:')}, {last.strip()}"
    if op := ops.get(called[1]):
        return f"{op} got tensors that do not fit together: {problem}"
    return f"TVM could not run {name}: {problem}, in {called[1]}"


def resize_pool(size: int) -> None:
    """Give the calling thread's pool `size` threads, at most one per core; other sessions may have set another size.

    TVM fixes the most that a pool can grow to when something first runs in that thread, by default at half of the
    logical cores; so this must come first.
    """
    if getattr(_pools, "size", None) == size:
        return
    affinity = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)
    configure = import_tvm().get_global_func("runtime.config_threadpool")
    configure(_ALL_THREADS_ON_ALL_CORES, size, [str(core) for core in cores])
    _pools.size = size


def _default_threads() -> int:
    machine = this_machine()
    return min((cores for cores in (machine.cores_physical, machine.cores_usable) if cores), default=1)


def read_build(bundle: Bundle) -> dict[str, Any]:
    """What the library of a tvm bundle needs of a machine. Raises `BundleError` where `build.json` is not right."""
    where = f"{bundle.path.name}/{BUILD}"
    try:
        data = json.loads(bundle.read(BUILD))
        if data["schema"] != _SCHEMA:
            raise BundleError(f"{where} has schema {data['schema']}, this edgekit reads {_SCHEMA}; upgrade edgekit")
        for key in ("arch", "machine", "system"):
            if not isinstance(data[key], str):
                raise ValueError(f"{key} is no text")
        for entry in data["kernels"]:
            if not all(isinstance(entry[key], str) for key in ("node", "op", "symbol")):
                raise ValueError("a kernel's node, op and symbol must be texts")
        data["features"] = [str(feature) for feature in data["features"]]
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{where} is damaged ({error}); export the bundle again") from error
    return data  # type: ignore[no-any-return]


def check_host(description: Mapping[str, Any], host: Host, name: str) -> None:
    """Raise `BundleError` unless code built so runs on this host: it would end the process otherwise."""
    again = "export it again on, or with --arch for, this machine"
    if (description["machine"], description["system"]) != (host.machine, host.system):
        raise BundleError(
            f"{name} holds code for {description['machine']} {description['system']}, this is {host.machine} "
            f"{host.system}; {again}"
        )
    if missing := [feature for feature in description["features"] if feature not in host.features]:
        raise BundleError(
            f"{name} holds code for {description['arch']}, this processor lacks {', '.join(missing)}; {again}"
        )


def import_tvm() -> Any:
    """TVM's module. Raises `MissingDependencyError` where it is not installed."""
    try:
        import tvm
    except ImportError as error:
        raise MissingDependencyError("apache-tvm", "tvm", "running a tvm bundle") from error
    return tvm


def _op(name: str) -> str:
    """The operators of a function: `conv2d_add_relu` for `fused_conv2d13_add11_relu7`; kernels of ours as they are."""
    if name.startswith("edgekit_"):
        return name
    words = name.removeprefix("fused_").split("_")
    return "_".join(re.sub(r"^(conv[123]d|[a-z]+)\d*$", r"\1", word) for word in words)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
