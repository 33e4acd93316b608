"""The load heatmap: one row a layer, one column an expert."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, expected
from moe_lab.report.canvas import Canvas, drawn, need
from moe_lab.report.theme import DEAD

MAX_LOG2_LOAD = 4
"""The load scale ends at 16 times the fair share and at a 16th of it; what lies beyond takes the
colour of the end.
"""


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
