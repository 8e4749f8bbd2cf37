"""The custom ops on this CPU: bare kernels, onnxruntime with and without the kernel library, and their rivals.

    python -m benchmarks.custom_ops_cpu [--threads 1,2] [--rounds 15] [--only sparse,length,linear,scan,memory]

All in float32, batch 1. Before anything is timed, each answer is compared with the op's PyTorch reference in float64
(dense rivals: with each other); subjects then take turns in random order, with a pause between turns. Medians and
ratios with bootstrap intervals of 95 % go to benchmarks/results/.

sparse  BlockSparseAttention: 8 heads, D = 64, blocks of 64, causal, N = 4096. `peak` is torch.mm of 1024 x 1024, timed
        in the same turns; a processed block pair counts 4 * 64 * 64 * 64 floating-point operations.
length  the same kernel with at most 16 key blocks for each query block, N from 2k to 16k. The first query blocks have
        fewer blocks before them, so times are compared per processed block pair
linear  KernelLinearAttention, relu, 8 heads, D = E = 64; 8 * N * 64 * 64 * 4 floating-point operations
scan    SelectiveScan, C = 192, S = 16
memory  what one run adds to the process's peak resident memory, N = 16384, each in a process of its own
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.custom_ops_subjects import (
    BLOCK,
    CHANNELS,
    COPY_FLOATS,
    DIM,
    HEADS,
    PEAK_SIZE,
    STATES,
    bare_kernel,
    block_pairs,
    flex_attention_run,
    group_query_attention,
    matmul,
    memory_copy,
    one_node_model,
    onnx_attention,
    onnxruntime_run,
    scan_inputs,
    sparse_inputs,
    sparse_kernel,
    sparse_model,
    sparse_truth,
)
from benchmarks.onnx_cpu import earlier_rows, heading
from benchmarks.turns import Subject, median, speedup, take_turns
from edgekit import custom_ops
from edgekit.custom_ops.kernel_linear_attention import kernel_linear_attention
from edgekit.custom_ops.selective_scan import selective_scan
from edgekit.custom_ops.tolerances import relative_l2
from edgekit.runtime.system import measure_peak

RESULTS = Path(__file__).parent / "results"
SPARSE_LENGTH, BUDGETS = 4096, (64, 16, 8)  # key blocks per query block: densities 1.0, 0.43 and 0.23
LINEAR_LENGTHS = (196, 1024, 4096, 16384)
SCAN_LENGTHS = (1024, 4096, 16384)
SCAN_FLOPS = 16  # executed per channel, state and token on x86-64-v4: an FMA counts two, integer operations none
BUDGET_LENGTHS, BUDGET = (2048, 4096, 8192, 16384), 16
MEMORY_LENGTH = 16384
WORST_ERROR = 1e-5  # relative L2 against float64; a subject that is further off is a fault, not a rival

KERNEL, NATIVE, BODY, TORCH_OP = "kernel", "ort native", "ort body", "torch op"
SDPA, MATMULS, LOOP = "torch SDPA", "torch matmuls", "torch loop"
MEMORY_SUBJECTS = (KERNEL, NATIVE, BODY, TORCH_OP, SDPA, "ort GroupQueryAttention")


@dataclass
class Row:
    """One case at one thread count: medians in ms, speed-ups over rivals, rates, errors against float64."""

    part: str
    case: str
    threads: int
    p50_ms: dict[str, float] = field(default_factory=dict)
    speedups: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    gflops: dict[str, float] = field(default_factory=dict)
    share_of_peak: dict[str, float] = field(default_factory=dict)
    share_of_bandwidth: dict[str, float] = field(default_factory=dict)
    cost_per_block: dict[str, float] = field(default_factory=dict)
    added_mib: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def check(self, subjects: Mapping[str, Subject], truth: torch.Tensor) -> None:
        """Note each subject's relative L2 error; refuse to go on where one is out of bounds."""
        for name, run in subjects.items():
            self.errors[name] = float(f"{relative_l2(run(), truth):.3g}")
            if not self.errors[name] <= WORST_ERROR:
                raise SystemExit(f"{self.part} {self.case}: {name} is off by {self.errors[name]:.2e}: not timed")

    def time(
        self,
        subjects: dict[str, Subject],
        rounds: int,
        compared: Sequence[tuple[str, str]],
        *,
        flops: Mapping[str, int],
        moved: Mapping[str, int] | None = None,
    ) -> Row:
        """Time the subjects beside `torch.mm`, and note the speed-ups of the pairs (ours, rival)."""
        series = take_turns({**subjects, "peak": matmul()}, rounds=rounds)
        self.p50_ms = {name: float(f"{median(turns):.4g}") for name, turns in series.items()}
        self.speedups = {f"{ours} over {rival}": speedup(series[rival], series[ours]) for ours, rival in compared}
        counted = {**flops, "peak": 2 * PEAK_SIZE**3}
        self.gflops = {name: round(count / self.p50_ms[name] / 1e6, 1) for name, count in counted.items()}
        self.share_of_peak = {name: round(self.gflops[name] / self.gflops["peak"], 3) for name in flops}
        if moved:
            bandwidth = 8 * COPY_FLOATS / self.p50_ms["copy"]
            self.share_of_bandwidth = {
                name: round(count / self.p50_ms[name] / bandwidth, 3) for name, count in moved.items()
            }
        return self


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # the child process of the memory part
    options = parser.parse_args(arguments)
    custom_ops.register()
    if options.memory_of:
        print(json.dumps(_memory_child(options.memory_of)))
        return 0
    title, facts = heading()
    rows: list[Row] = []
    for part in options.only.split(","):
        for threads in map(int, options.threads.split(",")):
            torch.set_num_threads(threads)
            for row in PARTS[part](threads, options.rounds):
                rows.append(row)
                print(_line(row), flush=True)
                _write(_merged(rows, options.out), options.out, title, facts)
    return 0


