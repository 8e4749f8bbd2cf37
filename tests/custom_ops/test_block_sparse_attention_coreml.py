"""BlockSparseAttention lowered to Core ML, on the reference runtime, against the eager op in float64 (itself tested
against the reference)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.custom_ops.block_sparse_attention import coreml
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import ExportError

NAME = "BlockSparseAttention"
TARGETS = ("iOS16", "iOS17", "iOS18")


def draw(
    n: int = 65,
    m: int | None = None,
    d: int = 8,
    heads: tuple[int, int, int] = (2, 2, 1),
    blocks: tuple[int, int] = (16, 16),
    listed: int = 3,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """q, k, v standard normal, of half-precision numbers; lists with repeats and -1."""
    generator, m, (hq, hkv, hm) = np.random.default_rng(seed), m or n, heads
    sizes = {"q": (batch, hq, n, d), "k": (batch, hkv, m, d), "v": (batch, hkv, m, d)}
    feed = {name: generator.standard_normal(size).astype(np.float16).astype(np.float32) for name, size in sizes.items()}
    lists = (batch, hm, -(-n // blocks[0]), listed)
    return feed | {"block_index": generator.integers(-1, -(-m // blocks[1]), lists, dtype=np.int32)}


def causal_lists(n: int, size: int, listed: int, heads: int, seed: int = 0) -> np.ndarray:
    """As DHSA makes them: own block, first block, and others before; -1 where there are fewer."""
    generator = np.random.default_rng(seed)
    rows = -(-n // size)
    index = np.full((1, heads, rows, listed), -1, np.int32)
    for h in range(heads):
        for row in range(rows):
            others = generator.permutation(np.arange(1, row))[: max(0, listed - 2)] if row > 1 else []
            blocks = list(dict.fromkeys([row, 0, *others]))[:listed]
            index[0, h, row, : len(blocks)] = blocks
    return index


def expected(feed: dict[str, np.ndarray], options: dict[str, Any]) -> np.ndarray:
    q, k, v, index = (torch.from_numpy(array) for array in feed.values())
    return torch.ops.edgekit.block_sparse_attention(q.double(), k.double(), v.double(), index, **options).numpy()


def call(options: dict[str, Any]) -> Any:
    return lambda q, k, v, block_index: torch.ops.edgekit.block_sparse_attention(q, k, v, block_index, **options)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "N=1": ({"n": 1}, {}),
    "N=1,M=70": ({"n": 1, "m": 70, "listed": 2}, {}),
    "N=63,D=33": ({"n": 63, "d": 33}, {}),
    "N=65,D=60,B=2": ({"n": 65, "d": 60, "batch": 2}, {}),
    "bq=32,bk=64": ({"n": 100, "m": 130, "blocks": (32, 64), "listed": 2}, {}),
    "bq=7,bk=5": ({"n": 33, "m": 40, "blocks": (7, 5), "listed": 6}, {}),
    "blocks-above-N": ({"n": 9, "m": 11, "blocks": (100, 100), "listed": 1}, {}),
    "GQA-8:2,Hm=1": ({"n": 33, "heads": (8, 2, 1), "listed": 2}, {}),
    "GQA-8:2,Hm=1,B=2": ({"n": 33, "heads": (8, 2, 1), "batch": 2, "listed": 2}, {}),
    "GQA-8:2,Hm=2,B=2": ({"n": 33, "heads": (8, 2, 2), "batch": 2, "listed": 2}, {}),
    "GQA-8:2,Hm=8,B=2": ({"n": 33, "heads": (8, 2, 8), "batch": 2, "listed": 2}, {}),
    "MQA-4:1,Hm=4": ({"n": 33, "heads": (4, 1, 4), "listed": 2}, {}),
    "one-entry": ({"listed": 1}, {}),
    "window=1": ({}, {"window": 1}),
    "window=20": ({"m": 80}, {"window": 20}),
    "window=40,bq=8,bk=24": ({"m": 80, "blocks": (8, 24)}, {"window": 40}),
    "window=2^40": ({}, {"window": 2**40}),
    "softcap": ({}, {"softcap": 1.5}),
    "softcap,window,GQA": ({"heads": (4, 2, 2)}, {"softcap": 1.5, "window": 30}),
    "scale": ({}, {"scale": -0.3}),
    "not-causal": ({"m": 80}, {"causal": False}),
    "not-causal,M-not-whole": ({"m": 83, "listed": 4}, {"causal": False}),
    "not-causal,window": ({"m": 81, "listed": 4}, {"causal": False, "window": 20}),
    "dense": ({"listed": 8}, {}),
    "dense,GQA-8:2,Hm=1": ({"heads": (8, 2, 1), "listed": 5}, {}),
    "dense,GQA-8:2,Hm=2,B=2": ({"heads": (8, 2, 2), "listed": 5, "batch": 2}, {"softcap": 2.0}),
    "dense,GQA-8:2,Hm=8": ({"heads": (8, 2, 8), "listed": 5, "m": 70}, {"window": 30}),
    "dense,not-causal,M-not-whole": ({"m": 83, "listed": 6}, {"causal": False}),
    "dense,not-causal,window": ({"m": 81, "listed": 6}, {"causal": False, "window": 20}),
}


def options_of(sizes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    block_q, block_k = sizes.get("blocks", (16, 16))
    return {"block_q": block_q, "block_k": block_k} | options


def random_case(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    generator = np.random.default_rng(seed)
    n = int(generator.integers(1, 40))
    sizes: dict[str, Any] = {"n": n, "m": n + int(generator.integers(0, 10)), "seed": seed}
    sizes["heads"] = [(1, 1, 1), (4, 2, 1), (4, 2, 2), (4, 2, 4), (3, 1, 3)][generator.integers(5)]
    sizes["blocks"] = tuple(int(size) for size in generator.integers(1, 13, 2))
    sizes |= {name: int(generator.integers(1, most)) for name, most in (("listed", 6), ("batch", 3), ("d", 10))}
    options = {"causal": bool(generator.integers(2)), "window": int(generator.integers(0, 30)), "scale": 0.4}
    return sizes, options | {"softcap": float(generator.choice([0.0, 2.0]))}


CASES |= {f"random-{seed}": random_case(seed) for seed in range(10)}


class Prepared:
    """Cases in one program: a conversion of one takes as long as that of ten."""

    def __init__(self, to_coreml: Any, names: list[str], target: str, precision: str) -> None:
        self.feeds = {name: draw(**CASES[name][0]) for name in names}
        self.options = {name: options_of(*CASES[name]) for name in names}

        def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            groups = zip(*(tensors[start::4] for start in range(4)), strict=True)
            return tuple(call(self.options[name])(*group) for name, group in zip(names, groups, strict=True))

        feed = {f"{name}{key}": array for name, each in self.feeds.items() for key, array in each.items()}
        self.program = to_coreml(function, feed, target, precision)
        self.answers = dict(zip(names, self.program.run(feed), strict=True))

    def error(self, name: str) -> float:
        return relative_l2(self.answers[name], expected(self.feeds[name], self.options[name]))


def check_ops(prepared: Prepared, target: str) -> None:
    """Which ops do the work: attention where the target has it, two gathers for each sparse case."""
    fused = sum(not options.get("softcap") for options in prepared.options.values())
    assert prepared.program.ops["scaled_dot_product_attention"] == (fused if target == "iOS18" else 0)
    sparse = sum(
        feed["block_index"].shape[3] < -(-feed["k"].shape[2] // prepared.options[name]["block_k"])
        for name, feed in prepared.feeds.items()
    )
    assert 0 < sparse < len(prepared.feeds)
    assert prepared.program.ops["gather"] == 2 * sparse


# Each case on one of the two targets that differ most; the slow test has all cases on all targets.
SHARE = {"iOS16": list(CASES)[::2], "iOS18": list(CASES)[1::2]}


@pytest.fixture(scope="module", params=SHARE)
def share(request, to_coreml):
    return request.param, Prepared(to_coreml, SHARE[request.param], request.param, "fp32")


def test_equals_the_reference(share):
    target, prepared = share
    errors = {name: prepared.error(name) for name in SHARE[target]}
    assert {name: error for name, error in errors.items() if error > tolerance(NAME, "float32", "coreml")} == {}


def test_which_ops_do_the_work(share):
    check_ops(share[1], share[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_all_cases_on_all_targets(to_coreml, target):
    prepared = Prepared(to_coreml, list(CASES), target, "fp32")
    errors = {name: prepared.error(name) for name in CASES}
    assert {name: error for name, error in errors.items() if error > tolerance(NAME, "float32", "coreml")} == {}
    check_ops(prepared, target)


def test_ios17_gathers_per_head(to_coreml):
    """Of what iOS 17 lowers, only the gather differs from iOS 16, and only the rest from iOS 18."""
    names = [name for name in CASES if name.startswith(("N=65", "GQA-8:2,Hm=2", "MQA", "softcap,window"))]
    prepared = Prepared(to_coreml, names, "iOS17", "fp32")
    for name in names:
        assert prepared.error(name) <= tolerance(NAME, "float32", "coreml"), name
    assert prepared.program.ops["scaled_dot_product_attention"] == 0


HALF = ["N=63,D=33", "GQA-8:2,Hm=8,B=2", "softcap,window,GQA", "not-causal,window", "dense,GQA-8:2,Hm=1"]


SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=["iOS16", pytest.param("iOS17", marks=SLOW), "iOS18"])
def half_cases(request, to_coreml):
    return Prepared(to_coreml, HALF, request.param, "fp16")


@pytest.mark.parametrize("name", HALF)
def test_half_precision(half_cases, name):
    assert half_cases.error(name) <= tolerance(NAME, "float16", "coreml")


BLOCKS = {"block_q": 16, "block_k": 16}
VARIANTS: dict[str, dict[str, Any]] = {"causal": {}, "window": {"window": 9}, "not-causal": {"causal": False}}


class Patterns:
    """All `VARIANTS` of 64 queries and 70 keys in one program, with 3 blocks listed, and with all 5."""

    def __init__(self, to_coreml: Any, target: str, precision: str) -> None:
        def function(q, k, v, few, many):
            op = torch.ops.edgekit.block_sparse_attention
            return tuple(op(q, k, v, index, **BLOCKS, **each) for index in (few, many) for each in VARIANTS.values())

        self.precision = precision
        self.program = to_coreml(function, self.feed([[0, 1, 2]] * 4), target, precision)

    def feed(self, lists: list[list[int]]) -> dict[str, np.ndarray]:
        """The inputs with these four lists of three blocks."""
        feed = draw(n=64, m=70)
        feed["block_index"] = np.array([[lists]], np.int32)
        many = np.pad(feed["block_index"], [(0, 0), (0, 0), (0, 0), (0, 2)], constant_values=-1)
        return feed | {"many": many}

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [f"{kind}-{name}" for kind in ("sparse", "dense") for name in VARIANTS]
        return dict(zip(names, self.program.run(feed), strict=True))

    def expected(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        four = {name: array for name, array in feed.items() if name != "many"}
        answers = {name: expected(four, BLOCKS | each) for name, each in VARIANTS.items()}
        return {f"{kind}-{name}": answer for kind in ("sparse", "dense") for name, answer in answers.items()}

    def check(self, feed: dict[str, np.ndarray]) -> None:
        bound = tolerance(NAME, {"fp32": "float32", "fp16": "float16"}[self.precision], "coreml")
        for name, (got, want) in zip(
            self.expected(feed), zip(self.run(feed).values(), self.expected(feed).values(), strict=True), strict=True
        ):
            assert relative_l2(got, want) <= bound, name
            assert not got[~want.any(axis=3)].any(), name


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("iOS16", "fp16"), id="iOS16-fp16"),
        pytest.param(("iOS17", "fp32"), id="iOS17-fp32", marks=SLOW),
        pytest.param(("iOS18", "fp32"), id="iOS18-fp32", marks=SLOW),
        pytest.param(("iOS18", "fp16"), id="iOS18-fp16"),
    ],
)
def patterns(request, to_coreml):
    return Patterns(to_coreml, *request.param)


def test_rows_that_see_nothing_give_zeros(patterns):
    """The first two lists are empty; of the others, some queries see no key."""
    feed = patterns.feed([[-1, -1, -1], [-1, -1, -1], [2, 4, -1], [4, -1, -1]])
    assert all((~want.any(axis=3)).any() for want in patterns.expected(feed).values())
    patterns.check(feed)


def test_lists_of_nothing_at_all(patterns):
    for got in patterns.run(patterns.feed([[-1, -1, -1]] * 4)).values():
        assert np.array_equal(got, np.zeros_like(got))


def test_a_repeated_block_counts_once(patterns):
    patterns.check(patterns.feed([[0, 0, 0], [1, 0, 1], [2, 2, 1], [0, -1, 0]]))


def test_what_is_not_listed_never_leaks(patterns):
    """A row reads blocks of its own where its list is short, so that a NaN elsewhere stays there."""
    feed = patterns.feed([[-1, -1, -1], [1, -1, -1], [-1, 2, 1], [3, -1, 0]])
    clean = patterns.run(feed)
    feed["k"][:, :, :16] = feed["v"][:, :, :16] = np.nan
    for name, got in patterns.run(feed).items():
        if name.startswith("sparse"):  # where all blocks could be listed, all are read
            assert np.array_equal(got[:, :, :48], clean[name][:, :, :48]), name
    assert np.isnan(patterns.run(feed)["sparse-causal"][:, :, 48:]).all()


@pytest.mark.parametrize("target", ["iOS17", "iOS18"])
def test_scores_beyond_65504_in_half_precision(to_coreml, target):
    """The scale is applied before the product; on iOS 18 Core ML's own op divides."""
    feed = draw(n=64, d=32)
    feed["q"], feed["k"] = (np.abs(feed[name]) * 100 for name in "qk")
    attributes = {"block_q": 16, "block_k": 16, "scale": 1e-3}
    assert np.max(feed["q"] @ feed["k"].swapaxes(2, 3)) > 65504
    (got,) = to_coreml(call(attributes), feed, target, "fp16").run(feed)
    assert np.isfinite(got).all()


