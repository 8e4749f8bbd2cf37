"""KernelLinearAttention lowered to Core ML, on the reference runtime, against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekit.custom_ops.kernel_linear_attention import FEATURE_MAPS, kernel_linear_attention
from edgekit.custom_ops.tolerances import relative_l2, tolerance

NAME = "KernelLinearAttention"
# The lowering differs in no more than the type of an index, if at all.
SLOW = pytest.mark.slow
TARGETS = (pytest.param("iOS16", marks=SLOW), pytest.param("iOS17", marks=SLOW), "iOS18")


def draw(tokens: int, d: int = 5, e: int = 3, batch: int = 2, heads: int = 3, scale: float = 1.0):
    generator = np.random.default_rng(tokens)
    sizes = {"q": (batch, heads, tokens, d), "k": (batch, heads, tokens, d), "v": (batch, heads, tokens, e)}
    return {name: (scale * generator.standard_normal(size)).astype(np.float32) for name, size in sizes.items()}


def expected(feed: dict[str, np.ndarray], feature_map: str = "relu", eps: float = 1e-6) -> torch.Tensor:
    q, k, v = (torch.from_numpy(array).double() for array in feed.values())
    return kernel_linear_attention(q, k, v, feature_map, eps)


def halved(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As a program with half-precision inputs sees them, so that only what it computes counts."""
    return {name: array.astype(np.float16).astype(np.float32) for name, array in feed.items()}


def call(feature_map: str = "relu", eps: float = 1e-6):
    return lambda q, k, v: torch.ops.edgekit.kernel_linear_attention(q, k, v, feature_map, eps)


def positive(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without a feature map, denominators of mixed signs would magnify every rounding."""
    return {name: np.abs(array) for name, array in feed.items()}


def calls(variants: list[tuple[str, dict[str, np.ndarray]]], eps: float = 1e-6):
    """One function of all variants, and its inputs: each variant is a feature map and q, k, v of its own."""

    def function(*tensors):
        triples = zip(variants, *(tensors[start::3] for start in range(3)), strict=True)
        return tuple(call(feature_map, eps)(q, k, v) for (feature_map, _), q, k, v in triples)

    feed = {f"{name}{n}": array for n, (_, each) in enumerate(variants) for name, array in each.items()}
    return function, feed


@pytest.mark.parametrize("target", TARGETS)
def test_equals_the_reference(to_coreml, target):
    variants = [
        (feature_map, positive(feed) if feature_map == "identity" else feed)
        for feature_map in FEATURE_MAPS
        for feed in (draw(1), draw(7, 60, 64), draw(200, 64, 33), draw(600, 16, 9))
    ]
    function, feed = calls(variants, 1e-3)
    for (feature_map, each), got in zip(variants, to_coreml(function, feed, target).run(feed), strict=True):
        error = relative_l2(got, expected(each, feature_map, 1e-3))
        assert error <= tolerance(NAME, "float32", "coreml"), (feature_map, each["q"].shape)


def test_defaults_and_keywords(to_coreml):
    feed = draw(9)

    def both(q, k, v):
        op = torch.ops.edgekit.kernel_linear_attention
        relu = torch.relu(q)  # a node of the name of a feature map
        return op(q, k, v), op(q, k, v, eps=0.25, feature_map="elu1"), op(relu, k, v, "relu")

    first, second, third = to_coreml(both, feed).run(feed)
    assert relative_l2(first, expected(feed)) <= tolerance(NAME, "float32", "coreml")
    assert relative_l2(second, expected(feed, "elu1", 0.25)) <= tolerance(NAME, "float32", "coreml")
    assert relative_l2(third, expected(feed)) <= tolerance(NAME, "float32", "coreml")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_queries_without_features_give_zeros(to_coreml, precision):
    feed = draw(9)
    feed["q"][:, :, 4] = -1
    feed["k"][0, 0] = -2
    (got,) = to_coreml(call(), feed, precision=precision).run(feed)
    assert np.isfinite(got).all()
    assert not got[:, :, 4].any()
    assert not got[0, 0].any()


def test_small_features_keep_the_meaning_of_eps(to_coreml):
    feed = {name: array * np.float32(1e-3) for name, array in draw(50, 16).items()}
    (got,) = to_coreml(call(), feed).run(feed)
    assert relative_l2(got, expected(feed)) <= tolerance(NAME, "float32", "coreml")


CARE = {
    "stage-3": (196, 2, 20),
    "just-not-split": (511, 2, 24),
    "odd-runs": (1000, 2, 24),
    "4096": (4096, 3, 24),
    "4096-wide": (4096, 2, 64),
}
"""Tokens, heads, head_dim."""


@pytest.fixture(scope="module")
def half(to_coreml):
    """The cases in half precision: their feeds and a run of all."""
    cases = [(name, each) for name in CARE for each in ("relu", "elu1")]
    feeds = {name: halved(draw(tokens, d, d, 1, heads)) for name, (tokens, heads, d) in CARE.items()}
    function, feed = calls([(feature_map, feeds[name]) for name, feature_map in cases])
    program = to_coreml(function, feed, precision="fp16")
    return feeds, {numerics: dict(zip(cases, program.run(feed, numerics), strict=True)) for numerics in NUMERICS}


NUMERICS = ("typed", "fp16sum")


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
@pytest.mark.parametrize("name", CARE)
def test_half_precision(half, name, feature_map, numerics):
    """Whether sums are kept in float32 or, the pessimistic mode, added up in half precision."""
    feeds, answers = half
    error = relative_l2(answers[numerics][name, feature_map], expected(feeds[name], feature_map))
    assert error <= tolerance(NAME, "float16", "coreml")


def test_large_features_stay_finite_in_half_precision_at_4096_tokens(to_coreml):
    feed = halved(positive(draw(4096, 64, 64, 1, 1, scale=8)))
    function, feeds = calls([(feature_map, feed) for feature_map in FEATURE_MAPS])
    for feature_map, got in zip(FEATURE_MAPS, to_coreml(function, feeds, precision="fp16").run(feeds), strict=True):
        assert relative_l2(got, expected(feed, feature_map)) <= tolerance(NAME, "float16", "coreml"), feature_map


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dynamic_batch_and_tokens(to_coreml, precision):
    feed = draw(40)
    axes = {0: torch.export.Dim("B", min=1, max=4), 2: torch.export.Dim("N", min=2, max=4096)}
    program = to_coreml(call("elu1"), feed, precision=precision, dynamic=((axes,) * 3,))
    dtype = {"fp32": "float32", "fp16": "float16"}[precision]
    for tokens, batch in ((40, 2), (7, 1), (1000, 3)):
        other = halved(draw(tokens, batch=batch))
        (got,) = program.run(other)
        assert relative_l2(got, expected(other, "elu1")) <= tolerance(NAME, dtype, "coreml"), tokens


def test_few_ops(to_coreml):
    """CARE has twelve of these."""
    function, feed = calls([("relu", draw(40)), ("elu1", draw(40)), ("elu1", draw(1024))])
    assert to_coreml(function, feed).ops.total() <= 14 + 20 + 26
