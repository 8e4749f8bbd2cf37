"""The C and C++ compilers: which ones to use for a machine, and running them."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError

_TIMEOUT = 300  # seconds; a compiler that takes longer hangs


class KernelBuildError(EdgekitError, RuntimeError):
    """Native kernels could not be built: a compiler or header is missing, or a compiler refused."""

    exit_code = 1


@dataclass(frozen=True)
class Toolchain:
    """Compilers that produce code for one machine, as argument lists (`CXX="ccache g++"` is two words)."""

    machine: str
    cc: tuple[str, ...]
    cxx: tuple[str, ...]
    cflags: tuple[str, ...] = ()
    cxxflags: tuple[str, ...] = ()
    ldflags: tuple[str, ...] = ()

    def version(self) -> str:
        """The first line that the C++ compiler says about itself."""
        return _version(self.cxx, "C++")

    def c_version(self) -> str:
        """The first line that the C compiler says about itself."""
        return _version(self.cc, "C")


def find_toolchain(machine: str) -> Toolchain:
    """The compilers for `machine` ("x86_64", "aarch64").

    `CC_<machine>` and `CXX_<machine>` decide where they are set. Otherwise, for this computer's own machine, `CC` and
    `CXX`, else `cc` and `c++`; for another machine, Debian's cross compilers `<machine>-linux-gnu-gcc` and `-g++`. The
    flags come from `CFLAGS`, `CXXFLAGS` and `LDFLAGS` by the same rule: those of this computer never reach a cross
    compiler.

    Raises:
        KernelBuildError: a compiler is not there; the message says how to get it. A variable that no shell would take.
    """
    native = machine == platform.machine()
    found = {}
    for language, own, cross in (("CC", "cc", "gcc"), ("CXX", "c++", "g++")):
        variable = f"{language}_{machine}"
        command = _words(language, machine) or (own if native else f"{machine}-linux-gnu-{cross}",)
        if shutil.which(command[0]) is None:
            package = "g++" if native else f"g++-{machine.replace('_', '-')}-linux-gnu"
            raise KernelBuildError(
                f"building kernels for {machine} needs a compiler; {command[0]!r} is not there. Install one "
                f"(Debian: apt-get install {package}) or set {variable}"
            )
        found[language] = command
    flags = (_words(name, machine) for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS"))
    return Toolchain(machine, found["CC"], found["CXX"], *flags)


def _words(name: str, machine: str) -> tuple[str, ...]:
    """The words of `<name>_<machine>`, or of `<name>` where that is unset and the machine is this computer's."""
    for variable in (f"{name}_{machine}", *((name,) if machine == platform.machine() else ())):
        if text := os.environ.get(variable):
            try:
                return tuple(shlex.split(text))
            except ValueError as error:
                raise KernelBuildError(f"{variable} is {text!r}, which is no list of words: {error}") from error
    return ()


def _version(compiler: Sequence[str], language: str) -> str:
    text = run([*compiler, "--version"], f"asking the {language} compiler for its version")
    return next(iter(text.splitlines()), "unknown")


def run(command: Sequence[str], purpose: str, folder: Path | None = None) -> str:
    """Run a tool and return what it printed.

    Raises:
        KernelBuildError: it cannot be started, fails or hangs; the message ends with its own words.
    """
    try:
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelBuildError(f"{purpose} failed: {error}") from error
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        tail = "\n".join(text.strip().splitlines()[-20:])
        raise KernelBuildError(f"{purpose} failed with exit code {done.returncode}: {shlex.join(command)}\n{tail}")
    return text
