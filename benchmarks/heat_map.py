"""Heat maps as PNG, drawn with Pillow: panels side by side, one figure in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN = 74, 40, 56, 24
LABELS = 78  # pixels to the left of a panel, for the labels of its rows
STOPS = ((178, 24, 43), (244, 165, 130), (247, 247, 217), (146, 197, 140), (27, 120, 55))
"""From 0 (red) to 1 (green), evenly spaced."""


@dataclass(frozen=True)
class Panel:
    """Shares in 0..1 by row and column, under a title."""

    title: str
    values: Sequence[Sequence[float]]


def draw(
    path: Path,
    title: str,
    note: str,
    bands: Sequence[tuple[str, Sequence[Panel]]],
    columns: Sequence[str],
    rows: Sequence[str],
    axes: tuple[str, str],
) -> None:
    """Write a picture: bands of panels, one band below the other, all with the same columns and rows.

    Args:
        path: the PNG.
        title: the first line.
        note: smaller, below it.
        bands: a heading and its panels.
        columns, rows: labels of all panels.
        axes: names of the horizontal and the vertical axis.
    """
    most = max(len(panels) for _, panels in bands)
    wide = LABELS + len(columns) * CELL_WIDTH
    band_height = 96 + len(rows) * CELL_HEIGHT + 56
    width = 2 * MARGIN + most * wide + (most - 1) * GAP
    height = 110 + len(bands) * band_height + 60
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 20), title, "black", _font(30))
    pen.text((MARGIN, 66), note, (70, 70, 70), _font(19))
    for number, (heading, panels) in enumerate(bands):
        top = 110 + number * band_height
        pen.text((MARGIN, top + 4), heading, "black", _font(24))
        for place, panel in enumerate(panels):
            _panel(pen, (MARGIN + place * (wide + GAP), top + 46), panel, columns, rows, axes)
    _legend(pen, (MARGIN + LABELS, height - 48))
    image.save(path, optimize=True)


def _panel(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    panel: Panel,
    columns: Sequence[str],
    rows: Sequence[str],
    axes: tuple[str, str],
) -> None:
    left, top = corner[0] + LABELS, corner[1] + 40
    middle = left + len(columns) * CELL_WIDTH / 2
    pen.text((middle, corner[1] + 8), panel.title, "black", _font(22), anchor="ma")
    for row, values in enumerate(panel.values):
        y = top + row * CELL_HEIGHT
        pen.text((left - 8, y + CELL_HEIGHT / 2), rows[row], "black", _font(17), anchor="rm")
        for column, value in enumerate(values):
            x = left + column * CELL_WIDTH
            colour = shade(value)
            pen.rectangle((x, y, x + CELL_WIDTH - 2, y + CELL_HEIGHT - 2), colour)
            light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
            centre = (x + CELL_WIDTH / 2 - 1, y + CELL_HEIGHT / 2 - 1)
            pen.text(centre, f"{100 * value:.0f}", "black" if light else "white", _font(17), anchor="mm")
    bottom = top + len(rows) * CELL_HEIGHT
    for column, label in enumerate(columns):
        pen.text((left + (column + 0.5) * CELL_WIDTH, bottom + 4), label, "black", _font(17), anchor="ma")
    pen.text((middle, bottom + 28), axes[0], (70, 70, 70), _font(17), anchor="ma")
    pen.text((left - 8, top - 6), axes[1], (70, 70, 70), _font(17), anchor="rd")


def _legend(pen: ImageDraw.ImageDraw, corner: tuple[int, int]) -> None:
    steps, step, tall = 101, 4, 22
    x, y = corner
    for index in range(steps):
        pen.rectangle((x + index * step, y, x + (index + 1) * step, y + tall), shade(index / (steps - 1)))
    pen.text((x - 8, y + tall / 2), "0 %", "black", _font(17), anchor="rm")
    pen.text((x + steps * step + 8, y + tall / 2), "100 % of needles found", "black", _font(17), anchor="lm")


def shade(value: float) -> tuple[int, int, int]:
    """The colour of a share in 0..1."""
    place = min(max(value, 0.0), 1.0) * (len(STOPS) - 1)
    low = min(int(place), len(STOPS) - 2)
    part = place - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(STOPS[low], STOPS[low + 1], strict=True))
    return red, green, blue


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
