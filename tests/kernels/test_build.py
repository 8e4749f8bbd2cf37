"""Building: what is written, that it can be trusted, and what is said when something is missing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.errors import InputError, MissingDependencyError, UnknownNameError
from edgekit.kernels import build as building
from edgekit.kernels import headers as onnxruntime_headers
from edgekit.kernels.build import KernelBuildError, build, sources_digest
from edgekit.kernels.headers import find_headers
from edgekit.kernels.native import objects
from edgekit.kernels.native.objects import SOURCES, op_objects
from edgekit.kernels.native.table import Entry, table_header
from edgekit.kernels.native.toolchain import find_toolchain, run
from edgekit.kernels.static import object_name, write_static

OPS = ("BlockSparseAttention", "KernelLinearAttention", "SelectiveScan")

pytestmark = pytest.mark.xdist_group("native")


# ---- what is built ----


def test_the_manifest_describes_the_library(this_arch: str, built_library: Any) -> None:
    document = json.loads(built_library.manifest.read_text())
    content = built_library.library.read_bytes()
    assert built_library.manifest.name == "kernels.json"
    assert document["schema"] == 1
    assert document["edgekit"] == edgekit.__version__
    assert document["arch"] == built_library.arch == this_arch
    assert (document["machine"], document["system"]) == (platform.machine(), "linux")
    assert document["library"] == built_library.library.name == "libedgekit_onnxruntime.so"
    assert document["sha256"] == hashlib.sha256(content).hexdigest()
    assert document["ort_api"] == find_headers().api
    assert {"apache-tvm", "apache-tvm-ffi", "cc", "c++"} <= document["tools"].keys()
    assert document["sources"] == sources_digest()
    served = {(kernel["op"], kernel["dtype"]) for kernel in document["kernels"]}
    assert served == {(op, dtype) for op in OPS for dtype in ("float32", "float16")}
    assert document["kernels"] == [entry.to_json() for entry in built_library.kernels]


def test_each_op_and_dtype_ends_with_a_kernel_for_every_call(built_library: Any) -> None:
    last = {(entry.op, entry.dtype): entry for entry in built_library.kernels}
    for entry in last.values():
        assert entry.parameters == (), entry


def test_only_the_interface_is_exported(built_library: Any) -> None:
    """Everything else is hidden: the library can share a process with TVM or a second copy of itself."""
    text = run(["nm", "-D", "--defined-only", str(built_library.library)], "listing symbols")
    exported = {line.split()[-1] for line in text.splitlines()}
    header = (SOURCES / "edgekit_kernels.h").read_text()
    assert "RegisterCustomOps" in exported
    for name in exported - {"RegisterCustomOps"}:
        assert f"{name}(" in header, name
    assert {"edgekit_block_sparse_attention", "edgekit_bsa_kernel", "edgekit_scan_shapes"} <= exported


def test_the_library_needs_only_the_c_and_cxx_runtimes(built_library: Any) -> None:
    text = run(["objdump", "-p", str(built_library.library)], "listing dependencies")
    needed = {line.split()[1].split(".so")[0] for line in text.splitlines() if "NEEDED" in line}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_unchanged_sources_are_not_built_again(built_library: Any) -> None:
    (again,) = build([built_library.arch], built_library.folder.parent)
    assert again.reused
    assert again.kernels == built_library.kernels


def test_the_same_sources_give_the_same_bytes(built_library: Any, tmp_path: Path) -> None:
    (other,) = build([built_library.arch], tmp_path)
    assert not other.reused
    assert other.library.read_bytes() == built_library.library.read_bytes()
    assert other.manifest.read_bytes() == built_library.manifest.read_bytes()
    assert sorted(path.name for path in other.folder.iterdir()) == ["kernels.json", "libedgekit_onnxruntime.so"]


@pytest.mark.parametrize("variable", ["CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS"])
def test_another_command_line_is_built_again(
    built_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    folder = tmp_path / built_library.arch
    shutil.copytree(built_library.folder, folder)
    assert build([built_library.arch], tmp_path)[0].reused
    command = {"CC": "cc ", "CXX": "c++ "}.get(variable, "")
    option = "-Wl,-O1" if variable == "LDFLAGS" else "-DEDGEKIT_TEST='a b'"
    monkeypatch.setenv(variable, command + option)
    (other,) = build([built_library.arch], tmp_path)
    assert not other.reused
    assert build([built_library.arch], tmp_path)[0].reused


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its instructions are those of x86-64")
def test_flags_of_the_user_do_not_break_the_promise_of_an_arch(
    built_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library for AVX2 holds no AVX-512, also with flags for another processor."""
    for variable in ("CFLAGS", "CXXFLAGS"):
        monkeypatch.setenv(variable, "-O3 -march=x86-64-v4 -mprefer-vector-width=512")
    (other,) = build(["x86-64-v3"], tmp_path)
    assert "%zmm" not in run(["objdump", "-d", str(other.library)], "disassembling")