DHSA = {
    "own-lists": (4096, (8, 4, 4), 64, 8, {}),
    "shared-lists,softcap": (4096, (8, 2, 1), 64, 12, {"softcap": 50.0}),
    "window": (4096, (4, 1, 1), 64, 9, {"window": 512}),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param("own-lists", "iOS16", marks=SLOW),
        pytest.param("own-lists", "iOS18", marks=SLOW),
        ("shared-lists,softcap", "iOS18"),
        ("window", "iOS18"),
    ],
)
def test_4096_tokens_in_half_precision(to_coreml, name, target):
    n, heads, size, listed, options = DHSA[name]
    feed = draw(n, d=64, heads=heads, blocks=(size, size), listed=listed)
    feed["block_index"] = causal_lists(n, size, listed, heads[2])
    attributes = {"block_q": size, "block_k": size} | options
    (got,) = to_coreml(call(attributes), feed, target, "fp16").run(feed)
    q, k, v, index = (torch.from_numpy(array) for array in feed.values())
    want = torch.ops.edgekit.block_sparse_attention(q, k, v, index, **attributes)  # float64 takes four times as long
    assert relative_l2(got, want) <= tolerance(NAME, "float16", "coreml")


@pytest.mark.parametrize(
    ("listed", "target"),
    [
        pytest.param(3, "iOS16", id="sparse-iOS16"),
        pytest.param(3, "iOS17", id="sparse-iOS17", marks=SLOW),
        pytest.param(12, "iOS17", id="dense-iOS17", marks=SLOW),
        pytest.param(12, "iOS18", id="dense-iOS18"),
    ],
)
def test_long_sequences_are_cut_into_parts(to_coreml, monkeypatch, listed, target):
    """Memory: with a small limit the same answers come from parts, and no tensor is larger than the limit asks."""
    monkeypatch.setattr(coreml, "ENTRIES", 8 * 48 * 32)
    feed = draw(n=180, d=8, heads=(4, 2, 2), listed=listed)
    attributes = {"block_q": 16, "block_k": 16, "window": 70}
    program = to_coreml(call(attributes), feed, target)
    (got,) = program.run(feed)
    assert relative_l2(got, expected(feed, attributes)) <= tolerance(NAME, "float32", "coreml")
    attention = "scaled_dot_product_attention" if target == "iOS18" else "softmax"
    assert program.ops[attention] == {3: 3, 12: 12}[listed]
    if target != "iOS18":
        scores = max(v.type.elements for op in program.operations for v in op.outputs if op.op_type == "softmax")
        assert scores <= coreml.ENTRIES


