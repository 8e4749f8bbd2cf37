"""`edgekit run BUNDLE --prompt`: its options, and the choice between a prompt and files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from edgekit.cli import render
from edgekit.cli.console import Output
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generated import MAX_NEW_TOKENS
from edgekit.runtime.generation_output import PromptOptions, check_takes_files, run_prompt
from edgekit.runtime.session import load

TOP = 5

Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="For a language model: the text to continue.")]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The same from a UTF-8 file; - is standard input.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option(metavar="N", help=f"With a prompt. Default: {MAX_NEW_TOKENS}, or what the context holds.")
]
Temperature = Annotated[
    float | None, typer.Option(help="With a prompt: 0 takes the likeliest token, above 0 draws one. Default: 0.")
]
TopP = Annotated[
    float | None, typer.Option(help="With a temperature: draw from the likeliest tokens of this probability together.")
]
Seed = Annotated[int | None, typer.Option(help="With a temperature: makes draws repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="With a prompt: ends the answer. May be repeated.")
]
Stats = Annotated[bool, typer.Option("--stats", help="With a prompt: also say what it took, on standard error.")]


def run(
    output: Output,
    bundle: Path,
    inputs: Sequence[Path],
    prompt: PromptOptions,
    *,
    top: int | None,
    save: Path | None,
    backend: str | None,
    threads: int | None,
    kernels: str,
) -> None:
    """The answer to a prompt as it comes, or to files. Raises `InputError` where the options do not go together."""
    prompt.check(len(inputs), {"--top": top, "--save": save})
    opened = Bundle.open(bundle)
    if prompt.asked:
        sys.stdout.flush()
        show = not output.as_json
        output.json(run_prompt(opened, prompt, backend=backend, threads=threads, kernels=kernels, show=show))
        return
    check_takes_files(opened, inputs)
    session = load(opened, backend=backend, threads=threads, kernels=kernels)
    render.run(output, session, inputs, top=TOP if top is None else top, save=save)
