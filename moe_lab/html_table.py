"""Tables of a notebook (``_repr_html_``): names and cells in, HTML out, with all text escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from moe_lab.number_format import MINUS
from moe_lab.plain_text import on_page

MOST = 25
"""Rows of one table; the rest is counted in a last row."""


def html_table(
    names: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "", below: str = ""
) -> str:
    """A table with ``caption`` above and ``below`` under it; floats have four digits."""
    every = list(rows)
    lines = [_row("th", names), *(_row("td", row) for row in every[:MOST])]
    if len(every) > MOST:
        lines.append(_row("td", [f"and {len(every) - MOST:,} more", *[""] * (len(names) - 1)]))
    head = f"<div>{_text(caption)}</div>" if caption else ""
    foot = f"<div>{_text(below)}</div>" if below else ""
    return f"{head}<table>{''.join(lines)}</table>{foot}"


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in cells) + "</tr>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:z.4g}".replace("-", MINUS)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace("-", MINUS)
    return "" if value is None else _text(str(value))


def _text(text: str) -> str:
    return escape(on_page(text)).replace("\n", "<br>")