def test_a_damaged_library_is_built_again(built_library: Any, tmp_path: Path) -> None:
    folder = tmp_path / built_library.arch
    shutil.copytree(built_library.folder, folder)
    with (folder / "libedgekit_onnxruntime.so").open("ab") as library:
        library.write(b"x")
    (other,) = build([built_library.arch], tmp_path)
    assert not other.reused
    assert other.library.read_bytes() == built_library.library.read_bytes()


def test_objects_compile_to_the_same_bytes(this_arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = op_objects(this_arch, ["KernelLinearAttention"])[0].path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = op_objects(this_arch, ["KernelLinearAttention"])[0].path
    assert fresh != kept
    assert fresh.read_bytes() == kept.read_bytes()


def test_the_object_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert objects.cache_root() == tmp_path / "cache" / "edgekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert objects.cache_root() == tmp_path / ".cache" / "edgekit"


def test_the_object_cache_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("EDGEKIT_KERNELS", str(tmp_path))
    assert objects.cache_root() == tmp_path / ".cache"
    monkeypatch.delenv("EDGEKIT_KERNELS")
    with pytest.raises(InputError, match="set EDGEKIT_KERNELS to a folder"):
        objects.cache_root()


def test_a_cache_that_cannot_be_written(this_arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot keep compiled kernels in .*set XDG_CACHE_HOME to a folder"):
        op_objects(this_arch)


def test_a_folder_that_cannot_be_written(built_library: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelBuildError, match=r"cannot write kernels to .*set EDGEKIT_KERNELS to a folder"):
        build([built_library.arch], tmp_path / "file")


@pytest.mark.parametrize(
    ("machine", "system", "without", "expected"),
    [
        ("x86_64", "linux", (), "x86-64-v4"),
        ("x86_64", "linux", ("avx512vl",), "x86-64-v3"),
        ("aarch64", "linux", (), "aarch64"),
        ("x86_64", "linux", ("avx2",), None),
        ("x86_64", "darwin", (), None),
        ("riscv64", "linux", (), None),
    ],
    ids=["v4", "v3", "aarch64", "old_x86", "macos", "riscv"],
)
def test_the_best_arch_is_the_most_demanding_that_fits(
    machine: str, system: str, without: tuple[str, ...], expected: str | None
) -> None:
    from edgekit.kernels.tvm.targets import ARCHS, best_arch

    features = {name for arch in ARCHS.values() for name in arch.features} - set(without)
    if expected is not None:
        assert best_arch(machine, system, features).name == expected
        return
    with pytest.raises(InputError, match=rf"--arch: x86-64-v3, .*this machine \({machine} {system}\) is none of them"):
        best_arch(machine, system, features)


def test_arch_names_are_those_of_the_kernels() -> None:
    from edgekit.kernels.tvm.targets import ARCHS

    assert tuple(ARCHS) == building.ARCH_NAMES


# ---- what is missing ----


def test_an_unknown_arch_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean x86-64-v4"):
        build(["x86-64-v5"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_headers_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEKIT_ONNXRUNTIME_INCLUDE", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no pkg-config
    monkeypatch.setattr(onnxruntime_headers, "_FOLDERS", (str(tmp_path / "nowhere"),))
    with pytest.raises(KernelBuildError, match="apt-get install libonnxruntime-dev") as raised:
        find_headers()
    assert "EDGEKIT_ONNXRUNTIME_INCLUDE" in str(raised.value)


def test_a_wrong_headers_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_ONNXRUNTIME_INCLUDE", str(tmp_path))
    with pytest.raises(KernelBuildError, match=f"EDGEKIT_ONNXRUNTIME_INCLUDE is {tmp_path}, which does not hold"):
        find_headers()


def test_old_headers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 14\n")
    (tmp_path / "onnxruntime_cxx_api.h").write_text("")
    monkeypatch.setenv("EDGEKIT_ONNXRUNTIME_INCLUDE", str(tmp_path))
    with pytest.raises(KernelBuildError, match=r"API 20 .* or newer, got API 14"):
        find_headers()


def test_headers_are_found_through_pkg_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 23\n")
    (tmp_path / "onnxruntime_cxx_api.h").write_text("")
    script = tmp_path / "pkg-config"
    script.write_text(f'#!/bin/sh\ntest "$2" = libonnxruntime && echo "-I/nowhere -I{tmp_path}"\n')
    script.chmod(0o755)
    monkeypatch.delenv("EDGEKIT_ONNXRUNTIME_INCLUDE", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_headers() == onnxruntime_headers.Headers(tmp_path, 23)


def test_a_missing_cross_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX_riscv64", "no-such-compiler -O2")
    monkeypatch.setenv("CC_riscv64", "cc")
    with pytest.raises(
        KernelBuildError, match=r"'no-such-compiler' is not there.*g\+\+-riscv64-linux-gnu.*CXX_riscv64"
    ):
        find_toolchain("riscv64")


def test_the_environment_chooses_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -m64")
    monkeypatch.setenv("CC", "gcc")
    assert find_toolchain(platform.machine()).cxx == ("g++", "-m64")
    monkeypatch.setenv(f"CXX_{platform.machine()}", "c++")
    assert find_toolchain(platform.machine()).cxx == ("c++",)


def test_flags_of_this_machine_do_not_reach_a_cross_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for language, compiler in (("CC", "cc"), ("CXX", "c++")):
        monkeypatch.setenv(f"{language}_riscv64", compiler)
    for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.setenv(name, "-march=native")
    tools = find_toolchain("riscv64")
    assert (tools.cflags, tools.cxxflags, tools.ldflags) == ((), (), ())
    monkeypatch.setenv("CFLAGS_riscv64", "-march=rv64gc -DNAME='two words'")
    assert find_toolchain("riscv64").cflags == ("-march=rv64gc", "-DNAME=two words")
    assert find_toolchain(platform.machine()).cxxflags == ("-march=native",)
    monkeypatch.setenv("CFLAGS", "'")
    with pytest.raises(KernelBuildError, match=r'CFLAGS is "\'", which is no list of words: No closing quotation'):
        find_toolchain(platform.machine())


def test_a_missing_tvm_names_the_extra(this_arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise objects.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(objects.metadata, "version", missing)
    with pytest.raises(MissingDependencyError, match=r"edgekit\[tvm\]"):
        build([this_arch], tmp_path)


def test_a_failing_compiler_leaves_what_was_there(
    built_library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / built_library.arch
    shutil.copytree(built_library.folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setenv("CFLAGS", "-include no_such_header.h")
    with pytest.raises(KernelBuildError, match=r"compiling the C layer failed with exit code 1(.|\n)*error"):
        build([built_library.arch], tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---- the table ----


def test_the_table_knows_what_kernels_are_made_for() -> None:
    text = table_header(
        [
            Entry("BlockSparseAttention", "float32", "fast", (("head_dim", 64), ("block_q", 32))),
            Entry("BlockSparseAttention", "float32", "slow", ()),
            Entry("SelectiveScan", "float16", "every", ()),
        ]
    )
    assert text.index('"fast"') < text.index('"slow"') < text.index('"every"')
    assert "2, {{EK_HEAD_DIM, INT64_C(64)}, {EK_BLOCK_Q, INT64_C(32)}}" in text
    with pytest.raises(UnknownNameError, match="state"):
        table_header([Entry("BlockSparseAttention", "float32", "x", (("state", 1),))])
    with pytest.raises(UnknownNameError, match="kernel dtype"):
        table_header([Entry("SelectiveScan", "float64", "x", ())])


# ---- static objects ----

PROGRAM = """
#include <stdio.h>
#include <string.h>
#include "edgekit_kernels.h"
int main(void) {
  float q[6] = {1, 2, 3, 4, 5, 6}, out[6];
  int32_t index[1] = {0};
  char error[200];
  edgekit_kla_args linear = {EDGEKIT_FLOAT32, q, q, q, out, 1, 1, 3, 2, 2, EDGEKIT_RELU, 0.0F};
  if (edgekit_kernel_linear_attention(&linear, NULL, error, sizeof error) != EDGEKIT_OK) return puts(error), 1;
  for (int i = 0; i < 6; i++) printf("%.6g ", out[i]);
  edgekit_bsa_args sparse = {0};
  sparse.q = sparse.k = sparse.v = q, sparse.block_index = index, sparse.out = out;
  sparse.batch = sparse.q_heads = sparse.kv_heads = sparse.index_heads = sparse.blocks_per_row = 1;
  sparse.q_length = sparse.kv_length = sparse.block_q = sparse.block_k = 3;
  sparse.head_dim = 2, sparse.causal = 1, sparse.scale = 1.0F;
  if (edgekit_block_sparse_attention(&sparse, NULL, error, sizeof error) != EDGEKIT_OK) return puts(error), 1;
  printf("%.6g %.6g ", out[0], out[1]);
  edgekit_scan_args scan = {EDGEKIT_FLOAT32, q, q, q, q, q, q, NULL, out, 1, 1, 3, 1, 0};
  if (edgekit_selective_scan(&scan, NULL, error, sizeof error) != EDGEKIT_OK) return puts(error), 1;
  printf("%.6g %s\\n", out[0], edgekit_scan_kernel(&scan));
  sparse.scale = 0;
  return edgekit_block_sparse_attention(&sparse, NULL, error, 24) != EDGEKIT_INVALID || strlen(error) != 23;
}
"""


@pytest.mark.parametrize("arch", ["host", "aarch64"])
def test_a_c_program_links_without_python_or_tvm(
    request: pytest.FixtureRequest, this_arch: str, tmp_path: Path, arch: str
) -> None:
    """The command of the header's first lines, on this machine and, under qemu, for aarch64."""
    emulator: list[str] = []
    if arch == "aarch64":
        request.getfixturevalue("aarch64_tools")
        emulator = ["qemu-aarch64"]
    written = write_static(OPS, this_arch if arch == "host" else arch, tmp_path)
    names = {path.name for path in written}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert {"edgekit_kernels.h", "edgekit_kernels.c", "edgekit_kernels_table.h", *map(object_name, OPS)} <= names
    (tmp_path / "app.c").write_text(PROGRAM)
    tools = find_toolchain("aarch64" if arch == "aarch64" else platform.machine())
    command = [
        *tools.cc,
        "-static",
        "-Wall",
        "-Wextra",
        "-Werror",
        "app.c",
        "edgekit_kernels.c",
        *map(object_name, OPS),
    ]
    run([*command, "-lm", "-o", "app"], "building the program", tmp_path)
    done = subprocess.run([*emulator, str(tmp_path / "app")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    *numbers, kernel = done.stdout.split()
    # The first causal row of the attention sees itself alone; the first step of the scan is 1 * 1 * 1 * 1 + 1 * 1.
    expected = [*_linear_attention(), 1, 2, 2]
    assert [float(number) for number in numbers] == pytest.approx(expected, rel=1e-5)
    assert kernel.startswith("edgekit_scan_f32")


def _linear_attention() -> list[float]:
    rows = [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
    out = []
    for q in rows:
        weights = [q[0] * k[0] + q[1] * k[1] for k in rows]
        out += [sum(w * v[e] for w, v in zip(weights, rows, strict=True)) / sum(weights) for e in range(2)]
    return out


def test_ops_that_were_left_out_say_so(this_arch: str, tmp_path: Path) -> None:
    written = write_static(["SelectiveScan"], this_arch, tmp_path)
    assert [path.name for path in written if path.suffix == ".o"] == ["edgekit_selective_scan.o"]
    (tmp_path / "app.c").write_text(PROGRAM)
    tools = find_toolchain(platform.machine())
    run([*tools.cc, "app.c", "edgekit_kernels.c", "edgekit_selective_scan.o", "-lm", "-o", "app"], "building", tmp_path)
    done = subprocess.run([str(tmp_path / "app")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "KernelLinearAttention: no kernel for float32 was compiled into this library" in done.stdout


def test_static_refuses_unknown_names(this_arch: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="SelectiveScan"):
        write_static(["SelectivScan"], this_arch, tmp_path)
    with pytest.raises(UnknownNameError, match="aarch64"):
        write_static(OPS, "aarch46", tmp_path)


# ---- the C sources ----

LAYOUTS = """
#include <stddef.h>
#include <tvm/ffi/c_api.h>
#define K(x)
#include "edgekit_kernels_tvm.h"
#define SAME(a, b, what) _Static_assert((a) == (b), what)
SAME(sizeof(ek_any), sizeof(TVMFFIAny), "any");
SAME(offsetof(ek_any, type), offsetof(TVMFFIAny, type_index), "type");
SAME(offsetof(ek_any, value), offsetof(TVMFFIAny, v_int64), "value");
SAME(offsetof(ek_any, value), offsetof(TVMFFIAny, v_float64), "value");
SAME(offsetof(ek_any, value), offsetof(TVMFFIAny, v_ptr), "value");
SAME(EK_ANY_INT, kTVMFFIInt, "int");
SAME(EK_ANY_FLOAT, kTVMFFIFloat, "float");
SAME(EK_ANY_TENSOR, kTVMFFIDLTensorPtr, "tensor");
SAME(sizeof(ek_dltensor), sizeof(DLTensor), "tensor");
SAME(offsetof(ek_dltensor, data), offsetof(DLTensor, data), "data");
SAME(offsetof(ek_dltensor, device.type), offsetof(DLTensor, device.device_type), "device");
SAME(offsetof(ek_dltensor, device.id), offsetof(DLTensor, device.device_id), "device");
SAME(offsetof(ek_dltensor, ndim), offsetof(DLTensor, ndim), "ndim");
SAME(offsetof(ek_dltensor, dtype.code), offsetof(DLTensor, dtype.code), "dtype");
SAME(offsetof(ek_dltensor, dtype.bits), offsetof(DLTensor, dtype.bits), "dtype");
SAME(offsetof(ek_dltensor, dtype.lanes), offsetof(DLTensor, dtype.lanes), "dtype");
SAME(offsetof(ek_dltensor, shape), offsetof(DLTensor, shape), "shape");
SAME(offsetof(ek_dltensor, strides), offsetof(DLTensor, strides), "strides");
SAME(offsetof(ek_dltensor, byte_offset), offsetof(DLTensor, byte_offset), "offset");
SAME(EK_DL_CPU, kDLCPU, "cpu");
SAME(EK_DL_INT, kDLInt, "int");
SAME(EK_DL_FLOAT, kDLFloat, "float");
"""

BACKEND = """
#include <cstddef>
#include <tvm/runtime/c_backend_api.h>
struct Env { void* sync_handle; int32_t num_task; };
static_assert(sizeof(Env) == sizeof(TVMParallelGroupEnv), "env");
static_assert(offsetof(Env, num_task) == offsetof(TVMParallelGroupEnv, num_task), "num_task");
static_assert(sizeof(FTVMParallelLambda) == sizeof(int (*)(int, Env*, void*)), "lambda");
int (*launch)(FTVMParallelLambda, void*, int) = TVMBackendParallelLaunch;
void* (*alloc)(int, int, uint64_t, int, int) = TVMBackendAllocWorkspace;
int (*release)(int, int, void*) = TVMBackendFreeWorkspace;
"""


def test_the_declared_layouts_are_those_of_tvm(tmp_path: Path) -> None:
    """What `edgekit_kernels_tvm.h` declares in its own words, against the installed headers."""
    from importlib.util import find_spec

    roots = [Path(str(spec.origin)).parent for name in ("tvm_ffi", "tvm") if (spec := find_spec(name))]
    include = [f"-I{root / 'include'}" for root in roots] + [f"-I{SOURCES}"]
    (tmp_path / "layouts.c").write_text(LAYOUTS)
    (tmp_path / "backend.cc").write_text(BACKEND)
    tools = find_toolchain(platform.machine())
    run([*tools.cc, "-std=c11", "-fsyntax-only", *include, "layouts.c"], "comparing layouts", tmp_path)
    run([*tools.cxx, "-std=c++17", "-fsyntax-only", *include, "backend.cc"], "comparing functions", tmp_path)


def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    entries = [Entry(op, "float32", f"k{i}", ()) for i, op in enumerate(OPS)]
    (tmp_path / "edgekit_kernels_table.h").write_text(table_header(entries))
    tools = find_toolchain(platform.machine())
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror", "-I", str(tmp_path)]
    source = str(SOURCES / "edgekit_kernels.c")
    run([*tools.cc, "-std=c11", "-O2", *strict, "-c", source, "-o", str(tmp_path / "c.o")], "compiling strictly")
    (tmp_path / "use.cc").write_text('#include "edgekit_kernels.h"\nint main() { return edgekit_kernels_abi() - 1; }\n')
    run([*tools.cxx, "-std=c++17", *strict, "-I", str(SOURCES), "-fsyntax-only", "use.cc"], "using C++", tmp_path)
