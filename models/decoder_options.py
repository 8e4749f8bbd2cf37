"""Attention as plain options, as a command line or a manifest holds them: names and values, checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from edgekit.errors import InputError
from edgekit.models.sparse_attention import SparseAttention

ATTENTION_OPTIONS: dict[str, Any] = {
    "attention" if item.name == "kind" else item.name: item.default for item in fields(SparseAttention)
}
"""The fields of `SparseAttention` and their defaults; `attention` stands for its kind."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "attention" if name == "kind" else name: get_args(hint)
    for name, hint in get_type_hints(SparseAttention).items()
    if get_origin(hint) is Literal
}

DECODER_OPTIONS = (*ATTENTION_OPTIONS, "context", "predictor")
"""What a decoder's folder can be loaded with."""


def check_options(options: Mapping[str, object], known: Collection[str]) -> None:
    """Refuse names that are not among `known`.

    Raises:
        InputError: names those that there are.
    """
    if unknown := sorted(options.keys() - set(known)):
        raise InputError(f"the decoder does not take {', '.join(unknown)}; it takes {', '.join(known)}")


def attention_from_options(options: Mapping[str, object]) -> SparseAttention:
    """The attention that these options describe; other names among them are left alone.

    Raises:
        InputError: a value of the wrong kind or out of range.
    """
    given = {name: options[name] for name in ATTENTION_OPTIONS if name in options}
    for name, value in given.items():
        _check_kind(name, value, ATTENTION_OPTIONS[name])
    values: dict[str, Any] = {"kind" if name == "attention" else name: value for name, value in given.items()}
    return SparseAttention(**values)


def refuse_idle_options(options: Mapping[str, object]) -> None:
    """Refuse options that would do nothing because the attention is another: a budget for a dense one.

    Raises:
        InputError: names them, and what to add.
    """
    kind = options.get("attention", "dense")
    idle = sorted(options.keys() & ATTENTION_OPTIONS.keys() - {"attention", "block_size"}) if kind == "dense" else []
    if kind != "dhsa" and options.get("predictor") is not None:
        idle.append("predictor")
    if idle:
        raise InputError(f"{', '.join(idle)} does nothing with attention {kind!r}; add attention=dhsa, or leave it out")


def _check_kind(name: str, value: object, default: object) -> None:
    """`None` as a default stands for an optional number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _CHOICES:
        fits, wanted = value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif isinstance(default, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif default is None:
        fits, wanted = number or value is None, "a number, or null for none"
    else:
        fits, wanted = number and isinstance(value, int), f"a whole number, such as {default}"
    if not fits:
        raise InputError(f"{name} is {wanted}; got {value!r}")
