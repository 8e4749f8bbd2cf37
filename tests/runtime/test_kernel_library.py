"""Native kernels: found where they should be, judged by everything they need, used or left with a reason."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import BundleError, InputError
from edgekit.runtime import kernel_library, profiler, verify
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.kernel_library import (
    PORTABLE,
    Host,
    NodeKernel,
    choose,
    find_libraries,
    kernel_kinds,
    kernel_lines,
    kernel_uses,
    kernels_root,
    misfit,
    this_host,
)
from edgekit.runtime.onnx_files import CustomNode
from edgekit.runtime.onnxruntime_backend import GUARD, OnnxRuntimeSession, op_error
from edgekit.runtime.profiler import profile, profile_pair
from edgekit.runtime.report import comparison_lines, profile_lines
from edgekit.runtime.session import load

MakeBundle = Callable[..., Bundle]
Describe = Callable[..., None]
TWICE = (CustomNode("first", "Twice", "float32"),)
X = {"x": np.arange(3, dtype=np.float32)}
NATIVE_NODES = [("first", "edgekit::Twice", "native x"), ("second", "edgekit::Twice", "native x")]


@pytest.fixture(autouse=True)
def no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is built, whatever the machine has."""
    root = tmp_path / "built"
    monkeypatch.setenv("EDGEKIT_KERNELS", str(root))
    return root


@pytest.fixture
def host() -> Host:
    return Host("x86_64", "linux", frozenset({"avx2", "fma", "avx512f"}), "1.2.3", 31)


# Where libraries are


def test_the_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_root() == tmp_path / "built"


@pytest.mark.parametrize(
    ("cache", "expected"),
    [("/c", Path("/c")), ("", Path.home() / ".cache")],
    ids=["set", "unset"],
)
def test_the_cache_has_a_folder_per_version(cache: str, expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert kernels_root() == expected / "edgekit" / "kernels" / edgekit.__version__


def test_without_a_home_the_bodies_run(make_custom_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is in no passwd file."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("EDGEKIT_KERNELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="set EDGEKIT_KERNELS to a folder"):
        kernels_root()
    session = load(make_custom_bundle())
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])
    assert {item.kernel for item in session.kernels} == {PORTABLE}
    assert "there is no home folder to look for native kernels in" in session.kernels_note


def test_libraries_are_found_in_a_folder_and_below(tmp_path: Path, describe_library: Describe) -> None:
    assert find_libraries(tmp_path / "nothing") == ()
    for name in ("b", "a"):
        describe_library(tmp_path / name)
    (tmp_path / "c").mkdir()
    describe_library(tmp_path / ".building-a")
    (tmp_path / "file").write_text("")
    assert [found.arch for found in find_libraries(tmp_path)] == ["a", "b"]
    assert [found.arch for found in find_libraries(tmp_path / "b")] == ["b"]


