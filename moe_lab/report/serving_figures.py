"""Figures of ``moe_lab.serving``: hit rate over budget, device by layer, experts touched."""

import numpy as np
import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars, need, plain
from moe_lab.report.heatmap_figures import cell_gaps, layer_axis, layer_height, map_layout
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

BOUNDS = ("clairvoyant", "bound")


@drawn
def expert_cache(frame: pl.DataFrame) -> Canvas:
    """Hit rate over the share of all experts that the cache holds, a series per policy; policies
    that know the future are dotted.

    Args:
        frame: columns share, policy, hit_rate, hit_rate_lo, hit_rate_hi.
    """
    need(frame, "share", "policy", "hit_rate", "hit_rate_lo", "hit_rate_hi")
    canvas = Canvas()
    for place, policy in enumerate(frame["policy"].unique(maintain_order=True)):
        rows = frame.filter(policy=policy).drop_nulls("hit_rate").sort("share")
        bound = policy in BOUNDS
        canvas.add_scatter(
            x=rows["share"].to_list(),
            y=rows["hit_rate"].to_list(),
            name=plain(policy),
            mode="lines" if bound else "lines+markers",
            line={"color": SERIES[place % len(SERIES)], "dash": "dot" if bound else "solid"},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)]},
            error_y=None if bound else error_bars(rows, "hit_rate", "hit_rate_lo", "hit_rate_hi"),
        )
    canvas.update_xaxes(title_text="budget, share of all bytes", tickformat=".0%")
    return canvas.update_yaxes(title_text="hit rate", tickformat=".0%", rangemode="tozero")


@drawn
def placement_load(frame: pl.DataFrame) -> Canvas:
    """Device x layer map of the load of a placement; 1 is the mean over devices.

    Args:
        frame: columns layer, device, load as ``serving.placement_load``.
    """
    need(frame, "layer", "device", "load")
    layers = frame["layer"].unique().sort().to_list()
    devices = frame["device"].unique().sort().to_list()
    table = frame.sort("layer", "device")["load"].to_numpy().reshape(len(layers), len(devices))
    with np.errstate(divide="ignore"):
        shade = np.log2(table).astype(np.float32)
    canvas = Canvas()
    canvas.add_heatmap(
        z=shade,
        customdata=table.astype(np.float32),
        x=[str(device) for device in devices],
        y=[str(layer) for layer in layers],
        coloraxis="coloraxis",
        hovertemplate="layer %{y}, device %{x}: %{customdata:.3f} \u00d7 mean<extra></extra>",
        **cell_gaps(table),
    )
    canvas.update_xaxes(title_text="device", type="category", showgrid=False)
    map_layout(canvas, table, 1, "load ÷ mean of the layer", layer_height(layers))
    return layer_axis(canvas, layers)


@drawn
def distinct_experts(frame: pl.DataFrame) -> Canvas:
    """Distinct experts of a layer over the tokens of a step, beside the two formulas.

    Args:
        frame: as ``serving.distinct_experts``; its means over layers are drawn.
    """
    need(frame, "layer", "kind", "size", "measured", "lo", "hi", "by_load", "by_equal_load")
    canvas = Canvas()
    rows = frame.filter(pl.col("layer").is_null()).sort("size")
    names = {"window": "tokens in a row", "batch": "requests together"}
    for place, (kind, name) in enumerate(names.items()):
        measured = rows.filter(kind=kind).drop_nulls("measured")
        if measured.height:
            canvas.add_scatter(
                x=measured["size"].to_list(),
                y=measured["measured"].to_list(),
                name=name,
                mode="lines+markers",
                line={"color": SERIES[place]},
                marker={"symbol": SYMBOLS[place]},
                error_y=error_bars(measured, "measured", "lo", "hi"),
            )
    formulas = rows.unique("size").sort("size")
    for dash, (column, name) in zip(
        DASHES[1:], {"by_load": "formula, by load", "by_equal_load": "formula, equal load"}.items(),
        strict=False,
    ):  # fmt: skip
        canvas.add_scatter(
            x=formulas["size"].to_list(),
            y=formulas[column].to_list(),
            name=name,
            mode="lines",
            line={"color": SERIES[7], "dash": dash},
        )
    sizes = formulas["size"].to_list()
    canvas.update_xaxes(title_text="tokens of a step (log scale)", type="log")
    canvas.update_xaxes(tickvals=sizes, ticktext=[f"{size:,}" for size in sizes])
    return canvas.update_yaxes(title_text="distinct experts of a layer", rangemode="tozero")
