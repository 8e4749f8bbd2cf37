"""Native kernels as a user meets them: built, listed, chosen, told."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.cli.app import run_command
from edgekit.kernels.build import sources_digest
from edgekit.runtime.__main__ import main as runtime_main
from edgekit.runtime.bundle import Bundle

MakeBundle = Callable[..., Bundle]
Describe = Callable[..., None]


class Cli:
    """Runs a command line in this process and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str], run: Callable[[list[str]], int]) -> None:
        self._capsys, self._run = capsys, run
        self.out = self.err = ""

    def __call__(self, *words: str | Path) -> int:
        code = self._run([str(word) for word in words])
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    def json(self, *words: str | Path) -> Any:
        assert self(*words, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys, run_command)


@pytest.fixture(params=["edgekit", "edgekit.runtime"])
def either(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The full command line, and the one for bare devices."""
    return Cli(capsys, run_command if request.param == "edgekit" else runtime_main)


@pytest.fixture(autouse=True)
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where edgekit looks for kernels: an empty folder."""
    monkeypatch.setenv("EDGEKIT_KERNELS", str(tmp_path / "built"))
    return tmp_path / "built"


# build


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arch", "x86-64-v5"], "unknown kernel arch 'x86-64-v5'; did you mean x86-64-v"),
        (["--arch", "aarch64,armv7"], "unknown kernel arch 'armv7'; known: aarch64"),
        (["--arch", ","], "unknown kernel arch ''"),
    ],
)
def test_build_refuses_an_unknown_arch_before_it_starts(cli: Cli, words: list[str], expected: str) -> None:
    assert cli("kernels", "build", *words) == 2
    assert expected in cli.err
    assert "compile" not in cli.err


def test_build_without_tvm_says_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert cli("kernels", "build") == 2
    assert "needs apache-tvm, which is not installed; run: pip install 'edgekit[tvm]'" in cli.err


