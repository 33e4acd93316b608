"""Figures of the section on difficulty, drawn from frames of ``analysis.difficulty``."""

from __future__ import annotations

import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

ALIGN_LABELS = {"input": "token that goes in", "target": "token to be predicted"}


@drawn
def difficulty_map(frame: pl.DataFrame) -> Canvas:
    """Rank correlation of ffn_count with difficulty within token ids over depth, with its interval,
    a series per alignment.

    Args:
        frame: columns layer, align, rho_token, rho_token_lo, rho_token_hi, rho_raw, verdict, as
            ``difficulty_association``.
    """
    figure = Canvas().add_hline(y=0, line={"color": SERIES[-1], "width": 1})
    for index, (align, name) in enumerate(ALIGN_LABELS.items()):
        rows = frame.filter(align=align).sort("layer")
        if not rows.height:
            continue
        hidden = [
            (layer, verdict, _number(raw))
            for layer, verdict, raw in rows.select("layer", "verdict", "rho_raw").rows()
        ]
        figure.add_scatter(
            x=(rows["layer"] + 0.12 * (index - 0.5)).to_list(),  # intervals beside each other
            y=rows["rho_token"].to_list(),
            error_y=error_bars(rows, "rho_token", "rho_token_lo", "rho_token_hi", thickness=1.5),
            mode="lines+markers",
            line={"color": SERIES[index], "width": 1.5, "dash": DASHES[index]},
            marker={"color": SERIES[index], "symbol": SYMBOLS[index], "size": 8},
            name=name,
            customdata=hidden,
            hovertemplate="layer %{customdata[0]}: %{y:.3f}<br>%{customdata[1]}; "
            "raw %{customdata[2]}",
        )
    deep = int(frame["layer"].max() - frame["layer"].min())  # type: ignore[operator]
    figure.update_xaxes(title_text="layer", dtick=1 if deep <= 16 else None)
    figure.update_yaxes(title_text="correlation within token ids")
    return figure.update_layout(height=360, hovermode="closest")


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:+z.3f}".replace("-", "\u2212")


@drawn
def difficulty_curves(frame: pl.DataFrame, *, value: str = "ffn_count per token") -> Canvas:
    """Mean ffn_count by tenth of difficulty: raw, and within token ids.

    Args:
        frame: one layer and alignment of ``analysis.difficulty.difficulty_curves``.
        value: what the means are of: the title of the axis.
    """
    figure = Canvas()
    frame = frame.sort("decile")
    for index, (value, low, high, name) in enumerate(
        (
            ("mean", "lo", "hi", "tenths of difficulty"),
            ("within", "within_lo", "within_hi", "tenths of difficulty for the token's id"),
        )
    ):
        figure.add_scatter(
            x=(frame["decile"] + 1).to_list(),
            y=frame[value].to_list(),
            error_y=error_bars(frame, value, low, high),
            mode="lines+markers",
            name=name,
            marker={"color": SERIES[index], "symbol": SYMBOLS[index], "size": 8},
            line={"color": SERIES[index], "width": 1.5},
            hovertemplate="tenth %{x}: %{y:.3f}<extra></extra>",
        )
    figure.update_xaxes(title_text="tenth, easiest to hardest", dtick=1)
    figure.update_yaxes(title_text=value)
    return figure.update_layout(height=360)


@drawn
def marginal_gain(frame: pl.DataFrame) -> Canvas:
    """Mean marginal gain by tenth of ffn_count.

    Args:
        frame: columns ffn_count (mean of the group), gain, lo, hi, as
            ``analysis.difficulty.curves.gain_groups``.
    """
    figure = Canvas()
    figure.add_scatter(
        x=frame["ffn_count"].to_list(),
        y=frame["gain"].to_list(),
        error_y=error_bars(frame, "gain", "lo", "hi"),
        mode="lines+markers",
        marker={"color": SERIES[0], "size": 8},
        hovertemplate="%{x:.2f} experts: %{y:.4f} nats<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="ffn_count that the router gave, mean over layers")
    figure.update_yaxes(title_text="nats gained per further expert")
    return figure.update_layout(height=340)