def test_what_a_library_says_of_itself(tmp_path: Path, describe_library: Describe) -> None:
    kernels = [{"op": op, "dtype": dtype, "symbol": "s"} for op, dtype in (("B", "g"), ("B", "f"), ("A", "f"))]
    describe_library(tmp_path / "v3", features=["avx2"], kernels=kernels, tools={"tvm": "0.27"})
    library = find_libraries(tmp_path)[0].library
    assert library is not None
    assert (library.arch, library.features, library.tools) == ("v3", ("avx2",), {"tvm": "0.27"})
    assert library.ops() == {"B": ("f", "g"), "A": ("f",)}
    assert library.path == tmp_path / "v3" / "lib.so"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": 2}, "it has schema 2, this edgekit reads 1"),
        ({"schema": True}, "field 'schema' is missing or of the wrong type"),
        ({"library": "../lib.so"}, "'library' must be the name of a file beside it, not '../lib.so'"),
        ({"library": "/lib/x86_64-linux-gnu/libc.so.6"}, "'library' must be the name of a file beside it"),
        ({"library": ".."}, "'library' must be the name of a file beside it"),
        ({"features": None}, "field 'features'"),
        ({"ort_api": "21"}, "field 'ort_api'"),
        ({"kernels": [{"op": "Twice"}]}, "field 'dtype'"),
        ({"kernels": ["Twice"]}, "field 'kernels' must list objects"),
        (
            {"kernels": [{"op": "A", "dtype": "f", "symbol": "s", "parameters": {"d": "64"}}]},
            "field 'parameters' must map names to sizes",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_damaged_description_is_a_reason(
    tmp_path: Path, describe_library: Describe, changes: dict[str, Any], words: str
) -> None:
    describe_library(tmp_path / "v3")
    path = tmp_path / "v3" / "kernels.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    found = find_libraries(tmp_path)[0]
    assert found.library is None
    assert words in found.problem
    assert "build again: edgekit kernels build" in found.problem


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, '{"schema": 1}', "\xff"], ids=lambda text: text[:14])
def test_no_description_at_all(tmp_path: Path, content: str) -> None:
    (tmp_path / "kernels.json").write_bytes(content.encode("latin-1"))
    assert "is damaged" in find_libraries(tmp_path)[0].problem


# Does a library fit?


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"machine": "aarch64"}, "built for aarch64 linux, this is x86_64 linux"),
        ({"system": "darwin"}, "built for x86_64 darwin, this is x86_64 linux"),
        ({"features": ["avx2", "avx512f", "avx512bw", "amx"]}, "this processor lacks avx512bw, amx"),
        ({"edgekit": "1.2.4"}, "built by edgekit 1.2.4, this is 1.2.3; build again: edgekit kernels build"),
        ({"ort_api": 32}, "needs onnxruntime 1.32 or newer, 1.31 is installed"),
        ({"kernels": [{"op": "Other", "dtype": "float32", "symbol": "o"}]}, "it has no kernel for edgekit::Twice"),
        (
            {"kernels": [{"op": "Twice", "dtype": "float16", "symbol": "t"}]},
            "it has no kernel for edgekit::Twice in float32, only float16",
        ),
        ({"sha256": "0" * 64}, "lib.so was changed after it was built"),
    ],
    ids=["machine", "system", "features", "edgekit", "onnxruntime", "op", "dtype", "hash"],
)
def test_what_does_not_fit(
    tmp_path: Path, describe_library: Describe, host: Host, changes: dict[str, Any], words: str
) -> None:
    fitting = {"machine": "x86_64", "system": "linux", "features": ["avx2"], "edgekit": "1.2.3", "ort_api": 31}
    describe_library(tmp_path / "good", **fitting)
    describe_library(tmp_path / "bad", **(fitting | changes))
    bad, good = (found.library for found in find_libraries(tmp_path))
    assert good is not None
    assert bad is not None
    assert misfit(good, host, TWICE) is None
    assert words in str(misfit(bad, host, TWICE))


def test_an_unknown_onnxruntime_fits_nothing(tmp_path: Path, describe_library: Describe) -> None:
    describe_library(tmp_path)
    library = find_libraries(tmp_path)[0].library
    assert library is not None
    reason = misfit(library, replace(this_host(), ort_api=None))
    assert reason == "the version of the installed onnxruntime is unknown"


def test_a_library_that_went_away(tmp_path: Path, describe_library: Describe) -> None:
    describe_library(tmp_path)
    (tmp_path / "lib.so").unlink()
    library = find_libraries(tmp_path)[0].library
    assert library is not None
    assert "cannot read lib.so: No such file" in str(misfit(library, this_host()))


