"""BlockSparseAttention's portable body in stock onnxruntime, against the eager op in float64 (itself tested against the
reference): values, dtypes, opsets, what must not leak, and what it says of bad input."""

from __future__ import annotations

import re
import types
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import onnxsim
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import edgekit.custom_ops
from edgekit.custom_ops.block_sparse_attention import onnx_body, onnx_op
from edgekit.custom_ops.block_sparse_attention.reference import block_sparse_attention as reference
from edgekit.custom_ops.onnx_function import GUARD
from edgekit.custom_ops.registry import find_op
from edgekit.custom_ops.tolerances import relative_l2, tolerance
from edgekit.errors import ExportError, InputError
from edgekit.export.onnx import quiet

edgekit.custom_ops.register()

SPEC = find_op("BlockSparseAttention")
INPUTS = {"q": ["B", "Hq", "N", "D"], "k": ["B", "Hkv", "M", "D"], "v": ["B", "Hkv", "M", "D"]}
INPUTS["block_index"] = ["B", "Hm", "NQ", "K"]


def make_model(
    *attributes: dict[str, Any], opset: int = 20, dtype: int = TensorProto.FLOAT, shapes: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """One BlockSparseAttention node for each of `attributes`, all on the same inputs."""
    shapes = INPUTS if shapes is None else shapes
    types = dict.fromkeys("qkv", dtype) | {"block_index": TensorProto.INT32}
    inputs = [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in INPUTS]
    nodes = [
        helper.make_node("BlockSparseAttention", list(INPUTS), [f"o{n}"], domain="edgekit", **({"scale": 0.4} | each))
        for n, each in enumerate(attributes)
    ]
    outputs = [helper.make_tensor_value_info(f"o{n}", dtype, shapes["q"]) for n in range(len(nodes))]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("edgekit", 1)],
        ir_version=10,
        functions=SPEC.functions(opset, graph.node),
    )


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def draw(
    n: int = 65,
    m: int | None = None,
    d: int = 8,
    heads: tuple[int, int, int] = (2, 2, 1),
    blocks: tuple[int, int] = (16, 16),
    listed: int = 3,
    batch: int = 1,
    seed: int = 0,
    dtype: type[np.generic] = np.float32,
) -> dict[str, np.ndarray]:
    """q, k, v standard normal; lists with repeats and -1."""
    generator, m, (hq, hkv, hm) = np.random.default_rng(seed), m or n, heads
    sizes = {"q": (batch, hq, n, d), "k": (batch, hkv, m, d), "v": (batch, hkv, m, d)}
    feed = {name: generator.standard_normal(size).astype(dtype) for name, size in sizes.items()}
    lists = (batch, hm, -(-n // blocks[0]), listed)
    return feed | {"block_index": generator.integers(-1, -(-m // blocks[1]), lists, dtype=np.int32)}


def expect(feed: dict[str, np.ndarray], attributes: dict[str, Any], function: Any = None) -> np.ndarray:
    """The answer in float64 for the tensors as they are in `feed`."""
    function = function or torch.ops.edgekit.block_sparse_attention
    tensors = [torch.from_numpy(feed[name]) for name in INPUTS]
    options = {"scale": 0.4} | attributes | {"causal": bool(attributes.get("causal", 1))}
    return function(*(tensor.double() for tensor in tensors[:3]), tensors[3], **options).numpy()


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "N=1": ({"n": 1}, {}),
    "N=1,M=70": ({"n": 1, "m": 70, "listed": 2}, {}),
    "N=63,D=33": ({"n": 63, "d": 33}, {}),
    "N=65,D=60": ({"n": 65, "d": 60, "batch": 2}, {}),
    "N=200,M=261,bq=bk=64": ({"n": 200, "m": 261, "blocks": (64, 64)}, {}),
    "bq=32,bk=64": ({"n": 100, "m": 130, "blocks": (32, 64)}, {}),
    "bq=16,bk=48": ({"n": 65, "m": 100, "blocks": (16, 48), "listed": 2}, {}),
    "bq=48,bk=16": ({"n": 63, "blocks": (48, 16)}, {}),
    "bq=7,bk=5": ({"n": 33, "m": 40, "blocks": (7, 5), "listed": 6}, {}),
    "blocks-above-N": ({"n": 9, "m": 11, "blocks": (100, 100), "listed": 1}, {}),
    "GQA-8:2,Hm=1": ({"n": 33, "heads": (8, 2, 1)}, {}),
    "GQA-8:2,Hm=2": ({"n": 33, "heads": (8, 2, 2), "batch": 2}, {}),
    "GQA-8:2,Hm=8": ({"n": 33, "heads": (8, 2, 8), "batch": 2}, {}),
    "many-repeats": ({"n": 63, "listed": 20}, {}),
    "window=1": ({}, {"window": 1}),
    "window=20": ({"m": 80}, {"window": 20}),
    "window=40,bq=8,bk=24": ({"m": 80, "blocks": (8, 24)}, {"window": 40}),
    "window=70,bq=8,bk=12": ({"n": 150, "m": 161, "blocks": (8, 12), "listed": 14}, {"window": 70}),
    "window=2^40": ({}, {"window": 2**40}),
    "softcap": ({}, {"softcap": 1.5}),
    "scale": ({}, {"scale": -0.3}),
    "not-causal": ({"m": 80}, {"causal": 0}),
    "not-causal,M-not-whole": ({"m": 83, "listed": 6}, {"causal": 0}),
    "not-causal,window=2^63-1": ({}, {"causal": 0, "window": 2**63 - 1}),
    "not-causal,window": ({"m": 81, "listed": 6}, {"causal": 0, "window": 20}),
    "not-causal,window=50,bq=8,bk=4": (
        {"n": 120, "m": 131, "blocks": (8, 4), "listed": 30},
        {"causal": 0, "window": 50},
    ),
    "not-causal,softcap,Hm=2": ({"heads": (4, 2, 2)}, {"causal": 0, "softcap": 2.0}),
}
by_case = pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES.keys())


def with_blocks(sizes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    block_q, block_k = sizes.get("blocks", (16, 16))
    return {"block_q": block_q, "block_k": block_k} | options


@by_case
def test_the_body_in_onnxruntime(sizes, options):
    feed, attributes = draw(**sizes), with_blocks(sizes, options)
    model = make_model(attributes)
    onnx.checker.check_model(model, full_check=True)
    (got,) = run(model, feed)
    assert got.dtype == np.float32
    assert relative_l2(got, expect(feed, attributes)) <= tolerance("BlockSparseAttention", "float32", "portable")


@pytest.mark.parametrize("name", ["N=65,D=60", "GQA-8:2,Hm=2", "not-causal,window", "softcap"])
def test_half_precision_is_rounded_once(name):
    sizes, options = CASES[name]
    feed, attributes = draw(**sizes, dtype=np.float16), with_blocks(sizes, options)
    (got,) = run(make_model(attributes, dtype=TensorProto.FLOAT16), feed)
    assert got.dtype == np.float16
    assert relative_l2(got, expect(feed, attributes)) <= tolerance("BlockSparseAttention", "float16", "portable")


def test_half_precision_scores_beyond_65504():
    feed = draw(d=32, dtype=np.float16)
    feed["q"], feed["k"] = (np.abs(feed[name]) * np.float16(100) for name in "qk")
    attributes = {"block_q": 16, "block_k": 16, "scale": 1e-3}
    assert np.max(feed["q"].astype(np.float64) @ feed["k"].astype(np.float64).swapaxes(2, 3)) > 65504
    (got,) = run(make_model(attributes, dtype=TensorProto.FLOAT16), feed)
    assert relative_l2(got, expect(feed, attributes)) <= tolerance("BlockSparseAttention", "float16", "portable")


@pytest.mark.parametrize("opset", [18, 20, 21, 22, 23, 24])
def test_opsets(opset):
    feed, attributes = draw(m=81), {"block_q": 16, "block_k": 16}
    model = make_model(attributes, attributes | {"window": 9, "causal": 0}, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert {f.opset_import[0].version for f in model.functions} == {opset}
    for got, each in zip(run(model, feed), ({}, {"window": 9, "causal": 0}), strict=True):
        expected = expect(feed, attributes | each)
        assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float32", "portable")


# Where a query sees nothing, softmax is -inf - -inf; the body replaces what comes of it.
@pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")
@pytest.mark.parametrize("name", ["N=1", "bq=16,bk=48", "GQA-8:2,Hm=2", "window=20", "not-causal,window"])
def test_the_body_in_onnx_reference(name):
    """onnx's own evaluator: the body means the same outside onnxruntime."""
    sizes, options = CASES[name]
    feed, attributes = draw(**sizes), with_blocks(sizes, options)
    (got,) = onnx.reference.ReferenceEvaluator(make_model(attributes)).run(None, feed)
    assert relative_l2(got, expect(feed, attributes)) <= tolerance("BlockSparseAttention", "float32", "portable")


def test_onnxsim_keeps_node_and_body():
    feed, attributes = draw(), {"block_q": 16, "block_k": 16}
    model, same = onnxsim.simplify(make_model(attributes, attributes | {"causal": 0}))
    assert same
    assert [(node.op_type, node.overload) for node in model.graph.node] == [
        ("BlockSparseAttention", ""),
        ("BlockSparseAttention", "v2"),
    ]
    for got, each in zip(run(model, feed), ({}, {"causal": 0}), strict=True):
        expected = expect(feed, attributes | each)
        assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float32", "portable")


def test_attributes_left_out_take_their_defaults():
    feed = draw(n=130, blocks=(64, 64))
    (got,) = run(make_model({}), feed)
    assert relative_l2(got, expect(feed, {})) <= tolerance("BlockSparseAttention", "float32", "portable")


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": 0}], ids=["causal", "window", "not-causal"])
def test_rows_that_list_nothing_give_zeros(options):
    feed, attributes = draw(n=64), {"block_q": 16, "block_k": 16} | options
    feed["block_index"][:, :, 0] = -1
    feed["k"][:, :, :16] = feed["v"][:, :, :16] = np.nan  # what an empty list must not read
    feed["block_index"][:, :, 1:] = [1, 2, -1]
    (got,) = run(make_model(attributes), feed)
    assert np.array_equal(got[:, :, :16], np.zeros_like(got[:, :, :16]))
    assert np.isfinite(got).all()


@pytest.mark.parametrize("blocks", [(16, 16), (48, 16), (16, 48)], ids=str)
def test_queries_before_their_keys_give_zeros(blocks):
    """Only the last key block is listed: of each query block, a part sees it, or none."""
    feed, attributes = draw(n=64, m=70, blocks=blocks), {"block_q": blocks[0], "block_k": blocks[1]}
    last = -(-70 // blocks[1]) - 1
    feed["block_index"][:] = last
    (got,) = run(make_model(attributes), feed)
    first = last * blocks[1] - 6  # the first query that sees a key
    assert np.array_equal(got[:, :, :first], np.zeros_like(got[:, :, :first]))
    assert np.abs(got[:, :, first:]).min() > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 30}, {"causal": 0}], ids=["causal", "window", "not-causal"])
@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_listed_never_leaks(options, bad, value):
    feed, attributes = draw(n=73, listed=4), {"block_q": 16, "block_k": 16} | options
    lists = feed["block_index"]
    lists[lists == 4] = bad
    lists[:, :, 2] = [1 - bad, 2, -1, 2]
    clean = np.repeat(~(lists == bad).any(axis=3)[0, 0], 16)[:73]
    model = make_model(attributes)
    (expected,) = run(model, feed)
    for block in (slice(16 * bad, 16 * bad + 16), slice(64, 73)):
        feed["k"][:, :, block] = feed["v"][:, :, block] = value
    (got,) = run(model, feed)
    assert clean.any()
    assert np.array_equal(got[:, :, clean], expected[:, :, clean])


def test_a_nan_that_is_seen_shows():
    feed = draw(n=32)
    feed["block_index"][:] = 0
    feed["k"][:, :, 3] = np.nan
    (got,) = run(make_model({"block_q": 16, "block_k": 16}), feed)
    assert np.isnan(got[:, :, 3:]).all()


def test_one_body_for_nodes_that_agree_and_overloads_for_others():
    attributes = {"block_q": 16, "block_k": 16}
    model = make_model(attributes, attributes | {"causal": 1}, attributes | {"scale": 0.1}, attributes)
    assert [node.overload for node in model.graph.node] == ["", "", "v2", ""]
    assert [function.overload for function in model.functions] == ["", "v2"]
    feed = draw()
    got = run(model, feed)
    assert np.array_equal(got[0], got[1])
    assert relative_l2(got[2], expect(feed, attributes | {"scale": 0.1})) <= tolerance(
        "BlockSparseAttention", "float32", "portable"
    )


def sizes_of(**changes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"q": (1, 4, 40, 8), "k": (1, 2, 50, 8), "v": (1, 2, 50, 8), "block_index": (1, 1, 3, 2)} | changes


WRONG = {
    "q-3D": (sizes_of(q=(4, 40, 8)), "takes q [B, Hq, N, D]"),
    "index-5D": (sizes_of(block_index=(1, 1, 1, 3, 2)), "takes q [B, Hq, N, D]"),
    "index-0D": (sizes_of(block_index=()), "takes q [B, Hq, N, D]"),
    "empty-batch": ({name: (0, *size[1:]) for name, size in sizes_of().items()}, "every axis"),
    "empty-sequence": (
        {"q": (1, 4, 0, 8), "k": (1, 2, 0, 8), "v": (1, 2, 0, 8), "block_index": (1, 1, 0, 2)},
        "every axis",
    ),
    "no-key-heads": (sizes_of(k=(1, 0, 50, 8), v=(1, 0, 50, 8)), "every axis"),
    "no-list": (sizes_of(block_index=(1, 1, 3, 0)), "every axis"),
    "no-index-heads": (sizes_of(block_index=(1, 0, 3, 2)), "every axis"),
    "k-and-v-differ": (sizes_of(v=(1, 2, 49, 8)), "k and v of one shape"),
    "head-dims-differ": (sizes_of(q=(1, 4, 40, 7)), "k and v of one shape"),
    "batches-differ": (sizes_of(q=(2, 4, 40, 8)), "k and v of one shape"),
    "head-ratio": (sizes_of(q=(1, 3, 40, 8)), "multiple of the number of key heads"),
    "M-below-N": (sizes_of(q=(1, 4, 51, 8), block_index=(1, 1, 4, 2)), "at least as many keys as queries"),
    "index-rows": (sizes_of(block_index=(1, 1, 4, 2)), "ceil(N / block_q)"),
    "index-heads": (sizes_of(block_index=(1, 3, 3, 2)), "Hm one of 1, Hkv, Hq"),
    "index-batch": (sizes_of(block_index=(2, 1, 3, 2)), "block_index [B, Hm"),
}


SYMBOLS = {name: [f"{name}{axis}" for axis in range(4)] for name in INPUTS}
DECLARED = {
    f"{name}-{declared}": (sizes, message, shapes)
    for name, (sizes, message) in WRONG.items()
    for declared, shapes in (("no-shapes", dict.fromkeys(INPUTS)), ("symbols", SYMBOLS), ("numbers", sizes))
    if declared == "no-shapes" or all(len(size) == 4 for size in sizes.values())
}


@pytest.mark.parametrize(("sizes", "message", "shapes"), DECLARED.values(), ids=DECLARED.keys())
def test_wrong_shapes(sizes, message, shapes):
    """However much the model says of its shapes: the guard speaks, not some op in the body."""
    feed = {name: np.zeros(size, np.int32 if name == "block_index" else np.float32) for name, size in sizes.items()}
    with pytest.raises(Exception, match=re.escape(message)) as error:
        run(make_model({"block_q": 16, "block_k": 16}, shapes=shapes), feed)
    assert GUARD + "BlockSparseAttention" in str(error.value)


@pytest.mark.parametrize("name", ["q-3D", "index-5D", "index-0D"])
def test_a_model_that_declares_another_rank_does_not_load(name):
    """onnxruntime's own shape inference refuses it, before any guard can run."""
    with pytest.raises(Exception, match="ShapeInferenceError") as error:
        run(make_model({"block_q": 16, "block_k": 16}, shapes=WRONG[name][0]), {})
    assert type(error.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize("index", [99, 3, -2, -(2**31), 2**31 - 1])
def test_block_index_out_of_range(index):
    feed = draw(n=33)
    feed["block_index"][0, 0, 1, 1] = index
    with pytest.raises(Exception, match=f"{GUARD}BlockSparseAttention needs every block index in -1") as error:
        run(make_model({"block_q": 16, "block_k": 16}), feed)
    assert type(error.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale": 0.0}, "scale that is finite and not 0, got 0.0"),
        ({"scale": float("nan")}, "scale that is finite and not 0, got nan"),
        ({"scale": float("inf")}, "scale that is finite and not 0, got inf"),
        ({"scale": 1}, "scale as float, got 1"),
        ({"softcap": -1.0}, "softcap"),
        ({"window": -1}, "window"),
        ({"block_q": 0}, "block_q of at least 1, got 0"),
        ({"block_k": 16.0}, "block_k as int, got 16.0"),
        ({"causal": 2}, "takes causal 0 or 1; got 2"),
        ({"causal": -1}, "takes causal 0 or 1; got -1"),
        ({"softcap": 1e-40}, "softcap of 0 .* or a normal float32 number"),
        ({"is_causal": 1}, "takes the attributes scale, block_q, .*; got is_causal"),
        ({"block_q": 1 << 14, "block_k": 1 << 14}, "more than 67108864 entries, however short .* choose"),
    ],
    ids=lambda value: str(value).replace(" ", "") if isinstance(value, dict) else "",
)
def test_attributes_outside_the_contract_get_no_body(attributes, message):
    with pytest.raises(InputError, match=message):
        make_model(attributes)


def test_a_node_without_scale_gets_no_body():
    node = helper.make_node("BlockSparseAttention", list(INPUTS), ["o"], domain="edgekit")
    with pytest.raises(InputError, match="needs the attribute scale"):
        SPEC.functions(20, [node])


def test_masks_are_few():
    """What the body computes beforehand does not grow with the length: block 64, causal needs 4 masks at most."""
    attributes = onnx_op.structure(helper.make_node("BlockSparseAttention", [], [], scale=1.0))
    assert onnx_body._Distances.of(attributes).count <= 5
    wide = onnx_op.structure(helper.make_node("BlockSparseAttention", [], [], scale=1.0, window=10**6))
    assert onnx_body._Distances.of(wide).count <= 10


class Attention(torch.nn.Module):
    def forward(self, q, k, v, block_index):
        return torch.ops.edgekit.block_sparse_attention(q, k, v, block_index, 16, 16, window=40)


def test_torch_export_and_torch_onnx():
    """Dynamic batch and lengths survive, the scale is resolved, and the file runs at other sizes."""
    feed = draw(n=40, m=50, batch=2)
    axes = {"q": {0: "B", 2: "N"}, "k": {0: "B", 2: "M"}, "v": {0: "B", 2: "M"}, "block_index": {0: "B", 2: "R"}}
    key, translate = SPEC.translation()
    tensors = tuple(torch.from_numpy(feed[name]) for name in INPUTS)
    with quiet():  # warnings of torch's about torch
        program = torch.onnx.export(
            Attention().eval(),
            tensors,
            input_names=list(INPUTS),
            dynamic_shapes=axes,
            custom_translation_table={key: translate},
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    (node,) = model.graph.node
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "block_q": 16,
        "block_k": 16,
        "causal": 1,
        "scale": pytest.approx(8**-0.5),
        "softcap": 0.0,
        "window": 40,
    }
    model.functions.extend(SPEC.functions(20, model.graph.node))
    onnx.checker.check_model(model, full_check=True)
    other = draw(n=65, m=101, batch=1, seed=1)
    (got,) = run(model, other)
    expected = expect(other, {"block_q": 16, "block_k": 16, "scale": 8**-0.5, "window": 40})
    assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float32", "portable")


@pytest.mark.parametrize(
    ("blocks", "keys", "expected"),
    [
        ((64, 64), 40, (64, 64)),
        ((1 << 20, 1 << 20), 40, (40, 40)),
        ((1 << 26, 16), 40, (48, 16)),
        ((24, 1 << 26), 40, (24, 48)),
        ((1 << 26, 1 << 26), None, (1 << 26, 1 << 26)),
    ],
    ids=["small", "both", "queries", "keys", "symbolic"],
)
def test_blocks_that_no_body_can_hold_are_cut_to_a_fixed_length(blocks, keys, expected):
    """As the native kernels do: a block longer than the sequence is as good as one of that length."""
    shape = types.SimpleNamespace(shape=(1, 2, "M" if keys is None else keys, 8))
    translate = onnx_op.translation(lambda *_, **attributes: attributes)
    attributes = translate(shape, shape, shape, None, *blocks)
    assert (attributes["block_q"], attributes["block_k"]) == expected


def test_long_blocks_over_a_short_fixed_sequence():
    class Long(torch.nn.Module):
        def forward(self, q, k, v, block_index):
            return torch.ops.edgekit.block_sparse_attention(q, k, v, block_index, 1 << 20, 16, window=9)

    feed = draw(n=40, m=50, blocks=(1 << 20, 16))
    key, translate = SPEC.translation()
    with quiet():
        program = torch.onnx.export(
            Long().eval(),
            tuple(torch.from_numpy(feed[name]) for name in INPUTS),
            input_names=list(INPUTS),
            custom_translation_table={key: translate},
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    model.functions.extend(SPEC.functions(20, model.graph.node))
    (got,) = run(model, feed)
    expected = expect(feed, {"block_q": 1 << 20, "block_k": 16, "scale": 8**-0.5, "window": 9})
    assert relative_l2(got, expected) <= tolerance("BlockSparseAttention", "float32", "portable")


def test_a_symbolic_head_dim_needs_a_scale():
    class Value:
        shape = ("B", 2, "N", "D")

    translate = onnx_op.translation(lambda *inputs, **attributes: attributes)
    with pytest.raises(ExportError, match="fixed head_dim, or a scale"):
        translate(Value(), None, None, None)
    assert translate(Value(), None, None, None, scale=2)["scale"] == 2.0


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 24),
    more=st.integers(0, 9),
    d=st.integers(1, 9),
    heads=st.sampled_from([(1, 1, 1), (4, 2, 1), (4, 2, 2), (4, 2, 4), (3, 1, 3)]),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    listed=st.integers(1, 5),
    batch=st.integers(1, 2),
    options=st.fixed_dictionaries(
        {}, optional={"causal": st.sampled_from([0, 1]), "window": st.integers(0, 30), "softcap": st.just(2.0)}
    ),
    seed=st.integers(0, 99),
)
def test_any_call_equals_the_reference(n, more, d, heads, blocks, listed, batch, options, seed):
    feed = draw(n, n + more, d, heads, blocks, listed, batch, seed)
    attributes = {"block_q": blocks[0], "block_k": blocks[1]} | options
    (got,) = run(make_model(attributes), feed)
    np.testing.assert_allclose(got, expect(feed, attributes, reference), rtol=2e-5, atol=2e-6)
