"""Figures of ``moe_lab.worth``: what the loss is without each expert, which score orders experts as
that loss does, and what removing many or changing k costs.
"""

import numpy as np
import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars, interval_text, need, plain
from moe_lab.report.heatmap_figures import (
    cell_gaps,
    layer_axis,
    layer_height,
    layer_table,
    place_map,
)
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

RANDOM = "random "
"""How the names of random orders begin."""


@drawn
def expert_worth(frame: pl.DataFrame) -> Canvas:
    """Layer x expert map of the change of the loss without each expert, in nats per token.

    Args:
        frame: columns layer, expert, d_loss, lo, hi as ``worth.expert_worth``; one row per expert.
    """
    need(frame, "layer", "expert", "d_loss", "lo", "hi")
    layers = frame["layer"].unique().sort().to_list()
    table = layer_table(frame, frame["d_loss"], layers)
    rows = frame.with_columns(row=pl.int_range(pl.len()))
    texts = np.full(table.shape, "", dtype=object)
    places = layer_table(rows, rows["row"], layers)
    for place in zip(*np.nonzero(~np.isnan(places)), strict=True):
        row = rows.row(int(places[place]), named=True)
        texts[place] = f"{row['d_loss']:+z.4f} ({interval_text(row['lo'], row['hi'], 4)})"
    # One expert that the model cannot do without must not take the colour from all others.
    reach = float(np.nanquantile(np.abs(table), 0.98)) or 1.0
    canvas = Canvas()
    canvas.add_heatmap(
        z=table.astype(np.float32),
        customdata=texts.tolist(),
        x=list(range(table.shape[1])),
        y=list(map(str, layers)),
        coloraxis="coloraxis",
        hovertemplate="layer %{y}, expert %{x}: %{customdata} nats/token<extra></extra>",
        **cell_gaps(table),
    )
    canvas.update_xaxes(title_text="expert", showgrid=False)
    ticks = {-reach: f"\u2212{reach:.2g}", 0.0: "0", reach: f"+{reach:.2g}"}
    place_map(canvas, ticks, reach, "nats per token without the expert", layer_height(layers))
    return layer_axis(canvas, layers)


@drawn
def sorted_worth(frame: pl.DataFrame, *, bound: float | None = None) -> Canvas:
    """The change of the loss without each expert in rising order, with its interval as a band.

    Args:
        frame: as for ``expert_worth``.
        bound: the change below which an expert costs nothing.
    """
    need(frame, "layer", "expert", "d_loss", "lo", "hi")
    rows = frame.drop_nulls("lo").sort("d_loss")
    need(rows, "lo")
    x = list(range(1, rows.height + 1))
    canvas = Canvas()
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    canvas.add_scatter(x=x, y=rows["lo"].to_list(), **edge)
    canvas.add_scatter(
        x=x, y=rows["hi"].to_list(), fill="tonexty", fillcolor="rgba(47,121,196,0.25)", **edge
    )
    canvas.add_scatter(
        x=x,
        y=rows["d_loss"].to_list(),
        customdata=[
            [layer, expert, interval_text(low, high, 4)]
            for layer, expert, low, high in rows.select("layer", "expert", "lo", "hi").rows()
        ],
        mode="lines+markers",
        marker={"size": 4},
        line={"color": SERIES[0], "width": 1},
        showlegend=False,
        hovertemplate="layer %{customdata[0]}, expert %{customdata[1]}: %{y:.4f} "
        "(%{customdata[2]})<extra></extra>",
    )
    if bound is not None:
        canvas.add_hline(y=bound, line={"color": SERIES[1], "dash": "dash", "width": 1})
    canvas.update_xaxes(title_text="experts, from the least needed")
    return canvas.update_yaxes(title_text="nats per token without the expert")


@drawn
def score_agreement(frame: pl.DataFrame) -> Canvas:
    """Rank correlation of each score with the measured loss, with its interval.

    Args:
        frame: columns score, rho, lo, hi as ``worth.score_agreement``; the rows of one layer, or
            of all experts.
    """
    need(frame, "score", "rho", "lo", "hi")
    rows = frame.drop_nulls("rho").sort("rho")
    need(rows, "rho")
    canvas = Canvas().add_vline(x=0, line={"color": SERIES[-1], "width": 1})
    canvas.add_scatter(
        x=rows["rho"].to_list(),
        y=[plain(name.replace("_", " ")) for name in rows["score"]],
        error_x=error_bars(rows, "rho", "lo", "hi"),
        mode="markers",
        marker={"color": SERIES[0], "size": 9},
        showlegend=False,
    )
    canvas.update_xaxes(title_text="rank correlation with the loss")
    canvas.update_yaxes(type="category", automargin=True)
    return canvas.update_layout(height=110 + 34 * rows.height)


