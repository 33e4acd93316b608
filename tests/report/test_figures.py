"""Figures: what a reader would read off them, from the figure's own data."""

import base64
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from plotly.subplots import make_subplots
from scipy import stats

from moe_lab.errors import AnalysisError
from moe_lab.report import figures
from moe_lab.report.canvas import Canvas
from moe_lab.report.theme import DEAD
from moe_lab.seed_intervals import seed_intervals

RUNS = pl.DataFrame(
    {
        "arm": ["topk"] * 6 + ["zero"],
        "ratio": [1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 4.0],
        "seed": [0, 1, 2, 0, 1, 2, 0],
        "loss": [3.10, 3.12, 3.11, 2.90, 2.95, 2.98, 2.89],
    }
)


def load_frame(loads: list[list[float]], zero_from: int = 99) -> pl.DataFrame:
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "is_zero": expert >= zero_from,
            "count": int(value * 100),
            "load": value,
        }
        for layer, row in enumerate(loads)
        for expert, value in enumerate(row)
    ]
    return pl.DataFrame(rows)


def values(data: Any) -> np.ndarray:
    """The numbers of a plotly array, which may travel as base64."""
    if isinstance(data, dict):
        raw = np.frombuffer(base64.b64decode(data["bdata"]), dtype=data["dtype"])
        return (
            raw.reshape([int(size) for size in data["shape"].split(",")])
            if "shape" in data
            else raw
        )
    return np.asarray(data, dtype=float)


def test_seed_interval_is_the_t_interval_of_scipy() -> None:
    frame = seed_intervals(RUNS, level=0.9).filter(pl.col("arm") == "topk", pl.col("ratio") == 4.0)
    losses = [2.90, 2.95, 2.98]
    low, high = stats.t.interval(0.9, df=2, loc=np.mean(losses), scale=stats.sem(losses))
    assert frame["lo"].item() == pytest.approx(low)
    assert frame["hi"].item() == pytest.approx(high)
    assert frame["n"].item() == 3


def test_one_seed_has_no_interval() -> None:
    frame = seed_intervals(RUNS).filter(pl.col("arm") == "zero")
    assert frame.select("n", "mean", "sd", "lo", "hi").row(0) == (1, 2.89, None, None, None)


def test_frontier_has_every_run_and_a_series_per_arm() -> None:
    figure = figures.frontier(RUNS)
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sorted(y for trace in points for y in trace.y) == sorted(RUNS["loss"])
    assert [trace.name for trace in figure.data if trace.mode == "lines+markers"] == [
        "topk",
        "zero",
    ]
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.tickvals) == [1, 2, 4]


def test_frontier_draws_an_arm_without_ratio_as_a_level() -> None:
    dense = pl.DataFrame(
        {"arm": ["dense"], "ratio": [None], "seed": [0], "loss": [3.3]}, schema=RUNS.schema
    )
    figure = figures.frontier(pl.concat([RUNS, dense]))
    assert [shape.y0 for shape in figure.layout.shapes] == [3.3]
    assert figure.layout.annotations[0].text == "dense"


def test_load_scale_is_symmetric_around_the_fair_share() -> None:
    figure = figures.expert_load(load_frame([[0.5, 1.0, 1.5], [0.25, 1.75, 1.0]]))
    axis = figure.layout.coloraxis
    assert axis.cmin == -axis.cmax == -2
    assert list(axis.colorbar.ticktext) == ["1/4", "1/2", "1\u00d7", "2\u00d7", "4\u00d7"]
    np.testing.assert_allclose(values(figure.data[0].z)[0], np.log2([0.5, 1.0, 1.5]), rtol=1e-6)


def test_dead_experts_are_outside_the_scale() -> None:
    figure = figures.expert_load(load_frame([[0.0, 2.0], [1.0, 1.0]]))
    shade, dead = (values(trace.z) for trace in figure.data)
    assert np.isnan(shade[0, 0])
    assert np.argwhere(dead == 1).tolist() == [[0, 0]]
    assert np.isnan(dead).sum() == 3, "the others show their own hover"
    assert figure.data[1].coloraxis is None
    assert {colour for _, colour in figure.data[1].colorscale} == {DEAD}
    assert "no token" in figure.data[1].hovertemplate


