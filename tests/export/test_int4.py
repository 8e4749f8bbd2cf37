"""Weights of four bits: what the bits stand for, one copy for embedding and logits, and an honest verification."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import edgekit
from edgekit.errors import ExportError
from edgekit.export.int4 import BLOCK, Int4, pack, packed_weights
from edgekit.export.weights_file import WeightsFile, external
from edgekit.runtime.session import load
from edgekit.runtime.tolerances import INT4_LOGITS_REL_L2, output_tolerance

_SPEC = importlib.util.spec_from_file_location("decoders", Path(__file__).with_name("decoders.py"))
decoders = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(decoders)


@pytest.fixture(scope="module")
def decoder():
    return decoders.bytes_decoder()


@pytest.fixture(scope="module")
def bundle(decoder, converted_once, tmp_path_factory):
    return edgekit.export(decoder, "onnx", tmp_path_factory.mktemp("int4"), name="tiny", precision="int4")


@pytest.mark.parametrize("shape", [(5, 32), (259, 64), (7, 45), (3, 1), (64, 96)])
def test_the_bits_stand_for_the_nearest_of_sixteen_levels(shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    packed = pack(weight)
    restored = packed.unpacked()
    assert restored.shape == shape
    for start in range(0, shape[1], BLOCK):
        part, found = weight[:, start : start + BLOCK], restored[:, start : start + BLOCK]
        span = np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)  # zero is one of the levels
        assert (np.abs(part - found) <= span[:, None] / 15 * 1.01 + 1e-6).all()


def product(weight, *, look_up=False):
    """A graph that multiplies with `weight` [rows, columns], turned, or looks up its rows; and its weights."""
    rows, columns = weight.shape
    make = onnx.helper.make_tensor_value_info
    if look_up:
        node, given = onnx.helper.make_node("Gather", ["w", "x"], ["y"]), make("x", 7, ["N"])
        initializer, weights = external("w", 1, [rows, columns]), {"w": lambda: weight}
    else:
        node, given = onnx.helper.make_node("MatMul", ["x", "w.T"], ["y"]), make("x", 1, ["N", columns])
        initializer, weights = external("w.T", 1, [columns, rows]), {"w.T": lambda: weight.T}
    graph = onnx.helper.make_graph([node], "g", [given], [make("y", 1, None)], [initializer])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), weights


def run(model, weights, tmp_path, x):
    with WeightsFile(tmp_path / "weights.bin", "weights.bin") as file:
        file.place(model, weights)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("columns", [32, 64, 45])
def test_a_product_computes_with_these_weights(tmp_path, columns):
    weight = np.random.default_rng(1).standard_normal((33, columns)).astype(np.float32)
    model, weights = product(weight)
    quantizer = Int4(precise_keys=False)
    quantizer.apply(model, weights)
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    assert "w.T" not in weights
    x = np.random.default_rng(2).standard_normal((5, columns)).astype(np.float32)
    expected = x @ quantizer.packed["w"].unpacked().T
    error = np.linalg.norm(run(model, weights, tmp_path, x) - expected) / np.linalg.norm(expected)
    assert error < 0.03  # x is rounded to eight bits


def test_a_look_up_gives_these_weights(tmp_path):
    weight = np.random.default_rng(1).standard_normal((50, 64)).astype(np.float32)
    model, weights = product(weight, look_up=True)
    quantizer = Int4(precise_keys=False)
    quantizer.apply(model, weights)
    assert [node.op_type for node in model.graph.node] == ["GatherBlockQuantized"]
    rows = np.array([49, 0, 7], np.int64)
    np.testing.assert_array_equal(run(model, weights, tmp_path, rows), quantizer.packed["w"].unpacked()[rows])


def test_an_embedding_of_broken_blocks_is_one_matrix_in_both_of_its_places():
    """Rows cannot be looked up in it packed, so the logits must not come from a packed one either."""
    embedding, other = (np.random.default_rng(seed).standard_normal((50, 45)).astype(np.float32) for seed in (0, 1))
    model, weights = product(other)
    model.graph.node.insert(0, onnx.helper.make_node("Gather", ["embedding", "ids"], ["rows"]))
    model.graph.node.insert(1, onnx.helper.make_node("Gemm", ["rows", "embedding"], ["scores"], transB=1))
    model.graph.initializer.append(external("embedding", 1, [50, 45]))
    weights["embedding"] = lambda: embedding
    quantizer = Int4(precise_keys=False)
    quantizer.apply(model, weights)
    assert [node.op_type for node in model.graph.node] == ["Gather", "Gemm", "MatMulNBits"]
    assert set(quantizer.packed) == {"w"}
    assert "embedding" in weights


def test_nothing_to_quantize():
    model, _ = product(np.ones((4, 4), np.float32))
    with pytest.raises(ExportError, match="int4 found no weights to quantize"):
        Int4(precise_keys=False).apply(model, {})


def test_a_boundary_predictor_is_left_alone():
    weight = np.ones((64, 64), np.float32)
    model, _ = product(weight)
    model.graph.node[0].input[1] = model.graph.initializer[0].name = "boundary_predictor.mlp.0.weight.T"
    with pytest.raises(ExportError, match="no weights"):
        Int4(precise_keys=True).apply(model, {"boundary_predictor.mlp.0.weight.T": lambda: weight})


class TestBundle:
    def test_its_graphs(self, bundle):
        assert bundle.name == "tiny-onnx-int4"
        for part in bundle.parts().values():
            ops = part.manifest.ops
            assert ops["com.microsoft::MatMulNBits"] == 2 * 7 + 1
            assert ops["com.microsoft::GatherBlockQuantized"] == 1
            assert "Gemm" not in ops
        assert bundle.manifest.opsets["com.microsoft"] == 1
        assert bundle.size < 0.6 * 4 * bundle.manifest.model.parameters + 400_000

    def test_embedding_and_logits_share_their_bits(self, bundle):
        for name in ("model.onnx", "decode.onnx"):
            graph = onnx.load_from_string(bundle.read(name)).graph
            places = {
                item.name: tuple(entry.value for entry in item.external_data)
                for item in graph.initializer
                if item.name.startswith("model.embed_tokens.weight.int4")
            }
            assert len(places) == 2
            assert len(set(places.values())) == 1

    def test_the_weights_that_it_holds(self, bundle, decoder):
        packed = packed_weights(bundle)
        assert len(packed) == 15
        state = decoder.state_dict()
        for name, weight in packed.items():
            error = np.linalg.norm(weight.unpacked() - state[name].numpy()) / np.linalg.norm(state[name].numpy())
            assert 0.02 < error < 0.15, name
        again = packed_weights(bundle.pack())
        assert all((again[name].values == weight.values).all() for name, weight in packed.items())

    def test_verify_has_three_references(self, bundle, decoder):
        result = edgekit.verify(bundle, model=decoder)
        assert result
        checks = {check.against: check.outputs[0] for check in result.checks}
        for part in ("prefill", "decode"):
            live = f"{part}: live PyTorch on fresh text"
            assert checks[f"{part}: stored PyTorch outputs"].tolerance == output_tolerance("int4")
            assert 1e-5 < checks[f"{live}, the same weights"].rel_l2 < output_tolerance("int4")
            assert checks[f"{live}, the same weights, products in fp32"].rel_l2 < output_tolerance("fp32")
            cost = checks[f"{live}, weights before int4"]
            assert 0.02 < cost.rel_l2 < INT4_LOGITS_REL_L2
            assert cost.top1_agreement is not None
        assert set(bundle.report()["against_fp32"]) == {"prefill", "decode"}

    def test_the_decoder_stays_as_it_was(self, bundle, decoder):
        edgekit.verify(bundle, model=decoder)
        fresh = decoders.bytes_decoder().state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in decoder.state_dict().items())

    def test_packed(self, bundle, tmp_path):
        packed = bundle.pack(tmp_path / "t.edge.zip")
        for part in packed.parts().values():
            inputs, outputs = next(iter(part.samples()))
            error = load(part).run(inputs)["logits"] - outputs["logits"]
            assert np.linalg.norm(error) < output_tolerance("int4") * np.linalg.norm(outputs["logits"])
