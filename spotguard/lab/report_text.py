"""How the report says numbers to people."""

from html import escape
from typing import Any

# From how many ms on: divided by, decimals, unit.
ROUNDING = ((100e3, 1e3, 0, "s"), (10e3, 1e3, 1, "s"), (1e3, 1e3, 2, "s"), (10, 1, 0, "ms"))


def size(count: float) -> str:
    """Return bytes as `512 B`, `3.4 MiB`, `1.03 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    if unit == "B":
        return f"{value:.0f} B"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def milliseconds(value: float | None) -> str:
    """Return `0 ms`, `0.4 ms`, `142 ms`, `1.42 s`, `14.2 s`, `116 s`, or a dash for None."""
    if value is None:
        return "-"
    for least, factor, decimals, unit in ROUNDING:
        if value >= least:
            return f"{value / factor:.{decimals}f} {unit}"
    return f"{value:.1f} ms" if value else "0 ms"


def seconds(value: float | None) -> str:
    """Return seconds as milliseconds() does."""
    return milliseconds(None if value is None else value * 1e3)


def number(value: int) -> str:
    """Return an integer with commas between thousands."""
    return f"{value:,}"


def plural(count: int, one: str, many: str = "") -> str:
    """Return `1 connection`, `4 connections`."""
    return f"{number(count)} {one if count == 1 else many or one + 's'}"


def e(value: Any) -> str:
    """Escape for HTML and SVG, attributes included."""
    return escape(str(value), quote=True)
