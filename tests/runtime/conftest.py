"""Core ML packages made by hand: MIL functions written with coremltools' builder, one package for many of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

VERSIONS = {"iOS15": 6, "iOS16": 7, "iOS17": 8, "iOS18": 9}
WritePackage = Callable[..., Path]


@pytest.fixture(scope="session")
def write_package(tmp_path_factory: pytest.TempPathFactory) -> WritePackage:
    """`write_package({name: (specs, build)}, opset)`: a package with a function for each entry.

    `specs` maps inputs to (dtype, shape) or (dtype, shape, "state"), with None for a size known at run time;
    `build(mb, **inputs)` makes the ops and returns the outputs. No pass runs over them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ct = pytest.importorskip("coremltools", reason="the coreml extra is not installed")
        from coremltools import proto
        from coremltools.converters.mil.backend.mil.load import MILProtoExporter
        from coremltools.converters.mil.mil import Builder, Function, Placeholder, Program, get_new_symbol, types
        from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    def placeholder(name: str, dtype: str, shape: tuple[int | None, ...], kind: str = "tensor") -> Any:
        sizes = [get_new_symbol() if size is None else size for size in shape]
        made = {"tensor": Placeholder, "state": StateTensorPlaceholder}[kind]
        return made(sym_shape=sizes, dtype=getattr(types, dtype), name=name)

    def write(functions: Mapping[str, tuple[Mapping[str, tuple[Any, ...]], Callable[..., Any]]], opset: str) -> Path:
        package = tmp_path_factory.mktemp("package") / "model.mlpackage"
        folder = package / "Data" / "com.apple.CoreML"
        weights = folder / "weights"
        weights.mkdir(parents=True)
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            program = Program()
            for function_name, (specs, build) in functions.items():
                inputs = {name: placeholder(name, *spec) for name, spec in specs.items()}
                with Function(inputs, opset_version=getattr(ct.target, opset)) as function:
                    outputs = build(Builder, **function.inputs)
                    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
                    function.set_outputs(outputs)
                program.add_function(function_name, function)
            program.skip_all_passes = True
            spec = proto.Model_pb2.Model()
            spec.specificationVersion = VERSIONS[opset]
            exporter = MILProtoExporter(program, str(weights), VERSIONS[opset])
            spec.mlProgram.CopyFrom(exporter.export())
        (folder / "model.mlmodel").write_bytes(spec.SerializeToString())
        entries = {"M": {"path": "com.apple.CoreML/model.mlmodel"}, "W": {"path": "com.apple.CoreML/weights"}}
        (package / "Manifest.json").write_text(
            json.dumps({"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": "M"})
        )
        return package

    return write
