"""What SelectiveScan accepts. Works on plain shapes and names, so that no part needs torch to check them."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import InputError, ShapeError

NAME = "SelectiveScan"
NAMES = ("u", "delta", "A", "B", "C", "D", "z")
DTYPES = ("float32", "float16", "bfloat16", "float64")
SHAPES = (
    "SelectiveScan takes u and delta [B, C, L], A [C, S], B and C [B, S, L], D [C] and, where given, z [B, C, L], "
    "each axis at least 1"
)


def check_shapes(*shapes: Sequence[int] | None) -> None:
    """Raise `ShapeError` unless the shapes of u, delta, A, B, C, D and z (None where there is no z) fit."""
    u, delta, a, b, c, d, *gate = (None if shape is None else tuple(shape) for shape in shapes)
    z = gate[0] if gate else None
    if u is not None and len(u) == 3 and a is not None and len(a) == 2:
        per_state = (u[0], a[1], u[2])
        fits = delta == u and a[0] == u[1] and b == per_state and c == per_state and d == u[1:2] and z in (None, u)
        if fits and all(size >= 1 for size in (*u, a[1])):
            return
    given = zip(NAMES, shapes, strict=False)
    raise ShapeError(f"{SHAPES}; got {', '.join(f'{name} {list(s)}' for name, s in given if s is not None)}")


def check_dtypes(*dtypes: str | None) -> None:
    """Raise `InputError` unless all tensors have the same one of `DTYPES` (names as torch and numpy have them)."""
    given = [(name, dtype) for name, dtype in zip(NAMES, dtypes, strict=False) if dtype is not None]
    if given[0][1] in DTYPES and len({dtype for _, dtype in given}) == 1:
        return
    raise InputError(
        f"SelectiveScan takes tensors of one dtype out of {', '.join(DTYPES)}; got "
        f"{', '.join(f'{name} {dtype}' for name, dtype in given)}. Convert them to one dtype"
    )
