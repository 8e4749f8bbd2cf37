"""What the training scripts share."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def reproducible(threads: int, seed: int) -> Iterator[None]:
    """Deterministic algorithms, a seeded global generator on the CPU, and a number of threads; then all as before.

    The number of threads decides the order of sums. The global generator is for what a model draws in train mode, such
    as dropout or a router's noise.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
