"""Tables and sentences for a terminal or a pipe.

On a terminal a table is aligned. Where it is wider than the window, its last column wraps if that
is text, else it is printed as records, a field a line. Elsewhere each row is one line, with tabs
between its cells and no wrapping, so that ``cut`` and ``awk -F'\\t'`` read it. Sentences wrap on a
terminal, between words only.
"""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

GAPS = "  ", " "
"""Between columns: the narrow one where the table fits only so."""
LAST = 28
"""Characters that a wrapped last column has at least."""
_NUMERIC = re.compile(r"[-+\u2212x(]?\.?\d|[-\u2013]?$")
Cell = object
"""A number, text, a truth or a date; None is an empty cell."""


def window_width() -> int | None:
    """Characters of a line of the terminal; None where the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(names: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print rows under their names: aligned, as records where the window is too narrow, or with
    tabs where the output is no terminal.
    """
    print(table_text(names, list(rows), window_width()))


def table_text(names: Sequence[str], rows: Sequence[Sequence[Cell]], width: int | None) -> str:
    """The text of ``print_table`` for a window of ``width`` characters (None: no terminal).

    Columns of numbers stand on the right. Floats have three decimals on a terminal, elsewhere six
    digits.
    """
    if width is None:
        return "\n".join("\t".join(map(_raw, row)) for row in (names, *rows))
    cells, sizes, right = _columns(names, rows)
    if (gap := _gap(sizes, right, width)) is not None:
        return "\n".join(
            wrapped(
                _padded(row[-1], sizes[-1], right[-1]),
                width,
                "".join(
                    _padded(cell, size, on_right) + gap
                    for cell, size, on_right in zip(row[:-1], sizes, right, strict=False)
                ),
            )
            for row in (names, *cells)
        )
    label = max(map(_length, names))
    records = (
        "\n".join(
            wrapped(cell, width, f"{_padded(name, label, False)}  ")
            for name, cell in zip(names, row, strict=True)
        )
        for row in cells
    )
    return "\n\n".join(records)


def fits(names: Sequence[str], rows: Sequence[Sequence[Cell]], width: int | None) -> bool:
    """Is the table aligned in a window of ``width`` characters, and not printed as records?"""
    return width is None or _gap(*_columns(names, rows)[1:], width) is not None


def _columns(
    names: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> tuple[list[list[str]], list[int], list[bool]]:
    """The cells as text; of each column, its width and whether it holds numbers."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    sizes = [max(map(_length, column)) for column in zip(names, *cells, strict=True)]
    right = [all(map(_NUMERIC.match, column)) for column in zip(*cells, strict=True)]
    return cells, sizes, right or [False] * len(names)


def _gap(sizes: Sequence[int], right: Sequence[bool], width: int) -> str | None:
    """The widest gap with which columns fit; None where none does. A last column of text may be
    wrapped.
    """
    last = sizes[-1] if right[-1] else min(sizes[-1], LAST)
    for gap in GAPS:
        if sum(sizes[:-1]) + len(gap) * (len(sizes) - 1) + last <= width:
            return gap
    return None


def say(text: str) -> None:
    """Print sentences, each line of them wrapped on a terminal and indented as it begins."""
    if (width := window_width()) is not None:
        lines = [(line.lstrip(), line) for line in text.split("\n")]
        text = "\n".join(
            wrapped(words, width, line[: len(line) - len(words)]) for words, line in lines
        )
    print(text)


def wrapped(text: str, width: int, first: str = "") -> str:
    """``text`` after ``first``, its further lines indented as far; words stay whole."""
    return (
        textwrap.fill(
            text,
            max(width, len(first) + 20),
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        or first.rstrip()
    )


def _raw(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:z.6g}"
    return "" if cell is None else " ".join(str(cell).split())


def _shown(cell: Cell) -> str:
    return f"{cell:z.3f}" if isinstance(cell, float) else _raw(cell)


def _length(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _padded(text: str, size: int, on_right: bool) -> str:
    blank = " " * (size - _length(text))
    return blank + text if on_right else text + blank


def dot_plot(rows: Sequence[tuple[str, Sequence[float]]], width: int, digits: int = 3) -> list[str]:
    """A line for each group of numbers: its label and mean, ``o`` at the mean and ``-`` from the
    least to the greatest, all on one axis of which the last line gives the ends.
    """
    means = [sum(values) / len(values) for _, values in rows]
    low = min(min(values) for _, values in rows)
    high = max(max(values) for _, values in rows)
    label = max(len(name) for name, _ in rows)
    number = max(len(f"{mean:.{digits}f}") for mean in means)
    room = max(10, width - label - number - 5)

    def place(value: float) -> int:
        return 0 if high == low else round((value - low) / (high - low) * (room - 1))

    lines = []
    for (name, values), mean in zip(rows, means, strict=True):
        least, most = place(min(values)), place(max(values))
        axis = [" "] * room
        axis[least : most + 1] = "-" * (most + 1 - least)
        axis[place(mean)] = "o"
        text = f"{name:>{label}}  {mean:{number}.{digits}f} |{''.join(axis)}"
        lines.append(text.rstrip())
    ends = f"{low:.{digits}f}", f"{high:.{digits}f}"
    blank = " " * (room - len(ends[0]) - len(ends[1]))
    return [*lines, f"{'':{label}}  {'':{number}}  {ends[0]}{blank}{ends[1]}"]
