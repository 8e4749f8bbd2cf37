"""`python -m edgekit.runtime verify|profile|run BUNDLE`: for devices that have numpy and onnxruntime alone.

Results go to stdout, errors to stderr in one line; with `--json`, stdout carries one JSON document, errors included.
Exit codes: 0 all well, 1 a check failed, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edgekit.errors import EdgekitError, InputError
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.datasets import Dataset, load_dataset
from edgekit.runtime.generated import MAX_NEW_TOKENS
from edgekit.runtime.generation_output import PromptOptions, check_takes_files, run_prompt
from edgekit.runtime.images import is_image
from edgekit.runtime.kernel_library import KERNELS_HELP
from edgekit.runtime.profiler import profile, profile_pair
from edgekit.runtime.report import comparison_lines, profile_lines
from edgekit.runtime.session import Array, Session, load
from edgekit.runtime.text import not_finite_rows, output_lines, prediction_lines, verification_lines
from edgekit.runtime.verification import finite, verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's) and return the exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = _command(words)
        sys.stdout.flush()  # a reader that went away shows here, not at exit
        return code
    except EdgekitError as error:
        return _fail(words, str(error), error.exit_code)
    except KeyboardInterrupt:
        print("edgekit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _command(words: list[str]) -> int:
    options = _parser().parse_args(words)
    data, lines, passed = options.command(options)
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) if options.json else "\n".join(lines)
    if options.json or lines:  # a command that writes as it goes leaves no lines
        print(text)
    return 0 if passed else 1


def _fail(words: list[str], message: str, code: int) -> int:
    print(f"edgekit: error: {' '.join(message.split())}", file=sys.stderr)
    if "--json" in words:
        print(json.dumps({"error": message, "exit_code": code}))
    return code


class _Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is an error like any other."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see: {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m edgekit.runtime",
        description="Verify, measure and run bundles. Needs numpy and onnxruntime; images also need Pillow.",
        epilog="Exit codes: 0 all well, 1 a check failed, 2 wrong usage or bad input, 130 interrupted.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("bundle", metavar="BUNDLE", help="a .edge folder or a packed .edge.zip file")
        sub.add_argument(
            "--backend",
            metavar="NAME",
            help="tvm runs the native code of a tvm bundle; coreml (on a Mac) or coreml-reference, also -fp32 and "
            "-fp16sum, a coreml bundle; default: what runs the bundle here",
        )
        sub.add_argument("--threads", "-t", type=int, metavar="N", help="threads for one run; default: one per core")
        sub.add_argument(
            "--kernels", default="auto", metavar="auto|portable|PATH", help=f"{KERNELS_HELP}; default: auto"
        )
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    sub = add("verify", _verify, "Does the bundle answer as PyTorch did? Compares with its stored samples.")
    sub.add_argument("--data", metavar="DIR_OR_NPZ", help="also measure accuracy: class folders of images, or an .npz")
    sub = add("profile", _profile, "How fast is it here, and can the figures be trusted?")
    sub.add_argument("--vs", metavar="BUNDLE", help="a second bundle: measure both in turns and compare")
    sub.add_argument("--vs-kernels", metavar="auto|portable|PATH", help="kernels of that bundle; default: the same")
    sub.add_argument("--size", action="append", default=[], metavar="NAME=N", help="the size of a dynamic dimension")
    sub.add_argument("--runs", type=int, metavar="N", help="timed runs; default: until the median is precise")
    sub = add("run", _run, "The answer to images (with the bundle's own preprocessing), to arrays or to a prompt.")
    sub.add_argument("inputs", nargs="*", metavar="INPUT", help="images, or .npy and .npz arrays")
    sub.add_argument("--top", "-k", type=int, metavar="K", help=f"how many classes to show; default: {TOP}")
    sub.add_argument("--save", metavar="FILE.npz", help="also write the raw outputs")
    sub.add_argument("--prompt", metavar="TEXT", help="for a language model: the text to continue")
    sub.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file; - is standard input")
    sub.add_argument("--max-new-tokens", type=int, metavar="N", help=f"default: {MAX_NEW_TOKENS}, or what fits")
    sub.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token; default: 0")
    sub.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens of this probability")
    sub.add_argument("--seed", type=int, metavar="N", help="makes draws repeatable")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated")
    sub.add_argument("--stats", action="store_true", help="also say what it took, on standard error")
    return parser


TOP = 5

# A command returns what to print as JSON, the same as lines, and whether all is well.
_Result = tuple[Any, list[str], bool]


def _verify(options: argparse.Namespace) -> _Result:
    bundle = Bundle.open(options.bundle)
    data = None if options.data is None else _dataset(bundle, Path(options.data))
    result = verify(bundle, data=data, backend=options.backend, threads=options.threads, kernels=options.kernels)
    return result.to_json(), verification_lines(result), bool(result)


def _profile(options: argparse.Namespace) -> _Result:
    bundle = Bundle.open(options.bundle)
    shared = {
        "backend": options.backend,
        "threads": options.threads,
        "kernels": options.kernels,
        "sizes": _sizes(options.size),
        "runs": options.runs,
    }
    if options.vs is None and options.vs_kernels is None:
        result = profile(bundle, **shared)
        bundle.add_to_report("profile", result.to_json())
        return result.to_json(), profile_lines(result), True
    rival = bundle if options.vs is None else options.vs
    pair = profile_pair(bundle, rival, vs_kernels=options.vs_kernels, **shared)
    bundle.add_to_report("profile", pair.a.to_json())
    bundle.add_to_report("comparison", pair.to_json())
    return pair.to_json(), comparison_lines(pair), True


def _run(options: argparse.Namespace) -> _Result:
    text = PromptOptions(
        prompt=options.prompt,
        prompt_file=options.prompt_file,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(options.stop),
        stats=options.stats,
    )
    text.check(len(options.inputs), {"--top": options.top, "--save": options.save})
    bundle = Bundle.open(options.bundle)
    shared = {"backend": options.backend, "threads": options.threads, "kernels": options.kernels}
    if text.asked:
        return run_prompt(bundle, text, show=not options.json, **shared), [], True
    check_takes_files(bundle, options.inputs)
    session = load(bundle, **shared)
    top = TOP if options.top is None else options.top
    data: list[dict[str, Any]] = []
    lines = [f"note: {note}" for note in (session.kernels_note, session.threads_note) if note]
    raw: dict[str, Array] = {}
    for path in map(Path, options.inputs):
        if is_image(path):
            predictions = session.predict(path, k=top)
            answers = session.run(_image_inputs(session, path)) if options.save else {}
            data.append({"input": str(path), "predictions": [vars(item) for item in predictions]})
            lines += prediction_lines(str(path), predictions)
        else:
            answers = session.run(_dataset(session.bundle, path).inputs)
            outputs = {name: array.tolist() for name, array in answers.items()}
            data.append({"input": str(path), "outputs": outputs})
            lines += output_lines(str(path), answers)
        if not_finite := not_finite_rows(answers):
            data[-1]["not_finite"] = not_finite
            lines += [f"note: {note}" for note in not_finite.values()]
        prefix = f"{path.stem}/" if len(options.inputs) > 1 else ""
        raw |= {f"{prefix}{name}": array for name, array in answers.items()}
    if options.save is not None:
        lines.append(_save(Path(options.save), raw))
    return finite(data), lines, True


def _image_inputs(session: Session, path: Path) -> dict[str, Array]:
    spec = session.inputs[0]
    assert spec.preprocessing is not None  # predict, which ran before, needs it
    return {spec.name: spec.preprocessing(path)}


def _save(path: Path, arrays: dict[str, Array]) -> str:
    try:
        with path.open("wb") as stream:  # numpy would add .npz to the name
            np.savez(stream, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own options
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --save") from error
    return f"outputs written to {path}"


def _dataset(bundle: Bundle, path: Path) -> Dataset:
    manifest = bundle.manifest
    first = manifest.inputs[0]
    return load_dataset(
        path,
        input_name=first.name,
        preprocessing=first.preprocessing,
        input_shapes={spec.name: spec.shape for spec in manifest.inputs},
        labels=manifest.labels,
    )


def _sizes(pairs: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not (value.isascii() and value.isdecimal()):
            raise InputError(f"cannot read --size {pair!r}; write NAME=NUMBER, such as N=4")
        sizes[name] = int(value)
    return sizes


if __name__ == "__main__":
    sys.exit(main())