@pytest.mark.parametrize(
    ("version", "api"),
    [("1.31.1", 31), ("1.20.0.dev20260101", 20), ("2.1.0", None), ("unknown", None)],
)
def test_the_api_is_onnxruntimes_minor_version(version: str, api: int | None) -> None:
    assert this_host(version).ort_api == api


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nflags : other\n", {"fpu", "avx2", "fma"}),
        ("Features\t: fp asimd\n", {"fp", "asimd"}),
        ("nothing of it", set()),
    ],
    ids=["x86", "arm", "neither"],
)
def test_processor_features(tmp_path: Path, text: str, features: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert kernel_library._processor_features(tmp_path / "cpuinfo") == features
    assert kernel_library._processor_features(tmp_path / "absent") == frozenset()


# Which one is chosen?


def test_the_library_that_needs_more_is_preferred(tmp_path: Path, describe_library: Describe, host: Host) -> None:
    fitting = {"machine": "x86_64", "system": "linux", "edgekit": "1.2.3", "ort_api": 31}
    describe_library(tmp_path / "x86-64-v3", **fitting, features=["avx2", "fma"])
    describe_library(tmp_path / "x86-64-v4", **fitting, features=["avx2", "fma", "avx512f"])
    best = choose(TWICE, tmp_path, host)
    assert best.library is not None
    assert best.library.arch == "x86-64-v4"
    assert best.kernels(TWICE) == (NodeKernel("first", "edgekit::Twice", "native x86-64-v4", str(best.library.path)),)
    older = choose(TWICE, tmp_path, replace(host, features=frozenset({"avx2", "fma"})))
    assert older.library is not None
    assert older.library.arch == "x86-64-v3"


def test_auto_says_why_it_found_none(no_libraries: Path, describe_library: Describe, host: Host) -> None:
    choice = choose(TWICE, "auto", host)
    assert choice.reason == f"no native kernels are built in {no_libraries}; to build them: edgekit kernels build"
    assert choice.kernels(TWICE) == (NodeKernel("first", "edgekit::Twice", PORTABLE, choice.reason),)
    describe_library(no_libraries / "old", edgekit="1.0")
    describe_library(no_libraries / "other", machine="riscv64")
    reason = choose(TWICE, "auto", replace(this_host())).reason
    assert reason.startswith(f"no native kernels in {no_libraries} fit: old: built by edgekit 1.0, this is")
    assert "; other: built for riscv64" in reason


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("nowhere", "no kernels at '.*nowhere'; expected 'auto', 'portable', or the path of a kernel library"),
        ("empty", "there is no kernels.json for .*empty"),
        ("old", "the kernels in .*old cannot be used here: old: built by edgekit 1.0"),
        ("old/lib.so", "cannot be used here: old: built by edgekit 1.0"),
        ("old/other.so", "there is no kernels.json for .*other.so"),
        ("", r"cannot be used here: old: built by .*; old2: built by"),
    ],
)
def test_a_path_that_does_not_fit_is_an_error(
    tmp_path: Path, describe_library: Describe, part: str, words: str
) -> None:
    root = tmp_path / "k"
    describe_library(root / "old", edgekit="1.0")
    describe_library(root / "old2", edgekit="1.0")
    (root / "empty").mkdir()
    (root / "old" / "other.so").write_bytes(b"")
    with pytest.raises(InputError, match=words):
        choose(TWICE, root / part, this_host())


@pytest.mark.parametrize("kernels", [None, 3, True], ids=str)
def test_kernels_must_be_a_name_or_a_path(kernels: Any) -> None:
    with pytest.raises(InputError, match="kernels must be 'auto', 'portable' or a path, got"):
        choose(TWICE, kernels, this_host())


def test_lines_count_the_nodes() -> None:
    native = NodeKernel("a", "edgekit::A", "native v4", "/k/lib.so")
    uses = kernel_uses([native, replace(native, node="b"), NodeKernel("c", "edgekit::C", PORTABLE, "not built")])
    assert kernel_lines(uses) == [
        "edgekit::A, 2 nodes: native v4",
        "edgekit::C, 1 node: portable function body (not built)",
    ]
    assert kernel_kinds(uses) == "native v4 kernels and portable function bodies"
    assert (kernel_lines(()), kernel_kinds(())) == ([], "")


# Sessions


