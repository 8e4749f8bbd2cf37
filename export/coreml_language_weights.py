"""Weights of few bits in a language model's package: which stay as they are, and what the others stand for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit.errors import ExportError
from edgekit.export.coreml_language_graphs import DECODE
from edgekit.export.coreml_tools import import_coremltools, quiet_tools
from edgekit.models.decoder import Decoder
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_info import WEIGHTS
from edgekit.runtime.session import Array

# What is stored in few bits: parameters alone, as tables of positions are no weights, and not those of the boundary
# predictor, since what is read of a text hangs on small differences that it sees. Pieces of those have names of their
# own, such as split_0: they are no parameters either.
_WEIGHT = re.compile(r"p_decoder_(?!boundary_predictor)")
_SUFFIX = re.compile(r"(_to_fp16)?(_quantized|_palettized)$")


def stays_precise(name: str) -> bool:
    """Whether the constant of this name keeps its fp16 values."""
    return _WEIGHT.match(name) is None


def stored_weights(program: Any, function: str, decoder: Decoder) -> dict[str, Array]:
    """What the weights of few bits stand for, by the decoder's parameters.

    Args:
        program: Core ML Tools' program.
        function: one of its functions, made from this decoder.

    Raises:
        ExportError: a weight that is no parameter of the decoder.
    """
    known = {re.sub(r"\W", "_", f"p_decoder.{name}"): (name, tensor) for name, tensor in decoder.named_parameters()}
    found = {}
    for op in program.functions[function].operations:
        if not op.op_type.startswith("constexpr_"):
            continue
        value = np.asarray(op.materialized_val_inference())
        name, tensor = known.get(_SUFFIX.sub("", op.outputs[0].name), ("", None))
        if tensor is None or tuple(tensor.shape) != value.shape:
            raise ExportError(f"the package has the weight {op.outputs[0].name}, which is no parameter of the decoder")
        found[name] = value.astype(np.float32)
    return found


def packed_weights(bundle: Bundle, decoder: Decoder) -> dict[str, Array]:
    """`stored_weights` of a finished bundle. Raises `ExportError` as it does."""
    ct = import_coremltools()
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder, quiet_tools():
        from coremltools.converters.mil.frontend.milproto.load import load

        path = Path(folder) / "weights" / Path(WEIGHTS).name
        path.parent.mkdir()
        path.write_bytes(bundle.read(WEIGHTS))
        spec = ct.proto.Model_pb2.Model()
        spec.ParseFromString(bundle.read(bundle.manifest.model_file))
        program = load(spec, spec.specificationVersion, str(path.parent))
        return stored_weights(program, DECODE, decoder)


def restore(decoder: Decoder, weights: Mapping[str, Array]) -> None:
    """Give the decoder these weights, in place."""
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(torch.from_numpy(value))
