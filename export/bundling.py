"""What every export puts into a bundle, whatever the model: kernels, figures of the check, where it was made."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import edgekit
from edgekit.errors import InputError
from edgekit.export.source import LoadedModel
from edgekit.runtime.bundle import BundleWriter
from edgekit.runtime.manifest import CustomOp
from edgekit.runtime.verification import Check, finite


def add_kernels(
    writer: BundleWriter,
    name: str,
    archs: Sequence[str] | None,
    ops: Sequence[CustomOp],
    *,
    step: Callable[[str], None],
) -> None:
    """Put the kernels of the model's own ops into the bundle as objects and C sources, a folder per arch.

    Raises `InputError` for kernels of a model that uses none.
    """
    if not archs:
        return
    if not ops:
        raise InputError(f"{name} uses no ops of edgekit's own, so there are no kernels to put in; leave them out")
    from edgekit.kernels.static import write_static

    for arch in dict.fromkeys(archs):
        step(f"kernels for {arch}")
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            for path in write_static([op.name for op in ops], arch, Path(folder)):
                writer.add(f"kernels/{arch}/{path.name}", "kernels").write_bytes(path.read_bytes())


def with_figures(check: Check | None, tolerance: float | None) -> dict[str, Any]:
    """The manifest's `verification`: the figures of the check at export, and the tolerance where it is no usual one."""
    recorded = {} if tolerance is None else {"tolerance": float(tolerance)}
    if check is None:
        return {"checked": False, **recorded}
    outputs = [
        {"name": o.name, "max_abs": o.max_abs, "rel_l2": o.rel_l2, "cosine": o.cosine, "psnr_db": o.psnr_db,
         "top1_agreement": o.top1_agreement, "tolerance": o.tolerance}
        for o in check.outputs
    ]  # fmt: skip
    figures = {"checked": True, "against": check.against, "inputs": check.inputs, "outputs": outputs}
    figures |= recorded
    return finite(figures)  # type: ignore[no-any-return]


def metadata_of(loaded: LoadedModel, precision: str) -> dict[str, str]:
    """What an ONNX file says of its origin."""
    return {
        "edgekit": edgekit.__version__,
        "model": loaded.source,
        "weights_sha256": loaded.weights.sha256,
        "precision": precision,
    }


def tools() -> dict[str, str]:
    """The versions of what makes a bundle."""
    names = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "numpy")
    versions = {name: metadata.version(name) for name in names}
    return {"edgekit": edgekit.__version__, "python": platform.python_version(), **versions}
