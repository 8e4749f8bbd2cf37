"""A diagnosis as plain text. Profiles have theirs in `edgekit.runtime.report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.runtime.report import machine_line, table

if TYPE_CHECKING:
    from edgekit.devices.doctor import Check, Diagnosis


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis as lines of text: the checks by group, the commands that mend, and the machine."""
    rows = [
        (check.group if first else "", check.name, check.status, check.found, check.wanted, check.needed_for)
        for check, first in _with_first_of_group(diagnosis)
    ]
    lines = table(rows, ("for", "package", "status", "found", "wanted", "needed for")).splitlines()
    commands = dict.fromkeys(check.mend for check in diagnosis.checks if check.mend)
    if commands:
        lines += ["", "to mend:", *(f"  {command}" for command in commands)]
    features = ", ".join(diagnosis.machine.features) or "unknown"
    lines += ["", f"machine: {machine_line(diagnosis.machine)}", f"features: {features}"]
    return lines + [f"- {note}" for note in diagnosis.notes]


def _with_first_of_group(diagnosis: Diagnosis) -> list[tuple[Check, bool]]:
    checks = diagnosis.checks
    return [(check, index == 0 or checks[index - 1].group != check.group) for index, check in enumerate(checks)]
