"""Language models as bundles: two graphs on one file of weights, checked against PyTorch, refused in plain words."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgekit
from edgekit.cli.app import run_command
from edgekit.errors import ExportError, InputError, UnknownNameError, WeightsError
from edgekit.export.language_graphs import LanguageGraph, flat_cache
from edgekit.export.tokenizer_info import tokenizer_of
from edgekit.export.weights_file import INLINE_BYTES
from edgekit.models.sparse_attention import SparseAttention
from edgekit.runtime.manifest import DimRange
from edgekit.runtime.session import load

_SPEC = importlib.util.spec_from_file_location("decoders", Path(__file__).with_name("decoders.py"))
decoders = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(decoders)
BLOCK, bytes_decoder, llama_folder = decoders.BLOCK, decoders.bytes_decoder, decoders.llama_folder


@pytest.fixture(scope="module")
def decoder():
    return bytes_decoder()


@pytest.fixture(scope="module")
def bundle(decoder, converted_once, tmp_path_factory):
    """A Gemma 2 with block-sparse attention, its graphs and their check included."""
    return edgekit.export(decoder, "onnx", tmp_path_factory.mktemp("gemma"), name="tiny", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_folder(tmp_path_factory.mktemp("llama") / "small")


@pytest.fixture(scope="module")
def llama(folder, converted_once, tmp_path_factory):
    """From a folder, with logits of their own and dense attention."""
    return edgekit.export(folder, "onnx", tmp_path_factory.mktemp("out"), overrides={"context": 64})


class TestBundle:
    def test_what_it_holds(self, bundle):
        manifest = bundle.manifest
        roles = {name: entry.role for name, entry in manifest.files.items()}
        assert roles == {
            "weights.bin": "weights",
            "model.onnx": "model",
            "decode.onnx": "decode",
            "samples.npz": "samples",
            "samples-decode.npz": "samples",
        }
        assert manifest.model_file == "model.onnx"
        generation = manifest.generation
        assert (generation.context, generation.layers, generation.block_size) == (96, 2, BLOCK)
        assert generation.pass_tokens % BLOCK == 0
        assert generation.attention == {
            "kind": "block", "budget": 32, "local": 8, "decode": "sparse", "chunks_per_block": 1, "heads": "kv"
        }  # fmt: skip
        tokenizer = generation.tokenizer
        assert (tokenizer.kind, tokenizer.bos, tokenizer.eos, tokenizer.pad) == ("bytes", 256, (257,), 258)
        assert tokenizer.add_bos

    def test_names_and_sizes(self, bundle):
        inputs = {spec.name: spec for spec in bundle.manifest.inputs}
        assert inputs["input_ids"].shape == ("batch", "tokens")
        assert inputs["input_ids"].index_of == "259"
        assert inputs["attention_mask"].shape == ("batch", "total")
        assert inputs["past_key_values.1.value"].shape == ("batch", 2, "past", 16)
        assert inputs["past_chunks.1.key"].shape == ("batch", 2, "chunks", 16)
        assert inputs["past_chunk_ids"].index_of == "chunks"
        assert [spec.name for spec in bundle.manifest.outputs] == [
            "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
            "present_chunks.0.key", "present_chunks.1.key", "present_chunk_ids",
        ]  # fmt: skip
        assert bundle.manifest.dims["past"] == DimRange(0, 96)
        assert bundle.manifest.decode.inputs[0].shape == ("batch", 1)
        assert bundle.manifest.decode.outputs[-1].shape == ("batch", "past + 1")
        assert bundle.manifest.custom_ops[0].nodes == 2
        assert bundle.manifest.decode.custom_ops == ()

    @pytest.mark.parametrize("which", ["bundle", "llama"])
    def test_each_weight_lies_in_the_file_once(self, which, request):
        bundle = request.getfixturevalue(which)
        places: dict[int, int] = {}
        for name in ("model.onnx", "decode.onnx"):
            graph = onnx.load_from_string(bundle.read(name)).graph
            for tensor in graph.initializer:
                entries = {item.key: item.value for item in tensor.external_data}
                if not entries:
                    assert tensor.ByteSize() < INLINE_BYTES + 200
                    continue
                assert entries["location"] == "weights.bin"
                assert int(entries["offset"]) % 64 == 0
                assert places.setdefault(int(entries["offset"]), int(entries["length"])) == int(entries["length"])
        ends = [offset + length for offset, length in sorted(places.items())]
        assert all(end <= start for end, start in zip(ends, sorted(places)[1:], strict=False))
        assert ends[-1] == bundle.manifest.files["weights.bin"].size
        large = [p for p in bytes_decoder().parameters() if 4 * p.numel() >= INLINE_BYTES]
        if which == "bundle":
            assert sum(places.values()) == 4 * sum(p.numel() for p in large)

    def test_products_read_their_weights_as_they_lie(self, bundle):
        """A session would turn a weight that is stored as PyTorch holds it, and keep both."""
        for name in ("model.onnx", "decode.onnx"):
            graph = onnx.load_from_string(bundle.read(name)).graph
            weights = {item.name for item in graph.initializer}
            assert not [n.name for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]

    def test_the_files_tell_nothing_of_the_machine(self, bundle):
        for name in ("model.onnx", "decode.onnx"):
            content = bundle.read(name)
            assert str(Path(__file__).parents[2]).encode() not in content
            assert b"site-packages" not in content
            assert b"File " not in content

    def test_the_check_is_recorded_for_both_graphs(self, bundle):
        for part in bundle.parts().values():
            assert part.manifest.verification["checked"]
            assert max(item["rel_l2"] for item in part.manifest.verification["outputs"]) < 1e-5

    def test_samples_of_several_sizes(self, bundle):
        first, second = (part.samples() for part in bundle.parts().values())
        assert {array.shape for array in first.inputs["input_ids"]} == {(1, 21), (1, 11), (2, 15), (1, 1)}
        assert [array.shape[2] for array in first.inputs["past_key_values.0.key"]] == [0, 8, 0, 0]
        assert {array.shape for array in second.inputs["input_ids"]} == {(1, 1), (2, 1)}
        assert int(first.inputs["attention_mask"][2].sum()) == 15 + 5


class TestAnswers:
    def test_passes_and_steps_follow_pytorch(self, bundle, decoder):
        """Each run takes the cache of the run before, of rows of different lengths."""
        prefill, decode = (load(part) for part in bundle.parts().values())
        generator = np.random.default_rng(5)
        lengths = np.array([29, 18])
        ids = generator.integers(0, 256, (2, 29))
        mask = (np.arange(29) < lengths[:, None]).astype(np.int64)
        graphs = [LanguageGraph.of(decoder, part) for part in ("prefill", "decode")]
        cache = {
            shape.name: tensor.numpy()
            for shape, tensor in zip(graphs[0].shapes[2:], flat_cache(decoder.empty_cache(2)), strict=True)
        }
        runs = [(0, prefill, ids[:, :16], mask[:, :16]), (0, prefill, ids[:, 16:], mask)]
        for _ in range(3):
            mask = np.concatenate([mask, np.ones((2, 1), np.int64)], 1)
            runs.append((1, decode, generator.integers(0, 256, (2, 1)), mask))
        for which, session, tokens, seen in runs:
            inputs = {"input_ids": np.ascontiguousarray(tokens), "attention_mask": np.ascontiguousarray(seen), **cache}
            answer = session.run(inputs)
            expected = graphs[which].run(inputs)
            for name, array in expected.items():
                np.testing.assert_allclose(answer[name], array, rtol=1e-4, atol=2e-5, err_msg=name)
            names = [shape.name for shape in graphs[which].shapes[2:]]
            cache = dict(zip(names, (answer[name] for name in graphs[which].outputs[1:]), strict=True))

    def test_packed(self, bundle, tmp_path):
        packed = bundle.pack(tmp_path / "tiny.edge.zip")
        for name, part in packed.parts().items():
            inputs, outputs = next(iter(part.samples()))
            np.testing.assert_allclose(load(part).run(inputs)["logits"], outputs["logits"], atol=1e-5, err_msg=name)
            with pytest.raises(edgekit.EdgekitError, match="pack the whole bundle") if name == "decode" else nothing():
                part.pack()

    def test_an_id_beyond_the_vocabulary(self, bundle):
        session = load(bundle)
        inputs = dict(next(iter(bundle.samples()))[0])
        inputs["input_ids"] = np.full_like(inputs["input_ids"], 259)
        with pytest.raises(InputError, match=r"input input_ids.* holds 259 .* from 0 to 258"):
            session.run(inputs)


class nothing:  # noqa: N801  # stands where a context manager does nothing
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class TestVerify:
    def test_with_the_module(self, bundle, decoder):
        result = edgekit.verify(bundle, model=decoder)
        assert result
        assert [check.against for check in result.checks] == [
            "prefill: stored PyTorch outputs",
            "prefill: live PyTorch on fresh text",
            "decode: stored PyTorch outputs",
            "decode: live PyTorch on fresh text",
        ]
        logits = [next(item for item in check.outputs if item.name == "logits") for check in result.checks]
        assert [item.top1_agreement for item in logits] == [1.0] * 4

    def test_without_the_model(self, bundle):
        result = edgekit.verify(bundle)
        assert result
        assert len(result.checks) == 2
        assert "module:Decoder" in result.not_checked[0]

    def test_layers(self, bundle, decoder):
        report = edgekit.verify(bundle, model=decoder, layers=True).layers
        assert report
        assert len(report.layers) > 40
        assert {"linear", "block_sparse_attention"} <= {layer.op for layer in report.layers}

    def test_another_models_weights(self, bundle):
        other = bytes_decoder()
        with torch.no_grad():
            other.model.norm.weight.add_(0.1)
        with pytest.raises(WeightsError, match="are not those that tiny was exported with"):
            edgekit.verify(bundle, model=other)

    def test_a_wrong_weight_is_found(self, bundle, decoder, tmp_path):
        """Both graphs read the same bytes, so both fail; the file's hash is made to fit."""
        import hashlib
        import shutil

        copy = tmp_path / "tiny-onnx.edge"
        shutil.copytree(bundle.path, copy)
        content = bytearray((copy / "weights.bin").read_bytes())
        content[4096:8192] = np.frombuffer(content[4096:8192], np.float32).__mul__(1.01).tobytes()
        (copy / "weights.bin").write_bytes(content)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"]["weights.bin"]["sha256"] = hashlib.sha256(content).hexdigest()
        (copy / "manifest.json").write_text(json.dumps(manifest))
        result = edgekit.verify(copy)
        assert [bool(check) for check in result.checks] == [False, False]

    def test_labelled_data(self, bundle):
        with pytest.raises(InputError, match="is a language model, for which labelled data says nothing"):
            edgekit.verify(bundle, data="digits")

    def test_on_a_bare_device(self, bundle, tmp_path):
        code = "import sys\nfor name in ('torch', 'onnx'): sys.modules[name] = None\n"
        code += "from edgekit.runtime.__main__ import main\nsys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code]
        done = subprocess.run([*command, "verify", bundle.path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "decode: stored PyTorch outputs" in done.stdout
        arguments = ["profile", bundle.path, "--size", "tokens=24", "--runs", "8"]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "tiny-onnx: " in done.stdout
        assert "tiny-decode-onnx: " in done.stdout
        assert "tokens/s" in done.stdout


class TestProfile:
    def test_both_graphs(self, bundle):
        result = edgekit.profile(bundle, sizes={"tokens": 8}, runs=4, warmup=1)
        assert result.inputs["input_ids"] == (1, 8)
        assert result.inputs["past_key_values.0.key"] == (1, 2, 0, 16)
        assert result.decode.bundle == "tiny-decode-onnx"
        assert result.decode.inputs["input_ids"] == (1, 1)
        assert result.decode.inputs["past_key_values.0.key"] == (1, 2, 8, 16)
        assert {op.op for op in result.ops} & {"edgekit::BlockSparseAttention", "MatMul"}
        assert result.decode.ops
        assert result.decode.model_bytes > bundle.manifest.files["weights.bin"].size
        assert result.to_json()["decode"]["inputs"]["input_ids"] == [1, 1]
        assert bundle.report()["profile"]["decode"]["runs"] == 4

    def test_against_itself(self, bundle):
        result = edgekit.profile(bundle, vs=bundle, sizes={"tokens": 8, "past": 16}, runs=8, warmup=1, ops=False)
        assert result.a.inputs["attention_mask"] == (1, 24)
        assert result.decode.b.inputs["attention_mask"] == (1, 25)

    @pytest.mark.parametrize(
        ("sizes", "words"),
        [
            ({"total": 4}, "unknown dimension 'total'"),
            ({"tokens": 0}, "at least 1"),
            ({"tokens": 97}, "97 tokens are more than the context of tiny, 96"),
            ({"tokens": 96}, "97 tokens are more than the context of tiny-decode, 96"),
            ({"past": -1}, "at least 1"),
        ],
    )
    def test_sizes_that_do_not_fit(self, bundle, sizes, words):
        with pytest.raises(InputError, match=words):
            edgekit.profile(bundle, sizes=sizes, runs=2, warmup=1)


class TestCommandLine:
    def test_inspect(self, bundle, capsys):
        assert run_command(["inspect", str(bundle.path)]) == 0
        shown = capsys.readouterr().out
        assert "up to 96 tokens, 2 layers" in shown
        assert "attention  block: budget 32" in shown
        assert "bytes, 259 tokens (bos 256, eos 257, pad 258)" in shown
        assert "graph      decode, in decode.onnx" in shown
        assert "past_key_values.0.key" in shown
        assert "past_key_values.1.key" not in shown
        assert "nodes of decode" in shown

    def test_verify_shows_a_few_of_many_outputs(self, bundle, capsys):
        assert run_command(["verify", str(bundle.path)]) == 0
        shown = capsys.readouterr().out
        assert "worst of" in shown
        assert shown.count("decode: stored") == 2

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--shape", "input_ids:1x8@int64"], "--shape is not for language models"),
            (["--precision", "fp16"], "exported as fp32 or int4"),
            (["--precision", "int8"], "exported as fp32 or int4"),
            (["--target", "tvm"], "language model, which is exported to onnx"),
            (["--option", "attention=sliding"], "attention is one of dense, window, block, dhsa"),
            (["--option", "attention=block", "--option", "budget=32"], "budget below"),
            (["--option", "budget=512"], "does nothing with attention"),
            (["--option", "layers=3"], "the decoder does not take layers"),
            (["--option", "attention=dhsa"], "needs the weights of its boundary predictor"),
            (["--option", "attention=dhsa", "--option", "predictor=gone.safetensors"], "no predictor at gone"),
            (["--weights", "w.safetensors"], "brings its own weights"),
        ],
    )
    def test_what_is_refused(self, folder, tmp_path, capsys, arguments, words):
        given = ["export", str(folder), "-o", str(tmp_path / "out")]
        given += [] if "--target" in arguments else ["--target", "onnx"]
        assert run_command([*given, *arguments]) != 0
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("out/*"))


