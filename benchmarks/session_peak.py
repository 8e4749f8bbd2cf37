"""One model in a process of its own: how long a run takes, and how much memory it adds. Imports no PyTorch.

    python -m benchmarks.session_peak MODEL.onnx --size 512 --threads 2 --limit-gib 20 [--no-arena] ..

Prints one line of JSON. The process may map `--limit-gib` of address space, so that a run that needs more fails here
and does not take the machine with it.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import numpy as np
import onnxruntime

from edgekit.runtime.onnxruntime_backend import session_options
from edgekit.runtime.system import current_memory_bytes, measure_peak, peak_memory_bytes


def image(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The image that all subjects see, float32 `[1, 3, size, size]`."""
    return np.random.default_rng(size).standard_normal((1, 3, size, size), dtype=np.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--limit-gib", type=float, required=True)
    parser.add_argument("--library", help="native kernels")
    parser.add_argument("--no-arena", action="store_true", help="every tensor is allocated by itself")
    options = parser.parse_args()
    limit = round(options.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    settings = session_options(options.threads)
    settings.enable_cpu_mem_arena = not options.no_arena
    if options.library:
        settings.register_custom_ops_library(options.library)
    answer: dict[str, Any] = {"arena": not options.no_arena}
    try:
        session = onnxruntime.InferenceSession(options.model, settings, providers=["CPUExecutionProvider"])
        x = image(options.size)
        answer["loaded_bytes"] = current_memory_bytes()
        seconds = []

        def run() -> Any:
            start = time.perf_counter()
            outputs = session.run(None, {session.get_inputs()[0].name: x})
            seconds.append(time.perf_counter() - start)
            return outputs[0]

        logits, peak = measure_peak(run)
        answer |= {"added_bytes": peak.bytes, "peak_bytes": peak_memory_bytes(), "logits": logits.ravel().tolist()}
        for _ in range(options.runs - 1):
            run()
        answer["seconds"] = seconds
    except Exception as error:  # onnxruntime raises a class of its own per status code; a failed allocation is a result
        answer["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
