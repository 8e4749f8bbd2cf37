"""Sessions: numpy in, numpy out, whatever runs underneath.

`load` opens a bundle and picks the backend that fits its target. A backend is one file with a subclass of `Session`.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError, UnknownNameError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.kernel_library import NodeKernel
from edgekit.runtime.manifest import DimRange, TensorSpec
from edgekit.runtime.postprocess import Prediction, top_k

Array = NDArray[Any]


class Session(ABC):
    """A loaded model. `run` takes and gives arrays by name; `predict` goes from an image to labels.

    Attributes:
        bundle: where it came from.
        inputs, outputs: the tensors, with dtypes and shapes.
        backend: what runs it, such as `onnxruntime-cpu`.
        threads: how many threads one run may use; None leaves it to the backend (its default: one per physical core).
        load_seconds: the time that loading took.
        kernels: what serves each node of edgekit's own ops; empty where the model has none.
        kernels_note: why function bodies serve them although native kernels were wanted; empty otherwise.
        threads_note: why one run uses fewer threads than asked for; empty otherwise.
    """

    backend: str

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.bundle = bundle
        self.threads = threads
        self.inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.manifest.outputs
        self.load_seconds = 0.0
        self.kernels: tuple[NodeKernel, ...] = ()
        self.kernels_note = ""
        self.threads_note = ""
        self._specs = {spec.name: (spec, np.dtype(spec.dtype)) for spec in self.inputs}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises `InputError` where a name, dtype or shape is not what the manifest says."""
        check_inputs(self._specs, inputs, self.bundle.manifest.dims)
        return self._run(inputs)

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run on inputs that were checked."""

    def predict(self, image: Array | str | os.PathLike[str], *, k: int = 5) -> list[Prediction]:
        """The k likeliest classes of one image: a path, or uint8 `[H, W]`, `[H, W, 3]` (RGB), `[H, W, 4]`.

        Uses the bundle's own preprocessing and labels. Raises `InputError` where the bundle takes no image or gives
        no class scores.
        """
        spec = self.inputs[0]
        if spec.preprocessing is None or len(self.inputs) != 1:
            raise InputError(
                f"{self.bundle.name} has no image preprocessing in its manifest; run it on arrays with run({{...}}), "
                f"it takes {', '.join(map(str, self.inputs))}"
            )
        outputs = self.run({spec.name: spec.preprocessing(image)})
        scores = outputs[self.outputs[0].name]
        if scores.ndim != 2:
            raise InputError(f"{self.bundle.name} gives {self.outputs[0]}, which is no vector of class scores")
        return top_k(scores[0], k, self.bundle.manifest.labels)

    def random_inputs(self, *, seed: int = 0, sizes: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Seeded inputs of the manifest's shapes: see `edgekit.runtime.session.random_inputs`."""
        return random_inputs(self.inputs, self.bundle.manifest.dims, seed=seed, sizes=sizes)


