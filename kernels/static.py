"""The kernels as objects and C sources that a program without Python can link."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from edgekit.kernels.native.objects import SOURCES, op_objects, scratch_folder, snake_case
from edgekit.kernels.native.table import table_header

TABLE = "edgekit_kernels_table.h"
SHIPPED = ("edgekit_kernels.h", "edgekit_kernels.c", "edgekit_kernels_call.h", "edgekit_kernels_tvm.h")


def write_static(ops: Iterable[str], arch: str, folder: Path) -> list[Path]:
    """Write what a C or C++ program needs to call `ops` on an `arch` device.

    The folder then holds the header `edgekit_kernels.h`, the sources around the kernels, and one object per op. With
    no Python and no TVM on the device or the computer that builds:

        cc app.c edgekit_kernels.c edgekit_*.o -lm

    Args:
        ops: names of custom ops ("BlockSparseAttention", ..); calls of the others then say that they were not
            compiled in.
        arch: name out of `edgekit.kernels.build.ARCH_NAMES`.
        folder: made if it is not there; files of the same names are replaced.

    Returns:
        The written files.

    Raises:
        UnknownNameError: an op or arch that does not exist.
        InputError: no op.
        MissingDependencyError: TVM is not installed.
    """
    objects = op_objects(arch, ops)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder) as work:
        for name in SHIPPED:
            shutil.copyfile(SOURCES / name, work / name)
        for item in objects:
            shutil.copyfile(item.path, work / object_name(item.op))
        (work / TABLE).write_text(table_header(entry for item in objects for entry in item.entries), encoding="utf-8")
        written = [folder / path.name for path in sorted(work.iterdir())]
        for path in written:
            (work / path.name).replace(path)
    return written


def object_name(op: str) -> str:
    """The file name of an op's object: "BlockSparseAttention" -> "edgekit_block_sparse_attention.o"."""
    return f"edgekit_{snake_case(op)}.o"
