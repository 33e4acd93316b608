"""Figures of the published models. plotly is imported when a figure is made."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import polars as pl

SPARSITIES = (0.5, 0.75, 0.9, 0.94, 0.97, 0.99)
MARKED = (0.94, 0.97)
"""1 - active / total at the two ends of LongCat-Flash: 94.4 % for a token that runs 12 real
experts, 96.7 % for one that runs none. The mean of LongCat-2.0 is 97.0 %, DeepSeek-V4-Pro 96.9 %.
"""
SYMBOLS = ("circle", "diamond", "square", "x")


def atlas(frame: "pl.DataFrame") -> "go.Figure":
    """Total against active parameters of ``models()``, log-log, with lines of equal sparsity;
    ranges of dynamic models as bars.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    low, high = float(frame["active"].min() or 1) * 0.6, float(frame["active"].max() or 1) * 1.6  # type: ignore[arg-type]
    for sparsity in SPARSITIES:
        marked = sparsity in MARKED
        figure.add_scatter(
            x=[low, high],
            y=[low / (1 - sparsity), high / (1 - sparsity)],
            mode="lines+text",
            text=["", f"{sparsity:.0%}"],
            textposition="middle right",
            line={
                "color": "#a8321a" if marked else "#a6acb4",
                "width": 2 if marked else 1,
                "dash": "solid" if marked else "dot",
            },
            hoverinfo="skip",
            showlegend=False,
        )
    for number, (family, rows) in enumerate(frame.group_by("family", maintain_order=True)):
        figure.add_scatter(
            x=rows["active"],
            y=rows["total"],
            mode="markers",
            name=str(family[0]),
            marker={"size": 10, "symbol": SYMBOLS[number // 10 % len(SYMBOLS)]},
            error_x=_range(rows),
            customdata=_hover(rows),
            hovertemplate=_HOVER,
        )
    figure.update_layout(
        title={
            "text": "Published MoE models: total against active parameters (each in its "
            "laboratory's convention)"
        },
        xaxis={
            "type": "log",
            "title": {"text": "active parameters per token"},
            "range": [math.log10(low), math.log10(high) + 0.25],
        },
        yaxis={"type": "log", "title": {"text": "total parameters"}},
        legend={"title": {"text": "family"}},
    )
    return figure


def sparsity_by_half_year(frame: "pl.DataFrame") -> "pl.DataFrame":
    """[half_year (its first day), models, median, highest, share_94, share_97]: sparsity by
    parameters of the models of each half-year, and the share of them at or above 94 % and 97 %.
    """
    import polars as pl

    half = pl.datetime(
        pl.col("date").dt.year(), pl.when(pl.col("date").dt.month() > 6).then(7).otherwise(1), 1
    ).cast(pl.Date)
    return (
        frame.group_by(half.alias("half_year"))
        .agg(
            pl.len().alias("models"),
            pl.col("sparsity").median().alias("median"),
            pl.col("sparsity").max().alias("highest"),
            *(
                (pl.col("sparsity") >= level).mean().alias(f"share_{100 * level:.0f}")
                for level in MARKED
            ),
        )
        .sort("half_year")
    )


def sparsity_over_time(frame: "pl.DataFrame") -> "go.Figure":
    """1 - active / total against date, with 94 % and 97 % marked, and its median in each half-year;
    1 - k / E of the same model as an open marker.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    medians = sparsity_by_half_year(frame)
    figure.add_scatter(
        x=medians["half_year"],
        y=medians["median"],
        mode="lines",
        name="median of a half-year (parameters)",
        line={"shape": "hv", "width": 2},
    )
    for name, column, symbol in (
        ("1 - active / total (parameters)", "sparsity", "circle"),
        ("1 - k / E (experts)", "expert_sparsity", "circle-open"),
    ):
        figure.add_scatter(
            x=frame["date"],
            y=frame[column],
            mode="markers",
            name=name,
            marker={"size": 9, "symbol": symbol},
            error_y=_sparsity_range(frame) if column == "sparsity" else None,
            customdata=_hover(frame),
            hovertemplate=_HOVER,
        )
    for level in MARKED:
        figure.add_hline(
            y=level, line={"color": "#a8321a", "width": 1}, annotation={"text": f"{level:.0%}"}
        )
    figure.update_layout(
        title={"text": "Sparsity of published MoE models: two definitions"},
        xaxis={"title": {"text": "date of publication"}},
        yaxis={"title": {"text": "sparsity"}, "tickformat": ".0%", "range": [0.6, 1.0]},
    )
    return figure


_HOVER = (
    "%{customdata[0]}<br>total %{customdata[1]}, active %{customdata[2]} (convention "
    "%{customdata[3]})<br>%{customdata[4]}<extra></extra>"
)


def _hover(rows: "pl.DataFrame") -> list[list[str]]:
    return [
        [
            row["name"],
            f"{row['total'] / 1e9:,.2f}B",
            f"{row['active'] / 1e9:,.2f}B",
            row["convention"],
            f"{row['top_k']:g} of {row['num_experts']} experts, sparsity {row['sparsity']:.1%} "
            f"(experts {row['expert_sparsity']:.1%})",
        ]
        for row in rows.iter_rows(named=True)
    ]


def _range(rows: "pl.DataFrame") -> dict[str, object]:
    """Bars from the least to the most active parameters, for models whose count varies."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [
            row["active_max"] - row["active"] if _varies(row) else 0
            for row in rows.iter_rows(named=True)
        ],
        "arrayminus": [
            row["active"] - row["active_min"] if _varies(row) else 0
            for row in rows.iter_rows(named=True)
        ],
    }


def _sparsity_range(rows: "pl.DataFrame") -> dict[str, object]:
    named = list(rows.iter_rows(named=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [
            (row["active"] - row["active_min"]) / row["total"] if _varies(row) else 0
            for row in named
        ],
        "arrayminus": [
            (row["active_max"] - row["active"]) / row["total"] if _varies(row) else 0
            for row in named
        ],
    }


def _varies(row: dict[str, object]) -> bool:
    """Does the model choose its count (LongCat)?

    Then the range is in convention B, as its figure is.
    """
    return row["convention"] == "B" and row["active_max"] != row["active_min"]