def test_zero_experts_have_their_own_panel() -> None:
    figure = figures.expert_load(load_frame([[1.0, 1.0, 0.5]], zero_from=2))
    real, zero = figure.data
    assert (list(real.x), list(zero.x)) == ([0, 1], [2])
    assert (real.xaxis, zero.xaxis) == ("x", "x2")
    assert "zero" in figure.layout.xaxis2.title.text


def test_layers_of_different_width_keep_their_own_experts() -> None:
    frame = load_frame([[1.0, 1.0], [0.5, 1.0, 1.5]])
    shade = values(figures.expert_load(frame).data[0].z)
    assert shade.shape == (2, 3)
    assert np.isnan(shade[0, 2])


def test_sorted_load_falls_within_each_layer() -> None:
    shade = values(
        figures.expert_load(load_frame([[0.5, 2.0, 1.0], [1.5, 0.25, 1.25]]), order="load")
        .data[0]
        .z
    )
    assert (np.diff(shade, axis=1) <= 0).all()


def test_null_load_of_a_layer_without_real_slots_is_blank() -> None:
    frame = load_frame([[1.0, 1.0]]).with_columns(load=pl.lit(None, dtype=pl.Float64))
    assert np.isnan(values(figures.expert_load(frame).data[0].z)).all()


def test_class_profile_bars_reach_the_interval() -> None:
    frame = pl.DataFrame(
        {
            "layer": [None, None, 0, 0],
            "class": ["name", "<b>op", "name", "<b>op"],
            "n_tokens": [90, 10, 90, 10],
            "n_docs": [4, 4, 4, 4],
            "mean": [2.0, 1.0, 2.1, 0.9],
            "lo": [1.8, 0.7, None, None],
            "hi": [2.3, 1.2, None, None],
        }
    )
    figure = figures.class_profile(frame)
    total = figure.data[1]
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b&gt;op (10)", "name (90)"]
    assert np.add(total.x, total.error_x.array).tolist() == pytest.approx([1.2, 2.3])
    assert np.subtract(total.x, total.error_x.arrayminus).tolist() == pytest.approx([0.7, 1.8])
    assert figure.layout.shapes[0].x0 == pytest.approx(1.9)


def test_adjusted_means_stand_beside_the_raw_ones() -> None:
    frame = pl.DataFrame(
        {
            "layer": [None],
            "class": ["name"],
            "n_tokens": [9],
            "n_docs": [1],
            "mean": [2.0],
            "lo": [None],
            "hi": [None],
        }
    )
    frame = frame.with_columns(adjusted=1.5, adjusted_lo=pl.lit(1.0), adjusted_hi=pl.lit(1.75))
    _, raw, adjusted = figures.class_profile(frame.cast({"lo": pl.Float64, "hi": pl.Float64})).data
    assert (raw.x[0], adjusted.x[0]) == (2.0, 1.5)
    assert raw.y[0] > adjusted.y[0]
    assert (adjusted.error_x.array[0], raw.error_x.array[0]) == (0.25, None)


def test_spread_leaves_out_what_is_not_known() -> None:
    frame = pl.DataFrame(
        {
            "layer": [0, 1],
            "mean": [2.0, 2.1],
            "sd": [0.8, 0.9],
            "hypergeometric_sd": [0.7, 0.7],
            "target": [None, None],
        }
    )
    assert [trace.name for trace in figures.ffn_spread(frame).data] == [
        "measured",
        "drawn evenly",
        "mean",
    ]


def test_training_curves_are_thinned_and_keep_their_ends() -> None:
    steps = np.arange(5000, dtype=float)
    frame = pl.DataFrame({"run": "a", "group": "g", "tokens": steps, "loss": steps[::-1]})
    trace = figures.training_curves(frame, "loss", points=100).data[0]
    assert len(trace.x) == 100
    assert (trace.x[0], trace.x[-1], trace.y[-1]) == (0, 4999, 0)


