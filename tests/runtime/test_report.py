from __future__ import annotations

import pytest

from edgekit.runtime import report


def test_table_aligns_columns() -> None:
    text = report.table([("Conv", "1.25 ms"), ("Relu", "12.5 ms")], ("op", "time"), "lr")
    assert text.splitlines() == ["op       time", "Conv  1.25 ms", "Relu  12.5 ms"]


def test_empty_table_is_empty() -> None:
    assert report.table([]) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 ms"), (0.01234, "0.0123 ms"), (2.806, "2.81 ms"), (25.34, "25.3 ms"), (1240.4, "1240 ms")],
)
def test_milliseconds(value: float, text: str) -> None:
    assert report.ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (512, "512 B"), (1536, "1.5 KiB"), (26_424_115, "25.2 MiB"), (3 * 2**40, "3.0 TiB")],
)
def test_bytes(value: int | None, text: str) -> None:
    assert report.bytes_(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.004, "0.4 %"), (0.0996, "10 %"), (0.12, "12 %"), (1.0, "100 %")])
def test_percent(value: float, text: str) -> None:
    assert report.percent(value) == text


def test_plural() -> None:
    assert (report.plural(1, "thread"), report.plural(2, "thread")) == ("1 thread", "2 threads")
