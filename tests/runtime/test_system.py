from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgekit.runtime import system
from edgekit.runtime.system import Limits

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files with the given contents under `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


X86 = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx2 fma avx512_vnni\n\nprocessor\t: 1\n",
    "proc/meminfo": "MemTotal:       16384000 kB\nMemFree: 1 kB\n",
    "sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0-1\n",
    "sys/devices/system/cpu/cpu1/topology/thread_siblings_list": "0-1\n",
    "sys/devices/system/cpu/cpu2/topology/thread_siblings_list": "2-3\n",
    "sys/devices/system/cpu/cpu3/topology/thread_siblings_list": "2-3\n",
}


def test_x86_machine(tmp_path: Path) -> None:
    machine = system.linux_machine(write(tmp_path, X86))
    assert machine.cpu == "Fast 9000"
    assert machine.cores_physical == 2
    assert machine.features == ("avx2", "avx512_vnni", "fma")
    assert machine.memory_bytes == 16_384_000 * 1024


def test_arm_board_without_a_processor_name(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimdhp asimddp i8mm\nCPU part : 0xd42\n",
        "proc/device-tree/model": "Small Board 5\0",
    }
    machine = system.linux_machine(write(tmp_path, files))
    assert machine.cpu == "Small Board 5"
    assert machine.features == ("dotprod", "fp16", "i8mm", "neon")
    assert machine.cores_physical is None


def test_system_that_tells_nothing(tmp_path: Path) -> None:
    machine = system.linux_machine(tmp_path)
    assert machine.cpu
    assert (machine.features, machine.memory_bytes, machine.cores_physical) == ((), None, None)


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, Limits(None, None)),
        (
            {
                "proc/self/cgroup": "0::/app/inner\n",
                "sys/fs/cgroup/app/memory.max": "536870912\n",
                "sys/fs/cgroup/app/inner/memory.max": "max\n",
                "sys/fs/cgroup/app/inner/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/app/cpu.max": "max 100000\n",
            },
            Limits(512 * MIB, 1.5),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "268435456\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            Limits(256 * MIB, 2.0),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n1:cpu:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            Limits(None, None),
        ),
        ({"proc/self/cgroup": "nonsense\n"}, Limits(None, None)),
    ],
    ids=["no-cgroup", "v2", "v1-container", "v1-unlimited", "damaged"],
)
def test_cgroup_limits(tmp_path: Path, files: dict[str, str], limits: Limits) -> None:
    assert system.cgroup_limits(write(tmp_path, files)) == limits


def test_limits_bound_the_machine(tmp_path: Path) -> None:
    files = {
        **X86,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(64 * MIB),
        "sys/fs/cgroup/cpu.max": "50000 100000",
    }
    machine = system.linux_machine(write(tmp_path, files))
    assert machine.memory_bytes == 64 * MIB
    assert machine.cores_usable == 1


def test_macos_features_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "hw.physicalcpu: 8\nhw.memsize: 17179869184\nmachdep.cpu.brand_string: Apple M9\n"
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.AdvSIMD: 1\n"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(system, "_sysctl", lambda: system._fields(output))
    machine = system.this_machine()
    assert (machine.cpu, machine.cores_physical, machine.memory_bytes) == ("Apple M9", 8, 2**34)
    assert machine.features == ("dotprod", "neon")


def test_windows_tells_little_but_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(os, "getloadavg", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    machine = system.this_machine()
    assert machine.cores_usable == os.cpu_count()
    assert machine.memory_bytes is None
    assert system.load_average() is None


MEMINFO = "MemTotal: 8000000 kB\nMemFree: 1000 kB\nMemAvailable: 4000000 kB\n"
AVAILABLE = 4_000_000 * 1024


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, AVAILABLE),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/box/app\n",
                "sys/fs/cgroup/box/app/memory.max": "max\n",
                "sys/fs/cgroup/box/app/memory.current": "700000\n",
                "sys/fs/cgroup/box/memory.max": "1000000\n",
                "sys/fs/cgroup/box/memory.current": "900000\n",
                "sys/fs/cgroup/box/memory.stat": "active_file 5\ninactive_file 50000\n",
            },
            150_000,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/app\n",
                "sys/fs/cgroup/memory/app/memory.limit_in_bytes": "1000000\n",
                "sys/fs/cgroup/memory/app/memory.usage_in_bytes": "1100000\n",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/app\n",
                "sys/fs/cgroup/memory/app/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/app/memory.usage_in_bytes": "1100000\n",
            },
            AVAILABLE,
        ),
    ],
    ids=["nothing told", "no limit", "a parent's limit, version 2", "used up, version 1", "no limit, version 1"],
)
def test_free_memory(tmp_path: Path, files: dict[str, str], free: int | None) -> None:
    assert system.free_memory_bytes(write(tmp_path, files)) == free


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the size of the address space")
def test_the_limit_of_the_address_space_counts() -> None:
    code = (
        "import resource; from edgekit.runtime.system import _status, free_memory_bytes;"
        "size = int(_status()['VmSize'].split()[0]) * 1024;"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, size + 2**28)); print(free_memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 2**27 < int(done.stdout) <= 2**28


def test_this_machine_is_described() -> None:
    machine = system.this_machine()
    assert machine.cpu
    assert machine.cores_usable is None or machine.cores_usable >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestMemory:
    def test_peak_counts_what_was_freed_again(self) -> None:
        def allocate() -> str:
            np.ones(64 * MIB, dtype=np.uint8)
            return "done"

        result, memory = system.measure_peak(allocate)
        assert result == "done"
        assert memory.bytes is not None
        if "counter reset" in memory.method:
            assert 60 * MIB < memory.bytes < 80 * MIB

    def test_without_permission_the_method_says_what_the_figure_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(system, "_reset_peak", lambda: False)
        _, memory = system.measure_peak(lambda: None)
        assert "counter reset" not in memory.method

    def test_this_process(self) -> None:
        now, peak = system.current_memory_bytes(), system.peak_memory_bytes()
        assert now is not None
        assert peak is not None
        assert (system.thread_count() or 0) >= 1


@pytest.mark.parametrize(
    ("readings", "reset", "added", "method"),
    [
        ((100, 100, 120, 180), True, 80, "reset"),
        ((100, 150, 120, 180), False, 80, "new peak"),
        ((100, 150, 120, 150), False, 20, "at least"),
        ((None, 150, None, 170), False, 20, "at least"),
        ((None, None, None, None), False, None, "does not tell"),
    ],
    ids=["reset", "new-peak", "below-earlier-peak", "peak-only", "nothing"],
)
def test_peak_added(
    readings: tuple[int | None, int | None, int | None, int | None], reset: bool, added: int | None, method: str
) -> None:
    memory = system.peak_added(*readings, was_reset=reset)
    assert memory.bytes == added
    assert method in memory.method


def test_installed_version_falls_back_to_the_module() -> None:
    assert system.installed_version("numpy") == np.__version__
    assert system.installed_version("no-such-distribution", "numpy") == np.__version__
    assert system.installed_version("no-such-distribution") == "unknown"
