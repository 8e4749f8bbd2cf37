"""One token loop of DynamicVis in a process of its own, whose OpenMP threads wait as PyTorch has them.

GNU's OpenMP, which PyTorch's wheels bring, lets a thread that waits for the others spin for some milliseconds. The loop
waits after each of its hundred thousand small ops: on idle cores spinning makes it faster, and where another process
has one of them each wait can last until the system takes that core away from it. `command` starts it; it prints one
line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

SUBJECTS = ("reference", "library")


def command(subject: str, size: int, threads: int, seconds: float) -> list[str]:
    """The process. It imports PyTorch first: OpenMP then starts before this package sets another way to wait."""
    start = "import sys, torch; from benchmarks.dynamicvis_loop import main; sys.exit(main())"
    return [
        sys.executable,
        "-c",
        start,
        f"--subject={subject}",
        f"--size={size}",
        f"--threads={threads}",
        f"--seconds={seconds:g}",
    ]


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """`own` without what says how OpenMP's threads wait."""
    return {name: value for name, value in own.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--subject", choices=SUBJECTS, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="further runs start until then, two at least")
    options = parser.parse_args()
    from benchmarks.dynamicvis_subjects import torch_loop_run, transformers_loop_run

    torch.set_num_threads(options.threads)
    run = (transformers_loop_run if options.subject == "library" else torch_loop_run)(options.size)
    seconds: list[float] = []
    logits: Any = None
    while len(seconds) < 2 or sum(seconds) < options.seconds:
        start = time.perf_counter()
        logits = run()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"logits": logits.ravel().tolist(), "seconds": seconds}))
    return 0
