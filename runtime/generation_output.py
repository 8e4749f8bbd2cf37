"""`run BUNDLE --prompt`: what both command lines share. A prompt from the words or a file, the answer as it comes."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from edgekit.errors import InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generated import Generated
from edgekit.runtime.generation import check_language_model, load_generator
from edgekit.runtime.tokenization import check_text

STDIN = "-"
_ARRAYS = (".npy", ".npz")
_BYTE_ORDER_MARK = "\ufeff"
# What could rewrite a terminal: all control characters but tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FINISH = {"end": "the model ended it", "stop": "a stop text came", "length": "--max-new-tokens reached", "": "stopped"}


@dataclass(frozen=True)
class PromptOptions:
    """The options of `run` that ask for text; None: not given.

    Attributes:
        prompt, prompt_file: one of them, for a language model; the file `-` is standard input.
        max_new_tokens, temperature, top_p, seed, stop: as for `Generator.stream`.
        stats: whether to say what it took.
    """

    prompt: str | None = None
    prompt_file: str | os.PathLike[str] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stats: bool = False

    @property
    def asked(self) -> bool:
        """Whether there is a prompt."""
        return self.prompt is not None or self.prompt_file is not None

    def check(self, inputs: int, not_with_prompt: dict[str, object]) -> None:
        """Raise `InputError` where the words of a command do not go together.

        Args:
            inputs: how many files were given.
            not_with_prompt: options of the other kind by name; None or False: not given.
        """
        if not self.asked:
            alone: dict[str, object] = {
                "--max-new-tokens": self.max_new_tokens,
                "--temperature": self.temperature,
                "--top-p": self.top_p,
            }
            alone |= {"--seed": self.seed, "--stop": self.stop or None, "--stats": self.stats or None}
            if given := [name for name, value in alone.items() if value is not None]:
                raise InputError(f"{given[0]} is for language models; add --prompt TEXT or --prompt-file FILE")
            if not inputs:
                raise InputError(
                    "nothing to run on: give INPUT files (images, .npy or .npz), or --prompt TEXT to a language model"
                )
            return
        if self.prompt is not None and self.prompt_file is not None:
            raise InputError("give either --prompt or --prompt-file, not both")
        if inputs:
            raise InputError("give either INPUT files or a prompt, not both: a language model continues one text")
        if self.temperature is None:
            for name, draw in (("--top-p", self.top_p), ("--seed", self.seed)):
                if draw is not None:
                    raise InputError(
                        f"{name} does nothing without a temperature; add --temperature 0.7, or leave it out"
                    )
        for name, value in not_with_prompt.items():
            if value is not None and value is not False:
                hint = "; did you mean --top-p?" if name == "--top" else ""
                raise InputError(f"{name} does not go with a prompt{hint}")


def check_takes_files(bundle: Bundle, files: Sequence[str | os.PathLike[str]]) -> None:
    """Raise `InputError` where a language model was given files other than arrays."""
    if bundle.manifest.generation is None:
        return
    for file in files:
        if Path(file).suffix.lower() not in _ARRAYS:
            raise InputError(
                f"{bundle.name} is a language model and cannot take {file}; give it a text to continue, --prompt TEXT "
                "or --prompt-file FILE"
            )


def run_prompt(
    bundle: Bundle,
    options: PromptOptions,
    *,
    backend: str | None = None,
    threads: int | None = None,
    kernels: str | os.PathLike[str] = "auto",
    show: bool = True,
) -> dict[str, Any]:
    """Continue the prompt; returns what `--json` prints.

    Args:
        show: write the answer to stdout as it comes, notes and statistics to stderr.

    Raises:
        InputError: a prompt that is no UTF-8 text or empty, a bundle of another kind, and all that `Generator.stream`
            refuses.
    """
    check_language_model(bundle)
    prompt = read_prompt(options)
    with StatusLine(sys.stderr if show else None) as status:
        status.show(f"loading {bundle.name}")
        generator = load_generator(bundle, threads=threads, kernels=kernels, backend=backend)
        stream = generator.stream(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=0.0 if options.temperature is None else options.temperature,
            top_p=1.0 if options.top_p is None else options.top_p,
            seed=options.seed,
            stop=options.stop,
            progress=lambda done, total: status.show(f"reading the prompt: {done:,} of {total:,} tokens"),
        )
    notes = list(dict.fromkeys(filter(None, (generator.prefill.kernels_note, generator.decode.kernels_note))))
    if generator.decode.backend.startswith("coreml-reference"):
        notes.append("the reference runtime says what a package computes, slowly; its speed says nothing of a device")
    weights = bundle.manifest.model.weights
    if weights.source == "random":
        notes.append(f"this bundle has random weights (seed {weights.seed}); its text means nothing")
    if show:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        writer = TextWriter(sys.stdout)
        try:
            for piece in stream:
                status.clear()
                writer.write(piece.text)
        except BrokenPipeError:  # the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            status.clear()
            writer.end_line()
    result = stream.finish() if not show else stream.generated()
    if show and options.stats:
        print("\n".join(statistics_lines(result)), file=sys.stderr)
    return generated_json(bundle, result) | {"notes": notes}


def read_prompt(options: PromptOptions) -> str:
    """The prompt in the options, or in their file: UTF-8, less a byte order mark and one line end at the end.

    Raises `InputError` where it cannot be read or is no UTF-8 text.
    """
    file = options.prompt_file
    if file is None:
        check_text(options.prompt, "--prompt")
        return options.prompt or ""
    try:
        content = sys.stdin.buffer.read() if os.fspath(file) == STDIN else Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the prompt in {file}: {getattr(error, 'strerror', None) or error}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"the prompt in {file} is no UTF-8 text: the byte 0x{content[error.start]:02x} at offset {error.start} "
            "belongs to no character; convert it to UTF-8 first"
        ) from error
    return text.removeprefix(_BYTE_ORDER_MARK).removesuffix("\n").removesuffix("\r")


class StatusLine:
    """Says on a terminal what is going on until the text comes; elsewhere it says nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None and stream.isatty() else None
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Replace what is shown."""
        if self._stream is not None:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)
            self._shown = True

    def clear(self) -> None:
        """Take it away."""
        if self._stream is not None and self._shown:
            print("\r\x1b[K", end="", file=self._stream, flush=True)
            self._shown = False


class TextWriter:
    """Writes text as it comes, without what would steer a terminal or what the stream's encoding lacks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = stream.encoding or "utf-8"
        self._terminal = stream.isatty()
        self._in_line = False

    def write(self, text: str) -> None:
        """Write and flush."""
        if not text:
            return
        if self._terminal:
            text = _CONTROL.sub("\ufffd", text)
        self._in_line = not text.endswith("\n")
        self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))
        self._stream.flush()

    def end_line(self) -> None:
        """End the line that was begun, if any."""
        if self._in_line:
            self.write("\n")


def generated_json(bundle: Bundle, result: Generated) -> dict[str, Any]:
    """One answer as plain data."""
    return {
        "bundle": bundle.name,
        "text": result.text,
        "tokens": list(result.tokens[0]),
        "finish": result.finish[0],
        "statistics": dataclasses.asdict(result.statistics) | {"passes": list(result.statistics.passes)},
    }


def statistics_lines(result: Generated) -> list[str]:
    """What it took, for people."""
    took = result.statistics
    passes = "1 pass" if len(took.passes) == 1 else f"{len(took.passes)} passes"
    speed = "" if took.tokens_per_second is None else f", {took.tokens_per_second:.1f} tokens/s"
    peak = "unknown" if took.peak_memory_bytes is None else f"{took.peak_memory_bytes / 2**20:.0f} MiB"
    lines = [
        f"prompt   {took.prompt_tokens} tokens in {passes}, {took.prefill_seconds:.2f} s, "
        f"{took.prompt_tokens_per_second:.0f} tokens/s",
        f"answer   {took.new_tokens} tokens, the first after {took.first_token_seconds:.2f} s{speed}; "
        f"ends: {', '.join(_FINISH[finish] for finish in result.finish)}",
        f"memory   {peak} at the process's peak; keys and values up to {took.cache_bytes / 2**20:.1f} MiB",
        f"loading  {took.load_seconds:.2f} s",
    ]
    return lines if took.seed is None else [*lines, f"seed     {took.seed}"]
