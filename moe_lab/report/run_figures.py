"""Figures of the records of runs: loss against ratio, and training curves."""

import math
from typing import Any

import numpy as np
import polars as pl

from moe_lab.number_format import count_of
from moe_lab.report.canvas import Canvas, drawn, error_bars, evenly, interval_text, need, plain
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS
from moe_lab.seed_intervals import seed_intervals

BAND = (
    "rgba(47,121,196,0.20)"  # the first series colour, thin enough to read through in both themes
)
MAX_TICKS = 9
MAX_POINTS = 400
"""A training curve is thinned to this many points by default: about as many as a plot has pixels.
"""


@drawn
def frontier(
    frame: pl.DataFrame,
    *,
    level: float = 0.95,
    means: pl.DataFrame | None = None,
    curve: pl.DataFrame | None = None,
) -> Canvas:
    """Validation loss against the total:active ratio, one series per arm.

    Args:
        frame: one row per run with columns arm (text), ratio (null for a run without experts),
            seed, loss in nats/token.
        level: coverage of the t-intervals over seeds, drawn where a ratio has at least two seeds.
        means: columns arm, ratio, n, mean, lo, hi as ``scaling.seed_intervals``, which makes them
            by default, or held_out too, as ``WallStudy.means``.
        curve: columns ratio, loss, lo, hi of the form fitted to the first arm of ``means``, as
            ``scaling.frontier_band``; drawn with its band, and the ratios held out of it as open
            marks.
    """
    need(frame, "arm", "ratio", "seed", "loss")
    figure = Canvas()
    names = arms(frame)
    if means is None:
        means = seed_intervals(frame, level=level)
    fitted = None if curve is None else means["arm"][0]
    if curve is not None:
        names.sort(key=lambda name: name != fitted)
        _band(figure, curve)
    for index, arm in enumerate(names):
        colour, symbol = SERIES[index % len(SERIES)], SYMBOLS[index % len(SYMBOLS)]
        marker = {"color": colour, "symbol": symbol}
        line = {"color": colour, "width": 1.5, "dash": DASHES[index % len(DASHES)]}
        runs = frame.filter(pl.col("arm") == arm).sort("ratio", "seed")
        points = means.filter(pl.col("arm") == arm).sort("ratio")
        if runs["ratio"].null_count() == runs.height:
            line["dash"] = "dash"
            figure.add_hline(y=points["mean"][0], line=line, annotation_text=plain(arm))
            continue
        aside = 2 ** (0.05 * index)  # arms beside each other, where one would hide another
        figure.add_scatter(
            x=(runs["ratio"] * aside).to_list(),
            y=runs["loss"].to_list(),
            mode="markers",
            marker=marker | {"size": 6, "opacity": 0.55},
            customdata=runs.select("ratio", "seed").rows(),
            hovertemplate="ratio %{customdata[0]:.4~g}, seed %{customdata[1]}<br>"
            "loss %{y:.4f} nats/token",
            name=plain(arm),
            legendgroup=arm,
            showlegend=False,
        )
        held = points["held_out"].to_list() if "held_out" in points.columns else []
        symbols = [symbol + "-open" * out for out in held] if any(held) else symbol
        figure.add_scatter(
            x=(points["ratio"] * aside).to_list(),
            y=points["mean"].to_list(),
            mode="markers" if arm == fitted else "lines+markers",
            marker=marker | {"size": 9, "symbol": symbols},
            line=line,
            error_y=error_bars(points, "mean", "lo", "hi", thickness=1.5, width=5, color=colour),
            customdata=[
                (ratio, count_of(n, "seed"), interval_text(low, high, 4))
                for ratio, n, low, high in points.select("ratio", "n", "lo", "hi").rows()
            ],
            hovertemplate="ratio %{customdata[0]:.4~g}, %{customdata[1]}<br>mean %{y:.4f}<br>"
            "%{customdata[2]}",
            name=plain(arm),
            legendgroup=arm,
        )
    figure.update_yaxes(title_text="validation loss, nats/token")
    return ratio_axis(figure, frame["ratio"]).update_layout(height=420, hovermode="closest")


