"""`python -m edgekit.runtime` as a user types it, and on a device that has numpy and onnxruntime alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from edgekit.runtime.__main__ import main
from edgekit.runtime.bundle import SAMPLES, Bundle, BundleWriter, Samples
from edgekit.runtime.compare import failed_comparison
from edgekit.runtime.manifest import Manifest, ModelInfo, TensorSpec, WeightsInfo
from edgekit.runtime.postprocess import Prediction
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.text import output_lines, prediction_lines, verification_lines
from edgekit.runtime.verification import Check, Verification

PICTURES = [np.full((6, 6, 3), level, np.uint8) for level in (20, 230)]
# A device without what the runtime must not need.
BLOCK = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"torch", "onnx", "typer", "rich", "PIL", "click", "hypothesis", "pytest"}:
                raise ImportError(f"{name} is not on this device")
    sys.meta_path.insert(0, Blocker())
"""


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgekit.runtime", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def shades(tmp_path: Path) -> Bundle:
    """Tells dark from light pictures: gray 4x4, logits (-mean, mean), one stored sample."""
    recipe = ImagePreprocessing(size=(4, 4), color="gray", mean=(0.5,), std=(0.5,))
    weight = np.stack([np.full(16, -1 / 16), np.full(16, 1 / 16)], axis=1).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])],
        "shades",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    image = recipe(PICTURES[1])
    with BundleWriter(tmp_path / "shades-onnx.edge") as writer:
        writer.add("model.onnx", "model").write_bytes(model.SerializeToString())
        Samples({"image": image[None]}, {"logits": (image.reshape(1, 16) @ weight)[None]}).save(
            writer.add(SAMPLES, "samples")
        )
        manifest = Manifest(
            name="shades",
            model=ModelInfo("tests", WeightsInfo("random", "0" * 64, seed=0), parameters=32),
            target="onnx",
            precision="fp32",
            inputs=(TensorSpec("image", "float32", (1, 1, 4, 4), "NCHW", recipe),),
            outputs=(TensorSpec("logits", "float32", (1, 2)),),
            labels=("dark", "light"),
        )
        return writer.finish(manifest, {})


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(PICTURES[1]).save(path)
    return path


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Four labelled rows for the tiny bundle."""
    x = np.random.default_rng(5).standard_normal((4, 4), dtype=np.float32)
    np.savez(tmp_path / "rows.npz", x=x, labels=np.array([0, 1, 2, 0]))
    return tmp_path / "rows.npz"


def test_verify(tiny_bundle: Bundle, arrays: Path) -> None:
    result = command("verify", tiny_bundle.path, "--threads", 1, "--data", arrays)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    columns = "against output inputs max abs rel L2 tolerance cosine PSNR same top-1"
    assert " ".join(lines[0].split()) == columns
    assert lines[1].startswith("stored PyTorch outputs  y  ")
    assert lines[1].endswith("  ok")
    assert lines[2].startswith("accuracy: ")
    assert lines[2].endswith(f"% of 4 items of {arrays}")
    assert lines[-2:] == ["not checked: live PyTorch: this is the torch-free runtime", "PASSED: tiny-onnx (fp32)"]


def test_verify_json(tiny_bundle: Bundle) -> None:
    result = command("verify", "--json", tiny_bundle.pack().path)
    assert result.returncode == 0
    data = json.loads(result.stdout)
    assert data["passed"] is True
    assert data["checks"][0]["inputs"] == 2


def test_a_check_that_fails_has_code_1(tiny_bundle: Bundle) -> None:
    samples = tiny_bundle.samples()
    with BundleWriter(tiny_bundle.path) as writer:
        writer.add("model.onnx", "model").write_bytes(tiny_bundle.read("model.onnx"))
        Samples(samples.inputs, {"y": samples.outputs["y"] + 1}).save(writer.add(SAMPLES, "samples"))
        writer.finish(tiny_bundle.manifest, {})
    result = command("verify", tiny_bundle.path)
    assert (result.returncode, result.stderr) == (1, "")
    assert "differs" in result.stdout
    assert result.stdout.endswith("FAILED: tiny-onnx (fp32)\n")


def test_profile(tiny_bundle: Bundle) -> None:
    result = command("profile", tiny_bundle.path, "--runs", 20, "--size", "N=3", "--threads", 1)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("tiny-onnx: onnxruntime-cpu, 1 thread, x [3, 4] (random)")
    assert "p50" in result.stdout
    assert tiny_bundle.report()["profile"]["runs"] == 20


def test_profile_in_turns(tiny_bundle: Bundle) -> None:
    shutil.copytree(tiny_bundle.path, tiny_bundle.path.with_name("rival.edge"))
    rival = tiny_bundle.path.with_name("rival.edge")
    result = command("profile", tiny_bundle.path, "--vs", rival, "--runs", 16, "--threads", 1, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    data = json.loads(result.stdout)
    assert (data["a"]["file"], data["b"]["file"]) == ("tiny-onnx.edge", "rival.edge")
    assert tiny_bundle.report().keys() == {"profile", "comparison"}
    text = command("profile", tiny_bundle.path, "--vs", rival, "--runs", 16, "--threads", 1).stdout.splitlines()
    assert text[0].split() == ["bundle", "p50", "p90", "p99", "timing"]


def test_run_on_images(shades: Bundle, photo: Path, tmp_path: Path) -> None:
    result = command("run", shades.path, photo, "--save", tmp_path / "raw.npz")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == str(photo)
    assert [line.split()[0] for line in lines[1:4]] == ["class", "light", "dark"]
    assert lines[-1] == f"outputs written to {tmp_path / 'raw.npz'}"
    with np.load(tmp_path / "raw.npz") as raw:
        np.testing.assert_allclose(raw["logits"], [[-0.8039, 0.8039]], atol=1e-3)


def test_run_json(shades: Bundle, photo: Path) -> None:
    (first,) = json.loads(command("run", shades.path, photo, "--top", 1, "--json").stdout)
    assert first["input"] == str(photo)
    assert [(item["index"], item["label"]) for item in first["predictions"]] == [(1, "light")]
    assert first["predictions"][0]["probability"] == pytest.approx(0.833, abs=1e-3)


def test_run_on_arrays(tiny_bundle: Bundle, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", x=x)
    result = command("run", tiny_bundle.path, tmp_path / "a.npy", tmp_path / "b.npz", "--save", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[:4] for line in result.stdout.splitlines()[1:3]] == [
        ["output", "shape", "dtype", "min"],
        ["y", "[2,", "3]", "float32"],
    ]
    with np.load(tmp_path / "out") as raw:
        assert sorted(raw.files) == ["a/y", "b/y"]
        np.testing.assert_array_equal(raw["a/y"], raw["b/y"])
    data = json.loads(command("run", tiny_bundle.path, tmp_path / "a.npy", "--json").stdout)
    assert np.shape(data[0]["outputs"]["y"]) == (2, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND; see: python -m edgekit.runtime --help"),
        (["fly"], "invalid choice: 'fly'"),
        (["verify"], "the following arguments are required: BUNDLE; see: python -m edgekit.runtime verify --help"),
        (["verify", "B", "--thread", "1"], "unrecognized arguments: --thread"),
        (["verify", "B", "--threads", "two"], "invalid int value: 'two'"),
        (["verify", "B", "--threads", "0"], "threads must be at least 1, got 0"),
        (["verify", "missing.edge"], "no bundle at missing.edge"),
        (["verify", "B", "--data", "missing.npz"], "no such data set: missing.npz"),
        (["profile", "B", "--size", "N"], "cannot read --size 'N'; write NAME=NUMBER, such as N=4"),
        (["profile", "B", "--size", "M=4"], "unknown dimension 'M'"),
        (["profile", "B", "--runs", "0"], "runs"),
        (["profile", "B", "--vs", "missing.edge"], "no bundle at missing.edge"),
        (["run", "B"], "nothing to run on: give INPUT files"),
        (["run", "B", "missing.npy"], "no such data set: missing.npy"),
        (["run", "B", "photo.png"], "has no image preprocessing"),
        (["run", "B", "x.npy", "--save", "missing/out.npz"], "cannot write missing/out.npz: No such file"),
    ],
    ids=lambda item: " ".join(item) if isinstance(item, list) else "",
)
def test_wrong_usage(
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tiny_bundle.path.parent)
    np.save("x.npy", np.ones((1, 4), np.float32))
    words = [str(tiny_bundle.path) if word == "B" else word for word in words]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("edgekit: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 2
    assert message in json.loads(captured.out)["error"]
    assert captured.err.startswith("edgekit: error: ")


def test_wrong_usage_as_typed(tmp_path: Path) -> None:
    result = command("verify", tmp_path, "--json")
    assert result.returncode == 2
    assert result.stderr.startswith(f"edgekit: error: {tmp_path} has no manifest.json")
    assert json.loads(result.stdout).keys() == {"error", "exit_code"}


@pytest.mark.parametrize(
    "words", [["--help"], ["verify", "--help"], ["profile", "--help"], ["run", "-h"]], ids=" ".join
)
def test_help(words: list[str]) -> None:
    result = command(*words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python -m edgekit.runtime")


def test_an_interrupt_has_code_130(tiny_bundle: Bundle) -> None:
    words = [sys.executable, "-m", "edgekit.runtime", "profile", str(tiny_bundle.path), "--runs", "100000000"]
    # A shell without job control lets its background processes ignore interrupts, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=4)  # it is measuring by now
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "edgekit: interrupted\n")


def test_a_reader_that_goes_away(tiny_bundle: Bundle) -> None:
    words = f"{sys.executable} -m edgekit.runtime verify {tiny_bundle.path} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", words], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_bare_device(tiny_bundle: Bundle, shades: Bundle, arrays: Path, photo: Path, tmp_path: Path) -> None:
    """Everything on arrays works with torch, onnx, typer, rich and Pillow out of reach."""
    np.save(tmp_path / "x.npy", np.ones((1, 4), np.float32))
    code = (
        BLOCK
        + """
    import edgekit.runtime, numpy
    from edgekit.runtime.__main__ import main
    tiny, shades, rows, x, photo = sys.argv[1:]
    codes = [
        main(["verify", tiny, "--data", rows]),
        main(["profile", tiny, "--runs", "10"]),
        main(["profile", tiny, "--vs", tiny, "--runs", "16"]),
        main(["run", tiny, x, rows]),
        main(["verify", shades]),
        main(["run", shades, photo]),
    ]
    assert codes == [0, 0, 0, 0, 0, 2], codes
    session = edgekit.runtime.load(shades)
    best = session.predict(numpy.full((6, 6, 3), 20, numpy.uint8))[0]
    assert best.label == "dark", best
    assert not {"torch", "onnx", "typer", "rich", "PIL"} & set(sys.modules)
    """
    )
    words = [tiny_bundle.path, shades.path, arrays, tmp_path / "x.npy", photo]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert "needs Pillow, which is not installed; run: pip install" in result.stderr


# Lines


def test_lines_of_what_could_not_be_compared() -> None:
    result = Verification("t", "int8", (Check("a", 2, (failed_comparison("y", 0.25, "no such output"),)),))
    lines = verification_lines(result)
    assert lines[1].split() == ["a", "y", "2", "2e-01", "no", "such", "output"]
    assert "nan" not in "".join(lines)
    assert lines[-1] == "FAILED: t (int8)"


def test_lines_of_predictions_and_outputs() -> None:
    found = [Prediction(0, "cat", 0.75, 1.5), Prediction(7, None, 0.25, -1.0), Prediction(2, "", 0.0, -9.0)]
    assert [line.split() for line in prediction_lines("p.png", found)[2:]] == [
        ["cat", "75.00", "%", "1.5"],
        ["7", "25.00", "%", "-1"],
        ["0.00", "%", "-9"],
    ]
    outputs: dict[str, Any] = {"y": np.array([[1.0, 2.0]]), "none": np.zeros((0, 4)), "flag": np.array(True)}
    assert [line.split() for line in output_lines("a.npy", outputs)[2:]] == [
        ["y", "[1,", "2]", "float64", "1", "2"],
        ["none", "[0,", "4]", "float64"],
        ["flag", "[]", "bool", "1", "1"],
    ]