def load(
    bundle: str | os.PathLike[str] | Bundle,
    *,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
) -> Session:
    """Load a bundle for running. Needs numpy and the backend alone, never torch.

    Args:
        bundle: a bundle's folder or packed file, or an opened `Bundle`.
        backend: `onnxruntime` for onnx bundles, `tvm` for tvm bundles, `coreml` (on a Mac) or `coreml-reference` for
            coreml bundles; `coreml-reference-fp32` and `-fp16sum` change how the reference rounds and sums (see
            `edgekit.runtime.mil.interpreter`). None takes onnxruntime, for a coreml bundle `coreml` on macOS and
            `coreml-reference` elsewhere; a tvm bundle is native code, which runs only where it is asked for by name.
        threads: threads for one run; None leaves it to the backend.
        kernels: for models with ops of edgekit's own. `auto` uses the native kernels that `edgekit kernels build` made
            where they fit this machine, else the function bodies in the model, and says why in `kernels_note`;
            `portable` always uses the bodies; a path names the library to use, or its folder. A tvm bundle has its
            kernels in its library and a coreml bundle has none: `auto` and `portable` say nothing there, and a path is
            refused.

    Raises:
        BundleError: the bundle is damaged, unsafe or newer than this edgekit.
        InputError: fewer than one thread, kernels at a path that do not fit, or a backend that cannot run the bundle.
        UnknownNameError: no such backend.
        MissingDependencyError: the backend's library is not installed.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads must be at least 1, got {threads!r}")
    opened = Bundle.open(bundle)
    chosen = _choose_backend(opened, backend)
    if chosen == "onnxruntime":
        from edgekit.runtime.onnxruntime_backend import OnnxRuntimeSession

        return OnnxRuntimeSession(opened, threads=threads, kernels=kernels)
    if kernels not in ("auto", "portable"):
        why = "has its kernels in its library and" if chosen == "tvm" else "has no nodes for native kernels and"
        raise InputError(
            f"{opened.name} {why} cannot take those at {os.fspath(kernels)!r}; leave kernels at 'auto' for a "
            f"{opened.manifest.target} bundle"
        )
    if chosen == "tvm":
        from edgekit.runtime.tvm_backend import TvmSession

        return TvmSession(opened, threads=threads)
    if chosen == "coreml":
        from edgekit.runtime.coreml_backend import CoreMLSession

        return CoreMLSession(opened, threads=threads)
    from edgekit.runtime.coreml_reference import CoreMLReferenceSession

    return CoreMLReferenceSession(opened, backend=chosen, threads=threads)


# The backends of each target.
_BACKENDS = {
    "onnx": ("onnxruntime",),
    "tvm": ("tvm",),
    "coreml": ("coreml", "coreml-reference", "coreml-reference-fp32", "coreml-reference-fp16sum"),
}


def backend_for(bundle: Bundle, backend: str | None) -> str | None:
    """`backend` where it runs bundles of this target, else None: one that was asked for serves one side of a pair."""
    _check_known(backend)
    return backend if backend in _BACKENDS.get(bundle.manifest.target, ()) else None


def refuse_timing(session: Session) -> None:
    """Raise `InputError` for a session whose time says nothing of a device."""
    if session.backend.startswith("coreml-reference"):
        raise InputError(
            f"the reference runtime's time says nothing of a device; to time {session.bundle.name}, copy it to a Mac "
            "and run its check_on_mac.py, or profile it there with --backend coreml"
        )


def _check_known(backend: str | None) -> None:
    known = [name for names in _BACKENDS.values() for name in names]
    if backend is not None and backend not in known:
        raise UnknownNameError("backend", str(backend), known)


def _choose_backend(bundle: Bundle, backend: str | None) -> str:
    """What runs this bundle: `backend`, or its target's own where that is None. Raises where there is none."""
    target = bundle.manifest.target
    _check_known(backend)
    if target not in _BACKENDS:
        raise UnknownNameError("target (of this bundle)", target, _BACKENDS)
    fitting = _BACKENDS[target]
    if backend in fitting:
        return backend
    if backend is not None:
        raise InputError(
            f"the backend {backend} cannot run {bundle.name}, a bundle for {target}; it takes {' or '.join(fitting)}"
        )
    if target == "tvm":
        raise InputError(
            f"{bundle.name} holds native code, which runs only where it is asked for. If you trust where it came from: "
            f"edgekit.load(bundle, backend={fitting[0]!r}), on the command line --backend {fitting[0]}"
        )
    return "coreml-reference" if target == "coreml" and sys.platform != "darwin" else fitting[0]