def test_dynamic_batch(to_coreml):
    feed, attributes = draw(n=33, heads=(4, 2, 1), listed=2, batch=2), {"block_q": 16, "block_k": 16}
    batch = {0: torch.export.Dim("B", min=1, max=8)}
    program = to_coreml(call(attributes), feed, "iOS18", dynamic=((batch,) * 4,))
    for size in (1, 2, 5):
        other = draw(n=33, heads=(4, 2, 1), listed=2, batch=size, seed=size)
        (got,) = program.run(other)
        assert relative_l2(got, expected(other, attributes)) <= tolerance(NAME, "float32", "coreml"), size


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # of coremltools
def test_dynamic_sizes_that_no_program_takes(to_coreml):
    feed, attributes = draw(n=33, heads=(4, 2, 1), listed=2, batch=2), {"block_q": 16, "block_k": 16}
    batch = {0: torch.export.Dim("B", min=1, max=8)}
    with pytest.raises(ExportError, match="dynamic batch needs iOS 17"):
        to_coreml(call(attributes), feed, "iOS16", dynamic=((batch,) * 4,))
    keys = {2: torch.export.Dim("M", min=33, max=100)}
    with pytest.raises(ExportError, match="needs fixed lengths and heads in Core ML"):
        to_coreml(call(attributes), feed, "iOS17", dynamic=(({}, keys, keys, {}),))


def test_how_many_ops_there_are(to_coreml):
    """For the record of what a block of a language model costs: GQA, a list per key head, no tails."""
    feed = draw(n=64, heads=(4, 2, 2), listed=2)
    assert to_coreml(call({"block_q": 16, "block_k": 16}), feed, "iOS18").ops.total() <= 42
