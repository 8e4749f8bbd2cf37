"""`edgekit run BUNDLE --prompt` as a user types it, and `python -m edgekit.runtime run BUNDLE --prompt` likewise."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.cli.app import run_command
from edgekit.runtime.__main__ import main
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generated import Generated
from edgekit.runtime.generation import Generator, load_generator
from edgekit.runtime.generation_output import TextWriter

MakeLanguageModel = Callable[..., Bundle]
Run = Callable[..., tuple[int, str, str]]
COMMANDS = {"edgekit": run_command, "edgekit.runtime": main}


@pytest.fixture(params=COMMANDS)
def run(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Run:
    """One of the two command lines in this process: exit code, stdout, stderr."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        code = COMMANDS[request.param](["run", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def toy(make_language_model: MakeLanguageModel) -> Path:
    return make_language_model(context=256).path


def answer(bundle: Path, prompt: str, count: int, **options: Any) -> Generated:
    return load_generator(bundle).generate(prompt, max_new_tokens=count, **options)


def test_the_text_goes_to_stdout_and_all_else_to_stderr(run: Run, toy: Path) -> None:
    code, out, err = run(toy, "--prompt", "three", "--max-new-tokens", "12", "--stats")
    assert code == 0
    assert out == answer(toy, "three", 12).text + "\n"
    assert "note: this bundle has random weights (seed 0); its text means nothing" in err
    assert "prompt   5 tokens in 1 pass, " in err
    assert "answer   12 tokens, the first after " in err
    assert "ends: --max-new-tokens reached" in err
    assert "memory " in err
    _, _, quiet = run(toy, "--prompt", "three")
    assert "answer" not in quiet


def test_json_gives_one_document(run: Run, toy: Path) -> None:
    words = ("--temperature", "2", "--top-p", "0.8", "--seed", "3", "--stop", "never there", "--json")
    code, out, _ = run(toy, "--prompt", "three", "--max-new-tokens", "7", *words)
    assert code == 0
    data = json.loads(out)
    wanted = answer(toy, "three", 7, temperature=2.0, top_p=0.8, seed=3)
    assert (data["text"], data["tokens"], data["finish"]) == (wanted.text, list(wanted.tokens[0]), "length")
    assert data["bundle"] == "toy-onnx"
    assert data["statistics"]["seed"] == 3
    assert data["statistics"]["passes"] == [5]
    assert data["statistics"]["prefill_seconds"] > 0
    assert data["notes"] == ["this bundle has random weights (seed 0); its text means nothing"]