def check_inputs(
    specs: Mapping[str, tuple[TensorSpec, np.dtype[Any]]], inputs: Mapping[str, Array], dims: Mapping[str, DimRange]
) -> None:
    """Raise `InputError` unless `inputs` has exactly the specified names, dtypes, shapes and, for indices, values."""
    try:
        named = inputs.keys() == specs.keys()
    except AttributeError:  # asking first would cost every run more than all other checks
        name = next(iter(specs))
        raise InputError(f"expected inputs by name, such as {{{name!r}: array}}; got {type(inputs).__name__}") from None
    if not named:
        wanted = ", ".join(str(spec) for spec, _ in specs.values())
        raise InputError(f"expected the inputs {wanted}; got {', '.join(map(repr, inputs)) or 'none'}")
    sizes: dict[str, int] = {}
    indices: list[TensorSpec] = []
    for name, (spec, dtype) in specs.items():
        array = inputs[name]
        if not isinstance(array, np.ndarray):
            raise InputError(f"input {spec} must be a numpy array, got {type(array).__name__}; use numpy.asarray")
        if array.dtype != dtype:
            raise InputError(f"input {spec} got dtype {array.dtype}; use array.astype(numpy.{spec.dtype})")
        if array.ndim != len(spec.shape):
            raise InputError(f"input {spec} got an array of shape {list(array.shape)}: {array.ndim} axes")
        for size, dim in zip(array.shape, spec.shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(f"input {spec} got an array of shape {list(array.shape)}")
            elif sizes.setdefault(dim, size) != size:
                raise InputError(f"dimension {dim} is {sizes[dim]} in one place and {size} in {spec}")
            elif size not in dims[dim]:
                raise InputError(f"input {spec} got {dim}={size}; this bundle was exported for {dim} in {dims[dim]}")
        if spec.index_of is not None:
            indices.append(spec)
    for spec in indices:  # after all shapes: an index may point into a dimension of a later input
        _check_indices(spec, inputs[spec.name], sizes)


def _check_indices(spec: TensorSpec, array: Array, sizes: Mapping[str, int]) -> None:
    """Raise `InputError` where a value lies outside 0..limit-1: a runtime may read past a tensor's end for it."""
    limit = spec.index_limit(sizes)
    if limit is None or not array.size or (array.min() >= 0 and array.max() < limit):
        return
    worst = int(array.argmin() if array.min() < 0 else array.argmax())
    position = [int(index) for index in np.unravel_index(worst, array.shape)]
    known = "" if spec.index_of == str(limit) else f" ({spec.index_of} is {limit})"
    raise InputError(
        f"input {spec} holds {array.flat[worst]} at {position}; its values are indices from 0 to {limit - 1}{known}"
    )


def random_inputs(
    specs: tuple[TensorSpec, ...],
    dims: Mapping[str, DimRange],
    *,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Seeded inputs for `specs`: standard normal floats, indices from all they may be, other integers from 0 and 1.

    Args:
        sizes: values of symbolic dimensions; the others take their smallest value (at least 1).
    """
    generator = np.random.default_rng(seed)
    chosen = {name: max(1, limits.min) for name, limits in dims.items()} | dict(sizes or {})
    for name, size in chosen.items():
        if name not in dims:
            raise InputError(f"unknown dimension {name!r}; this bundle has {', '.join(dims) or 'fixed shapes only'}")
        if not isinstance(size, int | np.integer):
            raise InputError(f"the size of {name} must be an integer, got {size!r}")
        if size not in dims[name]:
            raise InputError(f"{name}={size} is outside {dims[name]}, the range this bundle was exported for")
    try:
        return {spec.name: _draw(generator, spec, chosen) for spec in specs}
    except (ValueError, MemoryError) as error:  # numpy's words for an array that no memory holds
        raise InputError(
            f"cannot make inputs of {', '.join(map(str, specs))}: {error}; choose smaller sizes"
        ) from error


def _draw(generator: np.random.Generator, spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    if spec.dtype.startswith("float"):
        return generator.standard_normal(shape, dtype=np.float32).astype(spec.dtype)
    levels = spec.preprocessing is not None and spec.preprocessing.pixels
    limit = 256 if levels else spec.index_limit(sizes)
    if limit is None:
        return generator.integers(0, 2, shape).astype(spec.dtype)
    return generator.integers(0, min(limit, int(np.iinfo(spec.dtype).max) + 1), shape).astype(spec.dtype)
