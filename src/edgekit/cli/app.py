"""The commands: each parses its options, calls the public API, and hands the result to `render`.

Exit codes: 0 all well, 1 a check failed or an export could not be made, 2 wrong usage or bad input, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import edgekit
from edgekit.cli import generate, render
from edgekit.cli.arguments import parse_options, parse_sizes, read_json, read_lines
from edgekit.cli.console import Output
from edgekit.cli.train import train_app
from edgekit.errors import EdgekitError, InputError, UnknownNameError
from edgekit.export import TARGETS
from edgekit.export.coreml_options import coreml_options
from edgekit.runtime.generation_output import PromptOptions
from edgekit.runtime.kernel_library import KERNELS_HELP
from edgekit.runtime.tolerances import check_precision, default_precision

# typer brings its own copy of click in some versions and depends on it in others; this is its base error in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
_INTERRUPTED = 130

app = typer.Typer(
    name="edgekit",
    help="Take PyTorch models to phones and Jetsons, and prove that they arrived.",
    epilog="Exit codes: 0 all well, 1 a check failed, 2 wrong usage or bad input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A .edge folder or a packed .edge.zip file.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", help="Threads for one run. Default: one per core.")]

Kernels = Annotated[
    str,
    typer.Option("--kernels", metavar="auto|portable|PATH", help=f"{KERNELS_HELP[0].upper()}{KERNELS_HELP[1:]}."),
]

Backend = Annotated[
    str | None,
    typer.Option(
        help="onnxruntime; tvm: run the native code of a tvm bundle; coreml (on a Mac), coreml-reference and its "
        "variants -fp32 and -fp16sum. Default: what runs the bundle here; tvm only if named."
    ),
]

Tolerance = Annotated[
    float | None, typer.Option(help="The largest relative L2 error that passes. Default: by precision.")
]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"edgekit {edgekit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take PyTorch models to phones and Jetsons, and prove that they arrived."""


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the zoo: parameters, MACs, inputs, weights."""
    render.models(Output(as_json=as_json))


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A zoo name, package.module:factory, a .pt2 file, or a Hugging Face directory."
        ),
    ],
    target: Annotated[str, typer.Option("--target", help="Targets, separated by commas: onnx, coreml, tvm.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to put bundles into.")] = Path("out"),
    precision: Annotated[
        str | None,
        typer.Option(
            help="onnx: fp32, fp16 or int8; of a language model fp32 or int4. coreml: fp16, fp32, and weights in int8, "
            "int4, palette4, palette6 or palette8. Default: fp16 for coreml, else fp32."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME:1x3x224x224, or 'NAME:Nx3x224x224 | 1..8' for a dynamic batch; 'NAME:1x3xSxS | S=192/224/256' "
            "for listed sizes; 'NAME:P@int64<V' for integers from 0 to V-1. Once per input."
        ),
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Weights for a zoo model: a file, a folder, or 'random'.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="For int8: a folder of images, an .npz, 'digits', or 'random' (timing only).")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="A text file with one class name per line.")] = None,
    preprocessing: Annotated[
        Path | None, typer.Option(help="A JSON file that says how an image becomes the input (see the README).")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the model's constructor, such as num_classes=10 or img_size=[512,256]."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The bundle's name. Default: the model's.")] = None,
    opset: Annotated[int | None, typer.Option(help="The ONNX opset. Default: 20.")] = None,
    seed: Annotated[int, typer.Option(help="For random weights and sample inputs.")] = 0,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Refuse a bundle that differs from PyTorch.")
    ] = True,
    tolerance: Tolerance = None,
    arch: Annotated[
        str | None, typer.Option(help="For tvm: x86-64-v3, x86-64-v4 or aarch64. Default: this CPU's best.")
    ] = None,
    tune: Annotated[int, typer.Option(metavar="N", help="For tvm: measure N candidates in search of faster code.")] = 0,
    kernels: Annotated[
        str | None,
        typer.Option(metavar="ARCHS", help="Put edgekit's kernels into the bundle as C objects: x86-64-v3,aarch64."),
    ] = None,
    deployment_target: Annotated[
        str | None,
        typer.Option(metavar="iOS16|iOS17|iOS18", help="For coreml: the oldest system that shall run it."),
    ] = None,
    layout: Annotated[
        str, typer.Option(metavar="standard|ane", help="For coreml: ane rewrites for the Neural Engine.")
    ] = "standard",
    input_kind: Annotated[
        str | None,
        typer.Option("--input", metavar="image|tensor", help="For coreml: what the first input is. Default: image."),
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Also write the bundle as one zip file.")] = False,
    as_json: Json = False,
) -> None:
    """Export MODEL to a bundle and check it against PyTorch."""
    output = Output(as_json=as_json)
    targets = [part.strip() for part in target.split(",")]
    for each in targets:  # all of them before the first export takes its time
        if each not in TARGETS:
            raise UnknownNameError("target", each, TARGETS)
        check_precision(each, precision or default_precision(each))
    if "tvm" not in targets and (arch is not None or tune):
        raise InputError(f"--arch and --tune are for the target tvm; this export is to {target}")
    if "coreml" not in targets and (deployment_target is not None or layout != "standard" or input_kind is not None):
        raise InputError(
            f"--deployment-target, --layout and --input are for the target coreml; this export is to {target}"
        )
    if "coreml" in targets:
        coreml_options(precision or default_precision("coreml"), deployment_target, layout, input_kind)
    archs = [part.strip() for part in kernels.split(",")] if kernels is not None else None

    def takes(option_of: tuple[str, ...], each: str) -> bool:
        """Whether an option goes to a target: to those that have it; where none of them has, to all, to be refused."""
        return each in option_of or not set(option_of) & set(targets)

    bundles = []
    for each in targets:
        with output.steps(f"export {model} to {each}") as step:
            bundle = edgekit.export(
                model,
                each,
                out,
                precision=precision,
                shapes=shape,
                weights=weights,
                calibration=calibration if takes(("onnx",), each) else None,
                labels=read_lines(labels),
                preprocessing=read_json(preprocessing),
                name=name,
                opset=opset if takes(("onnx",), each) else None,
                seed=seed,
                check=check,
                tolerance=tolerance,
                arch=arch if each == "tvm" else None,
                tune=tune if each == "tvm" else 0,
                kernels=archs if takes(("onnx", "tvm"), each) else None,
                deployment_target=deployment_target if each == "coreml" else None,
                layout=layout if each == "coreml" else "standard",
                input=input_kind if each == "coreml" else None,
                progress=step,
                overrides=parse_options(option),
            )
            bundles.append(bundle)
            if pack:
                step("pack")
                bundles.append(bundle.pack())
    render.exported(output, bundles)


@app.command()
def verify(
    bundle: BundlePath,
    model: Annotated[
        str | None, typer.Option(help="The PyTorch model. Default: rebuild what the manifest names.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="The weights file that the bundle was exported with.")] = None,
    live: Annotated[
        bool | None,
        typer.Option("--live/--no-live", help="Compare with running PyTorch. Default: where it can be done."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled data for accuracy: 'digits', a folder of class folders, or an .npz.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Compare layer by layer; name the first bad one.")] = False,
    inputs: Annotated[int, typer.Option(help="How many fresh inputs for the live comparison.")] = 4,
    tolerance: Tolerance = None,
    backend: Backend = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    as_json: Json = False,
) -> None:
    """Check that BUNDLE answers as PyTorch does, layer by layer too."""
    output = Output(as_json=as_json)
    with output.steps(f"verify {bundle.name}") as step:
        result = edgekit.verify(
            bundle,
            model=model,
            weights=weights,
            live=live,
            data=data,
            layers=layers,
            inputs=inputs,
            tolerance=tolerance,
            backend=backend,
            threads=threads,
            kernels=kernels,
            progress=step,
        )
    render.verification(output, result)
    if not result:
        raise typer.Exit(1)


@app.command()
def profile(
    bundle: BundlePath,
    vs: Annotated[Path | None, typer.Option("--vs", help="A second bundle: measure both in turns and compare.")] = None,
    on: Annotated[str, typer.Option(help="The device to measure on: local.")] = "local",
    backend: Backend = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    vs_kernels: Annotated[
        str | None, typer.Option(metavar="auto|portable|PATH", help="Kernels of that bundle, or of the same one again.")
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="A dynamic dimension's size, such as N=4; of a language model tokens, past and batch."),
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Timed runs. Default: until the median is precise.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Untimed runs first. Default: until the latency settles.")] = None,
    max_seconds: Annotated[float, typer.Option(help="At most so long for the timed runs.")] = 5.0,
    ops: Annotated[bool, typer.Option("--ops/--no-ops", help="Also time every op.")] = True,
    as_json: Json = False,
) -> None:
    """Measure BUNDLE: latency, memory, ops, and whether to trust it."""
    output = Output(as_json=as_json)
    if vs is None and vs_kernels is not None:
        vs = bundle
    with output.steps(f"profile {bundle.name}") as step:
        step("warm up and measure" if vs is None else "warm up and measure in turns")
        result = edgekit.profile(
            bundle,
            on=on,
            vs=vs,
            backend=backend,
            threads=threads,
            kernels=kernels,
            vs_kernels=vs_kernels,
            sizes=parse_sizes(size),
            runs=runs,
            warmup=warmup,
            max_seconds=max_seconds,
            ops=ops,
        )
    render.measured(output, result)


@app.command()
def run(
    bundle: BundlePath,
    inputs: Annotated[list[Path] | None, typer.Argument(metavar="[INPUT]...", help="Images, or .npy/.npz.")] = None,
    prompt: generate.Prompt = None,
    prompt_file: generate.PromptFile = None,
    max_new_tokens: generate.MaxNewTokens = None,
    temperature: generate.Temperature = None,
    top_p: generate.TopP = None,
    seed: generate.Seed = None,
    stop: generate.Stop = None,
    stats: generate.Stats = False,
    top: Annotated[
        int | None, typer.Option("--top", "-k", help=f"How many classes to show. Default: {generate.TOP}.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the raw outputs to this .npz.")] = None,
    backend: Backend = None,
    threads: Threads = None,
    kernels: Kernels = "auto",
    as_json: Json = False,
) -> None:
    """Run BUNDLE on images, on arrays, or on a prompt, as an app would."""
    text = PromptOptions(prompt, prompt_file, max_new_tokens, temperature, top_p, seed, tuple(stop or ()), stats)
    generate.run(
        Output(as_json=as_json),
        bundle,
        inputs or (),
        text,
        top=top,
        save=save,
        backend=backend,
        threads=threads,
        kernels=kernels,
    )


@app.command()
def lint(
    bundle: BundlePath,
    function: Annotated[
        str | None, typer.Option(metavar="NAME", help="A function of the package. Default: the one the bundle runs.")
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="Also list every op.")] = False,
    as_json: Json = False,
) -> None:
    """Say what of a Core ML BUNDLE likely suits the Neural Engine."""
    from edgekit.cli.lint import run as run_lint

    run_lint(Output(as_json=as_json), bundle, function=function, ops=ops)


@app.command()
def inspect(bundle: BundlePath, kernels: Kernels = "auto", as_json: Json = False) -> None:
    """Show what is inside BUNDLE: tensors, ops, files, hashes."""
    render.inspect(Output(as_json=as_json), edgekit.Bundle.open(bundle), kernels)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show what is missing for which target, and the mend."""
    from edgekit.cli.kernels import toolchain_checks
    from edgekit.devices import diagnose

    diagnosis = diagnose(toolchain_checks())
    render.diagnosis(Output(as_json=as_json), diagnosis)
    if any(check.status == "wrong" for check in diagnosis.checks):
        raise typer.Exit(1)


