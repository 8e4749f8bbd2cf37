"""Each rule of the lint on a program that was made to meet it, and it alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.export.coreml_tools import import_coremltools, quiet_tools
from edgekit.export.lint import LintReport, lint_function
from edgekit.export.lint_facts import FACTS
from edgekit.export.lint_peaks import measure_peaks
from edgekit.export.lint_rules import findings
from edgekit.export.lint_score import score, segments, weighted_switches
from edgekit.runtime.mil import (
    MilBlock,
    MilFunction,
    MilOp,
    MilProgram,
    MilValue,
    Reference,
    ValueType,
    load_program,
)

ct = import_coremltools()
with quiet_tools():
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

Build = Callable[..., Any]
Make = Callable[..., MilProgram]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Save a program made with the builder, as it stands, and load it."""

    def save(build: Build, *shapes: tuple[Any, ...], dtype: str = "fp16", target: str = "iOS17") -> MilProgram:
        kind = {"fp16": types.fp16, "fp32": types.fp32}[dtype]
        with quiet_tools():
            specs = [mb.TensorSpec(shape=shape, dtype=kind) for shape in shapes]
            program = mb.program(input_specs=specs, opset_version=getattr(ct.target, target))(build)
            model = ct.convert(
                program,
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=ct.precision.FLOAT32,
                pass_pipeline=ct.PassPipeline.EMPTY,
                skip_model_load=True,
            )
            model.save(str(tmp_path / "model.mlpackage"))
        return load_program(tmp_path / "model.mlpackage")

    return save


def half(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float16)


def report(program: MilProgram) -> LintReport:
    return lint_function(program, "main")


def rules(program: MilProgram) -> set[str]:
    return {finding.rule for op in report(program).ops for finding in op.findings}


def symbol() -> Any:
    with quiet_tools():
        from coremltools.converters.mil.mil import get_new_symbol

        return get_new_symbol()


def loop(x: Any) -> Any:
    return mb.while_loop(
        _cond=lambda i, y: mb.less(x=i, y=np.float16(3)),
        _body=lambda i, y: (mb.add(x=i, y=np.float16(1)), mb.mul(x=y, y=np.float16(2))),
        loop_vars=(np.float16(0), x),
    )[1]


CLEAN = (1, 32, 32, 32)
CASES: dict[str, tuple[Build, tuple[tuple[Any, ...], ...], dict[str, Any]]] = {
    "fp32": (lambda x: mb.relu(x=mb.relu(x=x)), (CLEAN,), {"dtype": "fp32"}),
    "cast": (
        lambda x: mb.relu(x=mb.cast(x=mb.cast(x=mb.relu(x=x), dtype="fp32"), dtype="fp16")),
        (CLEAN,),
        {},
    ),
    "gather": (lambda x: mb.gather(x=x, indices=np.arange(32, dtype=np.int32), axis=1), (CLEAN,), {}),
    "scatter": (
        lambda x: mb.scatter(data=x, indices=np.int32([3]), updates=half(1, 32), axis=0),
        ((32, 32),),
        {},
    ),
    "control-flow": (loop, (CLEAN,), {}),
    "unsupported-op": (lambda x: mb.band_part(x=x, lower=-1, upper=0), (CLEAN,), {}),
    "rank-5": (lambda x: mb.relu(x=mb.reshape(x=x, shape=[1, 2, 16, 32, 32])), (CLEAN,), {}),
    "size": (lambda x: mb.relu(x=x), ((1, 1, 1, 16416),), {}),
    "kernel": (lambda x: mb.conv(x=x, weight=half(32, 1, 15, 1), groups=32, pad_type="same"), (CLEAN,), {}),
    "narrow-axis": (lambda x: mb.relu(x=x), ((1, 32, 1, 16),), {}),
    "unaligned-axis": (lambda x: mb.relu(x=x), ((1, 32, 1, 49),), {}),
    "linear-layout": (lambda x: mb.linear(x=x, weight=half(64, 32), bias=half(64)), ((1, 49, 32),), {}),
    "fused-attention": (
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
        ((1, 4, 64, 32),) * 3,
        {"target": "iOS18"},
    ),
    "attention-heads": (lambda q, k: mb.matmul(x=q, y=k, transpose_y=True), ((1, 4, 64, 32),) * 2, {}),
    "stride": (lambda x: mb.conv(x=x, weight=half(32, 32, 5, 5), strides=[5, 5]), ((1, 32, 160, 160),), {}),
    "dilation": (
        lambda x: mb.conv(x=x, weight=half(32, 32, 3, 3), dilations=[4, 4], pad_type="same"),
        (CLEAN,),
        {},
    ),
    "spatial-softmax": (lambda x: mb.softmax(x=x, axis=-1), (CLEAN,), {}),
    "infinite-mask": (
        lambda x: mb.softmax(x=mb.add(x=x, y=np.full((1, 32, 1, 1), -np.inf, np.float16)), axis=1),
        (CLEAN,),
        {},
    ),
}