@pytest.mark.parametrize("content", [b"three", b"three\n", b"three\r\n", b"\xef\xbb\xbfthree\n"])
def test_a_prompt_from_a_file(run: Run, toy: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert run(toy, "--prompt-file", file, "--max-new-tokens", "5")[1] == answer(toy, "three", 5).text + "\n"


def test_only_one_line_end_of_a_file_is_dropped(run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("zwölf\n\n".encode())))
    assert run(toy, "--prompt-file", "-", "--max-new-tokens", "5")[1] == answer(toy, "zwölf\n", 5).text + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a\udcff"], "--prompt is no UTF-8 text: the byte 0xff at character 1"),
        (["--prompt", "a", "--prompt-file", "b"], "give either --prompt or --prompt-file, not both"),
        (["--prompt-file", "nowhere.txt"], "cannot read the prompt in nowhere.txt: No such file"),
        (["x.npy", "--prompt", "a"], "give either INPUT files or a prompt, not both"),
        (["--prompt", "a", "--top", "3"], "--top does not go with a prompt; did you mean --top-p?"),
        (["--prompt", "a", "--save", "x.npz"], "--save does not go with a prompt"),
        (["--prompt", "a", "--backend", "tvm"], "the backend tvm generates no text"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be a number of at least 0, got -1.0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature must be a number of at least 0, got nan"),
        (["--prompt", "a", "--top-p", "0.9"], "--top-p does nothing without a temperature; add --temperature 0.7"),
        (["--prompt", "a", "--seed", "1"], "--seed does nothing without a temperature; add --temperature 0.7"),
        (
            ["--prompt", "a", "--temperature", "1", "--top-p", "1.5"],
            "top_p must be a number above 0 and at most 1, got 1.5",
        ),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be an integer of at least 1, got 0"),
        (["--prompt", "a", "--max-new-tokens", "256"], "context longer than the cache: 1 prompt and 256 new"),
        (["--temperature", "1"], "--temperature is for language models; add --prompt TEXT"),
        (["--stats"], "--stats is for language models; add --prompt TEXT"),
        ([], "nothing to run on: give INPUT files (images, .npy or .npz), or --prompt TEXT"),
        (["photo.png"], "toy-onnx is a language model and cannot take photo.png; give it a text to continue"),
        (["prompt.txt"], "toy-onnx is a language model and cannot take prompt.txt"),
    ],
)
def test_misuse_is_told_plainly(run: Run, toy: Path, words: list[str], message: str) -> None:
    code, out, err = run(toy, *words)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_file_that_is_no_utf8_is_refused_with_the_place(run: Run, toy: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("café au lait".encode("latin-1"))
    code, _, err = run(toy, "--prompt-file", file)
    assert code == 2
    assert "is no UTF-8 text: the byte 0xe9 at offset 3 belongs to no character" in err


def test_a_terminal_is_told_what_is_going_on(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Terminal()
    monkeypatch.setattr(sys, "stderr", both)
    monkeypatch.setattr(sys, "stdout", both)
    assert main(["run", str(toy), "--prompt", "three", "--max-new-tokens", "3"]) == 0
    text = answer(toy, "three", 3).text
    *shown, last = both.getvalue().split("\r\x1b[K")
    assert shown[:2] == ["", "loading toy-onnx"]
    assert "reading the prompt: 0 of 5 tokens" in shown
    alone = Terminal()
    TextWriter(alone).write(text + "\n")
    assert last == alone.getvalue()  # nothing else stays


def test_an_image_model_takes_no_prompt(run: Run, tiny_bundle: Bundle) -> None:
    code, _, err = run(tiny_bundle.path, "--prompt", "hello")
    assert code == 2
    assert "tiny-onnx is no language model, so it takes no prompt; it takes x: float32[N, 4]" in err
    assert f"edgekit run {tiny_bundle.path} INPUT" in err  # to be typed as it is
    code, out, _ = run(tiny_bundle.path, "--prompt", "hello", "--json")
    assert json.loads(out)["exit_code"] == 2


def test_arrays_still_run_on_a_language_model(run: Run, toy: Path, tmp_path: Path) -> None:
    arrays = {"input_ids": np.array([[104, 105]]), "attention_mask": np.ones((1, 2), np.int64)}
    for spec in load_generator(toy).prefill.inputs[2:]:
        shape = [{"batch": 1}.get(str(dim), 0) if isinstance(dim, str) else dim for dim in spec.shape]
        arrays[spec.name] = np.zeros(shape, spec.dtype)
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    code, out, err = run(toy, tmp_path / "x.npz")
    assert code == 0, err
    assert "logits" in out


def test_an_interrupt_ends_the_line_and_the_command(run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(toy, "three", 3).text
    stream = Generator.stream

    def interrupted(self: Generator, *words: Any, **options: Any) -> Any:
        pieces = stream(self, *words, **options)
        yield from (next(pieces) for _ in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    code, out, err = run(toy, "--prompt", "three", "--stats")
    assert code == 130
    assert out.endswith("\n")
    assert whole.startswith(out[:-1])
    assert "interrupted" in err


def script(toy: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "edgekit.runtime", "run", str(toy), "--prompt", "three", *words]


@pytest.mark.parametrize("module", ["edgekit", "edgekit.runtime"])
def test_a_reader_that_goes_away_is_no_error(toy: Path, module: str) -> None:
    command = [sys.executable, "-m", module, "run", str(toy), "--prompt", "three", "--max-new-tokens", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 0, err
    assert "Error" not in err


def test_a_device_without_torch_generates(toy: Path) -> None:
    code = f"""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {{"torch", "onnx", "typer", "rich", "PIL", "tokenizers"}}:
                    raise ImportError(f"{{name}} is not on this device")
        sys.meta_path.insert(0, Blocker())
        from edgekit.runtime.__main__ import main
        sys.exit(main(["run", {str(toy)!r}, "--prompt", "three", "--max-new-tokens", "4"]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == answer(toy, "three", 4).text + "\n"


def test_a_stream_without_utf8_gets_what_it_can_show(toy: Path) -> None:
    done = subprocess.run(
        script(toy, "--max-new-tokens", "9"),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
    )
    text = answer(toy, "three", 9).text
    assert done.stdout == text.encode("ascii", "replace") + b"\n"
    assert b"?" in done.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_steered_by_what_a_model_says() -> None:
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        writer = TextWriter(stream)
        writer.write("a\x1b[2Jb\tc\n")
        writer.end_line()  # the line has ended already
        writer.write("")
        writer.write("\x9b\r\x00d")
        writer.end_line()
        writer.end_line()
    assert terminal.getvalue() == "a\ufffd[2Jb\tc\n\ufffd\ufffd\ufffdd\n"
    assert file.getvalue() == "a\x1b[2Jb\tc\n\x9b\r\x00d\n"
