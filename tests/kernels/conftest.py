"""The native kernels under test: libraries built once for all processes, and a worker process that runs cases.

A kernel that reads out of bounds must fail a test, not end pytest: cases run in `native_driver.c`, which puts every
tensor between pages that cannot be touched.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.kernels.build import BuiltLibrary, build
from edgekit.kernels.native.objects import SOURCES, digest, op_objects
from edgekit.kernels.native.toolchain import KernelBuildError, find_toolchain, run
from edgekit.kernels.static import write_static

OPS = ("BlockSparseAttention", "KernelLinearAttention", "SelectiveScan")
DTYPES = ("float32", "float16")
DRIVER = Path(__file__).parent / "native_driver.c"
BUILD = Path(__file__).parents[2] / "build" / "kernels-under-test"

Array = np.ndarray[Any, Any]


@dataclass
class Case:
    """One call of a kernel through the C interface; field by field what `native_driver.c` reads."""

    op: str
    tensors: Sequence[Array | None]
    """Inputs in order; None is a NULL pointer."""
    ints: Sequence[int]
    floats: Sequence[float]
    shape: Sequence[int]
    """Of the output."""
    dtype: str = "float32"
    dtype_code: int | None = None
    """Overrides the enumerator of `dtype`."""
    threads: int = 0
    """0 passes no threads: everything runs on the caller's."""
    placement: int = 0
    """Bytes between each tensor's end and the page that cannot be touched; -1: it begins right behind such a page."""
    fail_allocation: int = 0
    """The n-th scratch allocation of the call fails (where the driver brings the allocator)."""
    null_output: bool = False

    def encode(self) -> bytes:
        out_bytes = -1 if self.null_output else int(np.prod([max(n, 0) for n in self.shape])) * self._item
        code = DTYPES.index(self.dtype) if self.dtype_code is None else self.dtype_code
        head = (OPS.index(self.op), code, self.threads, self.placement, self.fail_allocation)
        counts = (len(self.ints), len(self.floats), len(self.tensors), out_bytes)
        parts = [struct.pack("<9q", *head, *counts), struct.pack(f"<{len(self.ints)}q", *self.ints)]
        parts.append(struct.pack(f"<{len(self.floats)}d", *self.floats))
        for tensor in self.tensors:
            data = None if tensor is None else np.ascontiguousarray(tensor).tobytes()
            parts.append(struct.pack("<q", -1) if data is None else struct.pack("<q", len(data)) + data)
        return b"".join(parts)

    @property
    def _item(self) -> int:
        return 2 if self.dtype == "float16" else 4


@dataclass
class Answer:
    """What the kernel returned."""

    code: int
    message: str
    output: Array = field(repr=False)


class Driver:
    """A worker process that runs cases one after the other. A crash is an AssertionError in the test that caused it."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._command, self._environment = list(command), {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, case: Case) -> Answer:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        out_bytes = 0 if case.null_output else int(np.prod([max(n, 0) for n in case.shape])) * case._item
        size = 8 + 512 + out_bytes
        try:
            self._process.stdin.write(case.encode())
            self._process.stdin.flush()
            data = self._process.stdout.read(size)
        except BrokenPipeError:
            data = b""
        if len(data) != size:
            self._process.kill()
            status = self._process.wait()
            self.close()
            raise AssertionError(f"the kernel's process ended with status {status} on {_describe(case)}")
        dtype = np.float16 if case.dtype == "float16" else np.float32
        output = np.frombuffer(data[520:], dtype).reshape([0] if case.null_output else [max(n, 0) for n in case.shape])
        message = data[8:520].split(b"\0", 1)[0].decode()
        return Answer(struct.unpack("<q", data[:8])[0], message, output)

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()
            self._process.wait(timeout=60)
            self._process = None


def _describe(case: Case) -> str:
    shapes = [None if tensor is None else tensor.shape for tensor in case.tensors]
    return f"{case.op} {case.dtype} {shapes} ints={list(case.ints)} floats={list(case.floats)} at {case.placement}"


@contextmanager
def exclusively() -> Iterator[None]:
    """One process at a time builds; the others then find what it built."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_driver(
    name: str, arch: str, *flags: str, library: BuiltLibrary | None = None, objects: Sequence[Path] = ()
) -> Path:
    """The driver as an executable for `arch`: with the shared `library`, with `objects`, or with the static objects."""
    try:
        tools = find_toolchain("aarch64" if arch == "aarch64" else platform.machine())
    except KernelBuildError as error:
        missing_tool(str(error))
    with exclusively():
        static = [] if library else objects or [item.path for item in op_objects(arch)]
        sources = [DRIVER, *SOURCES.glob("*.[ch]"), SOURCES / "table.py"]
        key = digest(sources, arch, *flags, *map(str, static), str(library and library.manifest.read_text()))
        executable = BUILD / f"{name}-{arch}-{key[:16]}"
        if executable.is_file():
            return executable
        folder = BUILD / f"{name}-{arch}"
        shutil.rmtree(folder, ignore_errors=True)
        for old in BUILD.glob(f"{name}-{arch}-*"):
            old.unlink()
        command = [*tools.cc, "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", *flags, str(DRIVER)]
        if library:
            command += ["-I", str(SOURCES), str(library.library), f"-Wl,-rpath,{library.folder}"]
        else:
            write_static(OPS, arch, folder)
            command += ["-DEDGEKIT_CUSTOM_ALLOCATOR", "-I", str(folder), str(folder / "edgekit_kernels.c")]
            command += sorted(map(str, objects or folder.glob("*.o")))
        run([*command, "-o", str(executable), "-lm", "-lpthread"], f"building {name}")
        return executable


