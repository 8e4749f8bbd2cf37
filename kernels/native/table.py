"""The C table from which the native layer picks a kernel: specialised ones first, generic ones last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgekit.errors import UnknownNameError

# op -> its name in C, and what a kernel of it can be specialised to (`EK_` + upper case in edgekit_kernels.c)
_OPS = {
    "BlockSparseAttention": (
        "EK_BSA",
        (
            "batch",
            "heads",
            "kv_heads",
            "index_heads",
            "length",
            "kv_length",
            "head_dim",
            "blocks_per_row",
            "block_q",
            "block_k",
            "causal",
            "window",
        ),
    ),
    "KernelLinearAttention": ("EK_KLA", ("batch", "heads", "length", "head_dim", "value_dim", "feature_map")),
    "SelectiveScan": ("EK_SCAN", ("batch", "channels", "length", "state", "gate", "delta_softplus")),
}
_DTYPES = {"float32": "EDGEKIT_FLOAT32", "float16": "EDGEKIT_FLOAT16"}
_ALIGNMENT = 4
"""Bytes to which the kernels may take every tensor to be aligned; others are copied first."""


@dataclass(frozen=True)
class Entry:
    """One compiled kernel as the table and kernels.json list it; a `edgekit.kernels.tvm.catalog.Kernel` without TVM."""

    op: str
    dtype: str
    symbol: str
    parameters: tuple[tuple[str, int], ...]
    """What it is specialised to. ("head_dim", 64): it serves 64 alone. Empty: it serves every call."""

    def to_json(self) -> dict[str, object]:
        """The entry of kernels.json."""
        return {"op": self.op, "dtype": self.dtype, "symbol": self.symbol, "parameters": dict(self.parameters)}


def table_header(entries: Iterable[Entry]) -> str:
    """The text of edgekit_kernels_table.h.

    Raises:
        UnknownNameError: an op, dtype or parameter that the C layer does not know.
    """
    rows = list(entries)
    externs = "".join(
        f"extern int __tvm_ffi_{entry.symbol}(void*, ek_any*, int32_t, ek_any*);\n"
        for entry in sorted(rows, key=lambda entry: entry.symbol)
    )
    lines = "".join(f"    {_row(entry)},\n" for entry in rows)
    return (
        "/* Written by edgekit: the kernels that were compiled, in the order in which they are tried. Included by\n"
        " * edgekit_kernels.c alone. */\n"
        f"{externs}"
        "static const ek_variant ek_variants[] = {\n"
        f"{lines}"
        "};\n"
    )


def _row(entry: Entry) -> str:
    if entry.op not in _OPS:
        raise UnknownNameError("custom op", entry.op, _OPS)
    if entry.dtype not in _DTYPES:
        raise UnknownNameError("kernel dtype", entry.dtype, _DTYPES)
    op, names = _OPS[entry.op]
    parameters = []
    for name, value in entry.parameters:
        if name not in names:
            raise UnknownNameError(f"kernel parameter of {entry.op}", name, names)
        parameters.append(f"{{EK_{name.upper()}, INT64_C({value})}}")
    body = ", ".join(parameters) or "{0, 0}"
    return (
        f'{{{op}, {_DTYPES[entry.dtype]}, {_ALIGNMENT}, "{entry.symbol}", __tvm_ffi_{entry.symbol}, '
        f"{len(parameters)}, {{{body}}}}}"
    )
