"""What sparse attention loses: needles found and bits per byte, dense against dhsa, block and window.

    python -m benchmarks.dhsa_quality [--trials 3] [--budgets 512,1024] [--workers 2]

The model is the one that ships, `dhsa_bytes`; one byte is one token. A needle task hides one fact in held-out text and
asks for it at the end; it is found when greedy decoding gives all five digits. All attentions read the same tasks and
may read the same number of tokens per query block. Each kind has its best setting (size of blocks, selection per key
head or for all, number of chunks), chosen on other tasks and other text than those reported.

Three regimes: sparse throughout, where the question and the generated digits select their blocks as everything else
does; with the last 64 tokens of the prompt, that is the question, dense; and with the generated ones dense as well, as
in the authors' evaluation, which leaves little to select.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch

from benchmarks import heat_map
from benchmarks.dhsa_quality_subjects import (
    KINDS,
    MODEL,
    REACHES,
    REGIMES,
    Setting,
    bits,
    candidates,
    grid,
    over_all,
    passages,
    tasks,
    wilson,
)
from benchmarks.onnx_cpu import RESULTS, heading

LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
CHOOSING_SEED, SEED = 1001, 2002
CHOOSING_LENGTH, CHOOSING_TRIALS, CHOOSING_TEXTS = 4096, 1, 5
CHOOSING_REGIMES = ("sparse", "question")
KERNEL_SIZE = 64  # blocks that the kernels are fast with
NAME = "dhsa_quality"


@dataclass(frozen=True)
class Choice:
    """The setting of each kind for needles and for text, and all that were tried."""

    needles: dict[str, Setting]
    text: dict[str, Setting]
    tried: list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=3, help="needles of each length and depth")
    parser.add_argument("--budgets", default="512,1024", help="tokens per query block")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args(arguments)
    budgets = [int(each) for each in options.budgets.split(",")]
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:.0f} s: {line}", file=sys.stderr, flush=True)

    with ProcessPoolExecutor(options.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        chosen = _choose(budgets[0], pool, say)
        same = same_size(chosen.tried, options.trials, pool)
        say(f"blocks of {KERNEL_SIZE}: done")
        results = [
            _measure(budget, list(REGIMES)[: 2 if index else None], chosen, options.trials, pool, say)
            for index, budget in enumerate(budgets)
        ]
    title, facts = heading()
    trained = json.loads((resources.files("edgekit.models") / "pretrained" / f"{MODEL}.json").read_text())
    document = {
        "benchmark": NAME,
        **facts,
        "weights_sha256": trained["weights_sha256"],
        "seconds": round(time.perf_counter() - started, 1),
        "workers": options.workers,
        "trials": options.trials,
        "depths": DEPTHS,
        "lengths": LENGTHS,
        "reaches": REACHES,
        "tried": chosen.tried,
        "settings": {kind: [chosen.needles[kind].text, chosen.text[kind].text] for kind in KINDS},
        "same_size": same,
        "budgets": results,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{NAME}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{NAME}.md").write_text("\n".join(report(title, document)), encoding="utf-8")
    picture(document)
    print((RESULTS / f"{NAME}.md").read_text())
    return 0


def _choose(budget: int, pool: ProcessPoolExecutor, say: Callable[[str], None]) -> Choice:
    """The best setting of each kind for needles and for text."""
    texts = passages()[:CHOOSING_TEXTS]
    wanted = tasks([CHOOSING_LENGTH], DEPTHS, CHOOSING_TRIALS, CHOOSING_SEED)
    choice = Choice({}, {}, [])
    for kind in KINDS:
        settings = candidates(kind, budget)
        found, cost = [0], [0.0]
        if len(settings) > 1:
            runs = [setting.under(regime) for setting in settings for regime in CHOOSING_REGIMES]
            counts = [sum(cell.found for cell in cells) for cells in pool.map(grid, runs, [wanted] * len(runs))]
            found = np.asarray(counts).reshape(len(settings), -1).sum(1).tolist()
            cost = [float(over_all(rows).mean()) for rows in pool.map(bits, settings, [texts] * len(settings))]
            choice.tried.extend(
                {
                    "setting": asdict(setting),
                    "found": right,
                    "tasks": len(runs) // len(settings) * len(wanted),
                    "bits_per_byte": spent,
                }
                for setting, right, spent in zip(settings, found, cost, strict=True)
            )
        choice.needles[kind] = settings[max(range(len(settings)), key=lambda index: (found[index], -cost[index]))]
        choice.text[kind] = settings[int(np.argmin(cost))]
        say(f"{kind}: needles with {choice.needles[kind].text}; text with {choice.text[kind].text}")
    return choice


def same_size(tried: list[dict[str, Any]], trials: int, pool: ProcessPoolExecutor) -> dict[str, Any]:
    """dhsa and block with blocks of the size that kernels fetch, each at its best of that size, as plain data."""
    best = {}
    for kind in ("dhsa", "block"):
        sized = [each for each in tried if each["setting"]["kind"] == kind]
        sized = [each for each in sized if each["setting"]["block_size"] == KERNEL_SIZE]
        best[kind] = Setting(**max(sized, key=lambda each: each["found"])["setting"])
    wanted = tasks(LENGTHS, DEPTHS, trials, SEED)
    jobs = [(regime, kind) for regime in CHOOSING_REGIMES for kind in best]
    runs = [best[kind].under(regime) for regime, kind in jobs]
    grids = dict(zip(jobs, pool.map(grid, runs, [wanted] * len(runs)), strict=True))
    return {
        "settings": {kind: setting.text for kind, setting in best.items()},
        "needles": {
            regime: {kind: [asdict(cell) for cell in grids[regime, kind]] for kind in best}
            for regime in CHOOSING_REGIMES
        },
    }


def _measure(
    budget: int, regimes: list[str], choice: Choice, trials: int, pool: ProcessPoolExecutor, say: Callable[[str], None]
) -> dict[str, Any]:
    """All kinds at one budget, as plain data; the authors' regime at the first budget only."""
    wanted = tasks(LENGTHS, DEPTHS, trials, SEED)
    needles = {kind: setting.within(budget) for kind, setting in choice.needles.items()}
    text = {kind: setting.within(budget) for kind, setting in choice.text.items()}
    jobs = [(regime, kind) for regime in regimes for kind in KINDS if kind != "dense" or regime == regimes[0]]
    runs = [needles[kind].under(regime) for regime, kind in jobs]
    grids = dict(zip(jobs, pool.map(grid, runs, [wanted] * len(runs)), strict=True))
    for regime in regimes[1:]:  # the dense model finds the same in all of them
        grids[regime, "dense"] = grids[regimes[0], "dense"]
    say(f"budget {budget}: needles done")
    held_out = passages()[CHOOSING_TEXTS:]
    read = dict(zip(KINDS, pool.map(bits, text.values(), [held_out] * len(KINDS)), strict=True))
    say(f"budget {budget}: bits per byte done")
    return {
        "budget": budget,
        "needles_settings": {kind: asdict(setting) for kind, setting in needles.items()},
        "text_settings": {kind: asdict(setting) for kind, setting in text.items()},
        "needles": {
            regime: {kind: [asdict(cell) for cell in grids[regime, kind]] for kind in KINDS} for regime in regimes
        },
        "bits_per_byte": {kind: rows.tolist() for kind, rows in read.items()},
    }


