"""Verifications: truthy only when something was compared and all of it passed, and always strict JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import pytest

from edgekit.errors import InputError, NothingToCompareError, UnknownNameError
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.compare import compare_arrays, failed_comparison
from edgekit.runtime.datasets import Dataset
from edgekit.runtime.session import load
from edgekit.runtime.tolerances import (
    LAYER_REL_L2,
    OUTPUT_REL_L2,
    PRECISIONS,
    layer_tolerance,
    output_tolerance,
)
from edgekit.runtime.verification import (
    Accuracy,
    Check,
    LayerComparison,
    LayerReport,
    Verification,
    check_outputs,
    classify,
    measure_accuracy,
    score_output,
    verify,
    verify_samples,
)

Arrays = Mapping[str, np.ndarray[Any, Any]]
ONE = np.ones((1, 3), np.float32)


class MakeBundle(Protocol):
    def __call__(self, name: str = ..., *, samples: int = ..., batch: int | None = ...) -> Bundle: ...


def with_samples(bundle: Bundle, samples: Samples) -> Bundle:
    """The same bundle with other samples."""
    with BundleWriter(bundle.path) as writer:
        writer.add("model.onnx", "model").write_bytes(bundle.read("model.onnx"))
        samples.save(writer.add(SAMPLES, "samples"))
        return writer.finish(bundle.manifest, {})


def test_a_good_bundle_passes(tiny_bundle: Bundle) -> None:
    for bundle in (tiny_bundle, tiny_bundle.path, str(tiny_bundle.path), tiny_bundle.pack()):
        result = verify(bundle, threads=1)
        assert result
        (check,) = result.checks
        assert (check.inputs, [item.name for item in check.outputs]) == (2, ["y"])
        assert check.outputs[0].rel_l2 < 1e-6
        assert result.not_checked == ("live PyTorch: this is the torch-free runtime",)


def test_a_bundle_that_answers_otherwise_fails(tiny_bundle: Bundle) -> None:
    samples = tiny_bundle.samples()
    result = verify(with_samples(tiny_bundle, Samples(samples.inputs, {"y": samples.outputs["y"] * 1.001 + 0.001})))
    assert not result
    assert result.checks[0].outputs[0].rel_l2 > 1e-4
    assert result.to_json()["passed"] is False


def test_an_answer_that_is_missing_fails(tiny_bundle: Bundle) -> None:
    samples = tiny_bundle.samples()
    result = verify(with_samples(tiny_bundle, Samples(samples.inputs, {**samples.outputs, "z": samples.outputs["y"]})))
    assert not result
    assert [item.problem for item in result.checks[0].outputs] == [None, "the bundle has no output of this name"]


def test_nothing_to_verify_is_an_error(make_bundle: MakeBundle) -> None:
    with pytest.raises(NothingToCompareError, match="stores no samples"):
        verify(make_bundle(samples=0))
    other = make_bundle("other")
    session = load(with_samples(other, Samples(other.samples().inputs, {"z": np.ones((2, 1))})))
    with pytest.raises(NothingToCompareError, match=r"the reference has the outputs \['z'\], the bundle has \['y'\]"):
        verify_samples(session)
    with pytest.raises(NothingToCompareError, match="there are no inputs"):
        check_outputs("nothing", [], session.run, 1.0)


def answers(*arrays: Any) -> Any:
    """A run that gives these outputs `y` one after another."""
    left = iter(arrays)
    return lambda _: {"y": next(left)}


def references(*arrays: Any) -> list[tuple[Arrays, Arrays]]:
    return [({}, {"y": array}) for array in arrays]


def test_batches_of_several_sizes_are_compared_row_by_row() -> None:
    small, large = np.array([[1.0, 2.0]]), np.array([[3.0, 1.0], [0.0, 5.0]])
    changed = np.array([[3.0, 4.0], [0.0, 5.0]])
    check = check_outputs("x", references(small, large), answers(small, changed), 1.0)
    assert check.inputs == 2
    assert check.outputs[0].max_abs == 3
    assert check.outputs[0].top1_agreement == pytest.approx(2 / 3)


def test_swapped_shapes_do_not_pass_for_equal() -> None:
    first, second = np.ones((1, 3)), np.ones((2, 3))
    check = check_outputs("x", references(first, second), answers(second, first), 1.0)
    assert not check
    assert check.outputs[0].problem == "the shapes are [2, 3], [1, 3], PyTorch gave [1, 3], [2, 3]"


def test_an_output_that_is_missing_once() -> None:
    runs = iter([{"y": ONE}, {"z": ONE}])
    check = check_outputs("x", references(ONE, ONE), lambda _: next(runs), 1.0)
    assert not check
    assert [bool(item) for item in check.outputs] == [False, False]


@pytest.mark.parametrize(
    "arrays", [(np.float64(2), np.float64(3)), (np.ones((1, 2)), np.ones((1, 4)))], ids=["0-d", "wide"]
)
def test_shapes_that_do_not_stack(arrays: tuple[Any, ...]) -> None:
    check = check_outputs("x", references(*arrays), answers(*arrays), 0.0)
    assert check
    assert check.outputs[0].top1_agreement is None


def test_empty_outputs_do_not_pass() -> None:
    assert not check_outputs("x", references(np.ones((0, 3))), answers(np.ones((0, 3))), 1.0)


GOOD = compare_arrays("y", ONE, ONE, tolerance=1.0)
BAD = failed_comparison("z", 1.0, "no such output")


@pytest.mark.parametrize(
    ("checks", "layers", "passed"),
    [
        ((), None, False),
        ((Check("a", 1, ()),), None, False),
        ((Check("a", 1, (GOOD,)),), None, True),
        ((Check("a", 1, (GOOD, BAD)),), None, False),
        ((Check("a", 1, (GOOD,)), Check("b", 1, (BAD,))), None, False),
        ((Check("a", 1, (GOOD,)),), GOOD, True),
        ((Check("a", 1, (GOOD,)),), BAD, False),
        ((), GOOD, False),
    ],
)
def test_truth(checks: tuple[Check, ...], layers: Any, passed: bool) -> None:
    report = None
    if layers is not None:
        layer = LayerComparison("conv", "stem.conv", "conv2d", (1, 3), layers)
        report = LayerReport((layer,), 1.0, None if layer else layer)
    result = Verification("t", "fp32", checks, Accuracy("d", 3, 0.5, None), report)
    assert bool(result) == passed
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["passed"] == passed
    assert len(data["checks"]) == len(checks)


def test_json_has_no_infinities() -> None:
    result = Verification("t", "fp32", (Check("a", 1, (GOOD, BAD)),))
    outputs = result.to_json()["checks"][0]["outputs"]
    assert outputs[0]["psnr_db"] is None  # infinite: the arrays are equal
    assert outputs[1]["rel_l2"] is None  # NaN: not compared
    assert outputs[1]["problem"] == "no such output"


# Accuracy


def rows(count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).standard_normal((count, 4), dtype=np.float32)


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_accuracy(make_bundle: MakeBundle, batch: int | None) -> None:
    """Ten items in batches of four: the last batch is filled up, and what fills it is not counted."""
    session = load(make_bundle(batch=batch), threads=1)
    x = rows(10)
    single = load(make_bundle("single"), threads=1)
    right = np.array([single.run({"x": row[None]})["y"].argmax() for row in x])
    wrong_thrice = np.where(np.arange(10) < 3, (right + 1) % 3, right)
    assert measure_accuracy(session, Dataset({"x": x}, right, "d")) == Accuracy("d", 10, 1.0)
    assert measure_accuracy(session, Dataset({"x": x}, wrong_thrice, "d")).bundle == pytest.approx(0.7)
    found = classify(session.run, Dataset({"x": x}, None, "d"), output="y", batch=batch or 3) if batch else right
    np.testing.assert_array_equal(found, right)


def test_accuracy_of_a_whole(tiny_bundle: Bundle) -> None:
    """One run for all rows; those labelled -1 do not count."""
    session = load(tiny_bundle, threads=1)
    x = rows(7)
    right = session.run({"x": x})["y"].argmax(1)
    labels = np.where(np.arange(7) < 2, (right + 1) % 3, right)
    labels[5:] = -1
    data = Dataset({"x": x}, labels, "d", whole=True)
    assert measure_accuracy(session, data) == Accuracy("d", 5, pytest.approx(0.6))
    np.testing.assert_array_equal(classify(session.run, data, output="y"), right)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.full(7, -1), "every label is -1, so that none counts"),
        (np.zeros(6, np.int64), "d holds 6 labels for 7 rows"),
    ],
    ids=["none counts", "too few"],
)
def test_labels_of_a_whole_that_do_not_fit(tiny_bundle: Bundle, labels: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        measure_accuracy(load(tiny_bundle), Dataset({"x": rows(7)}, labels, "d", whole=True))


def test_accuracy_in_a_verification(tiny_bundle: Bundle) -> None:
    data = Dataset({"x": rows(6)}, np.zeros(6, np.int64), "six items")
    result = verify(tiny_bundle, data=data)
    assert result.accuracy is not None
    assert (result.accuracy.data, result.accuracy.items, result.accuracy.pytorch) == ("six items", 6, None)
    with pytest.raises(InputError, match="six items has no labels"):
        verify(tiny_bundle, data=replace(data, labels=None))


def test_a_model_without_class_scores(tiny_bundle: Bundle) -> None:
    session = load(tiny_bundle)
    assert score_output(session) == "y"
    session.outputs = tuple(replace(spec, shape=("N",)) for spec in session.outputs)
    with pytest.raises(InputError, match=r"tiny-onnx has no output with class scores: y: float32\[N\]"):
        score_output(session)


# Tolerances


def test_the_table_of_tolerances() -> None:
    assert set(OUTPUT_REL_L2) == set(LAYER_REL_L2) == set(PRECISIONS["onnx"])
    for precision in PRECISIONS["onnx"]:
        assert 0 < output_tolerance(precision) <= layer_tolerance(precision) < 1
    for tolerance in (output_tolerance, layer_tolerance):
        with pytest.raises(UnknownNameError, match="unknown precision 'fp8'; did you mean fp32, fp16"):
            tolerance("fp8")