def _merged(rows: list[Row], folder: Path) -> list[Row]:
    """The rows of an earlier run, with those measured now in their place; so parts can be measured one by one."""
    earlier = earlier_rows(folder / "custom_ops_cpu.json")
    known = {(row["part"], row["case"], row["threads"]): Row(**row) for row in earlier}
    known |= {(row.part, row.case, row.threads): row for row in rows}
    order = list(PARTS)
    return sorted(known.values(), key=lambda row: (order.index(row.part), row.threads))


def _sparse(threads: int, rounds: int) -> list[Row]:
    return [_sparse_case(budget, threads, rounds) for budget in BUDGETS]


def _sparse_case(budget: int, threads: int, rounds: int) -> Row:
    inputs = sparse_inputs(SPARSE_LENGTH, budget)
    pairs, blocks = block_pairs(inputs), SPARSE_LENGTH // BLOCK
    density = pairs / (HEADS * blocks * (blocks + 1) / 2)
    row = Row("sparse", f"N={SPARSE_LENGTH}, density {density:.2f}", threads)
    truth = sparse_truth(inputs)
    subjects = {
        KERNEL: sparse_kernel(inputs, threads),
        NATIVE: onnxruntime_run(sparse_model(inputs), inputs, threads, native=True),
        BODY: onnxruntime_run(sparse_model(inputs), inputs, threads, native=False),
        TORCH_OP: lambda: torch.ops.edgekit.block_sparse_attention(**inputs),
    }
    row.check(subjects, truth)
    q, k, v = (inputs[name] for name in "qkv")
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    rivals: dict[str, tuple[Callable[[], Subject], torch.Tensor]] = {
        SDPA: (lambda: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), dense),
        "flex_attention": (lambda: flex_attention_run(inputs), truth),
        "ort Attention": (lambda: onnx_attention(inputs, threads), dense),
        "ort GroupQueryAttention": (lambda: group_query_attention(inputs, threads), dense),
    }
    for name, (make, expected) in rivals.items():
        try:
            rival = make()
            rival()
        except Exception as error:  # a rival that does not work here is reported, not left out
            row.unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        row.check({name: rival}, expected)
        subjects[name] = rival
    compared = [(ours, SDPA) for ours in (KERNEL, NATIVE, BODY)] + [(NATIVE, BODY)]
    compared += [(NATIVE, name) for name in rivals if name in subjects and name != SDPA]
    return row.time(subjects, rounds, compared, flops={KERNEL: 4 * pairs * BLOCK * BLOCK * DIM})