@drawn
def removal_curves(frame: pl.DataFrame) -> Canvas:
    """The change of the loss over the share of experts removed, a series per order; random orders
    are one series, their mean.

    Args:
        frame: columns order, share, d_loss, lo, hi as ``worth.removal_curves``.
    """
    need(frame, "order", "share", "d_loss", "lo", "hi")
    is_random = pl.col("order").str.starts_with(RANDOM)
    canvas = Canvas()
    random = frame.filter(is_random).group_by("share").agg(pl.mean("d_loss")).sort("share")
    if random.height:
        canvas.add_scatter(
            x=random["share"].to_list(),
            y=random["d_loss"].to_list(),
            name="random orders, mean",
            mode="lines",
            line={"color": SERIES[-1], "dash": "dot"},
        )
    orders = frame.filter(~is_random)
    for place, order in enumerate(orders["order"].unique(maintain_order=True)):
        rows = orders.filter(order=order).sort("share")
        canvas.add_scatter(
            x=rows["share"].to_list(),
            y=rows["d_loss"].to_list(),
            name=plain(order.replace("_", " ")),
            error_y=error_bars(rows, "d_loss", "lo", "hi", thickness=1),
            mode="lines+markers",
            line={"color": SERIES[place % (len(SERIES) - 1)], "dash": DASHES[place // 7 % 4]},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)]},
        )
    canvas.update_xaxes(title_text="share of experts removed", tickformat=".0%")
    return canvas.update_yaxes(title_text="change of loss, nats per token")


@drawn
def pair_losses(frame: pl.DataFrame) -> Canvas:
    """The change of the loss without both experts of a pair over the sum of the changes without
    one; above the line each stands in for the other.

    Args:
        frame: columns layer, first, second, d_first, d_second, d_both, excess, lo, hi as
            ``worth.pair_losses``.
    """
    need(frame, "layer", "first", "second", "d_first", "d_second", "d_both", "excess", "lo", "hi")
    rows = frame.with_columns(alone=pl.col("d_first") + pl.col("d_second")).sort("alone")
    ends = [rows["alone"][0], rows["alone"][-1]]
    canvas = Canvas()
    canvas.add_scatter(
        x=ends,
        y=ends,
        mode="lines",
        name="both = sum",
        line={"color": SERIES[-1], "dash": "dot"},
        hoverinfo="skip",
    )
    canvas.add_scatter(
        x=rows["alone"].to_list(),
        y=rows["d_both"].to_list(),
        customdata=[
            [layer, first, second, f"{excess:+z.4f} ({interval_text(low, high, 4)})"]
            for layer, first, second, excess, low, high in rows.select(
                "layer", "first", "second", "excess", "lo", "hi"
            ).rows()
        ],
        mode="markers",
        name="a pair of experts",
        marker={"color": SERIES[0], "size": 7},
        hovertemplate="layer %{customdata[0]}, experts %{customdata[1]} and %{customdata[2]}: "
        "both %{y:.4f}, excess %{customdata[3]}<extra></extra>",
    )
    canvas.update_xaxes(title_text="sum of both alone, nats per token")
    return canvas.update_yaxes(title_text="without both, nats per token")


@drawn
def exchange_losses(frame: pl.DataFrame) -> Canvas:
    """What the exchange of two experts costs the tokens that used one of them, over how many did.

    Args:
        frame: columns layer, first, second, d_loss_used, used_lo, used_hi, used, tokens as
            ``worth.exchange_losses``.
    """
    need(frame, "layer", "first", "second", "d_loss_used", "used_lo", "used_hi", "used", "tokens")
    rows = frame.drop_nulls("d_loss_used").with_columns(share=pl.col("used") / pl.col("tokens"))
    need(rows, "share")
    canvas = Canvas().add_hline(y=0, line={"color": SERIES[-1], "width": 1})
    canvas.add_scatter(
        x=rows["share"].to_list(),
        y=rows["d_loss_used"].to_list(),
        error_y=error_bars(rows, "d_loss_used", "used_lo", "used_hi", thickness=1),
        customdata=rows.select("layer", "first", "second").rows(),
        mode="markers",
        marker={"color": SERIES[0], "size": 7},
        showlegend=False,
        hovertemplate="layer %{customdata[0]}, experts %{customdata[1]} and %{customdata[2]}: "
        "%{y:.4f} nats per token that used one of them<extra></extra>",
    )
    canvas.update_xaxes(title_text="share of tokens that used one of both", tickformat=".0%")
    return canvas.update_yaxes(title_text="nats per such token, exchanged")


@drawn
def top_k_losses(frame: pl.DataFrame) -> Canvas:
    """The change of the loss over the number of experts of every token, a series per class.

    Args:
        frame: columns k, class, d_loss, lo, hi as ``worth.top_k_losses``; of one class column, and
            of all tokens (null).
    """
    need(frame, "k", "class", "d_loss", "lo", "hi")
    canvas = Canvas()
    for place, name in enumerate(frame["class"].unique(maintain_order=True)):
        rows = frame.filter(pl.col("class").eq_missing(name)).sort("k")
        canvas.add_scatter(
            x=rows["k"].to_list(),
            y=rows["d_loss"].to_list(),
            name=plain("all tokens" if name is None else name),
            error_y=error_bars(rows, "d_loss", "lo", "hi", thickness=1),
            mode="lines+markers",
            line={"color": SERIES[place % len(SERIES)], "dash": DASHES[place // 8 % 4]},
            marker={"symbol": SYMBOLS[place % len(SYMBOLS)]},
        )
    canvas.update_xaxes(title_text="experts of every token (k)", dtick=1)
    return canvas.update_yaxes(title_text="change of loss, nats per token")