def report(title: str, document: dict[str, Any]) -> list[str]:
    """The results as lines of Markdown."""
    lines = [
        "# DHSA: what sparse attention loses",
        "",
        title,
        "",
        f"`{MODEL}`: one byte is one token. {document['trials']} needles for each of {len(DEPTHS)} depths and length.",
        "The budget is what a query block may read: own, first and local blocks included. In brackets: Wilson's 95 %",
        f"interval. The run took {document['seconds'] / 60:.0f} minutes in {document['workers']} processes.",
        "",
        f"Settings were chosen at the first budget, on {len(DEPTHS) * CHOOSING_TRIALS} other needles of",
        f"{CHOOSING_LENGTH} tokens in the first two regimes, and on other text:",
        "",
    ]
    for kind, (found, text) in document["settings"].items():
        if kind != "dense":
            lines.append(f"- {kind}: needles with {found}" + ("" if found == text else f"; text with {text}"))
    lines += ["", "The most needles found while choosing, by size of blocks:", "", *_tried_table(document["tried"])]
    lines += ["", f"## Blocks of {KERNEL_SIZE}, budget {document['budgets'][0]['budget']} tokens", ""]
    lines += [f"- {kind}: {words}" for kind, words in document["same_size"]["settings"].items()]
    for regime, cells in document["same_size"]["needles"].items():
        lines += ["", f"### Needles found in %, {REGIMES[regime][2]}", "", *_needle_table(cells)]
    for result in document["budgets"]:
        lines += ["", f"## Budget {result['budget']} tokens"]
        for regime, cells in result["needles"].items():
            lines += ["", f"### Needles found in %, {REGIMES[regime][2]}", "", *_needle_table(cells)]
        lines += ["", "### Bits per byte of held-out text, by place in a passage of 8192 tokens", ""]
        lines += _bits_table(result["bits_per_byte"])
    lines += [
        "",
        "Less than dense means: what lies beyond the budget does this small model more harm than good on such text.",
        "A block of queries chooses by their mean: what a byte reads may tell a little of the bytes behind it in its",
        "block. dense and window choose nothing.",
    ]
    return [*lines, ""]