def missing_tool(reason: str) -> NoReturn:
    """Skip; where the environment says that all tools are there (in CI), fail instead."""
    if os.environ.get("EDGEKIT_TESTS_HAVE_TOOLS"):
        pytest.fail(reason)
    pytest.skip(reason)


def built(arch: str) -> BuiltLibrary:
    """`libedgekit_onnxruntime.so` for `arch`, of the sources as they are."""
    try:
        with exclusively():
            return build([arch], BUILD)[0]
    except EdgekitError as error:
        if "headers are not installed" in str(error):
            missing_tool("onnxruntime's C++ headers are missing; .ci/onnxruntime-headers gets them")
        if "needs a compiler" in str(error):
            missing_tool(str(error))
        raise


@pytest.fixture(scope="session")
def built_library(this_arch: str) -> BuiltLibrary:
    """The library for this machine."""
    return built(this_arch)


@pytest.fixture(scope="session")
def shared_driver(built_library: BuiltLibrary) -> Iterator[Driver]:
    """Runs cases through the shipped library."""
    driver = Driver([str(build_driver("shared", built_library.arch, library=built_library))])
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def static_driver(this_arch: str) -> Iterator[Driver]:
    """Runs cases through the statically linked kernels, whose scratch memory is poisoned and guarded."""
    driver = Driver([str(build_driver("static", this_arch))])
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def x86_64_v3_driver(this_arch: str) -> Iterator[Driver]:
    """The static driver with the kernels of the lower x86-64 level."""
    if this_arch != "x86-64-v4":
        pytest.skip("this CPU runs one arch of the kernels only")
    driver = Driver([str(build_driver("static", "x86-64-v3"))])
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def aarch64_tools() -> None:
    """Skips where aarch64 programs cannot be built or run."""
    needs_aarch64()


