"""Every name of TVM that the kernels use, in one place: TVM moves its modules between releases.

Written against apache-tvm 0.27 with apache-tvm-ffi 0.1.14 (0.1.15 crashes in `Schedule.tensorize` and
meta_schedule). Older releases call `tirx` and `s_tir` `tir`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from edgekit.errors import MissingDependencyError

try:
    import tvm
    from tvm import IRModule
    from tvm.s_tir import Schedule
    from tvm.script import tirx as T
    from tvm.target import Target
    from tvm.tirx import PrimFunc
except ImportError as error:
    raise MissingDependencyError("apache-tvm", "tvm", "compiling the CPU kernels") from error

__all__ = ["IRModule", "PrimFunc", "Schedule", "T", "Target", "jit", "merge", "set_threads", "versions", "write_object"]


def versions() -> dict[str, str]:
    """The versions of the compiler, for manifests: {"apache-tvm": ..., "apache-tvm-ffi": ..., "llvm": ...}."""
    import tvm_ffi

    llvm = tvm.get_global_func("target.llvm_version_major")()
    return {"apache-tvm": str(tvm.__version__), "apache-tvm-ffi": str(tvm_ffi.__version__), "llvm": str(llvm)}


def merge(modules: Iterable[IRModule]) -> IRModule:
    """One module with the functions of all `modules`; each function keeps its own `global_symbol`."""
    merged = IRModule()
    for module in modules:
        merged.update(module)
    return merged


def jit(module: IRModule, target: Target) -> Callable[[str], Callable[..., Any]]:
    """Compile `module` into this process and return a look-up from a function's symbol to the callable.

    The callables take torch or numpy CPU tensors (through DLPack) and Python scalars.
    """
    executable = tvm.compile(module, target=target)
    return lambda symbol: executable[symbol]


def write_object(module: IRModule, target: Target, path: Path) -> None:
    """Compile `module` to the object file `path`; the entry of a function `f` is the C symbol `__tvm_ffi_f`."""
    tvm.compile(module, target=target).mod.write_to_file(str(path), "o")


def set_threads(count: int) -> None:
    """Let the parallel loops of compiled-in-process kernels run on `count` threads."""
    tvm.get_global_func("runtime.config_threadpool")(1, count)
