"""The script `check_on_mac.py` in every Core ML bundle: what can be known on a Mac alone, written back into the bundle.

The script is a module beside this one, so that it is checked and tested as the rest; it goes into the bundle as text
with two constants filled in. `edgekit.runtime.mac_report` reads what it wrote.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import edgekit
from edgekit.errors import ExportError
from edgekit.runtime.tolerances import output_tolerance

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.runtime.bundle import BundleWriter
    from edgekit.runtime.manifest import Manifest

SCRIPT = "check_on_mac.py"
ROLE = "tool"


def write_check(writer: BundleWriter, manifest: Manifest, *, tolerance: float | None = None) -> Path:
    """Write the script into a bundle, with the role `tool`.

    Args:
        tolerance: the largest relative L2 error that passes; None: that of the manifest's precision.

    Raises:
        ExportError: the manifest is not that of a Core ML package.
    """
    if manifest.coreml is None:
        raise ExportError(f"{manifest.name} is no Core ML package, so there is nothing to check on a Mac")
    if tolerance is None:
        tolerance = output_tolerance(manifest.precision, manifest.target)
    content = (resources.files("edgekit.export") / SCRIPT).read_text(encoding="utf-8")
    for empty, filled in (
        ('\nEDGEKIT = ""', f"\nEDGEKIT = {edgekit.__version__!r}"),
        ("\nTOLERANCE = 0.0", f"\nTOLERANCE = {float(tolerance)!r}"),
    ):
        if content.count(empty) != 1:
            raise ExportError(f"{SCRIPT} has no line {empty.strip()!r} to fill in; this is a fault of edgekit's")
        content = content.replace(empty, filled)
    path = writer.add(SCRIPT, ROLE)
    path.write_text(content, encoding="utf-8")
    return path