kernels_app = typer.Typer(
    help="Build and list the native kernels of edgekit's own ops.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(kernels_app, name="kernels")
app.add_typer(train_app, name="train")


@kernels_app.command("build")
def kernels_build(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="x86-64-v3, x86-64-v4 or aarch64; several times or with commas. Default: this CPU's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to put them into. Default: where edgekit looks.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again where nothing has changed.")] = False,
    as_json: Json = False,
) -> None:
    """Compile the kernels with TVM into a library for onnxruntime."""
    from edgekit.cli.kernels import build

    archs = [name.strip() for names in arch or () for name in names.split(",")]
    build(Output(as_json=as_json), archs or None, out, force=force)


@kernels_app.command("list")
def kernels_list(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[FOLDER]", help="Where to look. Default: where edgekit looks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is built, and whether it fits this machine."""
    from edgekit.cli.kernels import list_libraries

    list_libraries(Output(as_json=as_json), folder)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to put bundles into.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Export, check, time and run two models on real input."""
    from edgekit.cli.demo import demo as run_demo

    if not run_demo(Output(as_json=as_json), out):
        raise typer.Exit(1)


def run_command(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (default: the process's) and return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=words, standalone_mode=False)
    except EdgekitError as error:
        return _fail(words, str(error), error.exit_code)
    except _UsageError as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(words, message, 2, hint="edgekit --help")
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        return 0
    if code == _INTERRUPTED:  # some versions of typer return it, others raise
        print("edgekit: interrupted; nothing half-written was left behind", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _fail(words: list[str], message: str, code: int, hint: str | None = None) -> int:
    print(f"edgekit: error: {message}" + (f"\nSee: {hint}" if hint else ""), file=sys.stderr)
    if "--json" in words:
        print(json.dumps({"error": message, "exit_code": code}))
    return code
