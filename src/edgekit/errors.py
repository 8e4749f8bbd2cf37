"""The exceptions of edgekit: one tree, so that an application can catch `EdgekitError` and show its text.

Every message says what was expected, what arrived, and what to do next. This module imports nothing, so that each
part of the package, the torch-free runtime included, may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """Base of every error that edgekit raises on purpose. `str(error)` is meant for people."""

    exit_code = 2


class UnknownNameError(EdgekitError, ValueError):
    """A model, target, precision, device or data set whose name nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {', '.join(near)}?"
        else:
            hint = f"known: {', '.join(self.known)}" if self.known else "none is registered"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class WeightsError(EdgekitError, ValueError):
    """A weights file that cannot be read safely or does not fit the model."""


class ShapeError(EdgekitError, ValueError):
    """A shape that does not parse, or that does not fit the model."""


class InputError(EdgekitError, ValueError):
    """An input (array, image, data set) that the session or the preprocessing cannot take."""


class BundleError(EdgekitError, ValueError):
    """A bundle that is missing, truncated, edited, unsafe, or from a newer edgekit."""


class ExportError(EdgekitError, RuntimeError):
    """A model that could not be turned into an artifact. Nothing was written."""

    exit_code = 1


class NothingToCompareError(EdgekitError, RuntimeError):
    """A verification without anything to verify against."""


class MissingDependencyError(EdgekitError, ImportError):
    """An optional dependency that the call needs is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'edgekit[{extra}]'")
