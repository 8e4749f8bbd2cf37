"""The wheel holds exactly the tree, and its core runs with numpy and onnxruntime alone."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "export", "custom_ops", "runtime", "kernels", "devices")

pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=environment)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as a package index would get it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return next(folder.glob("*.whl"))


def tree() -> set[str]:
    """What the wheel must hold, by the tree's own files."""
    names = {
        f"edgekit/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    face = ROOT / "src" / "edgekit"
    for path in face.rglob("*"):
        inside = path.relative_to(face)
        if path.is_file() and "__pycache__" not in path.parts and inside.parts[0] not in FOLDERS:
            names.add(f"edgekit/{inside}")
    return names


def test_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == tree()
    assert len(licenses) == 1
    assert {name for name in names if name.endswith(".safetensors")} == {
        f"edgekit/models/pretrained/{name}.safetensors"
        for name in (
            "care_digits",
            "dhsa_bytes",
            "dynamicvis_digits",
            "hgnn_digits",
            "lighthgnn_digits",
            "shvit_digits",
        )
    }


def test_source_links_are_relative_and_complete() -> None:
    for folder in FOLDERS:
        link = ROOT / "src" / "edgekit" / folder
        assert link.is_symlink()
        assert link.readlink() == Path("..") / ".." / folder


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel and what its core requires, nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt", wheel)
    return python


def test_core_install_is_the_runtime_alone(bare: Path, tmp_path: Path) -> None:
    listed = run(bare, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check").stdout
    installed = {line.split("==")[0].lower() for line in listed.splitlines()}
    assert {"edgekit", "numpy", "onnxruntime"} <= installed
    assert not installed & {"torch", "onnx", "onnxscript", "typer", "rich", "pillow", "safetensors"}
    code = "import sys, edgekit.runtime, edgekit; assert 'torch' not in sys.modules; print(edgekit.runtime.__file__)"
    assert "site-packages" in run(bare, "-W", "error", "-c", code, cwd=tmp_path).stdout


def test_bare_runtime_verifies_profiles_and_runs_a_bundle(bare: Path, digits_bundle: Path, tmp_path: Path) -> None:
    verified = run(bare, "-m", "edgekit.runtime", "verify", digits_bundle, cwd=tmp_path)
    assert "PASSED" in verified.stdout
    profiled = run(bare, "-m", "edgekit.runtime", "profile", digits_bundle, "--json", cwd=tmp_path)
    assert '"p50"' in profiled.stdout
    run(bare, "-c", "import numpy; numpy.save('x.npy', numpy.zeros((1, 1, 32, 32), 'float32'))", cwd=tmp_path)
    answered = run(bare, "-m", "edgekit.runtime", "run", digits_bundle, "x.npy", cwd=tmp_path)
    assert "logits" in answered.stdout


def test_command_without_its_extra_says_how_to_get_it(bare: Path, tmp_path: Path) -> None:
    done = run(bare.parent / "edgekit", "list", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "pip install 'edgekit[cli]'" in done.stderr
    assert "python -m edgekit.runtime" in done.stderr


def test_missing_torch_is_named_with_its_extra(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-c", "import edgekit; edgekit.export('shvit_s1', 'onnx', 'out')", cwd=tmp_path, check=False)
    assert "pip install 'edgekit[export]'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "module", ["edgekit", "edgekit.runtime", "edgekit.export", "edgekit.models", "edgekit.devices"]
)
def test_imports_stay_light(module: str) -> None:
    heavy = "{'torch', 'onnx', 'onnxscript', 'onnxsim', 'sklearn', 'rich', 'typer'}"
    code = f"import sys, {module}; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    run(sys.executable, "-c", code)
