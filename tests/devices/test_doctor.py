from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.devices import diagnosis_lines, doctor
from edgekit.devices.doctor import (
    PARTS,
    Check,
    Diagnosis,
    Part,
    check_kernels,
    check_part,
    check_python,
    in_range,
    wanted_range,
)
from edgekit.runtime.kernel_library import find_libraries, this_host
from edgekit.runtime.system import Machine

TORCH = Part("torch", "torch", "export to onnx", "the models", "export")
ORT = Part("onnxruntime", "onnxruntime", "runtime", "running", alternatives=("onnxruntime-gpu",))
MACHINE = Machine("Fast 9000", "x86_64", 4, 8, 8, ("avx2",), 2**33, "Linux 6", "3.12.1")


@pytest.mark.parametrize(
    ("part", "versions", "importable", "wanted", "status", "found", "mend"),
    [
        (TORCH, {"torch": "2.13.0+cpu"}, True, ">=2.9,<2.14", "ok", "2.13.0+cpu", None),
        (TORCH, {}, False, ">=2.9,<2.14", "missing", "not installed", "pip install 'edgekit[export]'"),
        (ORT, {}, False, ">=1.20", "missing", "not installed", "pip install edgekit"),
        (TORCH, {"torch": "2.8.1"}, True, ">=2.9,<2.14", "wrong", "2.8.1, outside", "pip install 'torch>=2.9,<2.14'"),
        (
            TORCH,
            {"torch": "2.9.0"},
            False,
            ">=2.9",
            "wrong",
            "2.9.0, but its module torch is not there",
            "pip install --force-reinstall 'torch>=2.9'",
        ),
        (TORCH, {}, True, ">=2.9", "ok", "version unknown", None),
        (ORT, {"onnxruntime-gpu": "1.22"}, True, ">=1.20", "ok", "1.22 (onnxruntime-gpu)", None),
        (
            ORT,
            {"onnxruntime": "1.31", "onnxruntime-gpu": "1.22"},
            True,
            ">=1.20",
            "wrong",
            "overwrite each other",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime>=1.20'",
        ),
    ],
    ids=["fine", "missing-extra", "missing-core", "too-old", "broken", "no-metadata", "alternative", "two-at-once"],
)
def test_check_part(
    part: Part, versions: dict[str, str], importable: bool, wanted: str, status: str, found: str, mend: str | None
) -> None:
    check = check_part(part, versions, importable=importable, wanted=wanted)
    assert (check.status, check.mend) == (status, mend)
    assert found in check.found


@pytest.mark.parametrize("version", ["0.1.15", "0.1.15.post1"])
@pytest.mark.parametrize(("wanted", "install"), [(">=0.1.14,<0.1.15", ">=0.1.14,<0.1.15"), ("", "!=0.1.15")])
def test_a_version_known_to_crash_is_wrong_whatever_the_range(version: str, wanted: str, install: str) -> None:
    part = Part("apache-tvm-ffi", "tvm_ffi", "kernels", "compiling kernels", "tvm")
    bad = check_part(part, {"apache-tvm-ffi": version}, importable=True, wanted=wanted)
    assert (bad.status, bad.mend) == ("wrong", f"pip install 'apache-tvm-ffi{install}'")
    assert bad.found == f"{version}: it crashes in Schedule.tensorize and meta_schedule"
    for good in ("0.1.14.post1", "0.1.150"):
        assert check_part(part, {"apache-tvm-ffi": good}, importable=True, wanted="").status == "ok"


def test_kernel_libraries(tmp_path: Path, describe_library: Callable[..., None]) -> None:
    def found(root: Path) -> Check:
        return check_kernels(root, find_libraries(root), this_host())

    none = found(tmp_path)
    assert (none.group, none.status, none.found) == ("kernels", "missing", f"none built in {tmp_path}")
    assert none.mend == "edgekit kernels build"
    describe_library(tmp_path / "old", edgekit="0.0.1")
    old = found(tmp_path)
    assert (old.status, old.mend) == ("missing", "edgekit kernels build")
    assert old.found.startswith("old: built by edgekit 0.0.1, this is ")
    describe_library(tmp_path / "new")
    assert (found(tmp_path).status, found(tmp_path).mend) == ("ok", None)
    assert found(tmp_path).found == f"new in {tmp_path} (1 more for others)"


def test_kernels_of_other_sources_are_wrong(tmp_path: Path, describe_library: Callable[..., None]) -> None:
    describe_library(tmp_path / "a", sources="1")
    describe_library(tmp_path / "b", sources="2")
    libraries, host = find_libraries(tmp_path), this_host()
    check = check_kernels(tmp_path, libraries, host, sources="1")
    assert (check.status, check.mend) == ("wrong", "edgekit kernels build")
    assert check.found == f"b in {tmp_path}: older than the sources"
    assert check_kernels(tmp_path, libraries, host).status == "ok"


