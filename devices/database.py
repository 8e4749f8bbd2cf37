"""The devices that edgekit can measure on. A device is one entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import UnknownNameError


@dataclass(frozen=True)
class Device:
    """A place where a bundle runs. `kind` says how it is reached: `local` is this process."""

    name: str
    summary: str
    kind: Literal["local"]


DEVICES = (Device("local", "this machine", "local"),)


def list_devices() -> list[str]:
    """The names that `profile(..., on=NAME)` takes."""
    return [device.name for device in DEVICES]


def get_device(name: str) -> Device:
    """The device of that name. Raises `UnknownNameError` where there is none."""
    for device in DEVICES:
        if device.name == name:
            return device
    raise UnknownNameError("device", name, list_devices())
