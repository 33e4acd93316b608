"""Figures of the records of runs: loss against ratio, and training curves."""

import math
from typing import Any

import numpy as np
import polars as pl

from moe_lab.report.canvas import Canvas, drawn, evenly, need, plain
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

MAX_POINTS = 400
"""A training curve is thinned to this many points by default: about as many as a plot has pixels.
"""


@drawn
def frontier(
    frame: pl.DataFrame, *, level: float = 0.95, means: pl.DataFrame | None = None
) -> Canvas:
    """Validation loss against the total:active ratio, one series per arm.

    Args:
        frame: one row per run with columns arm (text), ratio (null for a run without experts),
            seed, loss in nats/token.
        level: coverage of the t-intervals over seeds, drawn where a ratio has at least two seeds.
        means: columns arm, ratio, n, mean, lo, hi as ``scaling.seed_intervals``, which makes them
            by default.
    """
    need(frame, "arm", "ratio", "seed", "loss")
    figure = Canvas()
    if means is None:
        from moe_lab.scaling import seed_intervals

        means = seed_intervals(frame, level=level)
    for index, arm in enumerate(arms(frame)):
        colour, symbol = SERIES[index % len(SERIES)], SYMBOLS[index % len(SYMBOLS)]
        marker = {"color": colour, "symbol": symbol}
        line = {"color": colour, "width": 1.5, "dash": DASHES[index % len(DASHES)]}
        runs = frame.filter(pl.col("arm") == arm).sort("ratio", "seed")
        points = means.filter(pl.col("arm") == arm).sort("ratio")
        if runs["ratio"].null_count() == runs.height:
            line["dash"] = "dash"
            figure.add_hline(y=points["mean"][0], line=line, annotation_text=plain(arm))
            continue
        figure.add_scatter(
            x=runs["ratio"].to_list(),
            y=runs["loss"].to_list(),
            mode="markers",
            marker=marker | {"size": 6, "opacity": 0.55},
            customdata=runs["seed"].to_list(),
            hovertemplate="ratio %{x:.4~g}, seed %{customdata}<br>loss %{y:.4f} nats/token",
            name=plain(arm),
            legendgroup=arm,
            showlegend=False,
        )
        bars = (points["hi"] - points["mean"]).to_list()
        figure.add_scatter(
            x=points["ratio"].to_list(),
            y=points["mean"].to_list(),
            mode="lines+markers",
            marker=marker | {"size": 9},
            line=line,
            error_y={"type": "data", "array": bars, "thickness": 1.5, "width": 5, "color": colour},
            customdata=points.select("n", "lo", "hi").rows(),
            hovertemplate="ratio %{x:.4~g}, %{customdata[0]} seeds<br>mean %{y:.4f}<br>"
            "%{customdata[1]:.4f} to %{customdata[2]:.4f}",
            name=plain(arm),
            legendgroup=arm,
        )
    ticks = _powers_of_two(frame["ratio"].drop_nulls())
    figure.update_xaxes(
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
        title_text="total : active experts (log scale)",
    )
    figure.update_yaxes(title_text="validation loss, nats/token")
    return figure.update_layout(height=420, hovermode="closest")


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


def _powers_of_two(ratios: pl.Series) -> list[float]:
    powers = [math.log2(ratio) for ratio in ratios if ratio > 0] or [0, 1]
    return [2.0**power for power in range(math.floor(min(powers)), math.ceil(max(powers)) + 1)]
