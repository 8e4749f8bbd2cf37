"""The table of ops: what computes each op type, and how a kernel sees its call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

Array = NDArray[Any]
Result = Array | tuple[Any, ...]


class Call(dict[str, Any]):
    """The inputs of one call of an op by parameter name, with readers that turn constants into Python values.

    Arrays are read-only: fp16 and fp32 values as float32, integers of less than a byte as int8 or uint8, bool as bool;
    a scalar is 0-dimensional; strings are str; parameters that take several values hold a list.

    Attributes:
        half_sums: whether sums are rounded to half precision after each addition.
        half: whether the first output is declared fp16.
        outputs: the declared dtypes of the outputs.
    """

    __slots__ = ("half", "half_sums", "outputs")

    half_sums: bool
    half: bool
    outputs: tuple[str, ...]

    def ints(self, name: str, default: list[int] | None = None) -> list[int]:
        """A list of integers. Raises `InputError` where it is missing and has no default."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise InputError(f"its input {name} is missing")
            return default
        if isinstance(value, list):  # several scalars rather than one vector
            return [int(item) for item in value]
        return [int(item) for item in np.ravel(value)]

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise InputError(f"its input {name} is missing")
        return int(value)

    def number(self, name: str, default: float | None = None) -> np.float32:
        value = self.get(name, default)
        if value is None:
            raise InputError(f"its input {name} is missing")
        return np.float32(value)

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.get(name, default))

    def flags(self, name: str, count: int) -> list[bool]:
        """A list of truth values, all False where it is missing."""
        value = self.get(name)
        return [False] * count if value is None else [bool(item) for item in np.ravel(value)]

    def text(self, name: str, default: str) -> str:
        return str(self.get(name, default))

    def array(self, name: str) -> Array:
        value = self.get(name)
        if not isinstance(value, np.ndarray):
            raise InputError(f"its input {name} is missing or no tensor")
        return value

    def optional(self, name: str) -> Array | None:
        value = self.get(name)
        return value if isinstance(value, np.ndarray) else None

    def arrays(self, name: str) -> list[Array]:
        value = self.get(name)
        if value is None:
            raise InputError(f"its input {name} is missing")
        return value if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Kernel:
    """What computes an op. `rounds`: whether a float result may need rounding to its declared type."""

    run: Callable[[Call], Result]
    rounds: bool


KERNELS: dict[str, Kernel] = {}


def op(*names: str, exact: bool = False) -> Callable[[Callable[[Call], Result]], Callable[[Call], Result]]:
    """Register a kernel under the op types `names`.

    Args:
        exact: its float results are among its inputs' values (data movement, maximum, ...), or need no rounding.
    """

    def register(run: Callable[[Call], Result]) -> Callable[[Call], Result]:
        for name in names:
            if name in KERNELS:
                raise RuntimeError(f"two kernels for {name}")
            KERNELS[name] = Kernel(run, rounds=not exact)
        return run

    return register


def axes_of(call: Call, rank: int, name: str = "axes") -> tuple[int, ...]:
    """The axes a call names, from 0 on, in order; all where it names none. Raises `InputError` outside the rank."""
    given = call.get(name)
    return tuple(range(rank)) if given is None else tuple(axis_of(axis, rank) for axis in call.ints(name))


def axis_of(axis: int, rank: int) -> int:
    """`axis`, counted from the end where it is negative, as 0..rank-1."""
    if not -rank <= axis < rank:
        raise InputError(f"its axis {axis} is outside a tensor of {rank} axes")
    return axis % rank
