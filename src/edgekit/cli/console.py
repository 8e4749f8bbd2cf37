"""Where the command line writes: tables for people, plain text off a terminal, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160


class Output:
    """Results go to stdout, progress and errors to stderr. With `as_json`, stdout carries one JSON document alone."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = _console(stderr=False)
        self.err = _console(stderr=True)

    def line(self, text: str = "", style: str | None = None) -> None:
        """One line for people; nothing with `--json`."""
        if not self.as_json:
            self.out.print(Text(text, style=style or ""), soft_wrap=True)

    def json(self, data: Any) -> None:
        """The JSON document; nothing without `--json`."""
        if self.as_json:
            sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str | None = None,
        right: Sequence[str] = (),
        whole: Sequence[str] = (),
        styles: Sequence[str | None] = (),
    ) -> None:
        """A table; `right` names the columns of numbers, `whole` those whose cells are never broken in two for a narrow
        terminal, `styles` gives a style per row."""
        if self.as_json:
            return
        terminal = self.out.is_terminal
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold" if terminal else "",
            header_style="bold" if terminal else "",
            box=box.SIMPLE_HEAD if terminal else None,
            pad_edge=False,
        )
        for column in columns:
            justify: Literal["left", "right"] = "right" if column in right else "left"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=column in whole)
        for index, row in enumerate(rows):
            style = styles[index] if index < len(styles) else None
            table.add_row(*(Text(cell) for cell in row), style=style if terminal else None)
        self.out.print(table)

    @contextlib.contextmanager
    def steps(self, what: str, *, detail: bool = True) -> Iterator[Callable[[str], None]]:
        """A function that announces steps: a spinner with the elapsed time on a terminal, lines elsewhere.

        Args:
            detail: off a terminal, a line per step; otherwise one for the whole.
        """
        start = time.perf_counter()
        if self.err.is_terminal:
            with self.err.status(what) as status:
                yield lambda step: status.update(f"{what}: {step} ({time.perf_counter() - start:.0f} s)")
        elif not detail:
            self.err.print(f"{what} ..", markup=False, highlight=False)
            yield lambda step: None
        else:
            yield lambda step: self.err.print(f"{what}: {step}", markup=False, highlight=False)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False)