def test_runs_of_one_group_share_a_line_style() -> None:
    frame = pl.DataFrame(
        {
            "run": ["a", "b", "c"],
            "group": ["g", "g", "h"],
            "tokens": [1.0] * 3,
            "loss": [1.0, 2.0, 3.0],
        }
    )
    first, second, third = figures.training_curves(frame, "loss").data
    assert first.line.color == second.line.color != third.line.color


def test_text_from_data_is_not_read_as_markup() -> None:
    frame = pl.DataFrame(
        {"arm": ["<a href='javascript:x'>"], "ratio": [1.0], "seed": [0], "loss": [1.0]}
    )
    assert all("<a" not in str(trace.name) for trace in figures.frontier(frame).data)


@pytest.mark.parametrize("frame", [RUNS.clear(), RUNS.drop("loss")])
def test_a_frame_that_cannot_be_drawn_says_what_it_lacks(frame: pl.DataFrame) -> None:
    with pytest.raises(
        AnalysisError, match="expected a frame with rows and columns arm, ratio, seed, loss"
    ):
        figures.frontier(frame)


def _layout(figure: go.Figure, axis: str) -> dict[str, Any]:
    values = getattr(figure.layout, axis).to_plotly_json()
    return {
        name: np.round(value, 9).tolist() if name == "domain" else value
        for name, value in values.items()
    }


@pytest.mark.parametrize("stacked", [False, True])
def test_panels_lie_where_plotly_puts_subplots(stacked: bool) -> None:
    shares = (0.5, 0.5) if stacked else (0.2, 0.5, 0.3)
    canvas = Canvas(shares, stacked=stacked, gap=0.06)
    kept = {"rows": 2, "shared_xaxes": True, "vertical_spacing": 0.06}
    across = {"cols": 3, "shared_yaxes": True, "column_widths": shares, "horizontal_spacing": 0.06}
    theirs = make_subplots(**(kept if stacked else across))
    for panel in range(1, len(shares) + 1):
        canvas.add_scatter(x=[0, 1], y=[1, 2], panel=panel)
        theirs.add_scatter(
            x=[0, 1],
            y=[1, 2],
            **({"row": panel, "col": 1} if stacked else {"row": 1, "col": panel}),
        )
    ours = canvas.figure()
    assert [(trace.xaxis, trace.yaxis) for trace in ours.data] == [
        (trace.xaxis, trace.yaxis) for trace in theirs.data
    ]
    for axis in ("x", "y"):
        for panel in ("", 2, 3)[: len(shares)]:
            whole = {"domain": [0.0, 1.0]}  # which plotly.js takes by itself
            assert whole | _layout(ours, f"{axis}axis{panel}") == whole | _layout(
                theirs, f"{axis}axis{panel}"
            )


def test_lines_and_bands_are_those_of_plotly() -> None:
    canvas, theirs = Canvas(), go.Figure()
    for figure in (canvas, theirs):
        figure.add_hline(y=3.0, line={"dash": "dash"}, annotation_text="level")
        figure.add_vline(x=2.0, line={"width": 1.5})
        figure.add_hrect(y0=-1, y1=1, fillcolor="red", line_width=0, layer="below")
        figure.add_vrect(x0=-1, x1=1, fillcolor="red")
    ours = canvas.figure().layout
    assert [shape.to_plotly_json() for shape in ours.shapes] == [
        shape.to_plotly_json() for shape in theirs.layout.shapes
    ]
    assert ours.annotations[0].to_plotly_json() == theirs.layout.annotations[0].to_plotly_json()


@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i4", ">f4"])
def test_arrays_reach_the_page_as_plotly_packs_them(dtype: str) -> None:
    table = np.arange(6).reshape(2, 3).astype(dtype)
    canvas = Canvas().add_heatmap(z=table, x=table[0], y=["a", "b"])
    (trace,) = canvas.spec()["data"]
    theirs = go.Figure(
        go.Heatmap(z=table.astype(table.dtype.newbyteorder("=")), x=table[0], y=["a", "b"])
    ).to_plotly_json()["data"][0]
    assert trace["z"] == theirs["z"]
    assert trace["y"] == ["a", "b"]


def test_a_figure_that_plotly_does_not_know_raises() -> None:
    with pytest.raises(ValueError, match="Invalid value"):
        Canvas().update_layout(height="tall").figure()
