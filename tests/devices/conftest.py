"""The fixtures `make_bundle` and `tiny_bundle` of tests/runtime, here too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("tiny_bundles", Path(__file__).parents[1] / "runtime" / "conftest.py")
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

make_bundle, tiny_bundle = _module.make_bundle, _module.tiny_bundle
