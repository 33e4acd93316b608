"""The figures of the verdict: laws beside their runs, compute saved, gain per doubling, elasticity,
power.

Frames in, plotly figures out, as in `figures`.
"""

from __future__ import annotations

import math

import polars as pl

from moe_lab.report.canvas import Canvas, drawn, error_bars, need, plain
from moe_lab.report.run_figures import add_line, ratio_axis
from moe_lab.report.theme import DASHES, SERIES, SYMBOLS

MARGIN = "rgba(125,127,136,0.22)"


@drawn
def law_fit(points: pl.DataFrame, curves: pl.DataFrame, variable: str) -> Canvas:
    """A fitted law beside the runs it was fitted to, a colour for each size and budget.

    Args:
        points, curves: columns x, loss, group, as ``scaling.law_curves``.
        variable: what x is.
    """
    for frame in (points, curves):
        need(frame, "x", "loss", "group")
    figure = Canvas().update_layout(hovermode="closest")
    for index, name in enumerate(points["group"].unique(maintain_order=True)):
        runs, curve = (frame.filter(pl.col("group") == name) for frame in (points, curves))
        add_line(figure, curve["x"], curve["loss"], index, plain(name) or "fitted law")
        figure.add_scatter(
            x=runs["x"].to_list(),
            y=runs["loss"].to_list(),
            mode="markers",
            marker={
                "color": SERIES[index % len(SERIES)],
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": 8,
            },
            name=f"{plain(name)}, runs" if name else "runs",
            hovertemplate=f"{plain(variable)} %{{x:.4~g}}: %{{y:.4f}} nats<extra></extra>",
        )
    figure.update_yaxes(title_text="loss, nats/token")
    if variable == "ratio":
        return ratio_axis(figure, points["x"]).update_layout(height=400)
    figure.update_xaxes(type="log", title_text=f"{plain(variable)} (log scale)")
    return figure.update_layout(height=400)


