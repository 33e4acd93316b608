"""Figures of ffn_count, the number of real experts that a token runs: spread and token classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars, interval_text, need, plain
from moe_lab.report.theme import SERIES, SYMBOLS


@drawn
def class_profile(frame: pl.DataFrame, *, value: str = "ffn_count per token") -> Canvas:
    """Mean ffn_count per token class with its interval; the layers behind it as small dots.

    Args:
        frame: columns layer (null = mean over layers), class, n_tokens, n_docs, mean, lo, hi, as
            ``analysis.class_profile``; adjusted, adjusted_lo, adjusted_hi are drawn where they are
            there.
        value: what the means are of: the title of the axis.
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
    series = [("mean over layers", "mean", "lo", "hi", 0.16 * adjusted)]
    if adjusted:
        series.append(("adjusted", "adjusted", "adjusted_lo", "adjusted_hi", -0.16))
    kinds = [plain(name) for name in total["class"]]
    for index, (name, mean, lo, hi, shift) in enumerate(series):
        figure.add_scatter(
            x=total[mean].to_list(),
            y=[row + shift for row in range(total.height)],
            mode="markers",
            marker={"size": 9, "color": SERIES[index], "symbol": SYMBOLS[index]},
            error_x=error_bars(total, mean, lo, hi, thickness=2, width=4),
            customdata=[
                (tokens, docs, interval_text(low, high, 3), kind)
                for kind, (tokens, docs, low, high) in zip(
                    kinds, total.select("n_tokens", "n_docs", lo, hi).rows(), strict=True
                )
            ],
            hovertemplate=f"%{{customdata[3]}}, {name}: %{{x:.3f}} (%{{customdata[2]}})<br>"
            "%{customdata[0]:,} tokens, %{customdata[1]} documents<extra></extra>",
            name=name,
        )
    tokens = total["n_tokens"].to_numpy()
    if tokens.sum():
        average = float(np.average(total["mean"].to_numpy(), weights=tokens))
        figure.add_vline(x=average, line={"dash": "dot", "width": 1.5, "color": SERIES[-1]})
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[f"{name} ({count:,})" for name, count in zip(kinds, tokens, strict=True)],
        range=[-0.6, total.height - 0.4],
        ticks="",
        showgrid=False,
    )
    figure.update_xaxes(title_text=value)
    return figure.update_layout(height=130 + (42 if adjusted else 30) * max(total.height, 2))


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
            error_y=error_bars(frame, column, f"{column}_lo", f"{column}_hi", thickness=2, width=4),
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