@pytest.mark.parametrize("rule", CASES)
def test_rule_is_met_alone(make: Make, rule: str) -> None:
    build, shapes, options = CASES[rule]
    assert rules(make(build, *shapes, **options)) == {rule}


def test_six_axes() -> None:
    """Core ML Tools writes no such program, but others may."""
    values = [MilValue(name, ValueType("float16", (1, 1, 2, 16, 32, 32))) for name in ("x", "y")]
    op = MilOp("relu", "y", {"x": (Reference("x"),)}, (values[1],))
    function = MilFunction("main", "CoreML7", (values[0],), MilBlock((), ("y",), (op,)))
    assert [finding.rule for finding in findings(op, function)] == ["rank"]


def test_topk_makes_integers_too(make: Make) -> None:
    program = make(lambda x: mb.topk(x=x, k=32, axis=-1), (1, 1, 1, 64))
    assert rules(program) == {"topk"}


def test_pooling_by_three_is_a_stride(make: Make) -> None:
    program = make(lambda x: mb.max_pool(x=x, kernel_sizes=[3, 3], strides=[3, 3], pad_type="valid"), (1, 32, 96, 96))
    assert rules(program) == {"stride"}


def test_dynamic_sizes_and_what_is_computed_from_them(make: Make) -> None:
    program = make(lambda x: mb.relu(x=x), (1, 32, 1, symbol()))
    assert rules(program) == {"dynamic-shape"}


def test_computed_slice(make: Make) -> None:
    def build(x: Any, y: Any) -> Any:
        start = mb.cast(x=mb.reduce_argmax(x=y, axis=0, keep_dims=True), dtype="int32")
        return mb.slice_by_size(x=x, begin=mb.concat(values=[start, np.int32([0])], axis=0), size=np.int32([2, 32]))

    assert rules(make(build, (4, 32), (2,))) >= {"dynamic-index", "integer"}


def test_clean_program_meets_nothing(make: Make) -> None:
    def build(x: Any) -> Any:
        y = mb.relu(x=mb.conv(x=x, weight=half(32, 32, 3, 3), pad_type="same"))
        y = mb.add(x=x, y=mb.conv(x=y, weight=half(32, 32, 1, 1), bias=half(32)))
        return mb.softmax(x=y, axis=1)

    found = report(make(build, CLEAN))
    assert rules(make(build, CLEAN)) == set()
    assert found.score == 100
    assert found.macs == 32 * 32 * 32 * (32 * 9 + 32)
    assert found.macs_on_engine == 1
    assert (found.switches, found.moved, found.advice) == (0, 0, ())


def test_casts_at_the_border_cost_nothing(make: Make) -> None:
    def build(x: Any) -> Any:
        return mb.cast(x=mb.relu(x=mb.cast(x=x, dtype="fp16")), dtype="fp32")

    program = make(build, CLEAN, dtype="fp32")
    assert rules(program) == set()
    assert [op.op_type for op in report(program).ops] == ["relu"]


