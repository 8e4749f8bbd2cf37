"""What a graph takes and gives: names, dtypes, and sizes that may be symbolic."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from edgekit.runtime.preprocess import ImagePreprocessing

DTYPES = ("float32", "float16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")

Dim = int | str


@dataclass(frozen=True)
class DimRange:
    """The sizes that a symbolic dimension may take: `min` to `max`, both included; `max` None means no upper bound.

    `values`, where given, are the only sizes, in ascending order: the first is `min`, the last `max`.
    """

    min: int = 1
    max: int | None = None
    values: tuple[int, ...] | None = None

    @classmethod
    def of(cls, sizes: Iterable[int]) -> DimRange:
        """The range that holds these sizes alone."""
        values = tuple(sorted(set(sizes)))
        return cls(values[0], values[-1], values)

    def __contains__(self, size: int) -> bool:
        if self.values is not None:
            return size in self.values
        return self.min <= size and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        if self.values is not None:
            return "/".join(map(str, self.values))
        return f"{self.min}..{'' if self.max is None else self.max}"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: `shape` holds ints and the names of symbolic dimensions, `layout` letters such as NCHW.

    `index_of` is for inputs of integers that point into something: they lie in 0..n-1, where n is the size of the
    symbolic dimension of that name, or the number written there as text, or a sum of these such as "V+Q+1".
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    layout: str | None = None
    preprocessing: ImagePreprocessing | None = None
    index_of: str | None = None

    def __str__(self) -> str:
        below = "" if self.index_of is None else f" < {self.index_of}"
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]{below}"

    def index_limit(self, sizes: Mapping[str, int]) -> int | None:
        """One more than the largest value that the input may hold, for these sizes; None where it is no index."""
        if self.index_of is None:
            return None
        return sum(int(term) if term.isdigit() else sizes[term] for term in self.index_of.split("+"))


def points(spec: TensorSpec, sizes: Set[str]) -> bool:
    """Whether `index_of` makes sense: a sum of `sizes` and of numbers of at least 1, for integers."""
    terms = (spec.index_of or "").split("+")
    known = (re.fullmatch(r"[1-9][0-9]{0,17}", t) is not None if t.isdigit() else t in sizes for t in terms)
    return "int" in spec.dtype and all(known)
