"""The aarch64 kernels, cross-compiled, linked statically with a C program and run under qemu-user."""

from __future__ import annotations

from typing import Any

import pytest

from edgekit.custom_ops.tolerances import relative_l2, tolerance

pytestmark = pytest.mark.xdist_group("aarch64")


def test_agrees_with_the_reference(aarch64_driver: Any, parity: Any) -> None:
    """Poisoned scratch memory and guard pages around every tensor, as on the host."""
    case, expected = parity.make()
    answer = aarch64_driver(case)
    assert (answer.code, answer.message) == (0, "")
    error = relative_l2(answer.output, expected)
    assert error <= tolerance(parity.op, parity.dtype, "native"), error


def test_threads_and_misaligned_buffers(aarch64_driver: Any, parity: Any) -> None:
    case, expected = parity.make(threads=2, placement=1)
    answer = aarch64_driver(case)
    assert (answer.code, answer.message) == (0, "")
    assert relative_l2(answer.output, expected) <= tolerance(parity.op, parity.dtype, "native")


def test_the_shared_library_agrees_with_the_reference(aarch64_library_driver: Any, parity: Any) -> None:
    case, expected = parity.make(threads=2)
    answer = aarch64_library_driver(case)
    assert (answer.code, answer.message) == (0, "")
    assert relative_l2(answer.output, expected) <= tolerance(parity.op, parity.dtype, "native")