def test_build_without_headers_says_how_to_get_them(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_ONNXRUNTIME_INCLUDE", str(tmp_path))
    assert cli("kernels", "build") == 1
    assert f"EDGEKIT_ONNXRUNTIME_INCLUDE is {tmp_path}, which does not hold onnxruntime_c_api.h" in cli.err
    assert "apt-get install libonnxruntime-dev" in cli.err


@pytest.mark.slow
def test_build_then_list_then_build_again(cli: Cli, built: Path, this_arch: str) -> None:
    assert cli("kernels", "build") == 0, cli.err
    arch = this_arch
    assert f"build kernels: {arch}: compile with TVM" in cli.err
    assert "fits" in cli.out
    assert "next: edgekit inspect BUNDLE" in cli.out
    listed = cli.json("kernels", "list")
    assert listed["folder"] == str(built)
    assert [(each["arch"], each["fits"], each["reason"]) for each in listed["libraries"]] == [(arch, True, None)]
    again = cli.json("kernels", "build", "--arch", arch)
    assert again[0]["reused"] is True
    assert again[0]["kernels"] == listed["libraries"][0]["kernels"]


# list


def test_list_of_nothing(cli: Cli, built: Path) -> None:
    assert cli("kernels", "list") == 0
    assert f"no kernels are built in {built}; models run on their portable function bodies" in cli.out
    assert "next: edgekit kernels build" in cli.out
    assert cli.json("kernels", "list", built / "nothing") == {"folder": str(built / "nothing"), "libraries": []}


def test_list_says_what_fits_and_why_not(cli: Cli, built: Path, describe_library: Describe) -> None:
    kernels = [
        {"op": "Twice", "dtype": "float32", "symbol": "a", "parameters": {"head_dim": 64, "block_q": 32}},
        {"op": "Twice", "dtype": "float32", "symbol": "b", "parameters": {}},
        {"op": "Twice", "dtype": "float16", "symbol": "c", "parameters": {}},
    ]
    describe_library(built / "good", kernels=kernels)
    describe_library(built / "other", kernels=kernels, machine="riscv64")
    describe_library(built / "wrong")
    (built / "wrong" / "kernels.json").write_text("{}")
    assert cli("kernels", "list") == 0
    lines = {line.split()[0]: line for line in cli.out.splitlines() if line}
    assert lines["good"].rstrip().endswith("fits")
    assert f"{edgekit.__version__}  >=1.20" in lines["good"]
    assert "built for riscv64 linux, this is" in lines["other"]
    assert "is damaged" in cli.out
    assert "head_dim=64 block_q=32; any other size  good, other" in cli.out
    data = cli.json("kernels", "list")["libraries"]
    assert [each["fits"] for each in data] == [True, False, False]
    assert data[0]["kernels"][0]["parameters"] == {"head_dim": 64, "block_q": 32}


def test_list_and_doctor_know_kernels_of_older_sources(cli: Cli, built: Path, describe_library: Describe) -> None:
    """In a checkout the version stays the same for long: the sources themselves are compared."""
    describe_library(built / "new")
    describe_library(built / "old", sources="0" * 64)
    describe_library(built / "unknown")
    document = json.loads((built / "unknown" / "kernels.json").read_text())
    assert document.pop("sources") == sources_digest()
    (built / "unknown" / "kernels.json").write_text(json.dumps(document))
    assert cli("kernels", "list") == 0
    lines = {line.split()[0]: line.rstrip() for line in cli.out.splitlines() if line}
    assert lines["new"].endswith("fits")
    for name in ("old", "unknown"):
        assert "  fits, but older than the sources; build again: edgekit" in lines[name]
    data = {each["arch"]: each for each in cli.json("kernels", "list")["libraries"]}
    assert [(each["fits"], each["outdated"]) for each in data.values()] == [(True, False), (True, True), (True, True)]
    assert cli("doctor", "--json") == 1
    (check,) = (check for check in json.loads(cli.out)["checks"] if check["name"] == "native kernels")
    assert (check["status"], check["mend"]) == ("wrong", "edgekit kernels build")
    assert check["found"] == f"old, unknown in {built}: older than the sources"


def test_without_a_home(cli: Cli, make_custom_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("EDGEKIT_KERNELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    for command in ("build", "list"):
        assert cli("kernels", command) == 2
        assert "set EDGEKIT_KERNELS to a folder" in cli.err
    assert cli("inspect", make_custom_bundle().path) == 0
    assert "portable function body" in cli.out
    assert "set EDGEKIT_KERNELS to a folder" in cli.out
    checks = {check["name"]: check for check in cli.json("doctor")["checks"]}
    assert checks["native kernels"]["status"] == "missing"
    assert checks["native kernels"]["mend"] == "EDGEKIT_KERNELS=FOLDER edgekit kernels build"


# The kernels of a bundle


def test_inspect_says_what_serves_which_node(cli: Cli, make_custom_bundle: MakeBundle, toy_library: Path) -> None:
    bundle = make_custom_bundle().path
    assert cli("inspect", bundle) == 0
    assert "first   edgekit::Twice  portable function body" in cli.out
    assert "no native kernels are built in" in cli.out
    assert cli("inspect", bundle, "--kernels", toy_library) == 0
    assert "second  edgekit::Twice  native x" in cli.out
    assert f"from {toy_library / 'libtoy.so'}" in cli.out
    nodes = cli.json("inspect", bundle, "--kernels", toy_library)["kernels"]
    assert nodes[0] == {
        "node": "first",
        "op": "edgekit::Twice",
        "kernel": "native x",
        "reason": str(toy_library / "libtoy.so"),
    }


def test_inspect_of_a_model_without_custom_ops(cli: Cli, tiny_bundle: Bundle) -> None:
    assert cli.json("inspect", tiny_bundle.path)["kernels"] == []
    assert cli("inspect", tiny_bundle.path) == 0
    assert "custom op" not in cli.out


@pytest.mark.parametrize("kernels", ["auto", "portable", "native"])
def test_every_command_takes_kernels(
    either: Cli, make_custom_bundle: MakeBundle, toy_library: Path, tmp_path: Path, kernels: str
) -> None:
    bundle = make_custom_bundle().path
    chosen = toy_library if kernels == "native" else kernels
    expected = "native x" if kernels == "native" else "portable function body"
    verified = either.json("verify", bundle, "--kernels", chosen)
    assert [(use["op"], use["nodes"], use["kernel"]) for use in verified["kernels"]] == [
        ("edgekit::Twice", 2, expected)
    ]
    assert either("verify", bundle, "--kernels", chosen) == 0
    assert f"edgekit::Twice, 2 nodes: {expected}" in either.out
    profiled = either.json("profile", bundle, "--kernels", chosen, "--runs", "8", "--threads", "1")
    assert profiled["kernels"][0]["kernel"] == expected
    assert Bundle.open(bundle).report()["profile"]["kernels"] == profiled["kernels"]
    np.save(tmp_path / "x.npy", np.ones(3, np.float32))
    assert either("run", bundle, tmp_path / "x.npy", "--kernels", chosen) == 0
    note = "note: function bodies instead of native kernels: no native kernels are built in"
    assert (note in either.out) is (kernels == "auto")


@pytest.mark.parametrize("named", [True, False], ids=["with --vs", "without --vs"])
def test_one_bundle_on_two_kernels(either: Cli, make_custom_bundle: MakeBundle, toy_library: Path, named: bool) -> None:
    bundle = make_custom_bundle().path
    words = ["profile", bundle, *(("--vs", bundle) if named else ())]
    words += ["--kernels", toy_library, "--vs-kernels", "portable", "--runs", "8"]
    assert either(*words, "-t", "1") == 0, either.err
    assert "custom-onnx on native x kernels" in either.out
    assert "custom-onnx on portable function bodies" in either.out


@pytest.mark.parametrize("command", ["verify", "profile", "run"])
def test_kernels_that_are_not_there(either: Cli, make_custom_bundle: MakeBundle, tmp_path: Path, command: str) -> None:
    np.save(tmp_path / "x.npy", np.ones(3, np.float32))
    extra = [tmp_path / "x.npy"] if command == "run" else []
    assert either(command, make_custom_bundle().path, *extra, "--kernels", "natve") == 2
    assert "no kernels at 'natve'; expected 'auto', 'portable', or the path of a kernel library" in either.err


def test_bad_input_is_answered_with_the_ops_own_words(
    either: Cli, make_custom_bundle: MakeBundle, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", -np.ones(3, np.float32))
    assert either("run", make_custom_bundle().path, tmp_path / "x.npy") == 2
    assert either.err.strip() == "edgekit: error: Twice: 'x' must be >= 0"


# doctor


def test_doctor_has_a_group_for_kernels(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_ONNXRUNTIME_INCLUDE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    data = cli.json("doctor")
    checks = {check["name"]: check for check in data["checks"] if check["group"] == "kernels"}
    assert list(checks) == ["apache-tvm", "apache-tvm-ffi", "C++ compiler", "onnxruntime headers", "native kernels"]
    assert {checks[name]["status"] for name in list(checks)[2:]} == {"missing"}
    assert "apt-get install g++" in checks["C++ compiler"]["mend"]
    assert "apt-get install libonnxruntime-dev" in checks["onnxruntime headers"]["mend"]
    assert checks["native kernels"]["mend"] == "edgekit kernels build"
    assert data["ok"] is True
