"""Numbers as text, for the page, the command line and sentences: thousands grouped, magnitudes with
their letter, a dash for a missing value.
"""

import math
from collections.abc import Sequence
from pathlib import Path

NOTHING = "\u2013"
MINUS = "\u2212"
_LETTERS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` decimals and grouped thousands; a value that rounds to zero has no
    sign, and one from 1e15 on has an exponent.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    form = "z,.{}f" if abs(value) < 1e15 else "z.{}e"
    return f"{value:{form.format(digits)}}".replace("-", MINUS)


def whole(value: float | None) -> str:
    """A number without decimals, thousands grouped."""
    return (
        NOTHING
        if value is None or not math.isfinite(value)
        else f"{value:z,.0f}".replace("-", MINUS)
    )


def magnitude(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits with k, M, B, T or P: 1234567 is 1.23M."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for size, letter in _LETTERS:
        if abs(value) >= size * (1 - 0.5 * 10.0**-digits):
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:z.{digits}g}"


def short_path(path: Path | str, most: int = 48) -> str:
    """A path as it is where it has at most ``most`` characters, else its last names after ``…/``.

    >>> short_path("/home/someone/projects/mixture/runs/first/sweep", most=20)
    '…/runs/first/sweep'
    """
    text = Path(path).as_posix()
    if len(text) <= most:
        return text
    *before, shown = Path(path).parts
    for name in reversed(before):
        if len(longer := f"{name}/{shown}") + 2 > most:
            break
        shown = longer
    return f"\u2026/{shown}"


def count_of(number: int, noun: str) -> str:
    """``1,200 runs``, ``1 run``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def listing(items: Sequence[str], most: int = 8) -> str:
    """``a, b and c``; past ``most`` items the rest is only counted."""
    shown = (
        [*items] if len(items) <= most else [*items[: most - 1], f"{len(items) - most + 1} more"]
    )
    return " and ".join((", ".join(shown[:-1]), shown[-1])) if len(shown) > 1 else "".join(shown)


def duration(seconds: float | None) -> str:
    """Seconds in words: ``42 s``, ``12 min``, ``3.4 h``; ``?`` for None."""
    if seconds is None:
        return "?"
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )
