"""Manifests: what is written reads back, and whatever else arrives is a BundleError, never another exception."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.runtime.manifest import (
    SCHEMA,
    CoreMLInfo,
    CustomOp,
    DimRange,
    FileEntry,
    Generation,
    Graph,
    Manifest,
    ModelInfo,
    StateSpec,
    TensorSpec,
    TokenizerInfo,
    WeightsInfo,
    safe_name,
)
from edgekit.runtime.preprocess import ImagePreprocessing

FULL = Manifest(
    name="tiny",
    model=ModelInfo("zoo", WeightsInfo("random", "a" * 64, seed=3), parameters=15, macs=12, options={"depth": [1, 2]}),
    target="onnx",
    precision="int8",
    inputs=(
        TensorSpec(
            "image",
            "float32",
            ("N", 1, 8, 8),
            "NCHW",
            ImagePreprocessing(size=(8, 8), color="gray", mean=(0.5,), std=(0.25,)),
        ),
        TensorSpec("mask", "bool", ("N",)),
        TensorSpec("ids", "int64", ("S",), index_of="N"),
        TensorSpec("words", "int32", (3,), index_of="50257"),
        TensorSpec("rows", "int64", ("S",), index_of="N+S+1"),
    ),
    outputs=(TensorSpec("logits", "float32", ("N", 2)), TensorSpec("grown", "float32", ("N + 1", 2))),
    dims={"N": DimRange(1, 4), "S": DimRange(0)},
    labels=("no", "日本"),
    opsets={"ai.onnx": 20},
    ir_version=10,
    ops={"Gemm": 1},
    custom_ops=(CustomOp("edgekit", "SelectiveScan", 1, 2, ("ort",)),),
    files={"model.onnx": FileEntry("model", 3, "b" * 64), "samples.npz": FileEntry("samples", 0, "c" * 64)},
    tools={"torch": "2.9"},
    calibration="ten images",
    verification={"checked": True, "outputs": [{"rel_l2": 1e-7, "psnr_db": None}]},
)


def language_model() -> Manifest:
    """A language model of one layer: two graphs, weights in a file of their own, and how text is generated."""
    cache = ("N", 1, "P", 2)

    def graph(tokens: int | str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs = (
            TensorSpec("input_ids", "int64", ("N", tokens), index_of="9"),
            TensorSpec("attention_mask", "int64", ("N", "T"), index_of="2"),
            *(TensorSpec(f"past_key_values.0.{kind}", "float32", cache) for kind in ("key", "value")),
        )
        outputs = (
            TensorSpec("logits", "float32", ("N", 1, 9)),
            *(TensorSpec(f"present.0.{kind}", "float32", ("N", 1, "T", 2)) for kind in ("key", "value")),
        )
        return inputs, outputs

    dims = {"N": DimRange(), "P": DimRange(0, 64), "T": DimRange(1, 64)}
    (inputs, outputs), (inputs2, outputs2) = graph("S"), graph(1)
    files = ("decode.onnx", "decode"), ("weights.bin", "weights"), ("t.json", "tokenizer"), ("s2.npz", "samples")
    return dataclasses.replace(
        FULL,
        precision="int4",
        inputs=inputs,
        outputs=outputs,
        dims=dims | {"S": DimRange(1, 64)},
        files=FULL.files | {name: FileEntry(role, 7, "d" * 64) for name, role in files},
        decode=Graph(
            "decode.onnx",
            inputs2,
            outputs2,
            dims,
            {"MatMulNBits": 3},
            (CustomOp("edgekit", "BlockSparseAttention", 1, 1),),
            "s2.npz",
            {"checked": False},
        ),
        generation=Generation(
            context=64,
            layers=1,
            block_size=8,
            pass_tokens=32,
            tokenizer=TokenizerInfo("huggingface", "t.json", 9, bos=1, eos=(2, 8), pad=0, add_bos=True),
            attention={"kind": "dhsa", "budget": 16, "share": True, "threshold": 1.1},
        ),
    )


LANGUAGE = language_model()


def package() -> Manifest:
    """A language model as one Core ML package with two functions and a state, and an input of listed sizes."""
    decode = LANGUAGE.decode
    assert decode is not None
    states = tuple(
        StateSpec(f"{kind}_cache", "float16", (1, 1, 64, 2), f"past_key_values.0.{kind}", f"present.0.{kind}")
        for kind in ("key", "value")
    )
    files = dict(LANGUAGE.files)
    del files["decode.onnx"]
    return dataclasses.replace(
        LANGUAGE,
        target="coreml",
        precision="palette4",
        files=files,
        dims=LANGUAGE.dims | {"S": DimRange.of((32, 8, 16))},
        decode=dataclasses.replace(decode, file="model.onnx", function="decode"),
        coreml=CoreMLInfo(
            deployment_target="iOS18",
            specification_version=9,
            function="prefill_32",
            functions=("prefill_32", "decode"),
            layout="ane",
            image_input="input_ids",
            input_dtypes={"input_ids": "int64"},
            label_outputs=("classLabel",),
            states=states,
            compression={"weights": "palette4", "share": 0.9},
        ),
    )


PACKAGE = package()


def data_of(manifest: Manifest = FULL) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(manifest.to_json())
    return data


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in JSON data."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [prefix, *(path for key, child in children for path in paths(child, (*prefix, key)))]


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `data` with another value at `path`."""
    if not path:
        return value
    result = copy.deepcopy(data)
    place = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return result


ALL_PATHS = paths(data_of())
STRANGE: list[Any] = [None, True, -1, 0, 2**70, 1.5, "", "x", "../x", "N", [], [[]], [None], {}, {"x": 1}, {"": None}]


@pytest.mark.parametrize("manifest", [FULL, LANGUAGE, PACKAGE], ids=["full", "language model", "package"])
def test_full_manifest_reads_back(manifest: Manifest) -> None:
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_equal_manifests_give_equal_text() -> None:
    assert copy.deepcopy(FULL).to_json() == FULL.to_json()


def without_indices() -> Manifest:
    return dataclasses.replace(FULL, inputs=FULL.inputs[:2])


def test_the_schema_is_the_lowest_that_has_all_fields() -> None:
    """A manifest without indices is one of schema 1, to the letter: older readers take it."""
    old = data_of(without_indices())
    assert old["schema"] == 1
    assert {key for tensor in old["inputs"] + old["outputs"] for key in tensor} == {
        "name", "dtype", "shape", "layout", "preprocessing"
    }  # fmt: skip
    assert Manifest.from_json(json.dumps(old)) == without_indices()
    assert data_of()["schema"] == 2
    assert {"decode", "generation"}.isdisjoint(data_of())


def test_a_language_model_has_schema_3() -> None:
    data = data_of(LANGUAGE)
    assert data["schema"] == 3
    assert (data["decode"]["file"], data["generation"]["tokenizer"]["eos"]) == ("decode.onnx", [2, 8])


def test_weights_in_a_file_of_their_own_need_schema_3() -> None:
    """An older reader would say that the bundle was edited, rather than that it is too new."""
    files = FULL.files | {"weights.bin": FileEntry("weights", 1, "d" * 64)}
    assert data_of(dataclasses.replace(FULL, files=files))["schema"] == 3


def test_a_package_and_listed_sizes_need_schema_4() -> None:
    data = data_of(PACKAGE)
    assert data["schema"] == 4
    assert data["dims"]["S"] == {"min": 8, "max": 32, "values": [8, 16, 32]}
    assert "values" not in data["dims"]["P"]
    assert data_of(dataclasses.replace(FULL, dims=FULL.dims | {"N": DimRange.of((1, 3))}))["schema"] == 4


