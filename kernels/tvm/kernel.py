"""What a compiled kernel is: the description that the catalog lists and the native library's table is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edgekit.kernels.tvm.compat import IRModule
from edgekit.kernels.tvm.targets import Arch


@dataclass(frozen=True)
class Kernel:
    """One kernel of one op: a TVM function, specialised or generic."""

    op: str
    """The op it computes, e.g. "BlockSparseAttention"."""
    dtype: str
    """The dtype of its floating tensors: "float32" or "float16" (computed in float32)."""
    symbol: str
    """The function's symbol, a C identifier; the entry of the object is "__tvm_ffi_" + symbol."""
    parameters: tuple[tuple[str, int], ...] = ()
    """What it is specialised to: it serves only calls with exactly these values. Empty: it serves every call."""
    build: Callable[[Arch], IRModule] = field(kw_only=True, repr=False, compare=False)
    """Makes the module for an arch: one scheduled PrimFunc named `symbol`."""

    @property
    def entry(self) -> str:
        """The C symbol of the packed entry, `int (void*, TVMFFIAny*, int32_t, TVMFFIAny*)`."""
        return f"__tvm_ffi_{self.symbol}"

    def module(self, arch: Arch) -> IRModule:
        """A TVM module with one scheduled PrimFunc called `symbol`, ready to be compiled for `arch`."""
        return self.build(arch)