class TestFolder:
    def test_verifies_with_the_folder(self, llama, folder):
        assert llama.manifest.model.source == "huggingface:small"
        assert llama.manifest.model.options == {"context": 64}
        result = edgekit.verify(llama, model=folder)
        assert result
        assert len(result.checks) == 4

    def test_a_folder_of_another_kind(self, llama, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(InputError, match="holds no language model of gemma2, llama, qwen2, and small is one; pass"):
            edgekit.verify(llama, model=tmp_path)

    def test_tokenizer_and_context(self, llama, folder):
        generation = llama.manifest.generation
        assert generation.context == 64
        tokenizer = generation.tokenizer
        assert (tokenizer.kind, tokenizer.file, tokenizer.vocab_size) == ("huggingface", "tokenizer.json", 97)
        assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, (2, 3), False)
        assert llama.read("tokenizer.json") == (folder / "tokenizer.json").read_bytes()
        assert generation.attention == {"kind": "dense"}

    def test_no_chunks(self, llama):
        assert not [spec.name for spec in llama.manifest.inputs if "chunk" in spec.name]

    def test_it_generates(self, llama):
        answer = edgekit.generate(llama, "a list", max_new_tokens=4)
        assert len(answer.tokens[0]) <= 4


class TestTokenizers:
    def test_one_that_does_not_fit(self, tmp_path):
        path = llama_folder(tmp_path / "big", tokens=98)
        with pytest.raises(InputError, match=r"a tokenizer that does not fit the vocabulary: .* up to 97, .* knows 97"):
            edgekit.export(path, "onnx", tmp_path / "out")
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_none(self, tmp_path):
        path = llama_folder(tmp_path / "none", tokens=None)
        with pytest.raises(InputError, match=r"has no tokenizer\.json, and a vocabulary of 97 is not that of bytes"):
            edgekit.export(path, "onnx", tmp_path / "out")

    def test_none_of_a_module(self):
        with pytest.raises(InputError, match=r"Tiny comes without a tokenizer\.json"):
            tokenizer_of("Tiny", bytes_decoder(vocab_size=300).config, None)

    def test_what_is_no_tokenizer(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(InputError, match=r"tokenizer\.json is no tokenizer"):
            tokenizer_of("t", bytes_decoder().config, tmp_path)

    def test_a_mark_beyond_the_vocabulary(self):
        config = dataclasses.replace(bytes_decoder().config, eos=(400,))
        with pytest.raises(InputError, match="names the token 400, but its vocabulary has 259"):
            tokenizer_of("t", config, None)

    @pytest.mark.parametrize(("settings", "adds"), [({}, False), ({"add_bos_token": True, "bos_token": "<s>"}, True)])
    def test_its_own_settings(self, tmp_path, settings, adds):
        decoders.write_tokenizer(tmp_path / "tokenizer.json", 90)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        config = dataclasses.replace(bytes_decoder().config, bos=None, eos=(), pad=None)
        info = tokenizer_of("t", config, tmp_path)
        assert (info.add_bos, info.bos) == (adds, 1 if adds else None)

    def test_the_first_token_may_end_a_text(self, tmp_path):
        decoders.write_tokenizer(tmp_path / "tokenizer.json", 90)
        first = next(iter(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": first}))
        config = dataclasses.replace(bytes_decoder().config, bos=None, eos=(), pad=None)
        assert tokenizer_of("t", config, tmp_path).eos == (0,)


def test_a_module_that_is_no_decoder_is_exported_as_before(tmp_path):
    bundle = edgekit.export(nn.Linear(3, 2), "onnx", tmp_path, shapes="x:1x3")
    assert bundle.manifest.generation is None


def test_int4_is_for_language_models(tmp_path):
    with pytest.raises(InputError, match="int4 is for language models, and Linear is none"):
        edgekit.export(nn.Linear(3, 2), "onnx", tmp_path, shapes="x:1x3", precision="int4")


def test_an_unknown_precision(tmp_path):
    with pytest.raises(UnknownNameError, match="int3"):
        edgekit.export(bytes_decoder(), "onnx", tmp_path, precision="int3")


def test_an_export_that_differs_leaves_nothing(decoder, converted_once, tmp_path, monkeypatch):
    """The check is of what lies in the bundle: a weight that is written wrongly is found."""
    from edgekit.export import weights_file

    before = weights_file.WeightsFile.place

    def place(self, model, weights):
        before(self, model, {name: (lambda make=make: make() * np.float32(1.01)) for name, make in weights.items()})

    monkeypatch.setattr(weights_file.WeightsFile, "place", place)
    with pytest.raises(ExportError, match=r"prefill of the fp32 bundle does not answer as PyTorch does"):
        edgekit.export(decoder, "onnx", tmp_path / "out", name="tiny")
    assert not list((tmp_path / "out").iterdir())


def test_dense_decode_takes_no_chunks():
    attention = SparseAttention(kind="block", budget=32, block_size=BLOCK, local=8, decode="dense")
    graph = LanguageGraph.of(bytes_decoder(attention), "decode")
    assert not [shape.name for shape in graph.shapes if "chunk" in shape.name]