def _band(figure: Canvas, curve: pl.DataFrame) -> None:
    """The fitted curve over its band."""
    need(curve, "ratio", "loss", "lo", "hi")
    ratios = curve["ratio"].to_list()
    figure.add_scatter(
        x=ratios + ratios[::-1],
        y=curve["hi"].to_list() + curve["lo"].to_list()[::-1],
        fill="toself",
        fillcolor=BAND,
        line={"width": 0},
        hoverinfo="skip",
        name="90 % band",
    )
    add_line(figure, curve["ratio"], curve["loss"], 0, "fitted")


def add_line(figure: Canvas, x: pl.Series, y: pl.Series, index: int, name: str) -> None:
    """A line without marks in the style of series ``index``."""
    colour, dash = SERIES[index % len(SERIES)], DASHES[index % len(DASHES)]
    style = {"color": colour, "dash": dash, "width": 1.5}
    figure.add_scatter(
        x=x.to_list(), y=y.to_list(), mode="lines", line=style, name=name, hoverinfo="skip"
    )


@drawn
def training_curves(
    frame: pl.DataFrame,
    metric: str,
    *,
    title: str | None = None,
    log: bool = False,
    points: int = MAX_POINTS,
) -> Canvas:
    """One metric over the training tokens, one line per run, runs of one group in one colour and
    dash.

    Args:
        frame: columns run, group (both text), tokens and ``metric``; rows of all runs.
        metric: the column to draw.
        title: of the vertical axis; the metric's name by default.
        log: draw the metric on a log scale.
        points: the most points of one line.
    """
    need(frame, "run", "group", "tokens", metric)
    figure = Canvas()
    groups = frame["group"].unique(maintain_order=True).to_list()
    logged = frame.drop_nulls(metric).group_by("group", "run", maintain_order=True)
    for (group, run), rows in logged:
        tokens, values = rows["tokens"].to_numpy(), rows[metric].to_numpy()
        shown = np.argsort(tokens, kind="stable")[evenly(rows.height, points)]
        figure.add_scatter(
            x=tokens[shown].astype(np.float32),
            y=values[shown].astype(np.float32),
            mode="lines",
            line=line_style(groups.index(group)),
            name=plain(run),
            legendgroup=group,
            hovertemplate="%{x:.3s} tokens: %{y:.4g}",
            showlegend=False,
        )
    figure.update_xaxes(title_text="training tokens", rangemode="tozero")
    figure.update_yaxes(title_text=title or metric, type="log" if log else None)
    return figure.update_layout(height=260, hovermode="closest")


def line_style(index: int) -> dict[str, Any]:
    """Colour and dash of the ``index``-th group of runs; dashes change where the colours begin
    again.
    """
    return {
        "color": SERIES[index % len(SERIES)],
        "dash": DASHES[index // len(SERIES) % len(DASHES)],
        "width": 1.5,
    }


def arms(frame: pl.DataFrame) -> list[str]:
    """The arms of a run table, the one with most ratios first: it is the series that a verdict is
    about.
    """
    counts = frame.group_by("arm", maintain_order=True).agg(n=pl.col("ratio").n_unique())
    return counts.sort("n", descending=True, maintain_order=True)["arm"].to_list()


def ratio_axis(figure: Canvas, ratios: pl.Series) -> Canvas:
    """A log axis of the total:active ratio, labelled at powers of two (at most ``MAX_TICKS``)."""
    powers = [math.log2(ratio) for ratio in ratios.drop_nulls() if ratio > 0] or [0, 1]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    ticks = [2.0**power for power in range(low, high + 1, (high - low) // MAX_TICKS + 1)]
    return figure.update_xaxes(
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
        title_text="total : active experts (log scale)",
    )
