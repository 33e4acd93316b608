"""``ANALYSES``: analyses that plugins add, each with its figure, for the report and by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import polars as pl

from moe_lab.registry import Registry
from moe_lab.trace import Trace

ANALYSES = Registry("an analysis")
"""Name -> ``Analysis``."""


@dataclass(frozen=True)
class Analysis:
    """
    Attributes:
        name: of the analysis, its figure and its Parquet file beside the page.
        compute: a trace -> a frame with documented columns; prints nothing.
        draw: that frame -> a ``moe_lab.report.canvas.Canvas``.
        heading, caption: above the figure on the page.
        summary: what the figure shows, in words, for who cannot see it.
    """

    name: str
    compute: Callable[[Trace], pl.DataFrame]
    draw: Callable[[pl.DataFrame], Any]
    heading: str
    caption: str = ""
    summary: str = ""


def register_analysis(
    name: str,
    draw: Callable[[pl.DataFrame], Any],
    *,
    heading: str = "",
    caption: str = "",
    summary: str = "",
) -> Callable[[Callable[[Trace], pl.DataFrame]], Callable[[Trace], pl.DataFrame]]:
    """Decorator of a function ``Trace -> DataFrame``: the page of a trace shows its figure.

    Raises:
        ConfigError: another analysis has the name.

    Example:
        >>> @register_analysis("busiest", draw_busiest, heading="The busiest expert")
        ... def busiest(trace):
        ...     return trace.counts().group_by("layer").agg(pl.col("count").max())
    """

    def file(compute: Callable[[Trace], pl.DataFrame]) -> Callable[[Trace], pl.DataFrame]:
        title = heading or name.replace("_", " ").capitalize()
        texts = (title, caption or title, summary or title)
        canvas = getattr(draw, "canvas", draw)  # of a figure decorated with @drawn
        ANALYSES.add(name, Analysis(name, compute, canvas, *texts), compute)
        return compute

    return file
