"""The kernels that exist, and how they become one object file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from edgekit.errors import InputError
from edgekit.kernels.tvm import block_sparse_attention, kernel_linear_attention, selective_scan
from edgekit.kernels.tvm.compat import merge, write_object
from edgekit.kernels.tvm.kernel import Kernel
from edgekit.kernels.tvm.targets import Arch

__all__ = ["Kernel", "compile_object", "kernels"]

# One module per op, in the order of the listing.
_OP_MODULES = (block_sparse_attention, kernel_linear_attention, selective_scan)


def kernels(arch: Arch) -> tuple[Kernel, ...]:
    """Every kernel for `arch`: per op and dtype the specialised ones first, the generic one last."""
    return tuple(kernel for module in _OP_MODULES for kernel in module.variants(arch))


def compile_object(kernels: Iterable[Kernel], arch: Arch, path: Path) -> None:
    """Compile `kernels` for `arch` into the one object file `path`.

    Raises:
        InputError: no kernel, or two kernels with one symbol.
    """
    chosen = tuple(kernels)
    symbols = [kernel.symbol for kernel in chosen]
    if not chosen or len(set(symbols)) != len(symbols):
        raise InputError(f"expected one or more kernels with different symbols, got {symbols or 'none'}")
    write_object(merge(kernel.module(arch) for kernel in chosen), arch.target, path)