def needs_aarch64() -> None:
    for tool in ("qemu-aarch64", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++"):
        if shutil.which(tool) is None:
            missing_tool(f"{tool} is not installed (Debian: qemu-user and g++-aarch64-linux-gnu)")


@pytest.fixture(scope="session")
def aarch64_library_driver() -> Iterator[Driver]:
    """Runs cases through the cross-built `libedgekit_onnxruntime.so` under qemu-user."""
    needs_aarch64()
    executable = build_driver("shared", "aarch64", library=built("aarch64"))
    driver = Driver(["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", str(executable)])
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def aarch64_driver() -> Iterator[Driver]:
    """Runs cases through the aarch64 kernels, linked statically, under qemu-user."""
    needs_aarch64()
    driver = Driver(["qemu-aarch64", str(build_driver("static", "aarch64", "-static"))])
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def sanitized_driver(this_arch: str) -> Iterator[Driver]:
    """The static driver with its C code under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    options = {"ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    try:
        executable = build_driver("sanitized", this_arch, *flags)
    except KernelBuildError as error:
        if "asan" not in str(error) and "ubsan" not in str(error):
            raise
        missing_tool(f"the compiler has no sanitizers: {error}")
    driver = Driver([str(executable)], options)
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def sanitized_kernels_driver(this_arch: str) -> Iterator[Driver]:
    """As `sanitized_driver`, with the kernels instrumented too: TVM's IR through the clang that $EDGEKIT_CLANG names.

    It must be of the LLVM version that TVM has (22 for TVM 0.27), for example "python -m ziglang clang".
    """
    clang = shlex.split(os.environ.get("EDGEKIT_CLANG", ""))
    if not clang:
        pytest.skip("EDGEKIT_CLANG is not set to a clang of TVM's LLVM version")
    try:
        run([*clang, "--version"], "asking clang for its version")
    except KernelBuildError as error:
        missing_tool(f"EDGEKIT_CLANG is set to no compiler: {error}")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-DKERNELS_TOO")
    with exclusively():
        objects = [_instrumented(op, this_arch, clang) for op in OPS]
    driver = Driver(
        [str(build_driver("instrumented", this_arch, *flags, objects=objects))], {"ASAN_OPTIONS": "abort_on_error=1"}
    )
    yield driver
    driver.close()


def _instrumented(op: str, arch_name: str, clang: Sequence[str]) -> Path:
    """The kernels of `op` compiled from TVM's LLVM IR with AddressSanitizer's checks in every function of theirs."""
    import tvm

    from edgekit.kernels.tvm import catalog
    from edgekit.kernels.tvm.compat import merge
    from edgekit.kernels.tvm.targets import get_arch

    arch = get_arch(arch_name)
    source, target = BUILD / f"{op}-asan.ll", BUILD / f"{op}-asan.o"
    module = merge(kernel.module(arch) for kernel in catalog.kernels(arch) if kernel.op == op)
    text = tvm.compile(module, target=arch.target).mod.inspect_source("ll")
    # A pass instruments only functions with the attribute; TVM's own have the group with the target's CPU.
    marked = re.sub(r'^(attributes #\d+ = \{)(?=.*"target-cpu")', r"\1 sanitize_address", text, flags=re.MULTILINE)
    assert marked.count("sanitize_address") > 0
    source.write_text(marked)
    command = [*clang, f"--target={arch.triple}", f"-march={arch.mcpu}", "-c", "-x", "ir", "-O1", "-fsanitize=address"]
    run([*command, str(source), "-o", str(target)], f"instrumenting {op}")
    assert "__asan_report_load" in run(["nm", str(target)], "listing symbols")
    return target


# ---- cases from arrays ----


def bsa_case(
    q: Array,
    k: Array,
    v: Array,
    block_index: Array,
    *,
    block_q: int,
    block_k: int,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    **how: Any,
) -> Case:
    """A case of BlockSparseAttention; arguments as those of the reference, `how` as the other fields of `Case`."""
    sizes = (q.shape[0], q.shape[1], k.shape[1], block_index.shape[1], q.shape[2], k.shape[2], q.shape[3])
    ints = (*sizes, block_index.shape[3], block_q, block_k, int(causal), window)
    floats = (q.shape[3] ** -0.5 if scale is None else scale, softcap)
    return Case("BlockSparseAttention", [q, k, v, block_index], ints, floats, q.shape, str(q.dtype), **how)


def kla_case(q: Array, k: Array, v: Array, *, feature_map: str = "relu", eps: float = 1e-6, **how: Any) -> Case:
    """A case of KernelLinearAttention."""
    ints = (*q.shape, v.shape[3], ("relu", "elu1", "identity").index(feature_map))
    return Case("KernelLinearAttention", [q, k, v], ints, [eps], (*q.shape[:3], v.shape[3]), str(q.dtype), **how)


def scan_case(*tensors: Array | None, delta_softplus: bool = False, **how: Any) -> Case:
    """A case of SelectiveScan: u, delta, A, B, C, D and z (None for no gate)."""
    u, a = tensors[0], tensors[2]
    assert u is not None
    assert a is not None
    ints = (*u.shape, a.shape[1], int(delta_softplus))
    return Case("SelectiveScan", tensors, ints, [], u.shape, str(u.dtype), **how)


@pytest.fixture(scope="session")
def make_case() -> dict[str, Callable[..., Case]]:
    """The makers of cases by op."""
    return {"BlockSparseAttention": bsa_case, "KernelLinearAttention": kla_case, "SelectiveScan": scan_case}


@pytest.fixture(scope="session")
def op_reference() -> Callable[[str, Sequence[Array | None], dict[str, Any]], Array]:
    """`reference(op, arrays, options)`: the answer in float64."""
    return reference


def random_index(generator: np.random.Generator, shape: Sequence[int], blocks: int) -> Array:
    """int32 block indices in any order, some repeated, some -1."""
    return generator.integers(-1, blocks, shape, dtype=np.int32)


# ---- the cases on which every way to run the kernels must agree with the references ----


@dataclass(frozen=True)
class Parity:
    """A named call with random inputs; `make()` gives it with the reference's answer in float64."""

    name: str
    op: str
    dtype: str
    sizes: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def make(self, **how: Any) -> tuple[Case, Array]:
        generator = np.random.default_rng(len(self.name) + sum(self.sizes))
        options = dict(self.options)
        arrays = {
            "BlockSparseAttention": _bsa_inputs,
            "KernelLinearAttention": _kla_inputs,
            "SelectiveScan": _scan_inputs,
        }[self.op](generator, self.sizes, self.dtype, options)
        makers = {"BlockSparseAttention": bsa_case, "KernelLinearAttention": kla_case, "SelectiveScan": scan_case}
        return makers[self.op](*arrays, **options, **how), reference(self.op, arrays, options)


def reference(op: str, arrays: Sequence[Array | None], options: dict[str, Any]) -> Array:
    """The op's PyTorch reference in float64 on the inputs as they are."""
    import torch

    from edgekit.custom_ops.block_sparse_attention.reference import block_sparse_attention
    from edgekit.custom_ops.kernel_linear_attention.reference import kernel_linear_attention
    from edgekit.custom_ops.selective_scan.reference import selective_scan

    function: Callable[..., Any] = {
        "BlockSparseAttention": block_sparse_attention,
        "KernelLinearAttention": kernel_linear_attention,
        "SelectiveScan": selective_scan,
    }[op]
    wide = [a if a is None or a.dtype == np.int32 else a.astype(np.float64) for a in arrays]
    result: Array = function(*(None if a is None else torch.from_numpy(a) for a in wide), **options).numpy()
    return result


def _normal(generator: np.random.Generator, dtype: str, *shape: int) -> Array:
    return generator.standard_normal(shape).astype(dtype)


def _bsa_inputs(
    generator: np.random.Generator, sizes: tuple[int, ...], dtype: str, options: dict[str, Any]
) -> list[Array | None]:
    batch, heads, kv_heads, index_heads, queries, keys, dim, listed = sizes
    rows, blocks = -(-queries // options["block_q"]), -(-keys // options["block_k"])
    q = _normal(generator, dtype, batch, heads, queries, dim)
    k, v = (_normal(generator, dtype, batch, kv_heads, keys, dim) for _ in range(2))
    return [q, k, v, random_index(generator, (batch, index_heads, rows, listed), blocks)]


def _kla_inputs(
    generator: np.random.Generator, sizes: tuple[int, ...], dtype: str, options: dict[str, Any]
) -> list[Array | None]:
    batch, heads, length, dim, value_dim = sizes
    q, k = (_normal(generator, dtype, batch, heads, length, dim) for _ in range(2))
    if options["feature_map"] == "identity":  # a denominator of both signs would come near 0
        q, k = abs(q), abs(k)
    return [q, k, _normal(generator, dtype, batch, heads, length, value_dim)]


def _scan_inputs(
    generator: np.random.Generator, sizes: tuple[int, ...], dtype: str, options: dict[str, Any]
) -> list[Array | None]:
    batch, channels, length, state = sizes
    u = _normal(generator, dtype, batch, channels, length)
    delta = (generator.random((batch, channels, length)) * 0.5).astype(dtype)
    a = -np.exp(generator.standard_normal((channels, state))).astype(dtype)
    b, c = (_normal(generator, dtype, batch, state, length) for _ in range(2))
    gate = _normal(generator, dtype, batch, channels, length) if options.pop("gate") else None
    return [u, delta, a, b, c, _normal(generator, dtype, channels), gate]


def _parities() -> list[Parity]:
    found: list[Parity] = []

    def add(op: str, name: str, *sizes: int, dtypes: Sequence[str] = DTYPES, **options: Any) -> None:
        short = {"BlockSparseAttention": "bsa", "KernelLinearAttention": "kla", "SelectiveScan": "scan"}[op]
        for dtype in dtypes:
            found.append(Parity(f"{short}-{name}-{dtype}", op, dtype, sizes, tuple(options.items())))

    def bsa(name: str, *sizes: int, **options: Any) -> None:  # batch Hq Hkv Hm N M D K
        add("BlockSparseAttention", name, *sizes, **{"block_q": 64, "block_k": 64, **options})

    bsa("single", 1, 1, 1, 1, 1, 1, 1, 1)
    bsa("ragged_n63_d60", 1, 2, 2, 2, 63, 63, 60, 1)
    bsa("tail_of_one_n65", 1, 2, 1, 1, 65, 65, 64, 3)
    bsa("block_64_d64", 1, 2, 1, 2, 200, 200, 64, 4)
    bsa("grouped_heads_index_per_kv", 2, 6, 2, 2, 97, 131, 32, 3, block_q=16, block_k=32)
    bsa("not_causal_d128", 1, 2, 2, 1, 130, 130, 128, 2, causal=False)
    bsa("window_17", 1, 2, 2, 1, 150, 150, 64, 3, window=17)
    bsa("window_5_not_causal", 1, 1, 1, 1, 70, 90, 17, 9, block_q=7, block_k=5, window=5, causal=False)
    bsa("window_beyond_everything", 1, 1, 1, 1, 70, 90, 16, 2, window=2**40)
    bsa("softcap", 1, 2, 2, 2, 100, 100, 64, 2, softcap=3.0, scale=0.5)
    bsa("scale_negative", 1, 1, 1, 1, 66, 66, 64, 2, scale=-0.3)
    bsa("blocks_of_one", 1, 1, 1, 1, 9, 11, 8, 6, block_q=1, block_k=1)
    bsa("blocks_longer_than_all", 1, 2, 1, 1, 33, 37, 24, 2, block_q=2**40, block_k=2**50)
    bsa("block_128_by_48", 1, 1, 1, 1, 300, 300, 40, 3, block_q=128, block_k=48)
    bsa("one_query", 2, 4, 2, 4, 1, 193, 64, 2)
    bsa("d256", 1, 1, 1, 1, 65, 65, 256, 1)

    def kla(name: str, *sizes: int, **options: Any) -> None:  # batch heads N D E
        add("KernelLinearAttention", name, *sizes, **{"feature_map": "relu", **options})

    kla("single", 1, 1, 1, 1, 1)
    kla("n63_d60_e17", 2, 3, 63, 60, 17)
    kla("n196_d64", 1, 2, 196, 64, 64)
    kla("n1025_d64", 1, 2, 1025, 64, 64)
    kla("n257_d128_e32_elu1", 1, 2, 257, 128, 32, feature_map="elu1")
    kla("n100_d31_e33_identity", 1, 1, 100, 31, 33, feature_map="identity", eps=0.0)
    kla("n70_d256_e256", 1, 1, 70, 256, 256)
    kla("n65_d16_elu1_without_eps", 1, 2, 65, 16, 16, feature_map="elu1", eps=0.0)
    kla("n65_smallest_eps", 1, 2, 65, 20, 12, eps=2.0**-126)
    kla("d16_e1", 3, 1, 40, 16, 1, eps=0.5)

    def scan(name: str, *sizes: int, **options: Any) -> None:  # batch C L S
        add("SelectiveScan", name, *sizes, **{"gate": False, "delta_softplus": False, **options})

    scan("single", 1, 1, 1, 1)
    scan("l63_s16_gate_softplus", 2, 3, 63, 16, gate=True, delta_softplus=True)
    scan("c17_l100_s5", 1, 17, 100, 5)
    scan("c192_l65_s16", 1, 192, 65, 16, delta_softplus=True)
    scan("c33_l257_s16_gate", 2, 33, 257, 16, gate=True)
    scan("s64", 1, 4, 33, 64)
    scan("s1", 1, 40, 50, 1, gate=True)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with an argument `parity` run once per case."""
    if "parity" in metafunc.fixturenames:
        metafunc.parametrize("parity", _parities(), ids=lambda parity: parity.name)
