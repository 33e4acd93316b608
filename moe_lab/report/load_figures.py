"""The load heatmap: one row a layer, one column an expert."""

import math

import numpy as np
import polars as pl

from moe_lab.errors import AnalysisError, require
from moe_lab.report.canvas import Canvas, drawn, need
from moe_lab.report.heatmap_figures import (
    cell_gaps,
    layer_axis,
    layer_height,
    layer_table,
    map_layout,
)
from moe_lab.report.theme import DEAD

MAX_LOG2_LOAD = 4
"""The load scale ends at 16 times the fair share and at a 16th of it; what lies beyond takes the
colour of the end.
"""


@drawn
def expert_load(frame: pl.DataFrame, *, order: str = "id", reach: int | None = None) -> Canvas:
    """Layer x expert heatmap of load, where 1 is the fair share; zero-compute experts in a panel of
    their own.

    Args:
        frame: one row per layer and expert with columns layer, expert, is_zero, load (fair share =
            1), as ``analysis.expert_load``.
        order: "id" keeps the experts' ids; "load" sorts each layer by load, which shows the shape
            where there are hundreds.
        reach: the power of two at both ends of the scale, for maps that are compared; as far as the
            loads go by default.
    """
    need(frame, "layer", "expert", "is_zero", "load")
    require(order in ("id", "load"), "order to be 'id' or 'load'", repr(order), error=AnalysisError)
    layers = frame["layer"].unique().sort().to_list()
    panels = [
        panel for zero in (False, True) if (panel := frame.filter(pl.col("is_zero") == zero)).height
    ]
    widths = [int(panel["expert"].max() - panel["expert"].min() + 1) for panel in panels]  # type: ignore[operator]
    shares = [max(width / sum(widths), 0.12) for width in widths]
    figure = Canvas([share / sum(shares) for share in shares], gap=0.03)
    for column, panel in enumerate(panels, start=1):
        _load_panel(figure, panel, layers, order, column)
    if reach is None:
        extreme = float(frame["load"].filter(frame["load"] > 0).log(2.0).abs().max() or 0)  # type: ignore[arg-type]
        reach = int(np.clip(math.ceil(extreme), 1, MAX_LOG2_LOAD))
    figure.update_xaxes(showgrid=False)
    loads = frame["load"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    map_layout(figure, loads, reach, "load ÷ fair share", layer_height(layers))
    return layer_axis(figure, layers)


def _load_panel(
    figure: Canvas, panel: pl.DataFrame, layers: list[int], order: str, column: int
) -> None:
    """Draw one panel: the load in log2 on the shared colour axis, and dead experts over it in a
    colour outside that scale.
    """
    first = int(panel["expert"].min())  # type: ignore[arg-type]
    load = layer_table(panel, panel["load"], layers, first).astype(np.float32)
    experts, place = range(first, first + load.shape[1]), "%{x}"
    if order == "load":
        load = -np.sort(-load, axis=1)
        experts, place = range(1, load.shape[1] + 1), "rank %{x}"
    zero = bool(panel["is_zero"][0])
    title, kind = ("zero", "zero-compute expert") if zero else ("expert", "expert")
    axes = {"x": list(experts), "y": list(map(str, layers)), "panel": column, **cell_gaps(load)}
    with np.errstate(divide="ignore", invalid="ignore"):
        shade = np.where(load > 0, np.log2(load), np.nan).astype(np.float32)
    hover = f"layer %{{y}}, {kind} {place}<br>%{{customdata:.3f}} \u00d7 fair share<extra></extra>"
    figure.add_heatmap(z=shade, customdata=load, coloraxis="coloraxis", hovertemplate=hover, **axes)
    if (load == 0).any():
        figure.add_heatmap(
            z=np.where(load == 0, 1, np.nan).astype(np.float32),
            zmin=0,
            zmax=1,
            colorscale=[[0, DEAD], [1, DEAD]],
            showscale=False,
            hovertemplate=f"layer %{{y}}, {kind} {place}<br>no token<extra></extra>",
            **axes,
        )
    ordered = ", sorted by load" if order == "load" and not zero else ""
    figure.update_xaxes(title_text=title + ordered, panel=column)
