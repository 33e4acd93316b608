"""Maps: one cell per expert and layer, or per pair of experts, in log2 of a ratio whose even value
is 1.

With hundreds of experts a map of pairs is binned: neighbours in the order of the clustering (or of
the id) share a cell, whose value is the sum of their counts over the sum of what was expected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, expected
from moe_lab.report.canvas import Canvas, drawn, need

BINS = 128
"""Most rows and columns of a map of pairs."""
REACH = 3
"""The scale ends at 8 times the even value and at an 8th of it; what lies beyond takes the colour
of the end.
"""


@drawn
def domain_specialisation(frame: pl.DataFrame, *, domain: object = None) -> Canvas:
    """Layer x expert map of one domain: its share of tokens over that of all domains.

    Args:
        frame: columns layer, domain, expert, specialisation, at_random as
            ``analysis.domain_specialisation``.
        domain: which domain; the first one by default.
    """
    need(frame, "layer", "domain", "expert", "specialisation", "at_random")
    wanted = frame["domain"][0] if domain is None else domain
    rows = frame.filter(pl.col("domain") == wanted)
    if not rows.height:
        raise AnalysisError(
            expected(f"a domain among {frame['domain'].unique().sort().to_list()}", repr(domain))
        )
    return _layer_map(
        rows, rows["specialisation"] / rows["at_random"], "domain's share ÷ overall share"
    )


@drawn
def load_shift(frame: pl.DataFrame) -> Canvas:
    """Layer x expert map of how an expert's share of the slots changed, as a ratio.

    Args:
        frame: columns layer, expert, share_a, share_b as ``analysis.load_shift``.
    """
    need(frame, "layer", "expert", "share_a", "share_b")
    return _layer_map(frame, frame["share_b"] / frame["share_a"], "share after ÷ share before")


@drawn
def coactivation(
    frame: pl.DataFrame,
    *,
    layer: int | None = None,
    order: pl.DataFrame | None = None,
    bins: int = BINS,
) -> Canvas:
    """Expert x expert map of one layer: pairs that ran together over what the two loads alone would
    give.

    Args:
        frame: columns layer, expert_a, expert_b, count, expected as ``analysis.coactivation``.
        layer: which layer; the first one by default.
        order: columns layer, place, expert as ``analysis.coactivation_order``; by id without it.
        bins: most rows and columns; with more experts, neighbours share a cell.
    """
    need(frame, "layer", "expert_a", "expert_b", "count", "expected")
    wanted = frame["layer"][0] if layer is None else layer
    rows = frame.filter(pl.col("layer") == wanted)
    need(rows, "layer")
    experts = int(rows["expert_b"].max()) + 1  # type: ignore[arg-type]
    place = np.arange(experts)
    if order is not None:
        own = order.filter(pl.col("layer") == wanted)
        place[own["expert"].to_numpy()] = own["place"].to_numpy()
    sums = [_square(rows, name, place, experts) for name in ("count", "expected")]
    names = np.argsort(place)
    count, even = (table + table.T for table in sums)
    return _pair_map(count, even, names, names, bins, "expert", "expert")


@drawn
def transitions(
    frame: pl.DataFrame, *, layers: tuple[int, int] | None = None, bins: int = BINS
) -> Canvas:
    """Expert x expert map from one layer to another: tokens that ran both over what independent
    layers would give.

    Args:
        frame: columns from_layer, to_layer, expert_from, expert_to, count, expected as
            ``analysis.transitions``.
        layers: which pair; the first one by default. Columns are put beside the rows that lead to
            them most.
        bins: most rows and columns; with more experts, neighbours share a cell.
    """
    need(frame, "from_layer", "to_layer", "expert_from", "expert_to", "count", "expected")
    first, second = layers or frame.select("from_layer", "to_layer").row(0)
    rows = frame.filter((pl.col("from_layer") == first) & (pl.col("to_layer") == second)).sort(
        "expert_from", "expert_to"
    )
    need(rows, "from_layer")
    shape = int(rows["expert_from"].max()) + 1, int(rows["expert_to"].max()) + 1  # type: ignore[arg-type]
    count, even = (
        rows[name].to_numpy().astype(np.float64).reshape(shape) for name in ("count", "expected")
    )
    lift = np.divide(count, even, out=np.zeros(shape), where=even > 0)
    order = np.argsort(lift.argmax(axis=0), kind="stable")
    return _pair_map(
        count[:, order],
        even[:, order],
        np.arange(shape[0]),
        order,
        bins,
        f"layer {second}",
        f"layer {first}",
    )


def _square(
    rows: pl.DataFrame, column: str, place: NDArray[np.int64], experts: int
) -> NDArray[np.float64]:
    table = np.zeros((experts, experts))
    table[place[rows["expert_a"].to_numpy()], place[rows["expert_b"].to_numpy()]] = rows[
        column
    ].to_numpy()
    return table


def _pair_map(
    count: NDArray,
    even: NDArray,
    rows: NDArray,
    columns: NDArray,
    bins: int,
    x_title: str,
    y_title: str,
) -> Canvas:
    """A map of count / even; ``rows`` and ``columns`` are the experts in drawn order."""
    edges = [
        np.unique(np.linspace(0, size, min(size, bins) + 1).round().astype(int))
        for size in count.shape
    ]
    count, even = (
        np.add.reduceat(np.add.reduceat(table, edges[0][:-1], 0), edges[1][:-1], 1)
        for table in (count, even)
    )
    lift = np.divide(count, even, out=np.full(count.shape, np.nan), where=even > 0)
    names = [_names(order, edge) for order, edge in zip((rows, columns), edges, strict=True)]
    binned = max(len(rows), len(columns)) > bins
    made = _map(
        lift, names[1], names[0], "from %{y} to %{x}: %{customdata:.2f} \u00d7 even<extra></extra>"
    )
    made.update_xaxes(
        title_text=f"{x_title}{', neighbours binned' if binned else ''}",
        showticklabels=len(names[1]) <= 32,
    )
    made.update_yaxes(title_text=y_title, showticklabels=len(names[0]) <= 32)
    return made.update_layout(height=560)


def _names(order: NDArray, edges: NDArray) -> list[str]:
    """What each cell is called: its expert, or the first of its experts and how many more."""
    sizes = np.diff(edges)
    return [
        str(order[start]) + (f" +{size - 1}" if size > 1 else "")
        for start, size in zip(edges[:-1], sizes, strict=True)
    ]


def _layer_map(rows: pl.DataFrame, ratio: pl.Series, title: str) -> Canvas:
    layers = rows["layer"].unique().sort()
    table = np.full((layers.len(), int(rows["expert"].max()) + 1), np.nan)  # type: ignore[arg-type]
    places = {layer: index for index, layer in enumerate(layers)}
    table[[places[layer] for layer in rows["layer"]], rows["expert"].to_numpy()] = ratio.to_numpy()
    hover = "layer %{y}, expert %{x}: %{customdata:.2f} \u00d7<extra></extra>"
    made = _map(table, list(range(table.shape[1])), [str(layer) for layer in layers], hover, title)
    ticks = np.unique(
        np.linspace(0, layers.len() - 1, min(layers.len(), 24)).round().astype(int)
    ).tolist()
    made.update_yaxes(
        type="category", tickvals=[str(layers[row]) for row in ticks], title_text="layer"
    )
    made.update_xaxes(title_text="expert")
    return made.update_layout(height=190 + int(np.clip(layers.len() * 26, 90, 760)))


def _map(
    ratio: NDArray, x: list[Any], y: list[Any], hover: str, title: str = "times the even value"
) -> Canvas:
    with np.errstate(divide="ignore", invalid="ignore"):
        shade = np.clip(np.log2(ratio), -REACH - 1, REACH + 1).astype(np.float32)
    made = Canvas()
    gap = 1 if ratio.size <= 2000 else 0
    made.add_heatmap(
        z=shade,
        customdata=ratio.astype(np.float32),
        x=x,
        y=y,
        coloraxis="coloraxis",
        hovertemplate=hover,
        xgap=gap,
        ygap=gap,
    )
    ticks = list(range(-REACH, REACH + 1))
    bar = {
        "title": {"text": title, "side": "top"},
        "tickvals": ticks,
        "ticktext": [_times(tick) for tick in ticks],
    }
    bar |= {
        "orientation": "h",
        "y": 1.0,
        "yanchor": "bottom",
        "x": 0,
        "xanchor": "left",
        "len": 300,
        "lenmode": "pixels",
    }
    made.update_xaxes(showgrid=False, type="category" if isinstance(x[0], str) else None)
    made.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return made.update_layout(coloraxis={"cmin": -REACH, "cmax": REACH, "colorbar": bar})


def _times(power: int) -> str:
    return f"{2**power}\u00d7" if power >= 0 else f"1/{2**-power}"
