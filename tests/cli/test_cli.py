"""Each command as a user types it, and each error as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgekit
from edgekit.cli.app import run_command
from edgekit.models.digits import load_digits_split


class Cli:
    """Runs the command line in this process and keeps what it wrote."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str | Path) -> int:
        code = run_command([str(word) for word in words])
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    def json(self, *words: str | Path) -> Any:
        assert self(*words, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


@pytest.fixture
def digit(tmp_path: Path) -> tuple[Path, int]:
    """A real handwritten digit as a PNG, and what it is."""
    images, labels = load_digits_split("test")
    path = tmp_path / "digit.png"
    Image.fromarray(images[5]).save(path)
    return path, int(labels[5])


@pytest.fixture
def broken(digits_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to break."""
    return Path(shutil.copytree(digits_bundle, tmp_path / digits_bundle.name))


def test_help_and_version(cli: Cli) -> None:
    assert cli("--version") == 0
    assert cli.out.strip() == f"edgekit {edgekit.__version__}"
    assert cli("--help") == 0
    for command in ("list", "export", "verify", "profile", "run", "inspect", "doctor", "kernels", "train", "demo"):
        assert command in cli.out
    assert "2 wrong usage" in cli.out


def test_list_shows_every_model_with_measured_accuracy(cli: Cli) -> None:
    data = cli.json("list")
    assert [entry["name"] for entry in data] == edgekit.list_models()
    by_name = {entry["name"]: entry for entry in data}
    assert by_name["shvit_s1"]["parameters"] == 6_330_808
    assert by_name["shvit_s1"]["accuracy"] is None
    assert by_name["shvit_digits"]["accuracy"] >= 0.97
    assert cli("list") == 0
    assert "6,330,808" in cli.out
    assert "241.3 M" in cli.out


def test_list_shows_the_inputs_of_models_without_images(cli: Cli) -> None:
    by_name = {entry["name"]: entry for entry in cli.json("list")}
    assert by_name["shvit_s1"]["input"] == [3, 224, 224]
    assert by_name["shvit_s1"]["macs_per"] == "image"
    assert by_name["lighthgnn"]["macs_per"] == by_name["hgnn"]["macs_per"] == "vertex"
    assert [item["name"] for item in by_name["hgnn"]["input"]] == [
        *("features", "members", "member_chunks", "memberships", "membership_chunks", "vertex_degree", "member_weight")
    ]
    members = {"name": "members", "shape": ["E", "M"], "dtype": "int64", "index_of": "V+Q+1"}
    assert by_name["hgnn"]["input"][1] == members
    assert cli("list") == 0
    lines = {line.split()[0]: line for line in cli.out.splitlines() if line.strip()}
    assert "184.3 k/vertex  Vx1433 " in lines["lighthgnn"]
    assert "Vx1433, .." in lines["hgnn"]


def test_list_shows_the_context_of_language_models(cli: Cli) -> None:
    entry = next(entry for entry in cli.json("list") if entry["name"] == "dhsa_bytes")
    assert entry["macs_per"] == "token"
    ids = {"name": "input_ids", "shape": ["B", "N"], "dtype": "int64", "index_of": "259", "context": 8704}
    assert entry["input"] == [ids]
    assert cli("list") == 0
    line = next(line for line in cli.out.splitlines() if line.startswith("dhsa_bytes"))
    assert "k/token  8,704 tokens " in line
    assert "MACs per token count the linear layers, not attention" in cli.out


@pytest.mark.parametrize("width", [60, 80])
def test_list_keeps_names_whole_in_a_narrow_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr("edgekit.cli.console.PLAIN_WIDTH", width)
    assert cli("list") == 0
    lines = cli.out.splitlines()
    assert {entry["name"] for entry in cli.json("list")} <= {line.split()[0] for line in lines if line.strip()}
    assert max(len(line.rstrip()) for line in lines if not line.startswith("next")) <= width
    assert "handwritten" not in " ".join(lines)


def test_export_then_every_other_command(cli: Cli, tmp_path: Path, digit: tuple[Path, int]) -> None:
    assert cli("export", "shvit_digits", "--target", "onnx", "-o", tmp_path, "--pack") == 0
    bundle = tmp_path / "shvit_digits-onnx.edge"
    assert f"next: edgekit verify {bundle}" in cli.out
    assert "export shvit_digits to onnx: convert to ONNX" in cli.err
    for path in (bundle, tmp_path / "shvit_digits-onnx.edge.zip"):
        verified = cli.json("verify", path, "--data", "digits", "--layers")
        assert verified["passed"] is True
        assert verified["accuracy"]["bundle"] == verified["accuracy"]["pytorch"] >= 0.97
        assert verified["layers"]["first_bad"] is None
        picture, label = digit
        answer = cli.json("run", path, picture, "--top", "3")
        assert answer[0]["predictions"][0]["label"] == str(label)
        assert len(answer[0]["predictions"]) == 3
        assert cli.json("inspect", path)["manifest"]["model"]["source"] == "zoo:shvit_digits"
        profiled = cli.json("profile", path, "--runs", "8", "--threads", "1")
        assert profiled["runs"] == 8
        assert profiled["latency_ms"]["p50"] > 0
        assert sum(op["share"] for op in profiled["ops"]) == pytest.approx(1, abs=1e-3)


def test_profile_against_another_bundle(cli: Cli, digits_bundle: Path, broken: Path) -> None:
    result = cli.json("profile", digits_bundle, "--vs", broken, "--runs", "8", "--no-ops", "--threads", "1")
    low, high = result["ratio"]["low"], result["ratio"]["high"]
    assert low <= result["ratio"]["value"] <= high


def test_tables_are_plain_text_off_a_terminal(cli: Cli, digits_bundle: Path) -> None:
    assert cli("verify", digits_bundle, "--no-live") == 0
    assert "\x1b[" not in cli.out + cli.err
    assert "PASSED: shvit_digits-onnx (fp32)" in cli.out
    assert "not checked: live PyTorch: not asked for" in cli.out
    assert cli("inspect", digits_bundle) == 0
    assert "image: float32[1, 1, 32, 32]" in cli.out
    assert "gray" in cli.out


def test_run_on_arrays_and_save(cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 32, 32), np.float32))
    assert cli("run", digits_bundle, tmp_path / "x.npy", "--save", tmp_path / "y.npz") == 0
    assert "logits" in cli.out
    with np.load(tmp_path / "y.npz") as saved:
        expected = edgekit.load(digits_bundle).run({"image": np.zeros((1, 1, 32, 32), np.float32)})["logits"]
        np.testing.assert_array_equal(saved["logits"], expected)


def test_a_graph_model_through_every_command(cli: Cli, tmp_path: Path) -> None:
    assert cli("export", "hgnn_digits", "--target", "onnx", "-o", tmp_path) == 0
    bundle = tmp_path / "hgnn_digits-onnx.edge"
    verified = cli.json("verify", bundle, "--data", "digits", "--layers")
    assert verified["passed"] is True
    assert verified["accuracy"]["bundle"] == verified["accuracy"]["pytorch"] > 0.9
    assert cli("inspect", bundle) == 0
    assert "members: int64[E, M] < V+Q+1" in cli.out
    assert cli.json("inspect", bundle)["manifest"]["inputs"][1]["index_of"] == "V+Q+1"
    assert cli.json("profile", bundle, "--runs", "2", "--no-ops")["input_source"] == "stored sample"
    assert cli.json("profile", bundle, "--runs", "2", "--no-ops", "--size", "V=30")["inputs"]["vertex_degree"] == [30]
    (inputs, outputs) = next(iter(edgekit.Bundle.open(bundle).samples()))
    np.savez(tmp_path / "graph.npz", **inputs)
    assert cli("run", bundle, tmp_path / "graph.npz", "--save", tmp_path / "out.npz") == 0
    assert "NaN" not in cli.out
    with np.load(tmp_path / "out.npz") as saved:
        np.testing.assert_allclose(saved["logits"], outputs["logits"], atol=1e-4)
    np.savez(tmp_path / "wrong.npz", **{**inputs, "members": inputs["members"] - 99_999})
    assert cli("run", bundle, tmp_path / "wrong.npz") == 2
    assert "members: int64[E, M] < V+Q+1 holds -99999 at" in cli.err


@pytest.mark.parametrize("main", ["edgekit", "runtime"])
def test_run_says_where_outputs_are_no_numbers(
    cli: Cli, capsys: pytest.CaptureFixture[str], tiny_bundle: edgekit.Bundle, tmp_path: Path, main: str
) -> None:
    from edgekit.runtime.__main__ import main as runtime

    x = np.zeros((3, 4), np.float32)
    x[1] = np.inf
    np.savez(tmp_path / "x.npz", x=x)

    def run(*words: str) -> str:
        given = ["run", str(tiny_bundle.path), str(tmp_path / "x.npz"), *words]
        assert (cli(*given) if main == "edgekit" else runtime(given)) == 0
        return cli.out if main == "edgekit" else capsys.readouterr().out

    assert "note: output 'y' holds NaN or infinities, in 1 of 3 rows" in run()
    (answer,) = json.loads(run("--json"))
    assert answer["not_finite"] == {"y": "output 'y' holds NaN or infinities, in 1 of 3 rows"}
    assert answer["outputs"]["y"][0] != answer["outputs"]["y"][1]
    assert None in answer["outputs"]["y"][1]


def test_doctor_finds_what_is_installed(cli: Cli) -> None:
    data = cli.json("doctor")
    names = {check["name"] for check in data["checks"]}
    assert {"torch", "onnxruntime", "numpy"} <= names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["export", "shvit_s9", "--target", "onnx"], "unknown model 'shvit_s9'; did you mean shvit_s"),
        (["export", "shvit_s1", "--target", "onxx"], "unknown target 'onxx'; did you mean onnx?"),
        (["export", "shvit_digits", "--target", "onnx,jetson"], "unknown target 'jetson'"),
        (["export", "shvit_s1", "--target", "onnx", "--precision", "fp61"], "did you mean fp16"),
        (["export", "shvit_digits", "--target", "onnx", "--shape", "image:1x3x32"], "does not run on image [1, 3, 32]"),
        (["export", "shvit_digits", "--target", "onnx", "--shape", "image=1x1"], "cannot read the shape"),
        (["export", "shvit_s1", "--target", "onnx", "--precision", "int8"], "int8 needs calibration data"),
        (["export", "shvit_digits", "--target", "onnx", "--option", "depth=3"], "depth"),
        (["export", "dynamicvis_digits", "--target", "onnx", "--option", "img_size=33"], "multiple of 8"),
        (["export", "hgnn_digits", "--target", "onnx", "--shape", "vertex:P@int64<W"], "point into W"),
        (["export", "hgnn", "--target", "onnx", "--precision", "int8"], "int8 needs calibration data"),
        (["export", "shvit_s1", "--target", "onnx", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["verify", "nothing.edge"], "no bundle at nothing.edge"),
        (["export", "dynamicvis_digits", "--target", "onnx", "--option", "num_classes=abc"], "got 'abc'"),
        (["export", "dynamicvis_digits", "--target", "onnx", "--option", "token_selection=no"], "true or false"),
        (["profile", "BUNDLE", "--runs", "0"], "runs"),
        (["profile", "BUNDLE", "--size", "N=\u00b2"], "NAME=NUMBER"),
        (["profile", "BUNDLE", "--on", "jetson"], "unknown device 'jetson'"),
        (["profile", "BUNDLE", "--size", "N=4"], "N"),
        (["run", "BUNDLE", "nothing.png"], "nothing.png"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_answered_in_words(
    cli: Cli, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(*[str(digits_bundle) if word == "BUNDLE" else word for word in words]) == 2
    assert expected in cli.err
    assert "Traceback" not in cli.err
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])


def test_errors_are_json_too(cli: Cli) -> None:
    assert cli("verify", "nothing.edge", "--json") == 2
    assert json.loads(cli.out)["exit_code"] == 2
    assert "no bundle at" in json.loads(cli.out)["error"]


@pytest.mark.parametrize("command", ["verify", "profile", "run", "inspect"])
def test_edited_bundle_is_refused_by_every_command(cli: Cli, broken: Path, command: str) -> None:
    model = broken / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    extra = ["picture.png"] if command == "run" else []
    assert cli(command, broken, *extra) == 2
    assert "was changed after export" in cli.err


def test_truncated_bundle_and_newer_schema(cli: Cli, broken: Path) -> None:
    samples = broken / "samples.npz"
    samples.write_bytes(samples.read_bytes()[:-10])
    assert cli("verify", broken) == 2
    assert "truncated" in cli.err
    manifest = broken / "manifest.json"
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "schema": 99}))
    assert cli("inspect", broken) == 2
    assert "schema 99" in cli.err
    assert "pip install -U edgekit" in cli.err


def test_path_that_leaves_the_bundle_is_refused(cli: Cli, broken: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.onnx").write_bytes(b"x")
    manifest = broken / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"]["../secret.onnx"] = data["files"].pop("model.onnx")
    manifest.write_text(json.dumps(data))
    assert cli("inspect", broken) == 2
    assert "leaves the bundle's folder" in cli.err


def test_image_that_is_none(cli: Cli, digits_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_text("not a picture")
    assert cli("run", digits_bundle, picture) == 2
    assert "picture.png" in cli.err


def test_bundle_that_differs_from_pytorch_fails_with_code_1(cli: Cli, broken: Path) -> None:
    """Samples edited with a right hash: what PyTorch 'answered' is no longer what the model computes."""
    bundle = edgekit.Bundle.open(broken)
    samples = bundle.samples()
    samples.outputs["logits"][0] += 1
    samples.save(broken / "samples.npz")
    _rehash(broken, "samples.npz")
    assert cli("verify", broken, "--no-live") == 1
    assert "FAILED" in cli.out
    assert "differs" in cli.out


def test_interrupted_export_leaves_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.export import steps

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "verify_samples", interrupt)
    assert cli("export", "shvit_digits", "--target", "onnx", "-o", tmp_path) == 130
    assert list(tmp_path.iterdir()) == []


def test_command_is_installed() -> None:
    command = Path(sys.executable).parent / "edgekit"
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("edgekit ")


def _rehash(bundle: Path, name: str) -> None:
    import hashlib

    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / name).read_bytes()
    manifest["files"][name].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (bundle / "manifest.json").write_text(json.dumps(manifest))
