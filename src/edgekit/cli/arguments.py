"""What options hold, as values: files read, pairs parsed. Every fault is an `InputError` that shows the right form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekit.errors import InputError


def read_lines(path: Path | None) -> list[str] | None:
    """The class names in a text file, one per line; empty lines do not count."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the labels in {path}: {error}") from error
    labels = [line.strip() for line in lines if line.strip()]
    if not labels:
        raise InputError(f"{path} holds no labels; write one class name per line")
    return labels


def read_json(path: Path | None) -> dict[str, Any] | None:
    """The JSON object in a file."""
    if path is None:
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the JSON in {path}: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def parse_options(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` with JSON values, such as `img_size=[512,256]`; what is no JSON is a text."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise InputError(f"cannot read --option {pair!r}; write KEY=VALUE, such as num_classes=10")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def parse_sizes(pairs: list[str] | None) -> dict[str, int] | None:
    """`NAME=NUMBER`, sizes of dynamic dimensions."""
    if not pairs:
        return None
    sizes = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not (value.isascii() and value.isdigit()):
            raise InputError(f"cannot read --size {pair!r}; write NAME=NUMBER, such as N=4")
        sizes[key] = int(value)
    return sizes
