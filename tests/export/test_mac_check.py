"""`check_on_mac.py` with a stand-in for Core ML Tools, and how its findings are read back: nothing here is a Mac."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.cli.app import run_command
from edgekit.errors import BundleError, ExportError
from edgekit.export.mac_check import write_check
from edgekit.runtime.bundle import Bundle, BundleWriter
from edgekit.runtime.mac_report import mac_lines, read_mac_report

_SPEC = importlib.util.spec_from_file_location("coreml_folders", Path(__file__).with_name("coreml_folders.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
folders = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(folders)

FAKE = Path(__file__).with_name("fake_coremltools")
# Makes this Python say that it is a Mac's, then runs the script as a user would.
AS_A_MAC = """
import platform, runpy, subprocess, sys
import numpy
try:
    import PIL.Image
except ImportError:
    pass
platform.machine(), platform.processor()
version, missing, script, *arguments = sys.argv[1:]
if version:
    sys.platform = "darwin"
    platform.mac_ver = lambda: (version, ("", "", ""), "arm64")
if missing:
    sys.modules[missing] = None
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def run(
    folder: Path, *arguments: str, macos: str = "15.1", fault: str = "", missing: str = ""
) -> subprocess.CompletedProcess[str]:
    script = folder / "check_on_mac.py"
    command = [sys.executable, "-W", "error", "-c", AS_A_MAC, macos, missing, str(script), *arguments]
    environment = {"PYTHONPATH": str(FAKE), "FAKE_COREML": fault, "PATH": "/nowhere", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def quick(folder: Path, *arguments: str, **options: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "--runs", "3", "--warmup", "1", *arguments, **options)


def mac_section(folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))["mac"]
    return section


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle's folder of each kind of model, not to be changed."""
    return {
        name: folders.write_folder(case(), tmp_path_factory.mktemp(name.replace("-", "_")), swift=False)
        for name, case in folders.CASES.items()
    }


@pytest.fixture
def image(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the image model's bundle, to measure in."""
    return Path(shutil.copytree(made["image"], tmp_path / made["image"].name))


def test_script_needs_python_3_9_and_nothing_of_edgekit(made: dict[str, Path]) -> None:
    text = (made["image"] / "check_on_mac.py").read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {
        name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    } | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
    assert "\nTOLERANCE = 0.002 " in text
    assert '\nEDGEKIT = ""' not in text


def test_dry_run_says_what_it_would_do_and_does_nothing(made: dict[str, Path]) -> None:
    folder = made["language"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run(folder, "--dry-run", "--runs", "7", macos="")
    assert done.returncode == 0, done.stderr
    for said in ("macOS 15.0 or later", "function prefill_16", "function decode", "logits, present.0.key", "0.002"):
        assert said in done.stdout
    assert "7 times for the latency" in done.stdout
    assert "here it would stop: Core ML runs on macOS alone, and this is Linux" in done.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"macos": ""}, "Core ML runs on macOS alone"),
        ({"macos": "12.7.1"}, "needs macOS 13.0; this is 12.7"),
        ({"missing": "coremltools"}, "coremltools is not installed; run: "),
        ({"missing": "PIL"}, "-m pip install pillow"),
    ],
    ids=["no-mac", "old-macos", "no-coremltools", "no-pillow"],
)
def test_machines_that_cannot_check_say_why(image: Path, options: dict[str, str], said: str) -> None:
    before = (image / "report.json").read_bytes()
    done = quick(image, **options)
    assert done.returncode == 2
    assert done.stderr.startswith("cannot check: ")
    assert said in done.stderr
    assert (image / "report.json").read_bytes() == before


def test_newer_systems_need_newer_macos(made: dict[str, Path]) -> None:
    done = quick(made["language"], macos="14.7")
    assert done.returncode == 2
    assert "the model is for iOS18, which needs macOS 15.0; this is 14.7" in done.stderr


