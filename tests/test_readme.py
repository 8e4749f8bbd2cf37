"""The README's commands and programs run as written, in its order, on real pictures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from edgekit.cli.app import run_command
from edgekit.models.digits import load_digits_split

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    return [
        line.removeprefix("$ ").split("  #")[0].strip()
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith(f"$ {program} ")
    ]


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
    Path("my_models.py").write_text(next(text for text in programs if text.startswith("# my_models.py")))
    typed = commands("edgekit")
    assert len(typed) >= 8
    for command in typed:
        assert run_command(shlex.split(command)[1:]) == 0, (command, capsys.readouterr().err)
    for program in programs:
        exec(compile(program, "README.md", "exec"), {"__name__": "readme"})


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