def test_listed_sizes_are_the_only_ones() -> None:
    sizes = DimRange.of((224, 192))
    assert (192 in sizes, 224 in sizes, 200 in sizes, str(sizes)) == (True, True, False, "192/224")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("coreml",), None, "'decode.function' must be a function of the package, for Core ML alone"),
        (("target",), "onnx", "'coreml' must be given for the target coreml"),
        (("coreml", "deployment_target"), "iOS15", "deployment_target' must be one of iOS16, iOS17, iOS18"),
        (("coreml", "function"), "other", "'coreml.function' must be one of prefill_32, decode"),
        (("coreml", "layout"), "nhwc", "'coreml.layout' must be one of standard, ane"),
        (("coreml", "image_input"), "photo", "'coreml.image_input' must be the name of an input"),
        (("coreml", "input_dtypes", "input_ids"), "system", "must be 'int64'"),
        (("coreml", "states", 0, "output"), "gone", "whose input and output the manifest has"),
        (("coreml", "states", 0, "dtype"), "int8", "must be one of float16, float32"),
        (("coreml", "states", 0, "shape"), [-1], "must be at least 0"),
        (("coreml", "compression", "x"), [], "a text, a number, true or false"),
        (("decode", "function"), "other", "'decode.function' must be a function of the package"),
        (("decode", "function"), None, "'decode.function' must be a function of the package"),
        (("dims", "S", "values"), [8, 32, 16], "in ascending order"),
        (("dims", "S", "values"), [8, 16], "from the min, 8, to the max, 32"),
        (("dims", "S", "values"), [8], "at least two sizes"),
    ],
    ids=lambda item: ".".join(map(str, item)) if isinstance(item, tuple) else None,
)
def test_a_package_that_makes_no_sense_is_refused(path: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(BundleError, match=re.escape(words)):
        Manifest.from_json(json.dumps(put(data_of(PACKAGE), path, value)))


@pytest.mark.parametrize("path", paths(data_of(PACKAGE)["coreml"]), ids=lambda path: ".".join(map(str, path)) or "all")
def test_any_field_of_a_package(path: tuple[Any, ...]) -> None:
    for value in STRANGE:
        try_to_read(json.dumps(put(data_of(PACKAGE), ("coreml", *path), value)))


@pytest.mark.parametrize("path", paths(data_of(LANGUAGE))[1:], ids=lambda path: ".".join(map(str, path)))
def test_any_field_of_a_language_model(path: tuple[Any, ...]) -> None:
    data = data_of(LANGUAGE)
    for value in STRANGE:
        try_to_read(json.dumps(put(data, path, value)))
    without = copy.deepcopy(data)
    place = without
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    try_to_read(json.dumps(without))


GENERATION = ("generation",)
TOKENIZER = ("generation", "tokenizer")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("decode",), None, "'decode' must be given where"),
        (("generation",), None, "'generation' must be given where"),
        (("decode", "file"), "model.onnx", "'decode.file' must be a listed file with the role 'decode'"),
        (("decode", "file"), "gone.onnx", "'decode.file'"),
        (("decode", "samples"), "weights.bin", "'decode.samples' must be a listed file with the role 'samples'"),
        (("decode", "dims", "P", "max"), -1, "decode.dims.P.max"),
        (
            ("decode", "inputs", 2, "name"),
            "k",
            "'decode.inputs' must be a list with the tensor 'past_key_values.0.key'",
        ),
        (("outputs", 0, "name"), "scores", "'outputs' must be a list with the tensor 'logits'"),
        (("outputs", 0, "shape"), ["N", 1, 8], "vocab_size' must be the last size of logits"),
        (("decode", "outputs", 0, "shape"), ["N", 1, "V"], "vocab_size' must be the last size of decode.logits"),
        (("decode", "ops", "MatMulNBits"), -1, "decode.ops.MatMulNBits"),
        (("decode", "custom_ops", 0, "nodes"), None, "decode.custom_ops[0].nodes"),
        (("decode", "verification"), [], "decode.verification"),
        ((*GENERATION, "context"), 0, "'generation.context' must be at least 1"),
        ((*GENERATION, "layers"), 2, "past_key_values.1.key"),
        ((*GENERATION, "layers"), 2**62, "past_key_values.1.key"),
        ((*GENERATION, "block_size"), 0, "generation.block_size"),
        ((*GENERATION, "pass_tokens"), 33, "'generation.pass_tokens' must be a multiple of the block size, 8"),
        ((*GENERATION, "attention", "budget"), [1], "generation.attention.budget"),
        ((*GENERATION, "attention"), {str(i): i for i in range(65)}, "at most 64 options"),
        ((*TOKENIZER, "kind"), "words", "must be one of bytes, huggingface"),
        ((*TOKENIZER, "kind"), "bytes", "'generation.tokenizer.file' must be null for bytes"),
        ((*TOKENIZER, "file"), None, "a file with the role 'tokenizer'"),
        ((*TOKENIZER, "file"), "weights.bin", "a file with the role 'tokenizer'"),
        ((*TOKENIZER, "vocab_size"), 8, "generation.tokenizer.eos"),
        ((*TOKENIZER, "vocab_size"), 10, "vocab_size' must be the last size of logits"),
        ((*TOKENIZER, "bos"), 9, "'generation.tokenizer.bos' must be a token id below"),
        ((*TOKENIZER, "bos"), None, "'generation.tokenizer.add_bos' must be false"),
        ((*TOKENIZER, "eos"), 2, "generation.tokenizer.eos"),
        ((*TOKENIZER, "eos"), [2, -1], "generation.tokenizer.eos"),
        ((*TOKENIZER, "pad"), True, "generation.tokenizer.pad"),
        ((*TOKENIZER, "add_bos"), 1, "'generation.tokenizer.add_bos' must be true or false"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_what_a_language_model_must_say(path: tuple[Any, ...], value: Any, words: str) -> None:
    with pytest.raises(BundleError, match=re.escape(words)):
        Manifest.from_json(json.dumps(put(data_of(LANGUAGE), path, value)))


def test_bytes_need_256_tokens() -> None:
    data = put(data_of(LANGUAGE), TOKENIZER, {**data_of(LANGUAGE)["generation"]["tokenizer"], "kind": "bytes"})
    with pytest.raises(BundleError, match=r"vocab_size' must be at least 256"):
        Manifest.from_json(json.dumps(put(data, (*TOKENIZER, "file"), None)))


def test_text_of_a_spec() -> None:
    assert [str(spec) for spec in FULL.inputs[1:]] == [
        "mask: bool[N]",
        "ids: int64[S] < N",
        "words: int32[3] < 50257",
        "rows: int64[S] < N+S+1",
    ]


def try_to_read(text: str) -> None:
    """Loads to something that can be used and written again, or raises BundleError."""
    try:
        manifest = Manifest.from_json(text, where="x.edge/manifest.json")
    except BundleError as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert "x.edge/manifest.json" in refused
        assert len(refused) < 500
        return
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.files[manifest.model_file].role == "model"
    for spec in (*manifest.inputs, *manifest.outputs):
        assert str(spec)
        assert spec.preprocessing is None or spec.preprocessing.describe()


@pytest.mark.parametrize("path", ALL_PATHS, ids=lambda path: ".".join(map(str, path)) or "all")
def test_any_field_of_another_type(path: tuple[Any, ...]) -> None:
    for value in STRANGE:
        try_to_read(json.dumps(put(data_of(), path, value)))


@pytest.mark.parametrize("path", ALL_PATHS[1:], ids=lambda path: ".".join(map(str, path)))
def test_any_field_deleted(path: tuple[Any, ...]) -> None:
    data = data_of()
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    try_to_read(json.dumps(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(path=st.sampled_from(ALL_PATHS), value=JSON)
@settings(max_examples=400, deadline=None)
def test_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    try_to_read(json.dumps(put(data_of(), path, value)))


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text(text: str) -> None:
    try_to_read(text)


def test_every_prefix_is_refused() -> None:
    text = FULL.to_json().rstrip()
    for length in range(len(text)):
        with pytest.raises(BundleError):
            Manifest.from_json(text[:length])


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (("model", "macs"), "many", "model.macs"),
        (("model", "weights", "seed"), [1], "model.weights.seed"),
        (("model", "weights", "file"), 7, "model.weights.file"),
        (("model", "parameters"), 10**30, "model.parameters"),
        (("ir_version",), {}, "ir_version"),
        (("calibration",), 1, "calibration"),
        (("inputs", 0, "layout"), 1, "inputs[0].layout"),
        (("inputs", 0, "shape"), ["M"], "inputs[0].shape"),
        (("inputs", 0, "shape"), [2**64], "inputs[0].shape"),
        (("inputs", 0, "shape"), [True], "inputs[0].shape"),
        (("inputs", 1, "name"), "image", "inputs"),
        (("inputs", 2, "index_of"), 4, "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "V", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "0", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "²", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "N+V", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "N+01", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "N+", "inputs[2].index_of"),
        (("inputs", 2, "index_of"), "N + 1", "inputs[2].index_of"),
        (("inputs", 2, "dtype"), "float32", "inputs[2].index_of"),
        (("outputs", 0, "index_of"), "N", "outputs[0].index_of"),
        (("inputs", 0, "dtype"), "complex64", "inputs[0].dtype"),
        (("inputs", 0, "preprocessing", "std"), [0], "inputs[0].preprocessing.std"),
        (("inputs", 0, "preprocessing"), "none", "inputs[0].preprocessing"),
        (("outputs",), [], "outputs"),
        (("dims", "N", "min"), True, "dims.N.min"),
        (("dims", "N"), {"min": 2, "max": 1}, "dims.N.max"),
        (("dims", "N"), {"min": 1, "max": 2, "step": 3}, "dims.N.step"),
        (("tools", "torch"), 2.9, "tools.torch"),
        (("labels",), ["a", 1], "labels"),
        (("custom_ops", 0, "kernels"), "ort", "custom_ops[0].kernels"),
        (("files", "model.onnx", "size"), -1, "files.model.onnx.size"),
        (("files", "model.onnx", "sha256"), "B" * 64, "files.model.onnx.sha256"),
        (("files", "model.onnx", "role"), "weights", "files"),
        (("files", "samples.npz", "role"), "model", "files"),
        (("target",), "../onnx", "target"),
        (("name",), "..", "name"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_the_message_names_the_field(path: tuple[Any, ...], value: Any, field: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(put(data_of(), path, value)), where="a.edge/manifest.json")
    assert field in str(caught.value)
    assert "a.edge/manifest.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"schema": NaN}', "not valid JSON"),
        ('{"schema": 1e999}', "not valid JSON"),
        ('{"schema": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"schema": 1, "schema": 1}', "twice"),
        ('{"schema": 1, "name": "\\ud800"}', "not valid JSON"),
        ('{"schema": 1, "name": "\\u001b[2J"}', "control characters"),
        ("\ufeff{}", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "is this an edgekit bundle"),
        ('{"schema": true}', "is this an edgekit bundle"),
        ('{"schema": 0}', "is this an edgekit bundle"),
        (json.dumps({"schema": SCHEMA + 1}), "pip install -U edgekit"),
        ('{"schema": 1}', "is missing"),
    ],
    ids=lambda item: item[:20],
)
def test_broken_json(text: str, words: str) -> None:
    with pytest.raises(BundleError, match=words) as caught:
        Manifest.from_json(text)
    assert len(str(caught.value)) < 500


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(BundleError, match=r"unknown field 'model\.arch'"):
        Manifest.from_json(json.dumps(put(data_of(), ("model", "arch"), "x")))


@pytest.mark.parametrize("path", [("tools",), ("ops", "Gemm"), ("labels",), ("files",)], ids=str)
def test_a_message_stays_short(path: tuple[str, ...]) -> None:
    long = "k" * 10**6
    for value in (long, [1] * 10**5, {long: 1}, {long: {}}):
        with pytest.raises(BundleError) as caught:
            Manifest.from_json(json.dumps(put(data_of(), path, value)))
        assert len(str(caught.value)) < 500


UNSAFE = (
    "", ".", "..", "../x", "a/../x", "/x", "//x", "a//b", "./x", "a/", "a\\b", "..\\x", "C:x", "C:\\x", "a\0b", "a\nb",
    "a\x1b[2J",
)  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_unsafe_file_names(name: str) -> None:
    assert not safe_name(name)
    data = data_of()
    data["files"][name] = data["files"]["samples.npz"]
    with pytest.raises(BundleError):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize("name", ["model.onnx", "a/b.bin", "..a", "a b", "日本.onnx"])
def test_safe_file_names(name: str) -> None:
    assert safe_name(name)


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_files_that_cannot_be_listed(name: str) -> None:
    data = data_of()
    data["files"][name] = data["files"]["samples.npz"]
    with pytest.raises(BundleError, match=name):
        Manifest.from_json(json.dumps(data))


def test_dim_range() -> None:
    assert [size in DimRange(1, 3) for size in range(5)] == [False, True, True, True, False]
    assert 10**9 in DimRange(2)
    assert (str(DimRange(1, 3)), str(DimRange(2))) == ("1..3", "2..")


def test_a_manifest_without_a_model_file() -> None:
    with pytest.raises(BundleError, match="no file with the role 'model'"):
        _ = dataclasses.replace(FULL, files={}).model_file