def test_without_libraries_the_bodies_run(make_custom_bundle: MakeBundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "edgekit"):
        session = load(make_custom_bundle())
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])
    assert [(item.node, item.op, item.kernel) for item in session.kernels] == [
        ("first", "edgekit::Twice", PORTABLE),
        ("second", "edgekit::Twice", PORTABLE),
    ]
    assert "no native kernels are built in" in session.kernels[0].reason
    assert session.kernels_note == f"function bodies instead of native kernels: {session.kernels[0].reason}"
    assert caplog.messages == [f"custom-onnx: {session.kernels_note}"]


def test_portable_needs_no_reason(
    make_custom_bundle: MakeBundle, toy_library: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "edgekit"):
        session = load(make_custom_bundle(), kernels="portable")
    assert {item.kernel for item in session.kernels} == {PORTABLE}
    assert session.kernels[0].reason == "portable bodies were asked for"
    assert (session.kernels_note, caplog.messages) == ("", [])


@pytest.mark.parametrize("how", ["auto", "folder", "parent", "library", "description"])
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
def test_native_kernels(
    make_custom_bundle: MakeBundle, toy_library: Path, monkeypatch: pytest.MonkeyPatch, how: str, typed: bool
) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", str(toy_library.parent))
    places = {
        "auto": "auto",
        "folder": toy_library,
        "parent": str(toy_library.parent),
        "library": toy_library / "libtoy.so",
        "description": toy_library / "kernels.json",
    }
    session = load(make_custom_bundle(typed=typed), kernels=places[how], threads=1)
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])
    assert [(item.node, item.op, item.kernel) for item in session.kernels] == NATIVE_NODES
    assert {item.reason for item in session.kernels} == {str(toy_library / "libtoy.so")}
    assert session.kernels_note == ""
    assert bool(verify(session.bundle, kernels=places[how]))


def test_a_packed_bundle_too(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    session = load(make_custom_bundle().pack(), kernels=toy_library)
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])
    assert session.kernels[0].native


def test_native_and_portable_say_the_same_of_bad_input(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    bundle = make_custom_bundle()
    for kernels in ("portable", toy_library):
        with pytest.raises(InputError) as caught:
            load(bundle, kernels=kernels).run({"x": np.array([1, -1], np.float32)})
        assert str(caught.value) == "Twice: 'x' must be >= 0"


def test_bad_input_writes_nothing_to_the_terminal(
    make_custom_bundle: MakeBundle, capfd: pytest.CaptureFixture[str]
) -> None:
    session = load(make_custom_bundle())
    with pytest.raises(InputError):
        session.run({"x": np.array([-1], np.float32)})
    assert capfd.readouterr() == ("", "")


def test_a_dtype_without_kernel_falls_back(
    make_custom_bundle: MakeBundle, toy_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_custom_bundle(dtype="float64")
    monkeypatch.setenv("EDGEKIT_KERNELS", str(toy_library.parent))
    session = load(bundle)
    assert session.run({"x": np.ones(2)})["y"].tolist() == [4, 4]
    assert "it has no kernel for edgekit::Twice in float64, only float32" in session.kernels_note
    with pytest.raises(InputError, match="it has no kernel for edgekit::Twice in float64"):
        load(bundle, kernels=toy_library)


@pytest.mark.parametrize("content", [b"no library", b""], ids=["text", "empty"])
def test_a_library_that_does_not_load_falls_back(
    make_custom_bundle: MakeBundle, no_libraries: Path, describe_library: Describe, content: bytes
) -> None:
    folder = no_libraries / "x"
    folder.mkdir(parents=True)
    (folder / "lib.so").write_bytes(content)
    describe_library(folder)
    bundle = make_custom_bundle()
    session = load(bundle)
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])
    assert f"the kernels in {folder / 'lib.so'} could not be used: " in session.kernels_note
    assert {item.kernel for item in session.kernels} == {PORTABLE}
    with pytest.raises(InputError, match=r"cannot use the kernels in .*lib\.so"):
        load(bundle, kernels=folder)


