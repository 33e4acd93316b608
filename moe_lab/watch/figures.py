"""The figures of one run that is looked into: a metric of every layer over the steps, and the load
of every expert at one step.
"""

import numpy as np
import polars as pl

from moe_lab.report import figures
from moe_lab.report.canvas import Canvas, evenly
from moe_lab.report.load_figures import MAX_LOG2_LOAD
from moe_lab.report.run_figures import line_style

LAYER_METRICS = {
    "load_cv": "load CV",
    "max_violation": "MaxVio",
    "dead_experts": "dead experts",
    "router_entropy": "router entropy, nats",
    "mean_ffn_count": "mean ffn_count",
    "gradient_ratio": "gradient ratio",
    "bias_spread": "spread of the selection bias",
}
"""Columns of the table of layers, with their axis titles."""
LIMITS = {
    "router_entropy": ("entropy_max", "maximum"),
    "mean_ffn_count": ("ffn_target", "target"),
}
"""Metric -> the column with what it is held against, and the word for it."""
POINTS = 200
MARKED = 20
"""Points of a line that are marked, at most: one point is a mark alone."""
LEGEND = 12
"""Layers that a legend names; of more the pointer does."""


def layer_curves(layers: pl.DataFrame, metric: str) -> Canvas:
    """One line per layer over the optimiser steps, and the limit of the metric where it has one.

    Args:
        layers: columns step, layer, ``metric`` and those of ``LIMITS``.
    """
    figure = Canvas()
    column, word = LIMITS.get(metric, (metric, ""))
    rows = layers.select("step", "layer", metric, pl.col(column).alias("limit"))
    step, layer, value, limit = rows.to_numpy().astype(np.float64).T
    known = ~np.isnan(value)
    numbers = np.unique(layer[known])
    for index, number in enumerate(numbers):
        places = np.flatnonzero(known & (layer == number))
        places = places[evenly(places.size, POINTS)]
        figure.add_scatter(
            x=step[places].astype(np.float32),
            y=value[places].astype(np.float32),
            mode="lines+markers" if places.size <= MARKED else "lines",
            line=line_style(index),
            name=f"layer {number:.0f}",
            hovertemplate="step %{x:,}: %{y:.4g}",
            showlegend=len(numbers) <= LEGEND,
        )
    limits = np.unique(limit[~np.isnan(limit)])
    if word and limits.size == 1:
        line = {"color": "#7d7f88", "width": 1.5, "dash": "dash"}
        text = f"{word} {limits[0]:.4g}"
        figure.add_hline(y=float(limits[0]), line=line, annotation_text=text)
    figure.update_xaxes(title_text="step", rangemode="tozero")
    figure.update_yaxes(title_text=LAYER_METRICS[metric])
    return figure.update_layout(height=300, hovermode="closest")


def load_map(loads: pl.DataFrame, step: int) -> Canvas:
    """The load of every expert at one step, as in a report.

    Args:
        loads: columns step, layer, load (shares of the experts).
    """
    rows = loads.filter(pl.col("step") == step).drop_nulls("load").sort("layer")
    frame = rows.select(
        "layer",
        expert=pl.int_ranges(0, pl.col("load").list.len()),
        load=pl.col("load") * pl.col("load").list.len().cast(pl.Float32),
    ).explode("expert", "load")
    # One scale for all steps.
    return figures.expert_load.canvas(
        frame.with_columns(is_zero=pl.lit(False)), reach=MAX_LOG2_LOAD
    )
