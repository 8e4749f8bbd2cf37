"""Softmax and the likeliest classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.errors import InputError
from edgekit.runtime.postprocess import Prediction, softmax, top_k

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray

SCORES = arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e4, 1e4, width=32))


@given(SCORES)
def test_softmax_sums_to_one_and_equals_torch(scores: NDArray[np.float32]) -> None:
    ours = softmax(scores)
    assert ours.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(ours, torch.softmax(torch.from_numpy(scores), dim=0).numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_works_along_any_axis(axis: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    np.testing.assert_allclose(softmax(x, axis).sum(axis=axis), 1)


@pytest.mark.parametrize(
    ("given_dtype", "result"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64"), ("int8", "float32")],
)
def test_softmax_dtypes(given_dtype: DTypeLike, result: DTypeLike) -> None:
    assert softmax(np.array([1, 2], given_dtype)).dtype == result


def test_softmax_gives_masked_scores_no_probability() -> None:
    np.testing.assert_array_equal(softmax(np.array([-np.inf, 3.0])), [0.0, 1.0])


def test_softmax_leaves_its_input_alone() -> None:
    x = np.array([1.0, 2.0], np.float32)
    softmax(x)
    np.testing.assert_array_equal(x, [1.0, 2.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["nan", "infinity"])
def test_softmax_refuses_what_has_no_answer(bad: float) -> None:
    with pytest.raises(InputError, match=r"expected finite scores, got NaN or infinity; .* try precision fp32"):
        softmax(np.array([[0.0, 1.0], [bad, 2.0]]))


def test_softmax_refuses_all_masked() -> None:
    with pytest.raises(InputError, match="expected finite scores"):
        softmax(np.array([-np.inf, -np.inf]))


@pytest.mark.parametrize("empty", [np.zeros((2, 0)), np.float32(3)], ids=["no-classes", "scalar"])
def test_softmax_refuses_no_scores(empty: NDArray[Any]) -> None:
    with pytest.raises(InputError, match="at least one score along axis -1"):
        softmax(empty)


def test_top_k_names_the_likeliest_first() -> None:
    first, second = top_k(np.array([[0.0, 3.0, 1.0]], np.float32), 2, ["cat", "dog", "owl"])
    assert (first.index, first.label, first.score) == (1, "dog", 3.0)
    assert (second.index, second.label, second.score) == (2, "owl", 1.0)
    assert first.probability == pytest.approx(np.exp(3) / (1 + np.exp(3) + np.exp(1)))


@given(SCORES, st.integers(1, 40))
def test_top_k_is_the_head_of_the_sorted_scores(scores: NDArray[np.float32], k: int) -> None:
    predictions = top_k(scores, k)
    assert len(predictions) == min(k, len(scores))
    expected = sorted(range(len(scores)), key=lambda index: (-float(scores[index]), index))[:k]
    assert [prediction.index for prediction in predictions] == expected
    assert all(prediction.label is None for prediction in predictions)


def test_top_k_of_equal_scores_takes_the_lower_index() -> None:
    assert [prediction.index for prediction in top_k(np.zeros(6), 3)] == [0, 1, 2]


def test_top_k_of_unsigned_integers_is_ordered() -> None:
    assert [prediction.index for prediction in top_k(np.array([0, 200, 100], np.uint8), 3)] == [1, 2, 0]


def test_top_k_takes_probabilities_as_they_are() -> None:
    assert top_k(np.array([0.25, 0.75]), 1, probabilities=True) == [Prediction(1, None, 0.75, 0.75)]


@pytest.mark.parametrize(
    ("logits", "k", "labels", "probabilities", "message"),
    [
        pytest.param(np.zeros((2, 3)), 1, None, False, r"\[C\] or \[1, C\], got shape \[2, 3\]", id="a-batch"),
        pytest.param(np.float32(1), 1, None, False, r"got shape \[\]", id="scalar"),
        pytest.param(np.zeros(0), 1, None, False, r"at least one score", id="no-classes"),
        pytest.param(np.array([1, np.nan]), 1, None, False, "got NaN", id="nan"),
        pytest.param(np.array([1, np.nan]), 1, None, True, "got NaN", id="nan-probability"),
        pytest.param(np.zeros(3), 0, None, False, "k of at least 1, got 0", id="k"),
        pytest.param(np.zeros(3), 1, ["a", "b"], False, "got 2 labels for 3 scores", id="labels"),
        pytest.param(np.array([-1.0, 5]), 1, None, True, "from -1 to 5; leave out probabilities=True", id="logits"),
    ],
)
def test_top_k_names_what_is_wrong(
    logits: NDArray[Any], k: int, labels: Sequence[str] | None, probabilities: bool, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        top_k(logits, k, labels, probabilities=probabilities)
