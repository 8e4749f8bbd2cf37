"""Core ML Tools, imported in one place: it prints advice, logs, and shows progress bars that tell a user nothing."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import PurePath
from typing import Any

from edgekit.errors import MissingDependencyError
from edgekit.export.onnx import quiet

_LOGGER = "coremltools"
_STRANGERS = re.compile(r"^<eval_with_key>|torch[/\\](?!.*test)|coremltools[/\\]|edgekit[/\\]export[/\\]")


def import_coremltools() -> Any:
    """The module. Raises `MissingDependencyError` where it is not installed."""
    try:
        with quiet_tools():
            import coremltools
    except ImportError as error:
        raise MissingDependencyError("coremltools", "coreml", "exporting to coreml") from error
    return coremltools


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Silence Core ML Tools, PyTorch's exporter, and the warnings of what they use, such as numpy's."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with quiet(), _interruptible():
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise an interrupt again where Core ML Tools has swallowed it: it imports and converts under bare `except:`."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # somebody else's handler, or a thread that gets no signals
        return
    interrupted = False

    def note(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted:  # also in place of the error that the loss led to
            raise KeyboardInterrupt


def release(error: BaseException) -> BaseException:
    """Free what a failed conversion holds, such as its temporary folder, which complains if it is left to the end."""
    with quiet_tools():
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__context__
        gc.collect()
    return error


def tools() -> dict[str, str]:
    """The versions of what makes a package, for the manifest."""
    import platform

    import edgekit

    versions = {name: metadata.version(name) for name in ("torch", "coremltools", "numpy")}
    return {"edgekit": edgekit.__version__, "python": platform.python_version(), **versions}


def source_line(stack_trace: str | None) -> str:
    """Where in the user's own code a node came from: `file.py:12: y = torch.foo(x)`; empty where that is unknown.

    Args:
        stack_trace: what torch.fx notes of a node, innermost call last.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', stack_trace or "")
    own = [frame for frame in frames if not _STRANGERS.search(frame[0])]
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{PurePath(file.replace(chr(92), '/')).name}:{line}: {code.strip()}"
