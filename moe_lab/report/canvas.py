"""What every figure begins with: an empty canvas in the light template, a look at the frame, and text that is shown as it is."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import polars as pl

from moe_lab.errors import AnalysisError, expected
from moe_lab.report.theme import template

if TYPE_CHECKING:
    import plotly.graph_objects as go


def figure() -> go.Figure:
    """An empty figure. ``plotly`` is imported on the first call."""
    import plotly.graph_objects as go

    return go.Figure(layout={"template": template("light")})


def need(frame: pl.DataFrame, *columns: str) -> None:
    """Raise ``AnalysisError`` unless the frame has rows and these columns."""
    missing = [column for column in columns if column not in frame.columns]
    if missing or not frame.height:
        raise AnalysisError(
            expected(f"a frame with rows and columns {', '.join(columns)}", f"{frame.height} rows without {missing or 'none'}")
        )


def plain(text: object) -> str:
    """Text that plotly shows as it is: its pseudo-HTML is escaped."""
    return html.escape(str(text), quote=False)