def _length(threads: int, rounds: int) -> list[Row]:
    """All lengths take turns with each other, because the figure that matters is their ratio."""
    row = Row("length", f"at most {BUDGET} key blocks per query block", threads)
    subjects, flops = {}, {}
    for length in BUDGET_LENGTHS:
        inputs = sparse_inputs(length, BUDGET)
        name = f"N={length}"
        subjects[name] = sparse_kernel(inputs, threads)
        flops[name] = 4 * block_pairs(inputs) * BLOCK * BLOCK * DIM
        row.check({name: subjects[name]}, sparse_truth(inputs))
    row.time(subjects, rounds, [], flops=flops)
    shortest = f"N={BUDGET_LENGTHS[0]}"
    row.cost_per_block = {name: round(row.gflops[shortest] / row.gflops[name], 3) for name in subjects}
    return [row]


def _linear(threads: int, rounds: int) -> list[Row]:
    return [_linear_case(length, threads, rounds) for length in LINEAR_LENGTHS]


def _linear_case(length: int, threads: int, rounds: int) -> Row:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(1, HEADS, length, DIM, generator=generator) for name in "qkv"}
    q, k, v = inputs.values()
    model = one_node_model("KernelLinearAttention", inputs, {"feature_map": "relu", "eps": 1e-6})
    out = torch.empty_like(v)
    kernel = bare_kernel("KernelLinearAttention", {"head_dim": DIM, "value_dim": DIM}, threads)

    def matmuls() -> torch.Tensor:
        features, keys = q.relu(), k.relu()
        return (features @ (keys.transpose(-2, -1) @ v)) / (features @ keys.sum(-2).unsqueeze(-1) + 1e-6)

    def bare() -> torch.Tensor:
        kernel(q, k, v, out, 1e-6, 0)
        return out

    subjects: dict[str, Subject] = {
        KERNEL: bare,
        NATIVE: onnxruntime_run(model, inputs, threads, native=True),
        BODY: onnxruntime_run(model, inputs, threads, native=False),
        TORCH_OP: lambda: torch.ops.edgekit.kernel_linear_attention(q, k, v),
        MATMULS: matmuls,
    }
    row = Row("linear", f"N={length}", threads)
    row.check(subjects, kernel_linear_attention(q.double(), k.double(), v.double()))
    compared = [(ours, MATMULS) for ours in (KERNEL, NATIVE, BODY)] + [(NATIVE, BODY)]
    return row.time(subjects, rounds, compared, flops={KERNEL: 4 * HEADS * length * DIM * DIM})


def _scan(threads: int, rounds: int) -> list[Row]:
    return [_scan_case(length, threads, min(rounds, 7)) for length in SCAN_LENGTHS]


def _scan_case(length: int, threads: int, rounds: int) -> Row:
    inputs = scan_inputs(length)
    tensors = list(inputs.values())
    model = one_node_model("SelectiveScan", inputs, {"delta_softplus": 0})
    out = torch.empty_like(inputs["u"])
    kernel = bare_kernel("SelectiveScan", {"state": STATES}, threads)

    def bare() -> torch.Tensor:
        kernel(*tensors, inputs["u"], out, 0, 0)
        return out

    subjects: dict[str, Subject] = {
        KERNEL: bare,
        NATIVE: onnxruntime_run(model, inputs, threads, native=True),
        BODY: onnxruntime_run(model, inputs, threads, native=False),
        TORCH_OP: lambda: torch.ops.edgekit.selective_scan(*tensors),
        LOOP: lambda: selective_scan(*tensors),
    }
    row = Row("scan", f"L={length}", threads)
    row.check(subjects, selective_scan(*(tensor.double() for tensor in tensors)))
    subjects["copy"] = memory_copy()
    moved = 4 * length * (3 * CHANNELS + 2 * STATES)  # u, delta, B and C read once, the result written once
    compared = [(KERNEL, BODY), (KERNEL, LOOP), (NATIVE, BODY), (NATIVE, LOOP), (BODY, LOOP)]
    return row.time(
        subjects, rounds, compared, flops={KERNEL: SCAN_FLOPS * length * CHANNELS * STATES}, moved={KERNEL: moved}
    )


