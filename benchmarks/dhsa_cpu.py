"""Sparse attention at the size of Gemma 2 2B on this CPU: one layer's attention, two whole layers, and their memory.

    python -m benchmarks.dhsa_cpu [--threads 2] [--lengths 2048,4096] [--only kernel,attention,prefill,memory]

float32, batch 1, random weights and inputs: 8 query heads and 4 key heads of 256, softcap 50, a window of 4096 tokens
in every other layer, hidden 2304, MLP 9216; the vocabulary is cut to 1024. DHSA reads at most 2048 tokens per query
block of 64. Before anything is timed it is checked: attention against float64 on 96 rows, prefill against PyTorch up to
4096 tokens, and all blocks against eager where that fits. Subjects take turns in random order; medians and ratios with
bootstrap intervals of 95 % go to benchmarks/results/.

kernel     BlockSparseAttention of all causal blocks; `peak` is torch.mm of 1024 x 1024, timed in the same turns
attention  from queries and keys to the attention's output. `dhsa` is selection and sparse op in one graph; the boundary
           predictor, which runs once for all layers, the selection and the op are timed apart as well. Dense rivals:
           eager (with its matrix of scores), onnxruntime's GroupQueryAttention, torch's flex_attention, torch's SDPA,
           which has no softcap, and our op with all blocks. On sliding layers the fused ones read the window only
prefill    a prompt through two layers, one sliding and one global, in onnxruntime: `eager`, `all blocks` and `dhsa`
memory     what one run adds to the process's peak resident memory, each in a process of its own
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch

from benchmarks import dhsa_subjects as subjects_of
from benchmarks.custom_ops_subjects import PEAK_SIZE, group_query_attention, matmul, onnxruntime_run
from benchmarks.dhsa_report import write
from benchmarks.dhsa_subjects import DIM, HEADS, SCALE, SOFTCAP, WINDOWS, Layer, Tensors
from benchmarks.onnx_cpu import earlier_rows, heading
from benchmarks.turns import Subject, median, speedup, take_turns
from edgekit import custom_ops
from edgekit.custom_ops.tolerances import relative_l2
from edgekit.runtime.system import measure_peak

RESULTS = Path(__file__).parent / "results"
LENGTHS = (2048, 4096, 8192, 16384)
ROUNDS = {2048: 9, 4096: 7, 8192: 5, 16384: 3}
WORST_ERROR, WORST_PREFILL_ERROR = 1e-5, 1e-4  # relative L2; a subject that is further off is a fault, not a rival

DHSA, PORTABLE, PREDICTOR = "dhsa", "dhsa, portable body", "boundary predictor"
SELECTION, SPARSE_OP, ALL_BLOCKS = "selection", "sparse op", "all blocks"
EAGER, GQA, SDPA, FLEX = "eager", "GroupQueryAttention", "torch SDPA (no softcap)", "flex_attention"
GRAPHS = {DHSA: "sparse", ALL_BLOCKS: "all blocks", EAGER: "eager"}
RIVALS = (EAGER, GQA, SDPA, FLEX, ALL_BLOCKS)
LAYERS: tuple[Layer, ...] = ("global", "sliding")
LEFT_OUT: set[str] = set()  # subjects that this run does without
SCORE_MATRICES = {EAGER: 3, GQA: 1}  # alive at once, at least, where rivals have them


@dataclass
class Row:
    """One case at one length: medians in ms, speed-ups over rivals, errors, memory."""

    part: str
    case: str
    length: int
    threads: int
    p50_ms: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    share_of_peak: dict[str, float] = field(default_factory=dict)
    added_mib: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def check(self, name: str, got: object, expected: torch.Tensor, worst: float = WORST_ERROR) -> None:
        """Note a subject's relative L2 error; refuse to go on where it is out of bounds."""
        assert isinstance(got, torch.Tensor)
        self.errors[name] = float(f"{relative_l2(got, expected):.3g}")
        if not self.errors[name] <= worst:
            raise SystemExit(
                f"{self.part} {self.case} {self.length}: {name} is off by {self.errors[name]:.2e}: not timed"
            )

    def time(self, runs: Mapping[str, Subject], compared: Sequence[tuple[str, str]]) -> Row:
        """Time the subjects in turns, and note the speed-ups of the pairs (ours, rival); keeps what is known."""
        short = self.length <= 4096
        series = take_turns(runs, rounds=ROUNDS.get(self.length, 5), settling_runs=int(short))
        for name, turns in series.items():
            self.p50_ms.setdefault(name, float(f"{median(turns):.4g}"))
        self.speedups |= {f"{ours} over {rival}": speedup(series[rival], series[ours]) for ours, rival in compared}
        return self


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, help="turns of each subject")
    parser.add_argument("--without", default="", help="subjects to leave out, separated by commas")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child process of the memory part
    options = parser.parse_args(arguments)
    custom_ops.register()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(_memory_child(options.memory_of, options.threads)))
        return 0
    LEFT_OUT.update(options.without.split(","))
    if options.rounds:
        ROUNDS.update(dict.fromkeys(LENGTHS, options.rounds))
    title, facts = heading()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as folder:
        for part in options.only.split(","):
            for length in map(int, options.lengths.split(",")):
                for row in PARTS[part](length, options.threads, Path(folder)):
                    rows.append(row)
                    print(_line(row), flush=True)
                    write(_merged(rows, options.out), options.out, title, facts, __doc__ or "")
    return 0


