"""Run a compiled TVM kernel in a process of its own, with every tensor against a page that cannot be touched.

    python tvm_guarded_run.py LIBRARY CASES.npz RESULTS.npz

CASES holds the function's symbol of case i as "i/symbol", its arguments as "i/0", "i/1", ... and the position of the
output among them as "i/out". Each case runs with its
tensors ending right before such a page and beginning right behind one; a kernel that strays is killed by the system.
RESULTS holds both outputs of case i, as "i/end" and "i/begin".
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import tvm  # noqa: F401 - its runtime supplies the parallel launch
import tvm_ffi

Array = np.ndarray[Any, Any]
_KEEP: list[mmap.mmap] = []


def guarded(source: Array, placement: str) -> Array:
    """A copy of `source` that ends (or begins) at a page without access."""
    page = mmap.PAGESIZE
    pages = -(-source.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    _KEEP.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for guard in (address, address + (pages + 1) * page):
        if protect(guard, page, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page if placement == "begin" else (pages + 1) * page - source.nbytes
    copy: Array = np.ndarray(source.shape, source.dtype, buffer=memory, offset=offset)
    copy[...] = source
    return copy


def main(library: str, cases: str, results: str) -> None:
    """Run every case of the file `cases` and write the outputs to the file `results`."""
    module = tvm_ffi.load_module(library)
    stored = np.load(cases)
    outputs = {}
    for case in sorted({name.split("/")[0] for name in stored}):
        count = sum(name.startswith(f"{case}/") for name in stored) - 2
        kernel = module[str(stored[f"{case}/symbol"])]
        for placement in ("end", "begin"):
            arguments: list[Any] = [stored[f"{case}/{i}"] for i in range(count)]
            arguments = [guarded(x, placement) if x.ndim else x.item() for x in arguments]
            kernel(*[tvm_ffi.from_dlpack(x) if isinstance(x, np.ndarray) else x for x in arguments])
            outputs[f"{case}/{placement}"] = arguments[int(stored[f"{case}/out"])].copy()
    np.savez(results, **outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