def _memory(threads: int, rounds: int) -> list[Row]:
    """Peak memory of one run, each subject in a process of its own."""
    del rounds
    row = Row("memory", f"N={MEMORY_LENGTH}, at most {BUDGET} key blocks per query block", threads)
    for name in MEMORY_SUBJECTS:
        for length in (MEMORY_LENGTH // 2, MEMORY_LENGTH):
            command = [sys.executable, "-m", "benchmarks.custom_ops_cpu", "--memory-of", f"{name}:{length}:{threads}"]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            row.added_mib[f"{name}, N={length}"] = round(json.loads(answer) / 2**20, 1)
    return [row]


def _memory_child(task: str) -> int:
    """Bytes that one run adds to the peak of resident memory, its output included."""
    name, length, threads = task.split(":")
    torch.set_num_threads(int(threads))
    inputs = sparse_inputs(int(length), BUDGET)
    q, k, v = (inputs[key] for key in "qkv")
    runs: dict[str, Callable[[], Subject]] = {
        KERNEL: lambda: sparse_kernel(inputs, int(threads)),
        NATIVE: lambda: onnxruntime_run(sparse_model(inputs), inputs, int(threads), native=True),
        BODY: lambda: onnxruntime_run(sparse_model(inputs), inputs, int(threads), native=False),
        TORCH_OP: lambda: lambda: torch.ops.edgekit.block_sparse_attention(**inputs),
        SDPA: lambda: lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "ort GroupQueryAttention": lambda: group_query_attention(inputs, int(threads)),
    }
    run = runs[name]()
    _, peak = measure_peak(run)
    if peak.bytes is None:
        raise SystemExit("this system does not tell a process's peak memory")
    return peak.bytes


PARTS: dict[str, Callable[[int, int], list[Row]]] = {
    "sparse": _sparse,
    "length": _length,
    "linear": _linear,
    "scan": _scan,
    "memory": _memory,
}


def _line(row: Row) -> str:
    """One row for the terminal."""
    figures = [f"{name} {value:.4g} ms" for name, value in row.p50_ms.items()]
    figures += [f"{name} {value:.2f}x ({low:.2f}-{high:.2f})" for name, (value, low, high) in row.speedups.items()]
    figures += [f"{name} {share:.0%} of peak" for name, share in row.share_of_peak.items()]
    figures += [f"{name} {share:.0%} of copy bandwidth" for name, share in row.share_of_bandwidth.items()]
    figures += [f"{name} {cost:.2f} of the shortest's time per block" for name, cost in row.cost_per_block.items()]
    figures += [f"{name} {size} MiB" for name, size in row.added_mib.items()]
    figures += [f"{name} unavailable: {reason}" for name, reason in row.unavailable.items()]
    return f"{row.part}, {row.case}, {row.threads} threads: " + "; ".join(figures)


def _write(rows: list[Row], folder: Path, title: str, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": "custom_ops_cpu", **facts, "rows": [asdict(row) for row in rows]}
    (folder / "custom_ops_cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    lines = [
        "# The custom ops on this CPU",
        "",
        title,
        "",
        *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(),
        "",
    ]
    for part in PARTS:
        chosen = [row for row in rows if row.part == part]
        if chosen:
            lines += [f"## {part}", "", *_tables(chosen), ""]
    (folder / "custom_ops_cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table of times, then one of ratios and shares."""
    if any(row.added_mib for row in rows):
        yield "| case | threads | subject | added, MiB |"
        yield "|---|---|---|---|"
        for row in rows:
            for name, size in row.added_mib.items():
                yield f"| {row.case} | {row.threads} | {name} | {size} |"
        return
    names = list(dict.fromkeys(name for row in rows for name in row.p50_ms))
    yield "| case | threads | " + " | ".join(f"{name}, ms" for name in names) + " |"
    yield "|---" * (len(names) + 2) + "|"
    for row in rows:
        cells = [f"{row.p50_ms[name]:.4g}" if name in row.p50_ms else "" for name in names]
        yield f"| {row.case} | {row.threads} | " + " | ".join(cells) + " |"
    yield ""
    yield "| case | threads | speed-ups, with 95 % intervals | rates |"
    yield "|---|---|---|---|"
    for row in rows:
        ratios = [f"{name} {value:.2f} ({low:.2f}-{high:.2f})" for name, (value, low, high) in row.speedups.items()]
        rates = [
            f"{name} {row.gflops[name]:.0f} GFLOP/s, {share:.0%} of peak" for name, share in row.share_of_peak.items()
        ]
        rates += [f"{name} {share:.0%} of copy bandwidth" for name, share in row.share_of_bandwidth.items()]
        rates += [f"{name}: {cost:.2f} of the shortest's time per block" for name, cost in row.cost_per_block.items()]
        yield f"| {row.case} | {row.threads} | {'<br>'.join(ratios)} | {'<br>'.join(rates)} |"
    for row in rows:
        for name, reason in row.unavailable.items():
            yield f"\n{row.case}: {name} did not run: {reason}"


if __name__ == "__main__":
    sys.exit(main())