def _merged(rows: list[Row], folder: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, with those measured now in their place; so parts can be measured one by one."""
    known = {_key(row): row for row in earlier_rows(folder / "dhsa_cpu.json")}
    known |= {_key(asdict(row)): asdict(row) for row in rows}
    order = list(PARTS)
    return sorted(known.values(), key=lambda row: (order.index(row["part"]), row["case"], row["length"]))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["part"], row["case"], row["length"], row["threads"]


def _kernel(length: int, threads: int, folder: Path) -> list[Row]:
    """The op's rate at head_dim 256, with blocks of 64 and 128, at the shortest length alone."""
    del folder
    if length != LENGTHS[0]:
        return []
    row, runs, flops = Row("kernel", "all causal blocks", length, threads), {}, {}
    inputs = subjects_of.attention_inputs(length)
    for block in (64, 128):
        for softcap in (0.0, SOFTCAP):
            name = f"blocks of {block}, softcap {softcap:g}"
            runs[name] = subjects_of.all_blocks_kernel(inputs, threads, block, softcap)
            expected = subjects_of.truth(inputs, "global", softcap=softcap)
            row.check(name, _some(runs[name]), expected)
            blocks = length // block
            flops[name] = 4 * HEADS * blocks * (blocks + 1) // 2 * block * block * DIM
    row.time({**runs, "peak": matmul()}, [])
    rate = 2 * PEAK_SIZE**3 / row.p50_ms["peak"]
    row.share_of_peak = {name: round(count / row.p50_ms[name] / rate, 3) for name, count in flops.items()}
    return [row]


def _attention(length: int, threads: int, folder: Path) -> Iterator[Row]:
    del folder
    inputs = subjects_of.attention_inputs(length)
    predict = subjects_of.run_graph("predict", "global", {"k": inputs["k"]}, threads)
    ids = predict()
    assert isinstance(ids, torch.Tensor)
    for layer in LAYERS:
        yield _attention_case(layer, inputs, ids, predict, threads)


def _attention_case(layer: Layer, inputs: Tensors, ids: torch.Tensor, predict: Subject, threads: int) -> Row:
    length = inputs["q"].shape[2]
    row = Row("attention", layer, length, threads)
    chosen = subjects_of.with_ids({name: inputs[name] for name in "qk"}, ids)
    select = subjects_of.run_graph("select", layer, chosen, threads)
    index = select()
    assert isinstance(index, torch.Tensor)
    everything = subjects_of.with_ids(inputs, ids)
    runs: dict[str, Subject] = {
        DHSA: subjects_of.run_graph("sparse", layer, everything, threads),
        PORTABLE: subjects_of.run_graph("sparse", layer, everything, threads, native=False),
        SPARSE_OP: onnxruntime_run(
            subjects_of.op_model(inputs, index, layer), {**inputs, "block_index": index}, threads, native=True
        ),
    }
    if PORTABLE in LEFT_OUT:
        del runs[PORTABLE]
        row.unavailable[PORTABLE] = "left out of this run"
    expected = subjects_of.truth(inputs, layer, index=index)
    for name, run in runs.items():
        row.check(name, _some(run), expected)
    runs |= {SELECTION: select} | ({PREDICTOR: predict} if layer == "global" else {})
    for name in RIVALS:
        if name not in SCORE_MATRICES and (run := _checked_rival(row, name, inputs, layer)):
            runs[name] = run
    row.time(runs, [(DHSA, name) for name in (*RIVALS, PORTABLE) if name in runs])
    # Rivals with matrices of scores take turns with ours alone, one after the other: they do not fit side by side.
    for name in SCORE_MATRICES:
        if run := _checked_rival(row, name, inputs, layer):
            row.time({DHSA: runs[DHSA], name: run}, [(DHSA, name)])
            del run
    return row


def _checked_rival(row: Row, name: str, inputs: Tensors, layer: Layer) -> Subject | None:
    """A dense rival whose answers are right; None, with a note, where it does not run here."""
    if reason := "left out of this run" if name in LEFT_OUT else _too_large(name, row.length):
        row.unavailable[name] = reason
        return None
    try:
        run = _rival(name, inputs, layer, row.threads)
        got = _some(run)
    except Exception as error:  # a rival that does not work here is reported, not left out
        row.unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return None
    row.check(name, got, subjects_of.truth(inputs, layer, softcap=0.0 if name == SDPA else SOFTCAP))
    return run


def _rival(name: str, inputs: Tensors, layer: Layer, threads: int) -> Subject:
    makes: dict[str, Callable[[], Subject]] = {
        EAGER: lambda: subjects_of.run_graph("eager", layer, inputs, threads),
        GQA: lambda: group_query_attention(inputs, threads, scale=SCALE, softcap=SOFTCAP, window=WINDOWS[layer]),
        SDPA: lambda: subjects_of.torch_sdpa(inputs, layer),
        FLEX: lambda: subjects_of.flex_attention(inputs, layer),
        ALL_BLOCKS: lambda: subjects_of.run_graph("all blocks", layer, inputs, threads),
    }
    return makes[name]()


def _some(run: Subject) -> torch.Tensor:
    """The rows that are checked."""
    out = run()
    assert isinstance(out, torch.Tensor)
    return out[:, :, subjects_of.checked_rows(out.shape[2])]


def _too_large(name: str, length: int) -> str | None:
    """Why a subject with matrices of scores is not tried here; None where it is."""
    scores = 4 * HEADS * length * length
    needed, free = SCORE_MATRICES.get(name, 0) * scores, _free_bytes()
    if needed < 0.9 * free:
        return None
    return (
        f"not tried: a matrix of scores takes {scores / 1e9:.1f} GB, {SCORE_MATRICES[name]} of them are needed at "
        f"once, and {free / 1e9:.1f} GB are free"
    )


def _free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise SystemExit("this system does not tell how much memory is free")


def _prefill(length: int, threads: int, folder: Path) -> list[Row]:
    row = Row("prefill", "two layers", length, threads)
    truths = _torch_logits(length)
    runs = {name: subjects_of.prefill_run(_written(name, folder), length, threads) for name in (DHSA, ALL_BLOCKS)}
    for name, run in runs.items():
        if name in truths:
            row.check(name, run(), truths[name], WORST_PREFILL_ERROR)
    row.time(runs, [(DHSA, ALL_BLOCKS)])
    dense = runs.pop(ALL_BLOCKS)()
    if reason := _too_large(EAGER, length):
        row.unavailable[EAGER] = reason
        return [row]
    runs[EAGER] = subjects_of.prefill_run(_written(EAGER, folder), length, threads)
    assert isinstance(dense, torch.Tensor)
    row.check(EAGER, runs[EAGER](), dense, WORST_PREFILL_ERROR)
    return [row.time(runs, [(DHSA, EAGER)])]


@torch.no_grad()
def _torch_logits(length: int) -> dict[str, torch.Tensor]:
    """What PyTorch's decoder answers, for lengths that it does not take minutes for."""
    answers = {}
    for name in (DHSA, ALL_BLOCKS) if length <= 4096 else ():
        decoder = subjects_of.decoder(subjects_of.PREFILLS[name])
        ids = torch.from_numpy(subjects_of.prompt(length))
        answers[name] = decoder.prefill(ids, torch.ones_like(ids), decoder.empty_cache(1))[0]
    return answers


def _written(name: str, folder: Path) -> Path:
    kind = subjects_of.PREFILLS[name]
    path = folder / f"{kind}.onnx"
    if not path.exists():
        subjects_of.write_prefill(kind, path)
    return path


def _memory(length: int, threads: int, folder: Path) -> list[Row]:
    """Peak memory of one run, each subject in a process of its own."""
    attention = Row("memory", "attention, global layer", length, threads)
    prefill = Row("memory", "prefill, two layers", length, threads)
    for name in (DHSA, ALL_BLOCKS, EAGER, GQA, SDPA):
        file = folder / f"{name}-attention.onnx"
        if name in GRAPHS and not file.exists():
            onnx.save(subjects_of.graph(GRAPHS[name], "global"), file)
        _measure(attention, name, f"attention:{name}:{length}:{file}")
    for name in subjects_of.PREFILLS:
        _measure(prefill, name, f"prefill:{name}:{length}:{_written(name, folder)}")
    return [attention, prefill]


def _measure(row: Row, name: str, task: str) -> None:
    if reason := _too_large(name, row.length):
        row.unavailable[name] = reason
        return
    command = [sys.executable, "-m", "benchmarks.dhsa_cpu", "--threads", str(row.threads), "--memory-of", task]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        row.unavailable[name] = f"the process ended with {answer.returncode}"
        return
    row.added_mib[name] = round(json.loads(answer.stdout) / 2**20, 1)


def _memory_child(task: str, threads: int) -> int:
    """Bytes that one run adds to the peak of resident memory, its output included."""
    part, name, length, path = task.split(":")
    if part == "prefill":
        run = subjects_of.prefill_run(Path(path), int(length), threads)
    else:
        inputs = subjects_of.attention_inputs(int(length))
        if name in GRAPHS:
            if name == DHSA:
                inputs = subjects_of.with_ids(inputs, (torch.arange(int(length)) // 8).unsqueeze(0))
            run = subjects_of.run_graph(GRAPHS[name], "global", inputs, threads, file=Path(path))
        else:
            run = _rival(name, inputs, "global", threads)
    _, peak = measure_peak(run)
    if peak.bytes is None:
        raise SystemExit("this system does not tell a process's peak memory")
    return peak.bytes


PARTS: dict[str, Callable[[int, int, Path], Iterable[Row]]] = {
    "kernel": _kernel,
    "attention": _attention,
    "prefill": _prefill,
    "memory": _memory,
}


def _line(row: Row) -> str:
    """One row for the terminal."""
    figures = [f"{name} {value:.4g} ms" for name, value in row.p50_ms.items()]
    figures += [f"{name} {value:.2f}x ({low:.2f}-{high:.2f})" for name, (value, low, high) in row.speedups.items()]
    figures += [f"{name} {share:.0%} of peak" for name, share in row.share_of_peak.items()]
    figures += [f"{name} {size} MiB" for name, size in row.added_mib.items()]
    figures += [f"{name}: {reason}" for name, reason in row.unavailable.items()]
    return f"{row.part}, {row.case}, {row.length} tokens, {row.threads} threads: " + "; ".join(figures)


if __name__ == "__main__":
    sys.exit(main())