def test_macs(make: Make) -> None:
    def build(x: Any, y: Any) -> Any:
        a = mb.conv_transpose(x=x, weight=half(32, 16, 2, 2), strides=[2, 2])
        b = mb.matmul(x=y, y=y, transpose_x=True)
        c = mb.einsum(values=(x, mb.transpose(x=x, perm=[0, 3, 2, 1])), equation="nchw,nwhu->nchu")
        return a, b, c

    found = {op.op_type: op.macs for op in report(make(build, (1, 32, 8, 8), (5, 7))).ops}
    assert found["conv_transpose"] == 32 * 64 * 16 * 4
    assert found["matmul"] == 7 * 7 * 5
    assert found["einsum"] == 32 * 8 * 8 * 32
    assert found["transpose"] == 0


def test_a_fall_back_in_the_middle_weighs_more_than_one_at_the_end(make: Make) -> None:
    weight = half(32, 32, 1, 1)

    def conv(x: Any) -> Any:
        return mb.conv(x=x, weight=weight)

    def away(x: Any) -> Any:
        return mb.band_part(x=x, lower=-1, upper=0)

    middle = report(make(lambda x: conv(away(conv(x))), CLEAN))
    end = report(make(lambda x: away(conv(conv(x))), CLEAN))
    assert (middle.switches, end.switches) == (2, 1)
    assert middle.weighted_switches == 2  # 4 p (1 - p) with p = 1 / 2, twice
    assert end.weighted_switches == 0
    assert middle.score < end.score
    assert [segment.on_engine for segment in segments(middle.ops)] == [True, False, True]
    (advice,) = middle.advice
    assert (advice.rule, advice.switches) == ("unsupported-op", 2)
    assert advice.points == pytest.approx(100 - middle.score)


def test_mending_what_slows_never_lowers_the_score(make: Make) -> None:
    def build(x: Any) -> Any:
        y = mb.linear(x=x, weight=half(49, 32), bias=half(49))
        y = mb.softmax(x=mb.band_part(x=y, lower=0, upper=-1), axis=-1)
        return mb.transpose(x=mb.matmul(x=y, y=half(49, 32)), perm=[0, 2, 1])

    found = report(make(build, (1, 49, 32)))
    assert 0 < found.score < 100
    for rule in {finding.rule for op in found.ops for finding in op.findings}:
        if FACTS[rule].effect == "slow":
            assert score(found.ops, rule) > found.score
    assert score(found.ops, "unsupported-op") >= found.score
    assert weighted_switches(found.ops, "unsupported-op") == 0


def test_peaks_name_the_op_that_overflows(make: Make) -> None:
    def build(x: Any) -> Any:
        large = mb.mul(x=x, y=np.float16(300.0), name="large")
        return mb.mul(x=mb.square(x=large, name="overflow"), y=np.float16(1e-4), name="back")

    program = make(build, (1, 4, 1, 32))
    x = np.full((1, 4, 1, 32), 2.0, np.float32)
    (name,) = (value.name for value in program.functions["main"].inputs)
    peaks = measure_peaks(program, "main", [{name: x}, {name: x / 2}])
    assert peaks is not None
    assert peaks.samples == 2
    assert [item.name for item in peaks.overflowing] == ["overflow"]
    assert peaks.worst.peak == 360000
    assert peaks.worst.headroom_bits == pytest.approx(np.log2(65504 / 360000))
    found = lint_function(program, "main", peaks=peaks)
    assert found.advice[0].rule == "fp16-overflow"
    assert "overflow" in found.advice[0].example


def test_peaks_count_what_is_below_the_normal_numbers(make: Make) -> None:
    program = make(lambda x: mb.mul(x=x, y=np.float16(1e-3), name="small"), (1, 4, 1, 32))
    (name,) = (value.name for value in program.functions["main"].inputs)
    x = np.where(np.arange(128).reshape(1, 4, 1, 32) % 4, 1.0, 0.01).astype(np.float32)
    peaks = measure_peaks(program, "main", [{name: x}])
    assert peaks is not None
    assert peaks.overflowing == ()
    assert [(item.name, item.small) for item in peaks.small] == [("small", 0.25)]


def test_every_fact_says_where_it_is_from() -> None:
    for rule, fact in FACTS.items():
        assert fact.rule == rule
        assert fact.sources
        assert all(source.address.startswith("https://") for source in fact.sources)
        assert fact.standing in ("documented", "community-observed")
        assert 0 <= fact.pace <= 1
        assert (fact.pace == 0) == (fact.effect == "off")
