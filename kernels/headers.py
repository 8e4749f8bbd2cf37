"""Where onnxruntime's C++ headers are. No wheel has them; Debian's libonnxruntime-dev does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekit.kernels.native.toolchain import KernelBuildError

VARIABLE = "EDGEKIT_ONNXRUNTIME_INCLUDE"
MINIMUM_API = 20
"""The oldest onnxruntime API that edgekit runs under (onnxruntime 1.20)."""

HOW_TO_GET = f"""\
Debian 13 and newer:   apt-get install libonnxruntime-dev
Debian 12:             take that package from Debian 13 with apt's own options and unpack it (the repository's
                       .ci/onnxruntime-headers FOLDER does this), then set {VARIABLE}=FOLDER/usr/include/onnxruntime
elsewhere:             unpack an onnxruntime release for C++ (https://github.com/microsoft/onnxruntime/releases)
                       and set {VARIABLE} to its include folder"""

_FILES = ("onnxruntime_c_api.h", "onnxruntime_cxx_api.h")
_FOLDERS = (
    "/usr/include/onnxruntime",
    "/usr/local/include/onnxruntime",
    "/opt/onnxruntime/include",
)


@dataclass(frozen=True)
class Headers:
    """onnxruntime's headers: their folder, and the API version that they describe (21 for onnxruntime 1.21)."""

    folder: Path
    api: int


def find_headers() -> Headers:
    """onnxruntime's headers: from $EDGEKIT_ONNXRUNTIME_INCLUDE, else pkg-config, else the usual folders.

    Raises:
        KernelBuildError: they are not found, or too old; the message says how to get them.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        headers = _headers_in(Path(chosen))
        if headers is None:
            raise KernelBuildError(
                f"{VARIABLE} is {chosen}, which does not hold {' and '.join(_FILES)}; point it at the folder that "
                f"does.\n{HOW_TO_GET}"
            )
        return _check(headers)
    for folder in _candidates():
        headers = _headers_in(folder)
        if headers is not None:
            return _check(headers)
    raise KernelBuildError(f"onnxruntime's C++ headers are not installed.\n{HOW_TO_GET}")


def _candidates() -> Iterator[Path]:
    yield from _pkg_config()
    for folder in _FOLDERS:
        yield Path(folder)
        yield Path(folder) / "core" / "session"  # the layout of older packages


def _pkg_config() -> Iterator[Path]:
    if shutil.which("pkg-config") is None:
        return
    done = subprocess.run(
        ["pkg-config", "--cflags-only-I", "libonnxruntime"], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode == 0:
        yield from (Path(word[2:]) for word in done.stdout.split() if word.startswith("-I"))


def _headers_in(folder: Path) -> Headers | None:
    if not all((folder / name).is_file() for name in _FILES):
        return None
    text = (folder / _FILES[0]).read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^#define\s+ORT_API_VERSION\s+(\d+)", text, re.MULTILINE)
    return Headers(folder.resolve(), int(found.group(1))) if found else None  # compilers run elsewhere


def _check(headers: Headers) -> Headers:
    if headers.api < MINIMUM_API:
        raise KernelBuildError(
            f"expected onnxruntime headers of API {MINIMUM_API} (onnxruntime 1.{MINIMUM_API}) or newer, got API "
            f"{headers.api} in {headers.folder}.\n{HOW_TO_GET}"
        )
    return headers