def test_a_better_check_of_the_kernels_stands_in_place_of_ours() -> None:
    better = Check("native kernels", "kernels", "ok", "here", "", "running", None)
    checks = doctor.diagnose([better]).checks
    assert [check for check in checks if check.name == "native kernels"] == [better]
    assert "native kernels" in {check.name for check in doctor.diagnose().checks}


def test_further_checks_are_shown() -> None:
    tool = Check("compiler", "kernels", "missing", "not found", "", "building", "apt-get install g++")
    diagnosis = doctor.diagnose([tool])
    assert tool in diagnosis.checks
    assert "  apt-get install g++" in diagnosis_lines(diagnosis)


def test_python_out_of_range() -> None:
    assert check_python("3.12.1", ">=3.11").status == "ok"
    old = check_python("3.9.2", ">=3.11")
    assert (old.status, old.mend) == ("wrong", "install a Python >=3.11 and edgekit into it")


def test_wanted_range_reads_metadata_lines() -> None:
    lines = ["numpy>=1.26", "torch<2.14,>=2.9; extra == 'export'", "Scikit_Learn[x] (>=1.4) ; extra == 'train'", "rich"]
    assert wanted_range("numpy", lines) == ">=1.26"
    assert wanted_range("torch", lines) == ">=2.9,<2.14"
    assert wanted_range("scikit-learn", lines) == ">=1.4"
    assert wanted_range("rich", lines) == wanted_range("absent", lines) == ""


def test_without_packaging_a_version_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.specifiers", None)
    assert in_range("1.0", ">=2") is None
    assert in_range("1.0", "") is True
    check = check_part(TORCH, {"torch": "1.0"}, importable=True, wanted=">=2.9")
    assert (check.status, check.found) == ("ok", "1.0 (range not checked: packaging is not installed)")


@pytest.mark.parametrize(
    ("arch", "features", "text"),
    [
        ("x86_64", ("avx2", "avx512_vnni"), "avx512_vnni present, so int8 is expected to be faster"),
        ("x86_64", ("avx2",), "no VNNI or AMX"),
        ("aarch64", ("dotprod", "i8mm", "neon"), "dotprod, i8mm present"),
        ("arm64", ("neon",), "neither dotprod nor i8mm"),
        ("x86_64", (), "does not tell"),
        ("riscv64", ("avx2",), "does not tell"),
    ],
)
def test_int8_note(arch: str, features: tuple[str, ...], text: str) -> None:
    machine = dataclasses.replace(MACHINE, arch=arch, features=features)
    assert text in doctor.machine_notes(machine, None, None)[0]


def test_notes_on_limits_load_and_clock() -> None:
    machine = dataclasses.replace(MACHINE, cores_usable=2)
    notes = doctor.machine_notes(machine, 7.5, 2596.1)[1:]
    assert [note.split(",")[0].split(";")[0] for note in notes] == [
        "this process may use 2 of 8 logical cores",
        "load average 7.5 on 8 cores: latencies measured now are too high",
        "the processor runs at 2596 MHz now",
    ]


def check(group: Any, status: Any) -> Check:
    return Check("part", group, status, "1.0", ">=1", "things", None if status == "ok" else "pip install part")


@pytest.mark.parametrize(
    ("checks", "ok"),
    [
        ([check("runtime", "ok"), check("training", "missing")], True),
        ([check("runtime", "missing")], False),
        ([check("runtime", "ok"), check("training", "wrong")], False),
    ],
    ids=["extra-missing", "runtime-missing", "extra-wrong"],
)
def test_diagnosis_is_ok_when_bundles_run(checks: list[Check], ok: bool) -> None:
    assert Diagnosis(tuple(checks), MACHINE, ()).ok is ok


def test_lines_list_each_command_once() -> None:
    checks = (check("runtime", "ok"), check("training", "missing"), check("training", "missing"))
    lines = diagnosis_lines(Diagnosis(checks, MACHINE, ("a note",)))
    assert lines[1].split()[:3] == ["runtime", "part", "ok"]
    assert lines.count("  pip install part") == 1
    assert lines[-1] == "- a note"


def test_this_installation() -> None:
    diagnosis = doctor.diagnose()
    assert [check.name for check in diagnosis.checks] == ["Python", *(part.name for part in PARTS), "native kernels"]
    by_name = {check.name: check for check in diagnosis.checks}
    assert by_name["numpy"].status == by_name["onnxruntime"].status == "ok"
    data = diagnosis.to_json()
    assert json.loads(json.dumps(data))["checks"][0]["name"] == "Python"


def test_an_uninstalled_edgekit_has_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    for function in ("metadata", "requires", "version"):
        monkeypatch.setattr(importlib.metadata, function, absent)
    diagnosis = doctor.diagnose()
    assert {check.wanted for check in diagnosis.checks} == {""}
    assert diagnosis.ok


def test_diagnosing_imports_nothing_heavy() -> None:
    script = (
        "import sys; from edgekit.devices import diagnose; diagnose(); "
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'sklearn', 'typer', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
