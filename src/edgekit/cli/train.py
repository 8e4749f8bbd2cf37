"""`edgekit train`: train the small models of the zoo on data that come with scikit-learn and with Python."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekit.cli.console import Output
from edgekit.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from edgekit.models.compare_lighthgnn import Row
    from edgekit.models.train_lighthgnn import Recipe

train_app = typer.Typer(
    name="train", help="Train small models on data that come with scikit-learn and with Python.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@train_app.command("lighthgnn")
def lighthgnn(
    data: Annotated[str, typer.Option(help="Data sets, separated by commas: digits, wine, breast-cancer.")] = (
        "digits,wine,breast-cancer"
    ),
    seeds: Annotated[int, typer.Option(help="How many seeds: 0 up to this number - 1.")] = 10,
    neighbours: Annotated[int, typer.Option("--neighbours", "-k", help="Other vertices in a hyperedge.")] = 8,
    teacher: Annotated[str, typer.Option(help="hgnn or hgnnp.")] = "hgnn",
    loss: Annotated[str, typer.Option(help="kl, or authors: what their published code computes.")] = "kl",
    setting: Annotated[
        str, typer.Option(help="transductive, or production: 90 % of the test vertices are unknown in training.")
    ] = "transductive",
    ties: Annotated[
        str, typer.Option(help="Of equally good epochs keep that of least validation entropy, or the first.")
    ] = "entropy",
    epochs: Annotated[int, typer.Option(help="Epochs of every training.")] = 200,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also save the first seed's teacher and better student here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teacher, plain MLP, LightHGNN and LightHGNN+ with 20 labels a class: test accuracy over the seeds."""
    from edgekit.models.compare_lighthgnn import compare
    from edgekit.models.train_lighthgnn import Recipe, save
    from edgekit.models.vertex_sets import VERTEX_SETS

    names = list(dict.fromkeys(name.strip() for name in data.split(",") if name.strip()))
    for name in names:
        if name not in VERTEX_SETS:
            raise UnknownNameError("vertex set", name, VERTEX_SETS)
    if not names:
        raise InputError(f"name at least one data set of {', '.join(VERTEX_SETS)}")
    if not 1 <= seeds <= 20:
        raise InputError(f"seeds is a number in 1..20; got {seeds}")
    # The recipe checks the three names itself.
    recipe = replace(Recipe(), neighbours=neighbours, epochs=epochs, **_named(teacher, loss, setting, ties))
    output = Output(as_json=as_json)
    rows, saved = [], []
    with output.steps("train") as step:
        for name in names:
            started = time.perf_counter()
            row, outcomes = compare(name, recipe, range(seeds), step)
            rows.append(row)
            if out is not None:
                seconds = (time.perf_counter() - started) / seeds
                files = (f"{name}-{recipe.teacher}", f"{name}-lighthgnn")
                saved += save(outcomes[0], recipe, out, files, seconds)
    _show(output, rows, recipe, seeds, saved)


@train_app.command("digits")
def digits(
    model: Annotated[str, typer.Option(help="A model that is trained on digits as images, or all.")] = "all",
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order and augmentation.")] = 0,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for weights and reports.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Train the image classifiers that ship with weights, on scikit-learn's handwritten digits."""
    from edgekit.models.train_digits import Recipe, digits_models, save, train

    known = digits_models()
    if model not in ("all", *known):
        raise UnknownNameError("digits model", model, ("all", *known))
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs must be at least 1; got {epochs}")
    output = Output(as_json=as_json)
    recipe = replace(Recipe(), seed=seed) if epochs is None else replace(Recipe(), seed=seed, epochs=epochs)
    rows, reports = [], []
    with output.steps("train") as step:
        for name in known if model == "all" else [model]:
            training = train(name, recipe, log=step)
            path = save(training, out)
            reports.append({**training.report, "weights": str(path)})
            rows.append((name, f"{training.report['test_accuracy']:.2%}", str(training.report["seconds"]), str(path)))
    output.table(("model", "test accuracy", "seconds", "weights"), rows, right=("test accuracy", "seconds"))
    output.line()
    output.line(f"next: edgekit export {rows[0][0]} --target onnx --weights {rows[0][3]} -o {out}")
    output.json(reports)


@train_app.command("dhsa_bytes")
def dhsa_bytes(
    seed: Annotated[int, typer.Option(help="Of initialisation and data.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for weights and report.")] = Path("out"),
    as_json: Json = False,
) -> None:
    """Train the language model of bytes that ships with weights, on Python's own docs: about an hour of one core.

    What was interrupted goes on from its checkpoint in the same folder.
    """
    from edgekit.models.dhsa_recipe import Recipe
    from edgekit.models.train_dhsa import CHECKPOINT, NAME, save, train

    if threads < 1:
        raise InputError(f"threads must be at least 1; got {threads}")
    output = Output(as_json=as_json)
    with output.steps("train") as step:
        training = train(replace(Recipe(), seed=seed, threads=threads), step, checkpoint=out / CHECKPOINT)
        path = save(training, out)
        (out / CHECKPOINT).unlink(missing_ok=True)
    figures = training.report["dense"]
    rows = [
        (name, length, f"{value['found']:.0%}" if isinstance(value, dict) else f"{value:.3f}")
        for name, by_length in figures.items()
        for length, value in by_length.items()
    ]
    output.table(("dense attention", "length", "figure"), rows, right=("length", "figure"))
    output.line()
    output.line(f"wrote {path}")
    output.line(f"next: edgekit export {NAME} --target onnx --weights {path} -o {out}")
    output.json({**training.report, "weights": str(path)})


def _named(teacher: str, loss: str, setting: str, ties: str) -> dict[str, Any]:
    return {"teacher": teacher, "loss": loss, "setting": setting, "ties": ties}


def _show(output: Output, rows: list[Row], recipe: Recipe, seeds: int, saved: list[Path]) -> None:
    from edgekit.models.compare_lighthgnn import difference_cells, method_title
    from edgekit.models.train_lighthgnn import METHODS

    columns = ["data", "vertices", "hyperedges", "labelled", "tested", *(method_title(m, recipe) for m in METHODS)]
    cells = [
        (
            row.dataset,
            str(row.vertices),
            str(row.hyperedges),
            str(row.labelled),
            str(row.tested),
            *map(row.cell, METHODS),
        )
        for row in rows
    ]
    output.table(columns, cells, right=columns[1:])
    output.line()
    pairs = [cell for row in rows for cell in difference_cells(row, recipe)]
    output.table(("data", "difference", "points", "p"), pairs, right=("points", "p"))
    output.line()
    how = f"{recipe.setting} setting, loss {recipe.loss!r}"
    output.line(
        f"Test accuracy in %, mean ± standard deviation over {seeds} seeds, {how}; p: exact sign-flip test on the "
        "seeds' differences."
        if seeds > 1
        else f"Test accuracy in %, {how}; one seed says nothing of how much it varies, take more with --seeds."
    )
    for path in saved:
        output.line(f"wrote {path}")
    output.json(
        {
            "recipe": asdict(recipe),
            "seeds": list(range(seeds)),
            "rows": [asdict(row) for row in rows],
            "saved": [str(path) for path in saved],
        }
    )