@drawn
def wall_compute(measured: pl.DataFrame, published: pl.DataFrame) -> Canvas:
    """Compute saved against ratio, with published frontiers under it.

    Args:
        measured: columns ratio, compute (multiplier against the smallest ratio), lo, hi.
        published: columns frontier, ratio, compute, beyond (outside the runs it was fitted on).
    """
    need(measured, "ratio", "compute", "lo", "hi")
    figure = Canvas().update_layout(hovermode="closest")
    for index, (name, rows) in enumerate(
        published.group_by("frontier", maintain_order=True), start=1
    ):
        style = {
            "color": SERIES[index % len(SERIES)],
            "dash": DASHES[index % len(DASHES)],
            "width": 1.5,
        }
        figure.add_scatter(
            x=rows["ratio"].to_list(),
            y=rows["compute"].to_list(),
            mode="lines",
            line=style,
            name=plain(name[0]),
            hovertemplate="ratio %{x:.3~g}: x%{y:.2f} compute",
        )
    _points(
        figure,
        measured,
        "compute",
        0,
        "this sweep",
        "circle",
        "ratio %{x:.4~g}: x%{y:.2f} compute",
        lines=True,
    )
    ends = pl.concat([measured["compute"], published["compute"]])
    powers = range(math.floor(math.log2(ends.min())), math.ceil(math.log2(ends.max())) + 1)  # type: ignore[arg-type]
    ticks = [2.0**power for power in powers[:: len(powers) // 8 + 1]]
    figure.update_yaxes(title_text="compute saved, factor", type="log", tickvals=ticks)
    figure.update_yaxes(ticktext=[f"{tick:.4g}" for tick in ticks])
    return ratio_axis(figure, measured["ratio"]).update_layout(height=420)


@drawn
def wall_loss(measured: pl.DataFrame, published: pl.DataFrame) -> Canvas:
    """Loss against training compute: this sweep's best per budget and a published compute-optimal
    frontier.

    Args:
        measured: columns compute (FLOPs), loss, ratio.
        published: columns frontier, compute, loss.
    """
    need(measured, "compute", "loss", "ratio")
    figure = Canvas().update_layout(hovermode="closest")
    for index, (name, rows) in enumerate(
        published.group_by("frontier", maintain_order=True), start=1
    ):
        add_line(figure, rows["compute"], rows["loss"], index, plain(name[0]))
    figure.add_scatter(
        x=measured["compute"].to_list(),
        y=measured["loss"].to_list(),
        mode="markers",
        marker={"color": SERIES[0], "symbol": "circle", "size": 9},
        customdata=measured["ratio"].to_list(),
        hovertemplate="%{x:.2e} FLOPs, best at ratio %{customdata:.4~g}: %{y:.4f}<extra></extra>",
        name="this sweep, best ratio of each budget",
    )
    figure.update_xaxes(type="log", title_text="training FLOPs (log scale)", exponentformat="power")
    figure.update_yaxes(title_text="loss, nats/token (of its own text and tokens)")
    return figure.update_layout(height=400)


@drawn
def wall_gain(gains: pl.DataFrame) -> Canvas:
    """Gain per doubling of the ratio with its interval, against the margin below which a doubling
    buys nothing.

    Args:
        gains: columns ratio_from, ratio_to, gain, lo, hi, margin, as ``Verdict.gain_table()``.
    """
    need(gains, "ratio_from", "ratio_to", "gain", "lo", "hi", "margin")
    figure = Canvas().update_layout(hovermode="closest")
    margin = float(gains["margin"][0])
    figure.add_hrect(y0=-margin, y1=margin, fillcolor=MARGIN, line_width=0, layer="below")
    middle = (gains["ratio_from"] * gains["ratio_to"]).sqrt()
    rows = gains.with_columns(ratio=middle).rename({"gain": "value"})
    steps = [f"{low:g} to {high:g}" for low, high in gains.select("ratio_from", "ratio_to").rows()]
    _points(
        figure,
        rows,
        "value",
        0,
        "gain per doubling",
        "circle",
        "%{customdata}: %{y:.4f} nats per doubling",
        custom=steps,
    )
    figure.add_hline(y=0, line={"color": SERIES[-1], "width": 1})
    figure.add_scatter(
        x=[None],
        y=[None],
        mode="markers",
        marker={"symbol": "square", "size": 12, "color": MARGIN},
        name="within the margin",
    )
    figure.update_yaxes(title_text="nats per doubling of the ratio")
    ends = pl.concat([gains["ratio_from"], gains["ratio_to"]])
    edges = [math.log10(ends.min()), math.log10(ends.max())]  # type: ignore[arg-type]
    return ratio_axis(figure, ends).update_xaxes(range=edges).update_layout(height=360)


@drawn
def wall_elasticity(frame: pl.DataFrame, margin: float) -> Canvas:
    """Elasticity d ln C / d ln ratio of each arm and budget with its interval, and of published
    laws.

    Args:
        frame: columns what, elasticity, lo, hi (null for laws), published.
        margin: elasticity below which a doubling of the ratio is worth less than the compute that
            counts as nothing.
    """
    need(frame, "what", "elasticity", "lo", "hi", "published")
    figure = Canvas().update_layout(hovermode="closest")
    figure.add_vrect(x0=-margin, x1=margin, fillcolor=MARGIN, line_width=0, layer="below")
    place = {name: index for index, name in enumerate(reversed(frame["what"].to_list()))}
    for known, name, series, symbol in (
        (False, "this sweep, 90 % interval", 0, "circle"),
        (True, "published", 1, "diamond-open"),
    ):
        rows = frame.filter(pl.col("published") == known)
        if not rows.height:
            continue
        bars = {
            "array": (rows["hi"] - rows["elasticity"]).to_list(),
            "arrayminus": (rows["elasticity"] - rows["lo"]).to_list(),
        }
        figure.add_scatter(
            x=rows["elasticity"].to_list(),
            y=[place[what] for what in rows["what"]],
            mode="markers",
            marker={"size": 9, "color": SERIES[series], "symbol": symbol},
            error_x=None
            if known
            else {"type": "data", "symmetric": False, "thickness": 2, "width": 5, **bars},
            customdata=[plain(what) for what in rows["what"]],
            hovertemplate="%{customdata}: %{x:.2f}<extra></extra>",
            name=name,
        )
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[plain(name) for name in place],
        range=[-0.6, len(place) - 0.4],
    )
    figure.update_xaxes(title_text="elasticity")
    return figure.update_layout(height=150 + 34 * max(len(place), 2))


@drawn
def wall_power(frame: pl.DataFrame) -> Canvas:
    """The chance that a sweep of this grid settles each candidate truth, against its seeds.

    Args:
        frame: columns truth, seeds, settled, as ``scaling.wall_power.power``.
    """
    need(frame, "truth", "seeds", "settled")
    figure = Canvas().update_layout(hovermode="closest")
    for index, (name, rows) in enumerate(
        frame.sort("seeds").group_by("truth", maintain_order=True)
    ):
        figure.add_scatter(
            x=rows["seeds"].to_list(),
            y=rows["settled"].to_list(),
            mode="lines+markers",
            line={
                "color": SERIES[index % len(SERIES)],
                "dash": DASHES[index % len(DASHES)],
                "width": 1.5,
            },
            marker={"size": 8, "symbol": SYMBOLS[index % len(SYMBOLS)]},
            name=plain(name[0]),
            hovertemplate="%{x} seeds: %{y:.2f}",
        )
    figure.add_hline(y=0.9, line={"color": SERIES[-1], "dash": "dot", "width": 1.5})
    figure.update_xaxes(
        title_text="seeds at each ratio", tickvals=frame["seeds"].unique().sort().to_list()
    )
    figure.update_yaxes(title_text="chance of the right verdict", range=[-0.03, 1.03])
    return figure.update_layout(height=360)


@drawn
def against_experts(frame: pl.DataFrame) -> Canvas:
    """Loss of each alternative less that of more experts at the same total, with its interval over
    seeds.

    Args:
        frame: columns alternative, ratio, difference, lo, hi, seeds, as
            ``scaling.against_experts``.
    """
    need(frame, "alternative", "ratio", "difference", "lo", "hi", "seeds")
    figure = Canvas().update_layout(hovermode="closest")
    figure.add_hline(y=0, line={"color": SERIES[-1], "width": 1})
    for index, (name, rows) in enumerate(frame.group_by("alternative", maintain_order=True)):
        up, down = rows["hi"] - rows["difference"], rows["difference"] - rows["lo"]
        bars = {
            "array": up.to_list(),
            "arrayminus": down.to_list(),
            "color": SERIES[index % len(SERIES)],
        }
        figure.add_scatter(
            x=(
                rows["ratio"] * 2 ** (0.06 * index)
            ).to_list(),  # beside each other, where intervals would hide one another
            y=rows["difference"].to_list(),
            mode="lines+markers",
            line={
                "color": SERIES[index % len(SERIES)],
                "dash": DASHES[index % len(DASHES)],
                "width": 1.5,
            },
            marker={
                "color": SERIES[index % len(SERIES)],
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": 9,
            },
            error_y={"type": "data", "symmetric": False, "thickness": 1.5, "width": 5, **bars},
            customdata=rows.select("ratio", "seeds").rows(),
            hovertemplate="ratio %{customdata[0]:.4~g}, %{customdata[1]} seeds: %{y:+.4f} nats",
            name=plain(name[0]),
        )
    figure.update_yaxes(title_text="loss less that of more experts, nats/token")
    return ratio_axis(figure, frame["ratio"]).update_layout(height=400)


def _points(
    figure: Canvas,
    rows: pl.DataFrame,
    column: str,
    series: int,
    name: str,
    symbol: str,
    hover: str,
    *,
    lines: bool = False,
    custom: list[str] | None = None,
) -> None:
    figure.add_scatter(
        x=rows["ratio"].to_list(),
        y=rows[column].to_list(),
        mode="lines+markers" if lines else "markers",
        line={"color": SERIES[series], "width": 2},
        marker={"color": SERIES[series], "symbol": symbol, "size": 9},
        error_y=error_bars(rows, column, "lo", "hi", thickness=1.5, width=5),
        customdata=custom,
        hovertemplate=hover + "<extra></extra>",
        name=name,
    )
