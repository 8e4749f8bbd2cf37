"""Run `coreml` bundles without Apple's runtime: the package's program, op by op, in numpy. Made to be right, not fast.

It says what a package computes by the documented meaning of its ops, and what rounding to fp16 does to it. It says
nothing of how long a device takes, nor which exact bits its kernels give; see `edgekit.runtime.mil.interpreter`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from edgekit.errors import BundleError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import PACKAGE, StateSpec
from edgekit.runtime.mil import MilInterpreter, load_program
from edgekit.runtime.session import Array, Session

if TYPE_CHECKING:
    from edgekit.runtime.mil.interpreter import Trace
    from edgekit.runtime.storage import Storage

# Backend names and the interpreter's mode of each.
BACKENDS = {"coreml-reference": "typed", "coreml-reference-fp32": "fp32", "coreml-reference-fp16sum": "fp16sum"}


class CoreMLReferenceSession(Session):
    """A package's function behind the `Session` contract; see `edgekit.load`.

    A stateful function is a pure one here: what the manifest calls the inputs of its states is put into them before a
    run, and the outputs are read from them after it.

    Attributes:
        interpreter: what runs it; its `program` is the package's.
    """

    def __init__(self, bundle: Bundle, *, backend: str = "coreml-reference", threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        self.backend = backend
        start = time.perf_counter()
        info = bundle.manifest.coreml
        if info is None:
            raise BundleError(f"{bundle.path.name} says nothing of its Core ML package; export it again")
        self._package = _Package.of(bundle)
        program = self._package.program
        if info.function not in program.functions:
            raise BundleError(
                f"{bundle.path.name} names the function {info.function!r}; its package has "
                f"{', '.join(program.functions)}; export it again"
            )
        self.interpreter = MilInterpreter(program, info.function, numerics=BACKENDS[backend])
        self._state_of: tuple[StateSpec, ...] = info.states
        self._check()
        self.load_seconds = time.perf_counter() - start

    def _check(self) -> None:
        """Raise `BundleError` where the manifest names tensors or states that the package has not."""
        states = {state.name for state in self._state_of}
        for what, named, found in (
            ("inputs", self._names("input", self.inputs), {value.name for value in self.interpreter.inputs}),
            ("states", states, {value.name for value in self.interpreter.states}),
        ):
            if named != found:
                raise BundleError(
                    f"the manifest of {self.bundle.path.name} names the {what} {', '.join(sorted(named)) or 'none'}; "
                    f"its package has {', '.join(sorted(found)) or 'none'}; export it again"
                )
        missing = self._names("output", self.outputs) - {value.name for value in self.interpreter.outputs}
        if missing:
            raise BundleError(f"the package of {self.bundle.path.name} has no output {min(missing)!r}; export it again")

    def _names(self, side: str, specs: tuple[Any, ...]) -> set[str]:
        return {spec.name for spec in specs} - {getattr(state, side) for state in self._state_of}

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.run_traced(inputs, None)

    def run_traced(self, inputs: Mapping[str, Array], trace: Trace | None) -> dict[str, Array]:
        """As `run`, on inputs that fit the manifest, with a look at every op; see `MilInterpreter.run`."""
        given = dict(inputs)
        states = {state.name: given.pop(state.input) for state in self._state_of}
        results = self.interpreter.run(given, states, trace=trace)
        results |= {state.output: states[state.name] for state in self._state_of}
        return {spec.name: np.asarray(results[spec.name]).astype(spec.dtype, copy=False) for spec in self.outputs}


class _Package:
    """A bundle's package, read once for the sessions of all its functions, which so share their weights.

    What was unpacked is removed with the last of them.
    """

    _open: ClassVar[weakref.WeakValueDictionary[Storage, _Package]] = weakref.WeakValueDictionary()

    def __init__(self, bundle: Bundle) -> None:
        package, folder = unpacked(bundle)
        if folder is not None:  # weights are mapped from there
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.program = load_program(package)

    @classmethod
    def of(cls, bundle: Bundle) -> _Package:
        """That of the open sessions on the same files, or a new one."""
        found = cls._open.get(bundle._storage)
        if found is None:
            found = cls._open[bundle._storage] = cls(bundle)
        return found


def unpacked(bundle: Bundle) -> tuple[Path, Path | None]:
    """The package as a folder: (its path, the temporary folder to remove afterwards or None).

    Raises `BundleError` where the bundle lists no package.
    """
    names = [name for name in bundle.manifest.files if name.startswith(f"{PACKAGE}/")]
    if not names:
        raise BundleError(f"{bundle.path.name} holds no {PACKAGE}; export it again")
    if not bundle.packed:
        return bundle.path / PACKAGE, None
    folder = Path(tempfile.mkdtemp(prefix="edgekit-coreml-"))
    try:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bundle.read(name))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / PACKAGE, folder
