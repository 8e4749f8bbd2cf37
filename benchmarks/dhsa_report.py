"""The tables of the benchmark of sparse attention: what was measured, and what follows for two and for 26 layers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.dhsa_subjects import BLOCK, BUDGET, LAYERS, WINDOW

Rows = Sequence[Mapping[str, Any]]
DENSE = ("eager", "GroupQueryAttention", "flex_attention", "torch SDPA (no softcap)", "all blocks")


def write(rows: Rows, folder: Path, title: str, facts: Mapping[str, Any], about: str) -> None:
    """Write dhsa_cpu.json and dhsa_cpu.md."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "dhsa_cpu", **facts, "rows": list(rows)}
    (folder / "dhsa_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    lines = ["# Sparse attention at the size of Gemma 2 2B on this CPU", "", title, ""]
    lines += [*about.split("\n\n", 2)[2].strip().splitlines(), ""]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += [f"## {part}", "", *_tables([row for row in rows if row["part"] == part]), ""]
    lines += _totals(rows)
    (folder / "dhsa_cpu.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _tables(rows: Rows) -> Iterator[str]:
    measure = "added_mib" if any(row["added_mib"] for row in rows) else "p50_ms"
    names = list(dict.fromkeys(name for row in rows for name in row[measure]))
    unit = "MiB" if measure == "added_mib" else "ms"
    yield "| case | tokens | threads | " + " | ".join(f"{name}, {unit}" for name in names) + " |"
    yield "|---" * (len(names) + 3) + "|"
    for row in rows:
        cells = [f"{row[measure][name]:.4g}" if name in row[measure] else "" for name in names]
        yield f"| {row['case']} | {row['length']} | {row['threads']} | " + " | ".join(cells) + " |"
    if any(row["speedups"] or row["share_of_peak"] for row in rows):
        yield ""
        yield "| case | tokens | ratios, with 95 % intervals |"
        yield "|---|---|---|"
    for row in rows:
        ratios = [f"{name} {value:.2f} ({low:.2f}-{high:.2f})" for name, (value, low, high) in row["speedups"].items()]
        ratios += [f"{name}: {share:.0%} of peak" for name, share in row["share_of_peak"].items()]
        if ratios:
            yield f"| {row['case']} | {row['length']} | {'<br>'.join(ratios)} |"
    for row in rows:
        for name, reason in row["unavailable"].items():
            yield f"\n{row['case']}, {row['length']} tokens: {name}: {reason}."


def _totals(rows: Rows) -> list[str]:
    """Sums of measured medians: the attention of two layers and of 26, and prefill of 26."""
    attention = {(row["case"], row["length"]): row["p50_ms"] for row in rows if row["part"] == "attention"}
    prefill = {row["length"]: row["p50_ms"] for row in rows if row["part"] == "prefill"}
    lengths = sorted({length for _, length in attention if ("sliding", length) in attention})
    lines: list[str] = []
    if lengths:
        lines += ["## computed from the medians above: attention", "", *_attention_totals(attention, lengths), ""]
    if both := [length for length in sorted(prefill) if ("global", length) in attention]:
        lines += ["## computed from the medians above: prefill of 26 layers", ""]
        lines += [*_prefill_totals(prefill, attention, both)]
    return lines


def _attention_totals(
    attention: Mapping[tuple[str, int], Mapping[str, float]], lengths: Sequence[int]
) -> Iterator[str]:
    yield (
        "`two layers` is a global and a sliding layer with a boundary predictor of their own; `26 layers` is 13 of "
        "each with one predictor, as a whole model has them. The last column counts the pairs of blocks that are "
        "read: no selection can be faster than that against a dense op of the same rate."
    )
    yield ""
    yield "| tokens | dense rival | dense, 2 layers, ms | dhsa, 2 layers, ms | ratio | ratio, 26 layers | ceiling |"
    yield "|---|---|---|---|---|---|---|"
    for length in lengths:
        layers = attention["global", length], attention["sliding", length]
        ours, once = sum(layer["dhsa"] for layer in layers), layers[0]["boundary predictor"]
        for name in DENSE:
            if all(name in layer for layer in layers):
                dense = sum(layer[name] for layer in layers)
                many = (LAYERS / 2 * dense) / (LAYERS / 2 * ours + once)
                yield (
                    f"| {length} | {name} | {dense:.4g} | {ours + once:.4g} | {dense / (ours + once):.2f} | {many:.2f} "
                    f"| {ceiling(length):.2f} |"
                )


def _prefill_totals(
    prefill: Mapping[int, Mapping[str, float]],
    attention: Mapping[tuple[str, int], Mapping[str, float]],
    lengths: Sequence[int],
) -> Iterator[str]:
    yield "13 times the measured two layers, with the boundary predictor counted once; without embedding and logits."
    yield ""
    yield "| tokens | eager, s | all blocks, s | dhsa, s | over eager | over all blocks |"
    yield "|---|---|---|---|---|---|"
    for length in lengths:
        times, once = prefill[length], attention["global", length]["boundary predictor"]
        ours = LAYERS / 2 * (times["dhsa"] - once) + once
        dense = {name: LAYERS / 2 * times[name] for name in ("eager", "all blocks") if name in times}
        seconds = [f"{dense[name] / 1e3:.4g}" if name in dense else "" for name in ("eager", "all blocks")]
        ratios = [f"{dense[name] / ours:.2f}" if name in dense else "" for name in ("eager", "all blocks")]
        yield f"| {length} | {seconds[0]} | {seconds[1]} | {ours / 1e3:.4g} | {ratios[0]} | {ratios[1]} |"


def ceiling(length: int) -> float:
    """Pairs of blocks that dense attention reads, over those of sparse attention: a global and a sliding layer."""
    dense = sparse = 0
    for window in (0, WINDOW):
        for row in range(-(-length // BLOCK)):
            lowest = max(0, row * BLOCK - window + 1) // BLOCK if window else 0
            reach = row - lowest + 1
            dense, sparse = dense + reach, sparse + min(reach, BUDGET // BLOCK)
    return dense / sparse
