"""Language models as packages for Core ML: functions on shared weights, states, text, and refusals in plain words.

Everything runs on the reference runtime; Apple's was never at hand.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import edgekit
from edgekit.cli.app import run_command
from edgekit.errors import ExportError, InputError
from edgekit.export.coreml_language import state_capacity
from edgekit.export.coreml_language_graphs import state_graphs
from edgekit.export.coreml_language_samples import StateTexts, stored_lengths
from edgekit.export.coreml_language_weights import stays_precise
from edgekit.export.language_samples import TextInputs
from edgekit.export.layers_coreml import compare_function_layers
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.models.sparse_attention import SparseAttention
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.coreml_generation import prefill_sizes, prefill_view
from edgekit.runtime.coreml_info import WEIGHTS
from edgekit.runtime.session import load
from edgekit.runtime.verification import verify_samples

pytest.importorskip("coremltools")

_SPEC = importlib.util.spec_from_file_location("decoders", Path(__file__).with_name("decoders.py"))
decoders = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(decoders)
bytes_decoder, llama_folder = decoders.bytes_decoder, decoders.llama_folder

SPARSE = SparseAttention(
    kind="dhsa",
    budget=32,
    block_size=8,
    local=8,
    decode="dense",
    predictor_heads=2,
    predictor_hidden=16,
    chunks_per_block=4,
    nms_radius=2,
    dense_last=6,
)
CONTEXT = 80


def relative(got, wanted):
    return float(np.linalg.norm(got.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


def logits_error(session, graph, states, lengths):
    """The largest relative error of the logits."""
    worst = 0.0
    for inputs in states.of(graph, lengths, seed=11):
        got, wanted = session.run(inputs), graph.run(inputs)
        worst = max(worst, relative(got["logits"], wanted["logits"]))
    return worst


@pytest.fixture(scope="module")
def decoder():
    return bytes_decoder(SPARSE, context=CONTEXT)


@pytest.fixture(scope="module")
def bundle(decoder, tmp_path_factory):
    """Gemma 2 with DHSA: a prefill function within the budget is dense, the one beyond it selects."""
    return edgekit.export(decoder, "coreml", tmp_path_factory.mktemp("gemma"), name="tiny", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama") / "small")


@pytest.fixture(scope="module")
def llama(folder, tmp_path_factory):
    """From a folder, in fp32, with logits of their own."""
    return edgekit.export(folder, "coreml", tmp_path_factory.mktemp("out"), precision="fp32", overrides={"context": 48})


class TestBundle:
    def test_what_it_holds(self, bundle):
        manifest = bundle.manifest
        assert manifest.precision == "fp16"
        assert manifest.coreml.functions == ("prefill_64", "prefill_80", "decode")
        assert manifest.coreml.function == "prefill_64"
        assert (manifest.coreml.deployment_target, manifest.coreml.specification_version) == ("iOS18", 9)
        assert manifest.decode.function == "decode"
        assert (manifest.generation.context, manifest.generation.layers) == (CONTEXT, 2)
        states = [(state.name, state.shape, state.dtype) for state in manifest.coreml.states]
        shape = (1, 2, CONTEXT, 16)
        assert states == [(f"{kind}_{layer}", shape, "float16") for layer in (0, 1) for kind in ("key", "value")]
        roles = {name: entry.role for name, entry in manifest.files.items() if entry.role != "swift"}
        assert (
            roles.items()
            >= {
                "model.mlpackage/Manifest.json": "package",
                "model.mlpackage/Data/com.apple.CoreML/model.mlmodel": "model",
                "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": "weights",
                "samples.npz": "samples",
                "samples-decode.npz": "samples",
            }.items()
        )
        assert Bundle.open(bundle.path).manifest == manifest

    def test_both_graphs_as_pure_functions(self, bundle):
        inputs = {spec.name: (spec.dtype, spec.shape) for spec in bundle.manifest.inputs}
        assert inputs["input_ids"] == ("int32", (1, 64))
        assert inputs["length"] == ("int32", (1,))
        assert inputs["past_key_values.1.value"] == ("float16", (1, 2, CONTEXT, 16))
        part = bundle.part("decode").manifest
        assert [str(spec) for spec in part.inputs][:2] == ["input_ids: int32[1, 1] < 259", "position: int32[1] < 80"]
        assert [spec.name for spec in part.outputs][:3] == ["logits", "present.0.key", "present.0.value"]

    def test_three_functions_hold_the_weights_once(self, bundle, decoder):
        """In fp16, with the tables of positions; the mask of a prompt is computed, or it would be most of the file."""
        parameters = sum(parameter.numel() for parameter in decoder.parameters())
        tables = 3 * 2 * CONTEXT * 8  # at most one per function
        assert 2 * parameters < bundle.manifest.files[WEIGHTS].size < 2 * (parameters + tables) + 20_000

    @pytest.mark.slow
    def test_equal_exports_are_equal_bytes(self, bundle, decoder, tmp_path):
        again = edgekit.export(decoder, "coreml", tmp_path, name="tiny", seed=3)
        assert again.manifest.files == bundle.manifest.files

    def test_what_inspect_says(self, bundle, capsys):
        assert run_command(["inspect", str(bundle.path)]) == 0
        printed = capsys.readouterr().out
        assert "a prompt is read in one pass of 64 or 80, in blocks of 8" in printed
        assert "checked on coreml-reference; never on Apple's Core ML" in printed

    def test_lint_advises_nothing_that_the_export_refuses(self, bundle):
        report = edgekit.lint(bundle, function="decode")
        remedies = {item.rule: item.remedy for item in report.advice}
        assert remedies["linear-layout"].endswith(": in the model itself")
        assert not any("--layout" in remedy for remedy in remedies.values())

    def test_verify_compares_every_function(self, bundle, decoder):
        checks = edgekit.verify(bundle, model=decoder).checks
        assert [check.against.partition(":")[0] for check in checks] == [
            *["prefill"] * 2, *["decode"] * 2, "prefill_80"]  # fmt: skip

    def test_figures_are_recorded(self, bundle):
        for part in bundle.parts().values():
            figures = part.manifest.verification
            assert figures["checked"]
            assert figures["tolerance"] == 5e-3
            assert {output["name"] for output in figures["outputs"]} >= {"logits", "present.1.key"}


class TestAnswers:
    @pytest.mark.parametrize("part", ["prefill", "decode"])
    def test_stored_samples_are_pytorchs(self, bundle, decoder, part):
        """The samples come from the decoder itself, not from the modules that were converted."""
        whole = bundle.parts()[part]
        graphs = {graph.name: graph for graph in state_graphs(decoder, CONTEXT)}
        graph = graphs[whole.manifest.coreml.function]
        for inputs, outputs in whole.samples():
            for name, array in graph.run(inputs).items():
                np.testing.assert_array_equal(outputs[name], array)
        assert verify_samples(load(whole, backend="coreml-reference"))

    def test_without_rounding_it_is_pytorch(self, bundle):
        """The graphs in fp32 on weights and states of fp16: what is left is the rounding of those alone."""
        for part in bundle.parts().values():
            check = verify_samples(load(part, backend="coreml-reference-fp32"), tolerance=2e-3)
            assert check

    def test_every_size_and_every_slot(self, bundle, decoder):
        graphs = state_graphs(decoder, CONTEXT)
        states = StateTexts(TextInputs(decoder, tokenizer_of("tiny", decoder.config, None), None), graphs)
        for graph in graphs[:-1]:
            session = load(prefill_view(bundle, graph.tokens), backend="coreml-reference")
            assert logits_error(session, graph, states, [1, 9, 33, graph.tokens - 1, graph.tokens]) < 5e-3
        session = load(bundle.part("decode"), backend="coreml-reference")
        assert logits_error(session, graphs[-1], states, [0, 1, 24, 25, CONTEXT - 1]) < 5e-3

    def test_fp32_is_within_its_bound(self, llama, folder):
        figures = [part.manifest.verification["outputs"] for part in llama.parts().values()]
        for outputs in figures:
            logits = next(output for output in outputs if output["name"] == "logits")
            assert logits["rel_l2"] < 1e-5
        assert llama.manifest.coreml.compute_precision == "fp32"
        assert llama.manifest.coreml.functions == ("prefill_48", "decode")
        assert edgekit.verify(llama, model=folder)

    @pytest.mark.slow
    @pytest.mark.parametrize("precision", ["int8", "int4", "palette6"])
    def test_weights_of_few_bits(self, precision, tmp_path, decoder):
        """The package computes what its bits stand for; tables of positions and the boundary predictor keep theirs.

        Both are larger than what is too small to be stored in few bits.
        """
        small = bytes_decoder(SPARSE, context=CONTEXT)
        made = edgekit.export(small, "coreml", tmp_path, name="tiny", precision=precision)
        assert made.manifest.coreml.compression["weights"] == precision
        parameters = sum(p.numel() for name, p in small.named_parameters() if "boundary" not in name)
        bits = {"int8": 8, "int4": 4, "palette6": 6}[precision]
        tables = 2 * 2 * CONTEXT * 8 * 2  # cosines and sines in fp16, of the prefill functions and of decode at most
        assert made.manifest.files[WEIGHTS].size < tables + parameters * (bits / 8) * 1.25 + 30_000
        for part in made.parts().values():
            assert verify_samples(load(part, backend="coreml-reference"), tolerance=5e-3)
        cost = made.report()["against_fp32"]
        assert 1e-4 < cost["decode"]["logits_rel_l2"] < (0.05 if precision == "int8" else 0.5)
        assert edgekit.verify(made, model=small)


@pytest.mark.parametrize(
    ("name", "stays"),
    [
        ("p_decoder_model_layers_0_mlp_up_proj_weight_to_fp16", False),
        ("p_decoder_model_embed_tokens_weight_to_fp16", False),
        ("p_decoder_boundary_predictor_enc_mha_in_proj_weight_to_fp16", True),
        ("b_decoder_model_rotary_cos_to_fp16", True),
        ("split_0", True),  # a piece of the boundary predictor's first layer
    ],
)
def test_what_stays_precise(name, stays):
    assert stays_precise(name) is stays


KINDS = {
    "dense": SparseAttention(kind="dense", block_size=8),
    "window": SparseAttention(kind="window", budget=32, block_size=8, local=8, decode="dense"),
    "block": SparseAttention(kind="block", budget=24, block_size=8, local=8, decode="dense"),
}
FAMILIES = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": 16,
        "sliding_window": 12,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_other_attentions(kind, tmp_path):
    """Their check at export is the test: every function against PyTorch, on stored and on fresh texts."""
    made = edgekit.export(bytes_decoder(KINDS[kind], context=48), "coreml", tmp_path, name=kind)
    assert made.manifest.generation.attention["kind"] == kind


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_folders_of_other_families(family, tmp_path):
    folder = llama_folder(tmp_path / "small", **FAMILIES[family])
    made = edgekit.export(folder, "coreml", tmp_path, overrides={"context": 40})
    assert made.manifest.verification["checked"]
    assert "tokenizer.json" in made.manifest.files


class TestText:
    def test_greedy_text_is_pytorchs(self, bundle, decoder):
        prompt, new = "The sea", 16  # within the budget, where all that was read is read again
        ids = [256, *prompt.encode()]
        answer = []
        for _ in range(new):
            tokens = torch.tensor([ids + answer])
            with torch.no_grad():
                answer.append(int(decoder(tokens)[0, -1].argmax()))
        got = edgekit.load_generator(bundle).generate(prompt, max_new_tokens=new, eos=())
        assert list(got.tokens[0]) == answer
        assert got.statistics.passes == (64,)

    def test_several_texts_each_as_alone(self, bundle):
        generator = edgekit.load_generator(bundle, backend="coreml-reference")
        prompts = ["A", "A longer one, that needs the second of both functions to read: seventy."]
        together = generator.generate(prompts, max_new_tokens=4, temperature=0.7, seed=5)
        alone = generator.generate(prompts[0], max_new_tokens=4, temperature=0.7, seed=5)
        assert together.tokens[0] == alone.tokens[0]
        assert together.statistics.passes == (80,)

    def test_the_command_line_says_that_it_is_slow(self, bundle, capsys):
        assert run_command(["run", str(bundle.path), "--prompt", "A list", "--max-new-tokens", "2", "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert len(printed["tokens"]) == 2
        assert any("reference runtime" in note for note in printed["notes"])

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"max_new_tokens": 100}, r"10 prompt and 100 new tokens are 110, but tiny-coreml holds 80"),
            ({"pass_tokens": 64}, r"reads a prompt in one of its fixed sizes, 64, 80"),
        ],
        ids=["beyond the state", "passes"],
    )
    def test_what_does_not_fit(self, bundle, arguments, words):
        with pytest.raises(InputError, match=words):
            edgekit.load_generator(bundle).generate("A letter.", **arguments)


@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        (SPARSE, {"deployment_target": "iOS17"}, "at least iOS18, and iOS17 was asked for"),
        (SparseAttention(kind="block", budget=24, block_size=8, local=8), {}, r"decode=sparse.*decode=dense"),
        (SPARSE, {"layout": "ane"}, "layout"),
        (SPARSE, {"input": "image"}, "input"),
        (SPARSE, {"shapes": "input_ids:1x8@int64<259"}, "--shape is not for language models"),
    ],
    ids=["too old", "sparse decoding", "layout", "image", "shape"],
)
def test_refusals(attention, options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        edgekit.export(bytes_decoder(attention, context=40), "coreml", tmp_path, name="tiny", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_context_beyond_what_a_package_takes():
    """The model was built for it, since it was asked for; a function of as many tokens would not end."""
    decoder = bytes_decoder(SPARSE, context=999_999)
    with pytest.raises(InputError, match=r"texts of up to 16,384 tokens.*got a context of 999,999"):
        state_capacity(decoder, {"context": 999_999})
    assert state_capacity(decoder, {}) == 2048
    assert state_capacity(bytes_decoder(SPARSE, context=4000), {"context": 4000}) == 4000


def test_a_context_beyond_the_models(tmp_path):
    """What the model was not built for is refused before anything is converted."""
    with pytest.raises(InputError, match="1 to 40 tokens, the model's context; got a capacity of 41"):
        state_graphs(bytes_decoder(SPARSE, context=40), 41)


def test_a_wrong_package_is_refused(tmp_path, monkeypatch):
    """One whose prefill scales its scores wrongly: nothing is left behind."""
    from edgekit.models import decoder_state_attention

    monkeypatch.setattr(decoder_state_attention, "_MASKED", 0.0)
    with pytest.raises(ExportError, match=r"prefill.* does not answer as PyTorch does"):
        edgekit.export(bytes_decoder(KINDS["dense"], context=40), "coreml", tmp_path, name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_what_samples_hold():
    """A text beyond the budget of a sparse attention is among them, unless it is too long for a sample."""
    assert stored_lengths("prefill", SPARSE, 80) == (21, 61, 1)
    assert stored_lengths("decode", SPARSE, 30) == (21, 29, 1, 0)


def test_names_of_the_prefill_functions(bundle):
    assert prefill_sizes(bundle) == {64: "prefill_64", 80: "prefill_80"}


class TestLayers:
    def test_a_good_package_passes(self, bundle, decoder):
        result = edgekit.verify(bundle, model=decoder, layers=True)
        assert result, result.layers.first_bad
        modules = {layer.module for layer in result.layers.layers}
        assert {"decoder.model.layers.1.mlp.down_proj", "decoder.model.norm"} <= modules
        assert len(result.layers.layers) > 200
        assert any("Apple's runtime" in note for note in result.not_checked)

    def test_the_layer_with_another_weight_is_named(self, bundle, decoder):
        other = copy.deepcopy(decoder)
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight.neg_()
        graph = next(graph for graph in state_graphs(other, CONTEXT) if graph.name == bundle.manifest.coreml.function)
        report = compare_function_layers(bundle, graph, 0.0125)
        assert not report
        assert report.first_bad.module == "decoder.model.layers.1.mlp.up_proj"