def test_an_edited_library_is_never_loaded(
    make_custom_bundle: MakeBundle, toy_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(toy_library, tmp_path / "copy" / "x"))
    with (folder / "libtoy.so").open("ab") as stream:
        stream.write(b"x")
    monkeypatch.setenv("EDGEKIT_KERNELS", str(folder.parent))
    assert "libtoy.so was changed after it was built" in load(make_custom_bundle()).kernels_note


@pytest.mark.parametrize("how", ["path", "variable"])
def test_nothing_is_loaded_from_inside_the_bundle(
    make_custom_bundle: MakeBundle, toy_library: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bundle = make_custom_bundle()
    inside = Path(shutil.copytree(toy_library, bundle.path / "x"))
    if how == "path":
        with pytest.raises(InputError, match="it lies inside the bundle, and opening a bundle never runs code"):
            load(bundle.path, kernels=inside)
    else:
        monkeypatch.setenv("EDGEKIT_KERNELS", str(bundle.path))
        assert "it lies inside the bundle" in load(bundle.path).kernels_note


def test_no_body_and_no_kernel(make_custom_bundle: MakeBundle) -> None:
    with pytest.raises(BundleError, match=r"no function bodies for edgekit::Twice.*no native kernels are built in"):
        load(make_custom_bundle(body=False))


def test_no_body_but_a_kernel(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    session = load(make_custom_bundle(body=False), kernels=toy_library)
    np.testing.assert_array_equal(session.run(X)["y"], 4 * X["x"])


def test_a_model_without_custom_ops_looks_for_nothing(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("find_libraries", "this_host", "kernels_root"):
        monkeypatch.delattr(kernel_library, name)
    for kernels in ("auto", "portable"):
        session = load(tiny_bundle, kernels=kernels)
        assert (session.kernels, session.kernels_note) == ((), "")


def test_a_wrong_path_is_an_error_for_every_model(tiny_bundle: Bundle, toy_library: Path) -> None:
    with pytest.raises(InputError, match="no kernels at 'portabel'; expected 'auto', 'portable'"):
        load(tiny_bundle, kernels="portabel")
    assert load(tiny_bundle, kernels=toy_library).kernels == ()


def test_threads_may_load_at_once(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    bundle = make_custom_bundle()

    def answer(index: int) -> bool:
        session = load(bundle, kernels=toy_library if index % 2 else "portable", threads=1)
        return np.array_equal(session.run(X)["y"], 4 * X["x"]) and session.kernels[0].native is bool(index % 2)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(answer, range(40)))


# What is measured belongs to the kernels


def test_native_nodes_are_timed_as_the_op(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    session = load(make_custom_bundle(), kernels=toy_library, threads=1)
    assert isinstance(session, OnnxRuntimeSession)
    times = session.op_times(X, runs=3)
    ops = {entry["name"]: (entry["op"], len(entry["microseconds"])) for entry in times}
    assert ops["first"] == ops["second"] == ("edgekit::Twice", 3)
    assert not any("body" in op for op, _ in ops.values())


def test_the_nodes_of_a_body_are_timed_as_the_op(make_custom_bundle: MakeBundle) -> None:
    session = load(make_custom_bundle(), kernels="portable", threads=1)
    assert isinstance(session, OnnxRuntimeSession)
    times = session.op_times(X, runs=3)
    bodies = [entry for entry in times if entry["op"] == "edgekit::Twice (body)"]
    assert sum("twice" in entry["name"] for entry in bodies) == 2
    assert all(len(entry["microseconds"]) == 3 for entry in bodies)
    assert "edgekit::Twice" not in {entry["op"] for entry in times}
    assert {"If", "ReduceMin"} <= {entry["op"] for entry in times}


@pytest.mark.parametrize("kind", ["native", "portable"])
def test_profiles_say_which_kernels_ran(make_custom_bundle: MakeBundle, toy_library: Path, kind: str) -> None:
    kernels = toy_library if kind == "native" else "portable"
    result = profile(make_custom_bundle(), kernels=kernels, runs=8, warmup=1, threads=1)
    text = "\n".join(profile_lines(result))
    if kind == "native":
        assert text.startswith("custom-onnx: onnxruntime-cpu, native x kernels, 1 thread, x [4]")
        assert "kernels     edgekit::Twice, 2 nodes: native x" in text
        assert "edgekit::Twice" in {op.op for op in result.ops}
    else:
        assert text.startswith("custom-onnx: onnxruntime-cpu, portable function bodies, 1 thread")
        assert "edgekit::Twice, 2 nodes: portable function body (portable bodies were asked for)" in text
        assert "edgekit::Twice (body)" in {op.op for op in result.ops}
    data = result.to_json()["kernels"]
    assert data == [vars(use) for use in result.kernels]
    assert [(use["op"], use["nodes"]) for use in data] == [("edgekit::Twice", 2)]


def test_a_body_of_many_calls_is_traced_in_fewer_runs(
    make_custom_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    op_times = OnnxRuntimeSession.op_times

    def counted(self: OnnxRuntimeSession, inputs: Any, *, runs: int) -> Any:
        asked.append(runs)
        return op_times(self, inputs, runs=runs)

    monkeypatch.setattr(OnnxRuntimeSession, "op_times", counted)
    monkeypatch.setattr(profiler, "_MOST_CALLS", 100)
    result = profile(make_custom_bundle(), kernels="portable", runs=8, warmup=1, threads=1)
    assert asked[0] == 1
    assert 4 <= asked[1] < 20
    assert result.ops


def test_one_bundle_against_itself_on_other_kernels(make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    bundle = make_custom_bundle()
    result = profile_pair(
        bundle, bundle, kernels=toy_library, vs_kernels="portable", runs=8, warmup=1, threads=1, ops=False
    )
    assert [side.kernels[0].kernel for side in (result.a, result.b)] == ["native x", PORTABLE]
    assert "custom-onnx on native x kernels" in result.verdict
    assert "custom-onnx on portable function bodies" in "\n".join(comparison_lines(result))


def test_verification_says_which_kernels_ran(make_custom_bundle: MakeBundle) -> None:
    result = verify(make_custom_bundle(), kernels="portable")
    assert bool(result)
    assert result.to_json()["kernels"][0]["kernel"] == PORTABLE


# Messages


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while running Gather node. "
            "Name:'_inlfunc_Op_token_0_edgekit: Op: k has 3 axes, it's 4' Status Message: indices element out of data",
            "Op: k has 3 axes, it's 4",
        ),
        (
            "... while running If node. Name:'c' Status Message: Non-zero status code returned while running Gather "
            "node. Name:'_inlfunc_Op_edgekit: Op: bad' Status Message: indices",
            "Op: bad",
        ),
        ("... while running Op node. Name:'a node' Status Message: Op: q has\n3 axes\n", "Op: q has\n3 axes"),
        ("... while running Gather node. Name:'g' Status Message: indices element out of data bounds", None),
        ("... while running Op2 node. Name:'g' Status Message: Op: no", None),
    ],
    ids=["guard", "guard-in-branch", "native", "other-node", "other-op"],
)
def test_op_error(text: str, message: str | None) -> None:
    assert op_error(text, {"Op"}) == message
    if "edgekit" not in text:
        assert op_error(text, set()) is None


def test_guards_are_named_as_the_bodies_name_them() -> None:
    from edgekit.custom_ops.onnx_function import GUARD as WRITTEN

    assert GUARD == WRITTEN


def test_the_runtime_needs_no_exporter_for_custom_ops(make_custom_bundle: MakeBundle) -> None:
    script = (
        "import sys, edgekit.runtime as edge; s = edge.load(sys.argv[1]); print(s.kernels[0].kernel); "
        "print([name for name in ('torch', 'onnx', 'tvm', 'typer') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, make_custom_bundle().path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [PORTABLE, "[]"]
    assert done.stderr == ""
