"""Maps: one cell per expert and layer, or per pair of experts, in log2 of a ratio whose even value
is 1.

With hundreds of experts a map of pairs is binned: neighbours in the order of the clustering (or of
the id) share a cell, whose value is the sum of their counts over the sum of what was expected.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from moe_lab.errors import AnalysisError, expected
from moe_lab.number_format import decimal
from moe_lab.report.canvas import Canvas, drawn, evenly, need

BINS = 128
"""Most rows and columns of a map of pairs."""
REACH = 3
"""The scale ends at 8 times the even value and at an 8th of it; what lies beyond takes the colour
of the end.
"""
EVEN = 0.03
"""A map whose values all lie this near to 1 is of one colour: a sentence says so in its place."""
TICK_CHARACTERS = 24
"""Most characters in the labels of an axis of experts: plotly turns more of them on a narrow page,
and they reach the axis title.
"""
MAX_LAYER_TICKS = 24
ABOVE, BELOW, TITLE = 66, 50, 20
"""Pixels above a map (title and colour bar) and below it (axis title), and of the title of its bar.
"""
BAR = 240
"""Length of the colour bar in pixels: all of it is seen on a page of 360."""


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
        domains = frame["domain"].unique().sort().to_list()
        raise AnalysisError(expected(f"a domain among {domains}", repr(domain)), field="domain")
    ratio = rows["specialisation"] / rows["at_random"]
    return _layer_map(rows, ratio, "domain's share ÷ overall share")


@drawn
def load_shift(frame: pl.DataFrame) -> Canvas:
    """Layer x expert map of how an expert's share of the slots changed, as a ratio.

    Args:
        frame: columns layer, expert, share_a, share_b as ``analysis.load_shift``.
    """
    need(frame, "layer", "expert", "share_a", "share_b")
    shares = [frame["share_a"], frame["share_b"]]
    hover = "%{customdata[0]:.4f} before, %{customdata[1]:.4f} after"
    return _layer_map(frame, shares[1] / shares[0], "share after ÷ share before", hover, shares)


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
        places = order.filter(pl.col("layer") == wanted)
        place[places["expert"].to_numpy()] = places["place"].to_numpy()
    sums = np.zeros((2, experts, experts))
    pairs = place[rows["expert_a"].to_numpy()], place[rows["expert_b"].to_numpy()]
    for table, name in zip(sums, ("count", "expected"), strict=True):
        table[pairs] = rows[name].to_numpy()
    names = np.argsort(place)
    count, even = sums + sums.transpose(0, 2, 1)
    return _pair_map(count, even, (names, names), bins, ("expert", "expert"))


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
    rows = frame.filter(from_layer=first, to_layer=second).sort("expert_from", "expert_to")
    need(rows, "from_layer")
    shape = int(rows["expert_from"].max()) + 1, int(rows["expert_to"].max()) + 1  # type: ignore[arg-type]
    count, even = (
        rows[name].to_numpy().astype(np.float64).reshape(shape) for name in ("count", "expected")
    )
    lift = np.divide(count, even, out=np.zeros(shape), where=even > 0)
    order = np.argsort(lift.argmax(axis=0), kind="stable")
    experts, titles = (np.arange(shape[0]), order), (f"layer {first}", f"layer {second}")
    return _pair_map(count[:, order], even[:, order], experts, bins, titles)


def _pair_map(
    count: NDArray,
    even: NDArray,
    experts: tuple[NDArray, NDArray],
    bins: int,
    titles: tuple[str, str],
) -> Canvas:
    """A map of count / even; ``experts`` and ``titles`` are those of rows and columns, the experts
    in drawn order.
    """
    edges = [evenly(size + 1, bins + 1) for size in count.shape]
    count, even = (
        np.add.reduceat(np.add.reduceat(table, edges[0][:-1], 0), edges[1][:-1], 1)
        for table in (count, even)
    )
    lift = np.divide(count, even, out=np.full(count.shape, np.nan), where=even > 0)
    rows, columns = map(_names, experts, edges)
    hover = "from %{y} to %{x}: %{customdata:.2f} \u00d7 even<extra></extra>"
    binned = ", neighbours binned" if max(map(len, experts)) > bins else ""
    made = _map(lift, columns, rows, hover, "times the even value", BINS * 4)
    made.update_xaxes(title_text=f"{titles[1]}{binned}", **_expert_ticks(columns))
    return made.update_yaxes(title_text=titles[0], **_expert_ticks(rows))


def _expert_ticks(names: list[str]) -> dict[str, Any]:
    """Every cell of a short axis, else evenly spaced ones; of a bin its first expert."""
    labels = [name.partition(" ")[0] for name in names]
    step = -(-len(names) // (TICK_CHARACTERS // max(map(len, labels))))
    return {"tickvals": names[::step], "ticktext": labels[::step]}


def _names(order: NDArray, edges: list[int]) -> list[str]:
    """What each cell is called: its expert, or the first of its experts and how many more."""
    return [
        str(order[start]) + (f" +{end - start - 1}" if end - start > 1 else "")
        for start, end in pairwise(edges)
    ]


def _layer_map(
    rows: pl.DataFrame,
    ratio: pl.Series,
    title: str,
    words: str = "%{customdata:.2f} \u00d7",
    shown: list[pl.Series] | None = None,
) -> Canvas:
    """A map of ``ratio``; ``words`` show it at hover, or the values of ``shown``."""
    layers = rows["layer"].unique().sort().to_list()
    table = layer_table(rows, ratio, layers)
    tables = [layer_table(rows, values, layers) for values in shown or ()]
    hover = f"layer %{{y}}, expert %{{x}}: {words}<extra></extra>"
    names = list(map(str, layers))
    custom = np.stack(tables, axis=-1) if tables else table
    made = _map(
        table, list(range(table.shape[1])), names, hover, title, layer_height(layers), custom
    )
    return layer_axis(made, layers).update_xaxes(title_text="expert")


def layer_table(
    rows: pl.DataFrame, values: pl.Series, layers: list[int], first: int = 0
) -> NDArray:
    """[layers, experts] of ``values``, one for each row; NaN where an expert has no row.

    Args:
        rows: columns layer and expert.
        layers: the layer of each row of the table.
        first: the expert of its first column.
    """
    experts = rows["expert"].to_numpy().astype(np.int64) - first
    table = np.full((len(layers), experts.max() + 1), np.nan)
    table[[layers.index(layer) for layer in rows["layer"]], experts] = values.to_numpy()
    return table


def layer_axis(figure: Canvas, layers: list[int]) -> Canvas:
    """The axis of a map with a row per layer, from above, with evenly spaced ticks."""
    ticks = [str(layer) for layer in layers[:: -(-len(layers) // MAX_LAYER_TICKS)]]
    figure.update_yaxes(type="category", autorange="reversed", tickvals=ticks, showgrid=False)
    return figure.update_yaxes(title_text="layer", panel=1)


def layer_height(layers: list[int]) -> int:
    """Height in pixels of the cells of a map with a row per layer."""
    return int(np.clip(len(layers) * 26, 90, 760))


def _map(
    ratio: NDArray,
    x: list[Any],
    y: list[Any],
    hover: str,
    title: str,
    height: int,
    custom: NDArray | None = None,
) -> Canvas:
    with np.errstate(divide="ignore", invalid="ignore"):
        shade = np.clip(np.log2(ratio), -REACH - 1, REACH + 1).astype(np.float32)
    customdata = (ratio if custom is None else custom).astype(np.float32)
    canvas = Canvas().add_heatmap(
        z=shade, customdata=customdata, x=x, y=y, hovertemplate=hover, coloraxis="coloraxis",
        **cell_gaps(ratio),
    )  # fmt: skip
    canvas.update_xaxes(showgrid=False, type="category" if isinstance(x[0], str) else None)
    canvas.update_yaxes(showgrid=False, autorange="reversed", type="category")
    return map_layout(canvas, ratio, REACH, title, height)


def map_layout(figure: Canvas, ratio: NDArray, reach: int, title: str, height: int) -> Canvas:
    """Place a map of ``ratio`` in log2 below its colour bar; where it is of one colour, the canvas
    says so in words.

    Margins are fixed: plotly's own put the axis title over the cells in some sizes.

    Args:
        reach: the power of two at both ends of the scale.
        title: of the scale.
        height: of the cells, in pixels.
    """
    known = ratio[~np.isnan(ratio)]
    if not known.size:
        figure.in_words = "no expert ran"
    elif (away := float(np.abs(known - 1).max())) <= EVEN:
        near = decimal(100 * away, 1)
        figure.in_words = f"every value is 1 (within {near} %)" if away else "every value is 1"
    ticks = range(-reach, reach + 1, 2 if reach > REACH else 1)
    names = [f"{2**tick}\u00d7" if tick >= 0 else f"1/{2**-tick}" for tick in ticks]
    return place_map(figure, dict(zip(ticks, names, strict=True)), reach, title, height)


def place_map(
    figure: Canvas, ticks: dict[Any, str], reach: float, title: str, height: int
) -> Canvas:
    """Place a map below its colour bar.

    Args:
        ticks: value of the colour -> its text.
        reach: the scale goes from -reach to reach.
        title: of the scale.
        height: of the cells, in pixels.
    """
    whole = ABOVE + height + BELOW
    bar = {
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
        **{"orientation": "h", "x": 0, "xanchor": "left", "xpad": 0, "ypad": 0},
        **{"yref": "container", "y": 1 - TITLE / whole, "yanchor": "top"},
        **{"len": BAR, "lenmode": "pixels"},
    }
    # A title of the bar itself would stand on the bar in low maps.
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yref": "paper", "y": 1}
    place |= {"yanchor": "bottom", "yshift": ABOVE - TITLE + 2, "font": {"size": 13}}
    figure.update_xaxes(automargin=False)
    return figure.update_layout(
        height=whole,
        margin={"t": ABOVE, "b": BELOW},
        coloraxis={"cmin": -reach, "cmax": reach, "colorbar": bar},
        annotations=[{"text": title, "showarrow": False, **place}],
    )


def cell_gaps(table: NDArray) -> dict[str, int]:
    """A pixel between the cells of a map that is not large."""
    return dict.fromkeys(("xgap", "ygap"), 1 if table.size <= 2000 else 0)