def _tried_table(tried: list[dict[str, Any]]) -> list[str]:
    sizes = sorted({each["setting"]["block_size"] for each in tried})
    lines = [_row("attention", *map(str, sizes)), _row("---", *["---:"] * len(sizes))]
    for kind in KINDS[1:]:
        own = [each for each in tried if each["setting"]["kind"] == kind]
        best = [
            max((each for each in own if each["setting"]["block_size"] == size), key=lambda each: each["found"])
            for size in sizes
        ]
        lines.append(_row(kind, *(f"{each['found']} of {each['tasks']}" for each in best)))
    return lines


def _needle_table(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [_row("attention", *map(str, LENGTHS), "all"), _row("---", *["---:"] * (len(LENGTHS) + 1))]
    for kind in cells:
        columns = [[cell for cell in cells[kind] if cell["length"] == length] for length in LENGTHS]
        counts = [(sum(c["found"] for c in column), sum(c["tasks"] for c in column)) for column in columns]
        counts.append((sum(found for found, _ in counts), sum(of for _, of in counts)))
        lines.append(_row(kind, *(_share(found, of) for found, of in counts)))
    return lines


def _share(found: int, of: int) -> str:
    low, high = wilson(found, of)
    return f"{100 * found / of:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _bits_table(bits_by_kind: dict[str, list[list[float]]]) -> list[str]:
    names = [f"{low}..{high}" for low, high in REACHES]
    lines = [_row("attention", *names, "all", "more than dense"), _row("---", *["---:"] * (len(names) + 2))]
    dense = over_all(np.asarray(bits_by_kind["dense"]))
    for kind in KINDS:
        rows = np.asarray(bits_by_kind[kind])
        whole = over_all(rows)
        difference = whole - dense
        spread = 1.96 * difference.std(ddof=1) / np.sqrt(len(difference))
        more = "" if kind == "dense" else f"{difference.mean():+.4f} ± {spread:.4f}"
        lines.append(_row(kind, *(f"{value:.3f}" for value in (*rows.mean(0), whole.mean())), more))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def picture(document: dict[str, Any]) -> None:
    """One heat map per budget: a band per regime, a panel per kind."""
    for result in document["budgets"]:
        bands = [
            (_heading(regime), [_panel(kind, cells[kind]) for kind in KINDS])
            for regime, cells in result["needles"].items()
        ]
        heat_map.draw(
            RESULTS / f"{NAME}_{result['budget']}.png",
            f"Needles found, budget of {result['budget']} tokens per query block",
            f"{MODEL}: a fact in held-out text, greedy decoding; % of {document['trials']} tasks per cell",
            bands,
            [str(length) for length in LENGTHS],
            [f"{100 * depth:g} %" for depth in DEPTHS],
            ("context length in tokens", "depth"),
        )


def _heading(regime: str) -> str:
    words = REGIMES[regime][2]
    return words[0].upper() + words[1:]


def _panel(kind: str, cells: Sequence[dict[str, Any]]) -> heat_map.Panel:
    found = {(cell["length"], cell["depth"]): cell["found"] / cell["tasks"] for cell in cells}
    return heat_map.Panel(kind, [[found[length, depth] for length in LENGTHS] for depth in DEPTHS])


if __name__ == "__main__":
    sys.exit(main())