def test_good_run_is_written_and_read_back(image: Path) -> None:
    done = quick(image)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" ok\n") == 4
    assert 'PASSED; written to report.json as the section "mac"' in done.stdout
    report = json.loads((image / "report.json").read_text(encoding="utf-8"))
    assert report["export"] == {"seconds": 1.5}  # what stood there stays
    assert sorted(path.name for path in image.iterdir() if path.name.startswith(".")) == []

    found = read_mac_report(Bundle.open(image))
    assert found is not None
    assert found.passed
    assert found.current
    assert found.machine.macos == "15.1"
    assert found.machine.chip  # there is no sysctl here
    (graph,) = found.graphs
    assert [unit.units for unit in graph.units] == ["CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL"]
    for unit in graph.units:
        assert unit.runs == 3
        assert unit.latency_ms is not None
        assert 0 < unit.latency_ms.min <= unit.latency_ms.p50 <= unit.latency_ms.p90 <= unit.latency_ms.p99
        assert unit.outputs[0].rel_l2 is not None
        assert unit.outputs[0].rel_l2 < 1e-6
    assert [(op.op, op.device, op.supported, op.cost) for op in graph.ops] == [
        ("conv", "NE", ("CPU", "NE"), 0.75),
        ("while_loop", None, (), None),
        ("topk", "CPU", ("CPU",), 0.25),
    ]
    lines = "\n".join(mac_lines(found))
    assert "on a Mac: PASSED" in lines
    assert "compute plan of main, as Core ML estimates it: NE 1 ops, 75 % of the cost" in lines
    assert "topk" in lines


@pytest.mark.parametrize("kind", folders.CASES)
def test_every_kind_of_input_reaches_core_ml(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(made[kind], tmp_path / made[kind].name))
    done = quick(folder, "--units", "ALL", "--no-plan")
    assert done.returncode == 0, done.stdout + done.stderr
    section = mac_section(folder)
    names = [output["name"] for output in section["graphs"][0]["units"][0]["outputs"]]
    assert names == {"arrays": ["out", "out_"]}.get(kind, ["logits", "present.0.key", "present.0.value"][: len(names)])
    assert len(section["graphs"]) == (2 if kind in ("language", "huggingface") else 1)
    assert section["graphs"][0]["plan"] is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("differs:CPU_AND_NE", "differs"),
        ("nan:CPU_AND_NE", "logits: 3 of 3 values are NaN or infinite"),
        ("no-output:CPU_AND_NE", "logits: Core ML gave no output of this name"),
        ("fails:CPU_AND_NE", "RuntimeError: Error in declaring network: no such unit"),
    ],
)
def test_one_bad_unit_fails_and_the_others_are_measured(image: Path, fault: str, said: str) -> None:
    done = quick(image, fault=fault)
    assert done.returncode == 1
    assert said in done.stdout
    assert "FAILED; written" in done.stdout
    found = read_mac_report(Bundle.open(image))
    assert found is not None
    assert not found.passed
    assert [unit.passed for unit in found.graphs[0].units] == [True, True, False, True]
    shown = "\n".join(mac_lines(found))
    assert "on a Mac: FAILED" in shown
    assert said in shown


def test_a_model_without_its_state_fails(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["language"], tmp_path / made["language"].name))
    done = quick(folder, "--units", "CPU_ONLY", fault="stateless")
    assert done.returncode == 1
    problems = [graph["units"][0]["problem"] for graph in mac_section(folder)["graphs"]]
    assert all("Cannot get state" in problem for problem in problems)


@pytest.mark.parametrize(("fault", "macos"), [("no-plan", "15.1"), ("", "14.3")])
def test_without_a_plan_the_rest_is_measured(image: Path, fault: str, macos: str) -> None:
    done = quick(image, "--units", "ALL", fault=fault, macos=macos)
    assert done.returncode == 0, done.stderr
    found = read_mac_report(Bundle.open(image))
    assert found is not None
    assert found.graphs[0].ops == ()
    wanted = "MLComputePlan needs macOS 14.4" if macos == "14.3" else "ValueError: MLComputePlan is not supported."
    assert found.graphs[0].plan_problem == wanted
    assert f"compute plan of main: {wanted}" in mac_lines(found)


def test_interrupted_run_leaves_the_report(image: Path) -> None:
    before = (image / "report.json").read_bytes()
    done = quick(image, fault="interrupt:CPU_AND_NE")
    assert done.returncode == 130
    assert "stopped; report.json is as it was" in done.stderr
    assert "CPU_ONLY" in done.stdout
    assert (image / "report.json").read_bytes() == before
    assert sorted(path.name for path in image.iterdir() if ".tmp" in path.name) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"mac": '])
def test_damaged_report_is_told_before_measuring(image: Path, content: str) -> None:
    (image / "report.json").write_text(content, encoding="utf-8")
    done = quick(image, fault="fails")
    assert done.returncode == 2
    assert "report.json" in done.stderr
    assert "CPU_ONLY" not in done.stdout
    assert (image / "report.json").read_text(encoding="utf-8") == content


