"""Polars frames in, plotly figures out. Each function is named after the analysis whose frame it
draws.

A figure has no title (the page sets heading and caption around it), carries the light template of
``theme``, and escapes every text that came from data, because plotly reads tags in labels.
``plotly`` is imported on the first call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, expected
from moe_lab.report.canvas import Canvas, drawn, need, plain
from moe_lab.report.depth_figures import (
    compare,
    domain_divergence,
    load_over_windows,
    repetition,
    router_entropy,
    saturation,
    vocabulary_specialisation,
    zero_compute,
)
from moe_lab.report.difficulty_figures import difficulty_curves, difficulty_map, marginal_gain  # noqa: F401
from moe_lab.report.intervals import seed_intervals
from moe_lab.report.map_figures import coactivation, domain_specialisation, load_shift, transitions
from moe_lab.report.theme import DASHES, DEAD, SERIES, SYMBOLS

__all__ = [
    "class_profile",
    "coactivation",
    "compare",
    "domain_divergence",
    "domain_specialisation",
    "expert_load",
    "ffn_spread",
    "frontier",
    "load_over_windows",
    "load_shift",
    "plain",
    "repetition",
    "router_entropy",
    "saturation",
    "training_curves",
    "transitions",
    "vocabulary_specialisation",
    "zero_compute",
]

MAX_POINTS = 400
"""A training curve is thinned to this many points by default: about as many as a plot has pixels.
"""
MAX_LOG2_LOAD = 4
"""The load scale ends at 16 times the fair share and at a 16th of it; what lies beyond takes the
colour of the end.
"""


@drawn
def frontier(frame: pl.DataFrame, *, level: float = 0.95) -> Canvas:
    """Validation loss against the total:active ratio, one series per arm.

    Args:
        frame: one row per run with columns arm (text), ratio (null for a run without experts),
            seed, loss in nats/token.
        level: coverage of the t-intervals over seeds, drawn where a ratio has at least two seeds.
    """
    need(frame, "arm", "ratio", "seed", "loss")
    figure = Canvas()
    intervals = seed_intervals(frame, level=level)
    for index, arm in enumerate(arms(frame)):
        style = {"color": SERIES[index % len(SERIES)], "symbol": SYMBOLS[index % len(SYMBOLS)]}
        runs = frame.filter(pl.col("arm") == arm).sort("ratio", "seed")
        means = intervals.filter(pl.col("arm") == arm).sort("ratio")
        if runs["ratio"].null_count() == runs.height:
            figure.add_hline(
                y=means["mean"][0],
                line={"color": style["color"], "dash": "dash", "width": 1.5},
                annotation_text=plain(arm),
            )
            continue
        figure.add_scatter(
            x=runs["ratio"].to_list(),
            y=runs["loss"].to_list(),
            mode="markers",
            marker={"color": style["color"], "symbol": style["symbol"], "size": 6, "opacity": 0.55},
            customdata=runs["seed"].to_list(),
            hovertemplate="ratio %{x:.4~g}, seed %{customdata}<br>loss %{y:.4f} nats/token",
            name=plain(arm),
            legendgroup=arm,
            showlegend=False,
        )
        bars = (means["hi"] - means["mean"]).to_list()
        figure.add_scatter(
            x=means["ratio"].to_list(),
            y=means["mean"].to_list(),
            mode="lines+markers",
            marker={**style, "size": 9},
            line={"color": style["color"], "width": 1.5, "dash": DASHES[index % len(DASHES)]},
            error_y={
                "type": "data",
                "array": bars,
                "thickness": 1.5,
                "width": 5,
                "color": style["color"],
            },
            customdata=means.select("n", "lo", "hi").rows(),
            hovertemplate="ratio %{x:.4~g}, %{customdata[0]} seeds<br>mean %{y:.4f}<br>%{customdata[1]:.4f} to %{customdata[2]:.4f}",
            name=plain(arm),
            legendgroup=arm,
        )
    ticks = _powers_of_two(frame["ratio"].drop_nulls())
    labels = [f"{tick:g}" for tick in ticks]
    figure.update_xaxes(
        type="log",
        tickmode="array",
        tickvals=ticks,
        ticktext=labels,
        title_text="total : active experts (log scale)",
    )
    figure.update_yaxes(title_text="validation loss, nats/token")
    return figure.update_layout(height=420, hovermode="closest")


@drawn
def expert_load(frame: pl.DataFrame, *, order: str = "id") -> Canvas:
    """Layer x expert heatmap of load, where 1 is the fair share; zero-compute experts in a panel of
    their own.

    Args:
        frame: one row per layer and expert with columns layer, expert, is_zero, load (fair share =
            1), as ``analysis.expert_load``.
        order: "id" keeps the experts' ids; "load" sorts each layer by load, which shows the shape
            where there are hundreds.
    """
    need(frame, "layer", "expert", "is_zero", "load")
    if order not in ("id", "load"):
        raise AnalysisError(expected("order to be 'id' or 'load'", repr(order)))
    layers = frame["layer"].unique().sort()
    panels = [
        panel for zero in (False, True) if (panel := frame.filter(pl.col("is_zero") == zero)).height
    ]
    widths = [_columns(panel) for panel in panels]
    shares = [max(width / sum(widths), 0.12) for width in widths]
    figure = Canvas([share / sum(shares) for share in shares], gap=0.03)
    for column, panel in enumerate(panels, start=1):
        _load_panel(figure, panel, layers, order, column)
    reach = _log2_reach(frame["load"])
    ticks = (
        list(range(-reach, reach + 1))
        if reach <= 3
        else list(range(-reach, reach + 1, 2))
        if reach % 2 == 0
        else [-5, -3, -1, 0, 1, 3, 5]
    )
    bar = {
        "title": {"text": "load ÷ fair share", "side": "top"},
        "tickvals": ticks,
        "ticktext": [_times(tick) for tick in ticks],
    }
    bar |= {
        "orientation": "h",
        "y": 1.0,
        "yanchor": "bottom",
        "x": 0,
        "xanchor": "left",
        "len": 260,
        "lenmode": "pixels",
    }
    rows = np.unique(
        np.linspace(0, layers.len() - 1, min(layers.len(), 24)).round().astype(int)
    ).tolist()
    figure.update_yaxes(
        type="category",
        autorange="reversed",
        tickvals=[str(layers[row]) for row in rows],
        showgrid=False,
    )
    figure.update_yaxes(title_text="layer", panel=1)
    figure.update_xaxes(showgrid=False)
    height = 190 + int(np.clip(layers.len() * 26, 90, 760))
    return figure.update_layout(
        height=height, coloraxis={"cmin": -reach, "cmax": reach, "colorbar": bar}
    )


@drawn
def class_profile(frame: pl.DataFrame) -> Canvas:
    """Mean ffn_count per token class with its interval; the layers behind it as small dots.

    Args:
        frame: columns layer (null = mean over layers), class, n_tokens, n_docs, mean, lo, hi, as
            ``analysis.class_profile``; adjusted, adjusted_lo, adjusted_hi are drawn where they are
            there.
    """
    need(frame, "layer", "class", "n_tokens", "n_docs", "mean", "lo", "hi")
    figure = Canvas()
    total = frame.filter(pl.col("layer").is_null()).sort("mean")
    place = {name: float(index) for index, name in enumerate(total["class"])}
    layers = frame.filter(pl.col("layer").is_not_null() & pl.col("class").is_in(list(place)))
    figure.add_scatter(
        x=layers["mean"].to_list(),
        y=[place[name] for name in layers["class"]],
        mode="markers",
        marker={"size": 5, "opacity": 0.5, "color": SERIES[-1]},
        customdata=layers["layer"].to_list(),
        hovertemplate="layer %{customdata}: %{x:.3f}<extra></extra>",
        name="one layer",
    )
    adjusted = "adjusted" in frame.columns
    _profile_series(
        figure, total, "mean", "lo", "hi", shift=0.16 * adjusted, name="mean over layers", series=0
    )
    if adjusted:
        _profile_series(
            figure,
            total,
            "adjusted",
            "adjusted_lo",
            "adjusted_hi",
            shift=-0.16,
            name="adjusted",
            series=1,
        )
    tokens = total["n_tokens"].to_numpy()
    if tokens.sum():
        average = float(np.average(total["mean"].to_numpy(), weights=tokens))
        figure.add_vline(x=average, line={"dash": "dot", "width": 1.5, "color": SERIES[-1]})
    labels = [
        f"{plain(name)} ({count:,})" for name, count in total.select("class", "n_tokens").rows()
    ]
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=labels,
        range=[-0.6, total.height - 0.4],
        ticks="",
        showgrid=False,
    )
    figure.update_xaxes(title_text="ffn_count per token")
    return figure.update_layout(height=130 + (42 if adjusted else 30) * max(total.height, 2))


def _profile_series(
    figure: Canvas,
    total: pl.DataFrame,
    mean: str,
    lo: str,
    hi: str,
    *,
    shift: float,
    name: str,
    series: int,
) -> None:
    bars = {
        "array": (total[hi] - total[mean]).to_list(),
        "arrayminus": (total[mean] - total[lo]).to_list(),
    }
    figure.add_scatter(
        x=total[mean].to_list(),
        y=[index + shift for index in range(total.height)],
        mode="markers",
        marker={"size": 9, "color": SERIES[series], "symbol": SYMBOLS[series]},
        error_x={"type": "data", "symmetric": False, "thickness": 2, "width": 4, **bars},
        customdata=total.select(
            "n_tokens",
            "n_docs",
            lo,
            hi,
            pl.col("class").map_elements(plain, return_dtype=pl.String),
        ).rows(),
        hovertemplate=f"%{{customdata[4]}}, {name}: %{{x:.3f}} (%{{customdata[2]:.3f}} to %{{customdata[3]:.3f}})<br>"
        "%{customdata[0]:,} tokens, %{customdata[1]} documents<extra></extra>",
        name=name,
    )


@drawn
def ffn_spread(frame: pl.DataFrame) -> Canvas:
    """Standard deviation of ffn_count over tokens, per layer, beside those that routers without a
    look at the token would give.

    Args:
        frame: columns layer, mean, sd, hypergeometric_sd as ``analysis.ffn_spread``; sd_lo, sd_hi
            (interval of sd), independent_sd and target (of the mean) are drawn where they are there
            and not null.
    """
    need(frame, "layer", "mean", "sd", "hypergeometric_sd")
    figure = Canvas((0.5, 0.5), stacked=True, gap=0.09)
    frame = frame.sort("layer")
    layers = [str(layer) for layer in frame["layer"]]
    for column, name, panel, marker in _SPREAD_SERIES:
        if column not in frame.columns or frame[column].null_count() == frame.height:
            continue
        figure.add_scatter(
            x=layers,
            y=frame[column].to_list(),
            error_y=_error_bars(frame, column),
            mode="markers",
            name=name,
            marker=marker,
            hovertemplate=f"layer %{{x}}: {name} %{{y:.3f}}<extra></extra>",
            showlegend=column != "mean",
            panel=panel,
        )
    figure.update_xaxes(type="category", title_text="layer", panel=2)
    figure.update_yaxes(title_text="sd of ffn_count", rangemode="tozero", panel=1)
    figure.update_yaxes(title_text="mean ffn_count", panel=2)
    return figure.update_layout(height=470)


def _error_bars(frame: pl.DataFrame, column: str) -> dict[str, Any] | None:
    if column != "sd" or not {"sd_lo", "sd_hi"} <= set(frame.columns):
        return None
    up, down = frame["sd_hi"] - frame["sd"], frame["sd"] - frame["sd_lo"]
    return {
        "type": "data",
        "symmetric": False,
        "array": up.to_list(),
        "arrayminus": down.to_list(),
        "thickness": 2,
        "width": 4,
    }


def _dash_marker(index: int) -> dict[str, Any]:
    return {"color": SERIES[index], "symbol": "line-ew-open", "size": 15, "line": {"width": 3}}


_DOT = {"color": SERIES[0], "symbol": "circle", "size": 8}
_SPREAD_SERIES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("sd", "measured", 1, _DOT),
    ("hypergeometric_sd", "drawn evenly", 1, _dash_marker(1)),
    ("independent_sd", "drawn by load", 1, _dash_marker(3)),
    ("mean", "mean", 2, _DOT),
    ("target", "target", 2, _dash_marker(2)),
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
    groups = {
        group: index for index, group in enumerate(frame["group"].unique(maintain_order=True))
    }
    for (group, run), rows in frame.drop_nulls(metric).group_by(
        "group", "run", maintain_order=True
    ):
        index = groups[str(group)]
        tokens, values = rows["tokens"].to_numpy(), rows[metric].to_numpy()
        shown = np.argsort(tokens, kind="stable")[evenly(rows.height, points)]
        figure.add_scatter(
            x=tokens[shown].astype(np.float32),
            y=values[shown].astype(np.float32),
            mode="lines",
            line=line_style(index),
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
    counts = (
        frame.group_by("arm", maintain_order=True)
        .agg(pl.col("ratio").n_unique().alias("n"))
        .sort("n", descending=True, maintain_order=True)
    )
    return counts["arm"].to_list()


def evenly(count: int, points: int) -> NDArray[np.int64]:
    """At most ``points`` evenly spaced numbers below ``count``, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, points)).round().astype(np.int64)


