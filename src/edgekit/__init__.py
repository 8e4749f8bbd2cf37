"""edgekit takes PyTorch models to phones and Jetsons, and proves that they arrived.

    bundle = edgekit.export("shvit_s1", "onnx", "out")
    assert edgekit.verify(bundle)
    print(edgekit.profile(bundle).latency_ms.p50)
    edgekit.load(bundle).predict("photo.jpg")
    edgekit.generate("dhsa_bytes-onnx.edge", "A list is").text

Importing edgekit loads neither torch nor onnxruntime; each name below loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from edgekit.devices import profile as profile
    from edgekit.errors import EdgekitError as EdgekitError
    from edgekit.export import export as export
    from edgekit.export.lint import lint as lint
    from edgekit.export.verification import verify as verify
    from edgekit.models import create_model as create_model
    from edgekit.models import fuse as fuse
    from edgekit.models import list_models as list_models
    from edgekit.runtime.bundle import Bundle as Bundle
    from edgekit.runtime.generation import Generator as Generator
    from edgekit.runtime.generation import generate as generate
    from edgekit.runtime.generation import load_generator as load_generator
    from edgekit.runtime.session import Session as Session
    from edgekit.runtime.session import load as load

_HOMES = {
    "Bundle": "edgekit.runtime.bundle",
    "EdgekitError": "edgekit.errors",
    "Generator": "edgekit.runtime.generation",
    "Session": "edgekit.runtime.session",
    "create_model": "edgekit.models",
    "fuse": "edgekit.models",
    "generate": "edgekit.runtime.generation",
    "lint": "edgekit.export.lint",
    "list_models": "edgekit.models",
    "load": "edgekit.runtime.session",
    "load_generator": "edgekit.runtime.generation",
    "profile": "edgekit.devices",
    "verify": "edgekit.export.verification",
}

__all__ = [
    "Bundle",
    "EdgekitError",
    "Generator",
    "Session",
    "__version__",
    "create_model",
    "export",
    "fuse",
    "generate",
    "lint",
    "list_models",
    "load",
    "load_generator",
    "profile",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "export":  # the package of that name, which can be called
        return importlib.import_module("edgekit.export")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'edgekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
