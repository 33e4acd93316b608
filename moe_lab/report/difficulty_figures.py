"""Figures of the section on difficulty, drawn from frames of ``analysis.difficulty``."""

from __future__ import annotations

import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars
from moe_lab.report.theme import SERIES, SYMBOLS

ALIGN_LABELS = {"input": "token that goes in", "target": "token to be predicted"}


@drawn
def difficulty_map(frame: pl.DataFrame) -> Canvas:
    """Layer x alignment: rank correlation of ffn_count with difficulty within token ids.

    Args:
        frame: columns layer, align, rho_token, rho_token_lo, rho_token_hi, rho_raw, verdict, as
            ``difficulty_association``.
    """
    layers = frame["layer"].unique().sort().to_list()
    aligns = [align for align in ALIGN_LABELS if align in frame["align"].to_list()]
    rows = {(row["layer"], row["align"]): row for row in frame.to_dicts()}
    table = [[rows[layer, align] for align in aligns] for layer in layers]
    reach = max([0.05, *(abs(value) for value in frame["rho_token"].drop_nulls())])
    figure = Canvas()
    figure.add_heatmap(
        x=[ALIGN_LABELS[align] for align in aligns],
        y=[str(layer) for layer in layers],
        z=[[row["rho_token"] for row in cells] for cells in table],
        text=[[_cell(row) for row in cells] for cells in table],
        texttemplate="%{text}",
        customdata=[
            [f"{row['verdict']}; raw {_number(row['rho_raw'])}" for row in cells] for cells in table
        ],
        hovertemplate="layer %{y}, %{x}: %{z:.3f}<br>%{customdata}<extra></extra>",
        coloraxis="coloraxis",
    )
    figure.update_yaxes(type="category", autorange="reversed", title_text="layer", showgrid=False)
    figure.update_xaxes(showgrid=False, side="top")
    return figure.update_layout(
        height=150 + 44 * len(layers),
        coloraxis={"cmin": -reach, "cmax": reach, "colorbar": {"title": {"text": "correlation"}}},
    )


def _cell(row: dict) -> str:
    if row["rho_token"] is None:
        return str(row["verdict"])
    rho, low, high = (_number(row[name]) for name in ("rho_token", "rho_token_lo", "rho_token_hi"))
    return rho if row["rho_token_lo"] is None else f"{rho} ({low} to {high})"


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:+z.3f}".replace("-", "\u2212")


@drawn
def difficulty_curves(frame: pl.DataFrame) -> Canvas:
    """Mean ffn_count by tenth of difficulty: raw, and within token ids.

    Args:
        frame: one layer and alignment of ``analysis.difficulty.difficulty_curves``.
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
    figure.update_yaxes(title_text="ffn_count per token")
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
