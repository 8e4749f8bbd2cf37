"""Weights of few bits for Core ML: linear in channels or blocks, or a table of values; activations stay fp16.

The forms are Core ML's own (`constexpr_affine_dequantize` and `constexpr_lut_to_dense`, from iOS 18 on
`constexpr_blockwise_shift_scale`); see "Quantization overview" and "Palettization overview" in the guide of Core ML
Tools. What is here of ours is the choice of tables: optimal in one dimension up to local minima, and the same bytes on
every machine, which k-means of Core ML Tools is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import ExportError
from edgekit.export.calling import first_line
from edgekit.export.coreml_tools import import_coremltools, quiet_tools

# Fewer values than this stay in fp16: scales or a table would take a good part of what they save.
LEAST_VALUES = 512
BLOCK = 32
_BITS = {"palette4": 4, "palette6": 6, "palette8": 8}
SMALL = frozenset({"int8", "int4", *_BITS})  # precisions whose weights have few bits
_ROUNDS = 100
_PALETTE, _LINEAR = "compression::palettize_weights", "compression::linear_quantize_weights"


def compress_program(program: Any, precision: str, *, keep: Callable[[str], bool] = lambda _: False) -> None:
    """Weights of an ML program in fp16 as `precision` says, in place: a program of Core ML Tools, not yet written.

    int4 takes blocks of 32 values along the input channels. Weights whose channels are no multiple of 32, and depthwise
    ones, become int8 per channel. Constants whose names `keep` accepts stay as they are.

    Raises:
        ExportError: Core ML Tools could not do it.
    """
    tools = import_coremltools().optimize.coreml
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    for function in program.functions.values():
        function._essential_scope_sources.clear()  # the passes note nothing of where in PyTorch an op is from
    constants = (op.name for each in program.functions.values() for op in each.operations if op.op_type == "const")
    with _plainly(precision):
        for name, config in _passes(tools, precision, [name for name in constants if keep(name)]):
            graph_pass = PASS_REGISTRY[name]
            graph_pass.set_options([PassOption("config", config), PassOption("joint_compression", False)])
            graph_pass.apply(program)


def _passes(tools: Any, precision: str, kept: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """The passes of Core ML Tools to run, in order, with their configurations; `kept` are constants to leave alone."""
    names = dict.fromkeys(kept)
    if precision in _BITS:
        table = _TableOf(_BITS[precision])
        config = tools.OpPalettizerConfig(mode="custom", lut_function=table, weight_threshold=LEAST_VALUES)
        return [(_PALETTE, tools.OptimizationConfig(global_config=config, op_name_configs=names))]
    kinds: list[dict[str, Any]] = [{"dtype": "int8", "granularity": "per_channel"}]
    if precision == "int4":
        kinds.insert(0, {"dtype": "int4", "granularity": "per_block", "block_size": BLOCK})
    configs = (
        tools.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=LEAST_VALUES, **kind) for kind in kinds
    )
    return [(_LINEAR, tools.OptimizationConfig(global_config=config, op_name_configs=names)) for config in configs]


@contextlib.contextmanager
def _plainly(precision: str) -> Iterator[None]:
    try:
        with quiet_tools():
            yield
    except Exception as error:  # the compression passes raise errors of many kinds
        raise ExportError(f"Core ML Tools cannot store the weights as {precision}: {first_line(error)}") from error


def facts(spec: Any, precision: str) -> dict[str, str | int | float | bool]:
    """What is shown of the compression: which weights, in how many tensors, and which share of all values."""
    counted: dict[str, int] = {}
    dense = 0
    for name, function in spec.mlProgram.functions.items():
        if name != min(spec.mlProgram.functions):
            continue  # functions of one package share their weights; a map of protobuf's has no order
        for op in function.block_specializations[function.opset].operations:
            if not op.outputs:
                continue  # what writes a state has none
            size = int(np.prod([d.constant.size for d in op.outputs[0].type.tensorType.dimensions] or [1]))
            if op.type.startswith("constexpr_"):
                counted[op.type] = counted.get(op.type, 0) + size
            elif op.type == "const" and op.attributes["val"].WhichOneof("value") == "blobFileValue":
                dense += size
    total = sum(counted.values()) + dense
    return {"weights": precision, "share": round(sum(counted.values()) / total, 4) if total else 0.0, **counted}


class _TableOf:
    """The `lut_function` of Core ML Tools for tables of 2^bits values."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, weight: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        table, indices = nearest_values(weight, 2**self.bits)
        return table.astype(weight.dtype), indices


def nearest_values(weight: NDArray[Any], count: int) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """A table of `count` values for `weight`, ascending, and the index of the nearest one for each value, flat.

    k-means in one dimension (Lloyd's algorithm) on the distinct values, from quantiles of their density's cube root,
    which is optimal for many small cells (Panter and Dite, 1951). No random numbers.
    """
    values, inverse, counts = np.unique(weight.ravel().astype(np.float64), return_inverse=True, return_counts=True)
    if len(values) <= count:
        return np.concatenate([values, np.full(count - len(values), values[-1])]), inverse.astype(np.uint8)
    table = _start(values, counts, count)
    weights = np.concatenate([[0], np.cumsum(counts)]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values * counts)])
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(values, (table[1:] + table[:-1]) / 2), [len(values)]])
        filled = weights[edges[1:]] - weights[edges[:-1]]
        means = (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(filled, 1)
        moved = np.where(filled > 0, means, table)
        if np.array_equal(moved, table):
            break
        table = np.sort(moved)
    nearest = np.searchsorted((table[1:] + table[:-1]) / 2, values)
    return table, nearest[inverse].astype(np.uint8)


def _start(values: NDArray[np.float64], counts: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """`count` values spread as the cube root of the density of `values`, estimated over 512 cells."""
    density, edges = np.histogram(values, bins=512, weights=counts)
    mass = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    positions = (np.arange(count) + 0.5) / count * mass[-1]
    return np.asarray(np.interp(positions, mass, edges), np.float64)