def test_changed_and_missing_files_are_named(image: Path) -> None:
    weights = image / "model.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    weights.write_bytes(b"other")
    done = quick(image)
    assert done.returncode == 2
    assert "weights/weight.bin was changed after the export" in done.stderr
    weights.unlink()
    assert "weights/weight.bin cannot be read" in quick(image).stderr
    (image / "manifest.json").write_text("{}", encoding="utf-8")
    assert "manifest.json is damaged" in quick(image).stderr
    (image / "manifest.json").unlink()
    assert "no readable manifest.json beside this file" in quick(image).stderr


def test_bundle_without_samples_is_refused(tmp_path: Path) -> None:
    manifest, _, _ = folders.image_case()
    folder = folders.write_folder(folders.image_case(), tmp_path, swift=False)
    data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del data["files"]["samples.npz"]
    (folder / "manifest.json").write_text(json.dumps(data), encoding="utf-8")
    done = quick(folder)
    assert done.returncode == 2
    assert "no samples to compare with" in done.stderr
    assert manifest.name in (folder / "manifest.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_counts_are_checked(image: Path, count: str) -> None:
    done = run(image, "--runs", count)
    assert done.returncode == 2
    assert "expected" in done.stderr


def test_inspect_shows_what_was_measured(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", str(image)]) == 0
    assert "on a Mac" not in capsys.readouterr().out
    assert quick(image).returncode == 0
    assert run_command(["inspect", str(image)]) == 0
    shown = capsys.readouterr().out
    assert "on a Mac: PASSED" in shown
    assert "CPU_AND_NE" in shown


def test_measurements_of_another_export_are_marked(image: Path) -> None:
    assert quick(image, "--units", "ALL").returncode == 0
    report = json.loads((image / "report.json").read_text(encoding="utf-8"))
    report["mac"]["package_sha256"] = "0" * 64
    report["mac"]["machine"]["translated"] = True
    (image / "report.json").write_text(json.dumps(report), encoding="utf-8")
    found = read_mac_report(Bundle.open(image))
    assert found is not None
    assert not found.current
    lines = mac_lines(found)
    assert any("measured on another export" in line for line in lines)
    assert any("Rosetta" in line for line in lines)


@pytest.fixture(scope="module")
def measured(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(made["image"], tmp_path_factory.mktemp("measured") / made["image"].name))
    assert quick(folder).returncode == 0
    return folder


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-object": (lambda mac: mac.clear(), "mac'? must be an object"),
    "newer": (lambda mac: mac.update(schema=2), "mac.schema"),
    "no-field": (lambda mac: mac.pop("machine"), "mac'? must be an object with the fields"),
    "machine": (lambda mac: mac["machine"].update(chip=3), "mac.machine.chip"),
    "unknown": (lambda mac: mac["machine"].update(extra=3), "mac.machine.extra"),
    "memory": (lambda mac: mac["machine"].update(memory_bytes=-1), "mac.machine.memory_bytes"),
    "graphs": (lambda mac: mac.update(graphs={}), "mac.graphs"),
    "units": (lambda mac: mac["graphs"][0].update(units=[3]), r"mac.graphs\[0\].units\[0\]"),
    "latency": (lambda mac: mac["graphs"][0]["units"][0]["latency_ms"].update(p50="fast"), "latency_ms.p50"),
    "negative": (lambda mac: mac["graphs"][0]["units"][0].update(load_ms=-2.5), "load_ms"),
    "flag": (lambda mac: mac.update(passed="yes"), "mac.passed"),
    "cost": (lambda mac: mac["graphs"][0]["plan"]["ops"][0].update(cost=True), r"plan.ops\[0\].cost"),
    "plan": (lambda mac: mac["graphs"][0].update(plan=[]), r"mac.graphs\[0\].plan"),
    "infinite": (lambda mac: mac.update(tolerance=float("inf")), "not valid JSON"),
    "terminal": (lambda mac: mac["machine"].update(chip="\x1b[2J"), "control characters"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_section_is_refused(measured: Path, tmp_path: Path, edit: str) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / measured.name))
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    change, said = EDITS[edit]
    before = copy.deepcopy(report)
    change(report["mac"])
    assert report != before
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with pytest.raises(BundleError, match=said):
        read_mac_report(Bundle.open(folder))


def test_bundle_that_was_never_measured_has_no_report(made: dict[str, Path]) -> None:
    assert read_mac_report(Bundle.open(made["image"])) is None


def test_script_is_for_core_ml_alone(tmp_path: Path) -> None:
    manifest, _, _ = folders.image_case()
    with BundleWriter(tmp_path / "x.edge") as writer, pytest.raises(ExportError, match="no Core ML package"):
        write_check(writer, replace(manifest, coreml=None))
