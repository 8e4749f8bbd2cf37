"""The README's commands and programs run as written, in its order, on real pictures."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from edgekit.cli.app import run_command
from edgekit.errors import EdgekitError
from edgekit.kernels.headers import find_headers
from edgekit.models.digits import load_digits_split

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def typed(block: str, program: str) -> list[str]:
    lines = [line for line in block.splitlines() if line.startswith(f"$ {program} ")]
    return [line.removeprefix("$ ").split("  #")[0].strip() for line in lines]


def commands(program: str) -> list[str]:
    return [command for block in blocks("console") for command in typed(block, program)]


def compilers() -> bool:
    """Whether this machine has what links kernels and tvm bundles; where the environment says so, it must."""
    return bool(os.environ.get("EDGEKIT_TESTS_HAVE_TOOLS")) or all(map(shutil.which, ("cc", "c++")))


def headers() -> bool:
    """Whether this machine has onnxruntime's headers; where the environment says so, it must."""
    try:
        return find_headers() is not None
    except EdgekitError:
        return bool(os.environ.get("EDGEKIT_TESTS_HAVE_TOOLS"))


def test_first_screen_shows_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = commands("make")
    assert shown == ["make demo", "make test"]
    for command in shown:
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE)


@pytest.mark.xdist_group("readme")
def test_commands_and_programs_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    Image.fromarray(load_digits_split("test")[0][0]).save("digit.png")
    Path("labels.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    Path("recipe.json").write_text(blocks("json")[0])
    programs = blocks("python")
    for name in ("my_models.py", "my_attention.py"):
        Path(name).write_text(next(text for text in programs if text.startswith(f"# {name}")))
    monkeypatch.setenv("EDGEKIT_KERNELS", str(tmp_path / "kernels"))
    assert len(commands("edgekit")) >= 16
    for language, text in re.findall(r"^```(console|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
            continue
        for command in typed(text, "edgekit"):
            if "tvm" in command and not compilers():
                continue
            if command == "edgekit kernels build" and not (compilers() and headers()):
                continue
            assert run_command(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
        for command in typed(text, "python3"):
            words = [sys.executable, *shlex.split(command)[1:]]
            ran = subprocess.run(words, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, (command, ran.stderr)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
