"""The catalog: what kernels exist, and that they become objects for every arch."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit.errors import InputError, UnknownNameError
from edgekit.kernels.tvm.catalog import Kernel, compile_object, kernels
from edgekit.kernels.tvm.targets import ARCHS, get_arch

_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_op_has_a_generic_kernel_per_dtype_and_it_comes_last(arch: str) -> None:
    by_use: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels(get_arch(arch)):
        by_use.setdefault((kernel.op, kernel.dtype), []).append(kernel)
    ops = ("BlockSparseAttention", "KernelLinearAttention", "SelectiveScan")
    assert set(by_use) == {(op, dtype) for op in ops for dtype in ("float32", "float16")}
    for use, found in by_use.items():
        assert [not kernel.parameters for kernel in found] == [False] * (len(found) - 1) + [True], use


@pytest.mark.parametrize("arch", ARCHS)
def test_symbols_are_different_c_identifiers(arch: str) -> None:
    symbols = [kernel.symbol for kernel in kernels(get_arch(arch))]
    assert len(set(symbols)) == len(symbols)
    assert all(re.fullmatch(r"edgekit_[a-z0-9_]+", symbol) for symbol in symbols)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_object_holds_the_entries_for_its_machine(arch: str, tmp_path: Path) -> None:
    chosen = [kernel for kernel in kernels(get_arch(arch)) if kernel.op == "BlockSparseAttention"]
    path = tmp_path / "kernels.o"
    compile_object(chosen, get_arch(arch), path)
    content = path.read_bytes()
    assert struct.unpack_from("<H", content, 18) == (_ELF_MACHINES[get_arch(arch).machine],)
    for kernel in chosen:
        assert f"\0{kernel.entry}\0".encode() in content


def test_no_kernel_and_two_of_a_name_are_errors(tmp_path: Path) -> None:
    arch = get_arch("x86-64-v3")
    one = kernels(arch)[0]
    for wrong in ([], [one, one]):
        with pytest.raises(InputError, match="different symbols"):
            compile_object(wrong, arch, tmp_path / "kernels.o")
    assert not (tmp_path / "kernels.o").exists()


def test_unknown_arch() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown kernel arch 'x86-64-v5'; did you mean .*x86-64-v4"):
        get_arch("x86-64-v5")


def test_the_package_imports_without_tvm_and_torch() -> None:
    code = "import edgekit.kernels, edgekit.kernels.tvm, sys; sys.exit('tvm' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
