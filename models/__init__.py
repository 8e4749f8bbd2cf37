"""Architectures: one family per file, a registry of entry points, weights, and `fuse`.

Importing this package is cheap: torch loads on the first use of a name below.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgekit.errors import MissingDependencyError

if TYPE_CHECKING:
    from edgekit.models.complexity import count_macs, count_macs_per_token, count_parameters
    from edgekit.models.fusion import fuse
    from edgekit.models.registry import create_model, list_models, model_entry
    from edgekit.models.weights import load_weights, seed_weights, state_dict_sha256

_MODULES = {
    "count_macs": "complexity",
    "count_macs_per_token": "complexity",
    "count_parameters": "complexity",
    "create_model": "registry",
    "fuse": "fusion",
    "list_models": "registry",
    "load_weights": "weights",
    "model_entry": "registry",
    "seed_weights": "weights",
    "state_dict_sha256": "weights",
}

__all__ = [
    "count_macs",
    "count_macs_per_token",
    "count_parameters",
    "create_model",
    "fuse",
    "list_models",
    "load_weights",
    "model_entry",
    "seed_weights",
    "state_dict_sha256",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("torch", "export", f"edgekit.models.{name}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