def _powers_of_two(ratios: pl.Series) -> list[float]:
    values = [float(value) for value in ratios if value > 0]
    low, high = (
        (math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))))
        if values
        else (0, 1)
    )
    return [2.0**power for power in range(low, high + 1)]


def _times(power: int) -> str:
    return f"{2**power}\u00d7" if power >= 0 else f"1/{2**-power}"


def _log2_reach(load: pl.Series) -> int:
    alive = load.filter(load > 0)
    extreme = float(alive.log(2.0).abs().max() or 0) if alive.len() else 0.0  # type: ignore[arg-type]
    return int(np.clip(math.ceil(extreme), 1, MAX_LOG2_LOAD))


def _columns(panel: pl.DataFrame) -> int:
    return int(panel["expert"].max() - panel["expert"].min() + 1)  # type: ignore[operator]


def _load_panel(
    figure: Canvas, panel: pl.DataFrame, layers: pl.Series, order: str, column: int
) -> None:
    """Draw one panel: the load in log2 on the shared colour axis, and dead experts over it in a
    colour outside that scale.
    """
    first, width = int(panel["expert"].min()), _columns(panel)  # type: ignore[arg-type]
    load = np.full((layers.len(), width), np.nan, dtype=np.float32)
    row = {layer: index for index, layer in enumerate(layers)}
    load[[row[layer] for layer in panel["layer"]], (panel["expert"] - first).to_numpy()] = panel[
        "load"
    ].to_numpy()
    if order == "load":
        load = -np.sort(-load, axis=1)
    with np.errstate(divide="ignore"):
        shade = np.where(load > 0, np.log2(load), np.nan).astype(np.float32)
    zero = bool(panel["is_zero"][0])
    kind = "zero-compute expert" if zero else "expert"
    where = "rank %{x}" if order == "load" else "%{x}"
    gap = 1 if load.size <= 2000 else 0
    columns = list(range(1, width + 1)) if order == "load" else list(range(first, first + width))
    common: dict[str, Any] = {
        "x": columns,
        "y": [str(layer) for layer in layers],
        "xgap": gap,
        "ygap": gap,
    }
    hover = f"layer %{{y}}, {kind} {where}<br>%{{customdata:.3f}} \u00d7 fair share<extra></extra>"
    figure.add_heatmap(
        z=shade, customdata=load, coloraxis="coloraxis", hovertemplate=hover, **common, panel=column
    )
    if (load == 0).any():
        scale = [[0, "rgba(0,0,0,0)"], [1, DEAD]]
        dead = (load == 0).astype(np.uint8)
        figure.add_heatmap(
            z=dead,
            zmin=0,
            zmax=1,
            colorscale=scale,
            showscale=False,
            hoverinfo="skip",
            **common,
            panel=column,
        )
    title = "zero" if zero else "expert"
    figure.update_xaxes(
        title_text=title + (", sorted by load" if order == "load" and not zero else ""),
        panel=column,
    )
