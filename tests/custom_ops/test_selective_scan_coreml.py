"""SelectiveScan lowered to Core ML, on the reference runtime, against the torch op in float64 (itself tested
against the reference)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.custom_ops.coreml_graph import FP32
from edgekit.custom_ops.selective_scan.contract import NAMES
from edgekit.custom_ops.selective_scan.coreml import CHUNK
from edgekit.custom_ops.selective_scan.eager import selective_scan
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import ExportError

NAME = "SelectiveScan"
SLOW = pytest.mark.slow


def draw(length: int, channels: int = 3, states: int = 5, *, count: int = 7, batch: int = 2) -> dict[str, np.ndarray]:
    """The first `count` inputs; delta as before softplus and A negative, as in Mamba."""
    generator = np.random.default_rng(length)
    tokens, weights = (batch, channels, length), (batch, states, length)
    sizes = (tokens, tokens, (channels, states), weights, weights, (channels,), tokens)
    feed = {name: generator.standard_normal(size) for name, size in zip(NAMES, sizes, strict=True)}
    feed["delta"] -= 2
    feed["A"] = -np.exp(feed["A"] / 2)
    return {name: array.astype(np.float32) for name, array in list(feed.items())[:count]}


def halved(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float16).astype(np.float32) for name, array in feed.items()}


def expected(feed: dict[str, np.ndarray], softplus: bool = True) -> torch.Tensor:
    return selective_scan(*(torch.from_numpy(array).double() for array in feed.values()), delta_softplus=softplus)


def call(softplus: bool = True) -> Any:
    return lambda *tensors: torch.ops.edgekit.selective_scan(*tensors, delta_softplus=softplus)


def calls(variants: list[tuple[bool, dict[str, np.ndarray]]]) -> tuple[Any, dict[str, np.ndarray]]:
    """One function of all variants, and its inputs: each variant is delta_softplus and inputs of its own."""

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest, outputs = list(tensors), []
        for softplus, feed in variants:
            mine, rest = rest[: len(feed)], rest[len(feed) :]
            outputs.append(call(softplus)(*mine))
        return tuple(outputs)

    return function, {f"{name}{n}": array for n, (_, each) in enumerate(variants) for name, array in each.items()}


# The lowering differs in no more than the type of an index, if at all: one target here, another in half precision.
@pytest.mark.parametrize("target", ["iOS16", pytest.param("iOS17", marks=SLOW), pytest.param("iOS18", marks=SLOW)])
def test_equals_the_reference(to_coreml, target):
    variants = [(softplus, draw(65, 7, 3, count=count)) for softplus in (False, True) for count in (6, 7)]
    for softplus, feed in variants:
        if not softplus:
            feed["delta"] = np.log1p(np.exp(feed["delta"]))
    function, feeds = calls(variants)
    for (softplus, feed), got in zip(variants, to_coreml(function, feeds, target).run(feeds), strict=True):
        error = relative_l2(got, expected(feed, softplus))
        assert error <= tolerance(NAME, "float32", "coreml"), (softplus, len(feed))


def test_every_kind_of_tail(to_coreml):
    lengths = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 100]
    variants = [(True, draw(length, 3, 1)) for length in lengths]
    function, feeds = calls(variants)
    program = to_coreml(function, feeds)
    assert program.ops["while_loop"] == sum(length > CHUNK for length in lengths)
    for (_, feed), got in zip(variants, program.run(feeds), strict=True):
        assert got.shape == feed["u"].shape
        assert relative_l2(got, expected(feed)) <= tolerance(NAME, "float32", "coreml"), got.shape


def test_small_and_large_steps_keep_their_digits(to_coreml):
    """softplus(-15) is 3e-7, which log(1 + exp(x)) rounds to a multiple of 1.2e-7; softplus(90) is 90."""
    feed = draw(20)
    feed["D"][:] = 0  # so that only what the steps bring counts
    program = to_coreml(call(), feed)
    for step in (-30.0, -15.0, 0.0, 19.0, 21.0, 90.0):
        feed["delta"][:] = step
        assert relative_l2(program.run(feed)[0], expected(feed)) <= tolerance(NAME, "float32", "coreml"), step


@pytest.mark.parametrize("target", [pytest.param("iOS16", marks=SLOW), pytest.param("iOS17", marks=SLOW), "iOS18"])
def test_a_half_precision_program_scans_in_float32(to_coreml, target):
    variants = [(True, halved(draw(length, 16, 16))) for length in (20, 65)]
    function, feeds = calls(variants)
    program = to_coreml(function, feeds, target, "fp16")
    for (_, feed), got in zip(variants, program.run(feeds, "fp16sum"), strict=True):
        assert relative_l2(got, expected(feed)) <= tolerance(NAME, "float16", "coreml")
    halves = [op for op in program.operations if any(value.type.dtype == "float16" for value in op.outputs)]
    assert {op.op_type for op in halves} <= {"cast"}, "nothing but the inputs and the output is half precision"
    assert len(halves) <= len(feeds) + len(variants)
    assert any(value.name.startswith(FP32) for op in program.operations for value in op.outputs)


def test_growth_is_right_where_the_answer_is_finite(to_coreml):
    """A > 0: decays whose product over the tokens is infinite, on a state that is zero until the last of them."""
    feed = draw(65, count=6)
    feed["A"], feed["delta"][:] = np.abs(feed["A"]), 4.0
    feed["u"][:, :, :60] = 0
    (got,) = to_coreml(call(False), feed).run(feed)
    assert relative_l2(got, expected(feed, False)) <= tolerance(NAME, "float32", "coreml")


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=SLOW), "fp16"])
def test_thousands_of_tokens(to_coreml, precision):
    """The longest scan of DynamicVis base at 512 x 512, with fewer channels."""
    feed = halved(draw(2176, 24, 16, count=6))
    (got,) = to_coreml(call(), feed, precision=precision).run(feed)
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    assert relative_l2(got, expected(feed)) <= tolerance(NAME, dtype, "coreml")


def test_size_of_the_program(to_coreml):
    """Ops do not grow with the length, and no tensor of the loop with more than a chunk of tokens."""
    feed = draw(2176, 8, 16, count=6)
    program = to_coreml(call(), feed)
    assert program.ops.total() <= 2 * CHUNK + 50
    largest = max(value.type.elements for op in program.operations for value in op.outputs)
    assert largest <= max(feed["u"].size * 3, 2 * CHUNK * 8 * 16 * 2)


def test_dynamic_batch(to_coreml):
    feed = draw(40)
    batch = {0: torch.export.Dim("B", min=1, max=8)}
    axes = tuple(batch if len(array.shape) == 3 else {} for array in feed.values())
    program = to_coreml(call(), feed, dynamic=(axes,))
    for size in (1, 2, 5):
        other = draw(40, batch=size)
        assert relative_l2(program.run(other)[0], expected(other)) <= tolerance(NAME, "float32", "coreml"), size


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # of coremltools
def test_a_dynamic_length_is_refused(to_coreml):
    feed = draw(40)
    length = torch.export.Dim("L", min=2, max=100)
    axes = tuple({2: length} if len(array.shape) == 3 else {} for array in feed.values())
    with pytest.raises(ExportError, match="SelectiveScan needs fixed numbers of tokens"):
        to_coreml(call(), feed, dynamic=(axes,))
