"""Every figure can be read: maps have ticks, hover texts have values, legends have different names,
and a figure that would show one colour is a sentence.
"""

import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest
from test_figures import RUNS, load_frame, values

from moe_lab.report import figures
from moe_lab.report.canvas import Canvas
from moe_lab.report.figure_blocks import Variant, one_plot
from moe_lab.report.heatmap_figures import MAX_LAYER_TICKS, TICK_CHARACTERS
from moe_lab.report.wall_figures import wall_gain

FIELD = re.compile(r"%\{(\w+)(?:\[(\d+)\])?:([^}]*)\}")
RANDOM = np.random.default_rng(0)


def pairs(experts: int, layer: int = 0) -> pl.DataFrame:
    """As ``analysis.coactivation``; no pair of the last expert was expected."""
    rows = [(layer, a, b) for a in range(experts) for b in range(a + 1, experts)]
    frame = pl.DataFrame(rows, schema=["layer", "expert_a", "expert_b"], orient="row")
    counts = pl.Series(RANDOM.integers(1, 50, frame.height))
    expected = pl.when(pl.col("expert_b") == experts - 1).then(0.0).otherwise(20.0)
    return frame.with_columns(count=counts, expected=expected)


def passages(experts: int, lift: float | None = None) -> pl.DataFrame:
    """As ``analysis.transitions`` from layer 0 to 1."""
    rows = [(0, 1, a, b) for a in range(experts) for b in range(experts)]
    columns = ["from_layer", "to_layer", "expert_from", "expert_to"]
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(expected=20.0)
    drawn = RANDOM.integers(1, 50, frame.height) if lift is None else np.full(len(rows), 20 * lift)
    return frame.with_columns(count=pl.Series(drawn))


def loads(layers: int, experts: int) -> pl.DataFrame:
    return load_frame(RANDOM.gamma(4, 0.25, (layers, experts)).tolist(), zero_from=experts)


def shares(layers: int, experts: int, names: tuple[str, str]) -> pl.DataFrame:
    """Columns layer, domain, expert and two shares: expert 0 has no token, and in a shift expert 1
    had none before.
    """
    grid = [(layer, "code", expert) for layer in range(layers) for expert in range(experts)]
    frame = pl.DataFrame(grid, schema=["layer", "domain", "expert"], orient="row")
    low, high = RANDOM.random((2, len(grid)))
    low[0], high[0] = 0, 0
    low[1] *= names[1] != "share_a"
    return frame.with_columns(pl.Series(names[0], high), pl.Series(names[1], low))


def layer_map(layers: int, experts: int) -> dict[str, go.Figure]:
    specialised = shares(layers, experts, ("specialisation", "at_random"))
    return {
        "expert_load": figures.expert_load(loads(layers, experts)),
        "domain_specialisation": figures.domain_specialisation(specialised),
        "load_shift": figures.load_shift(shares(layers, experts, ("share_b", "share_a"))),
    }


@pytest.mark.parametrize("experts", [8, 48, 64, 256, 768])
def test_a_map_of_pairs_names_experts_on_both_axes(experts: int) -> None:
    for figure in (figures.coactivation(pairs(experts)), figures.transitions(passages(experts))):
        heat = figure.data[0]
        for axis, names in ((figure.layout.xaxis, heat.x), (figure.layout.yaxis, heat.y)):
            assert axis.showticklabels is not False
            assert len(axis.ticktext) >= 6
            assert sum(map(len, axis.ticktext)) <= TICK_CHARACTERS
            assert all(text.isdigit() and int(text) < experts for text in axis.ticktext)
            assert set(axis.tickvals) <= set(names)


@pytest.mark.parametrize("layers", [1, 16, 47, 94])
def test_a_map_of_layers_labels_them_at_even_steps(layers: int) -> None:
    for name, figure in layer_map(layers, 64).items():
        ticks = [int(tick) for tick in figure.layout.yaxis.tickvals]
        assert min(layers, 12) <= len(ticks) <= MAX_LAYER_TICKS, name
        assert len(set(np.diff(ticks))) <= 1, name
        cells = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        assert cells / len(ticks) >= 20, name


def test_the_title_of_a_map_and_its_colour_bar_have_room_of_their_own() -> None:
    """With plotly's automatic margins the title of the axis stood over the cells."""
    maps = layer_map(4, 24) | {"coactivation": figures.coactivation(pairs(64))}
    for name, figure in maps.items():
        assert figure.layout.xaxis.automargin is False, name
        assert figure.layout.margin.b >= 45, name
        assert figure.layout.annotations[0].yref == "paper", name
        assert "\u00f7" in figure.layout.annotations[0].text or name == "coactivation"


def drawn_figures() -> dict[str, Any]:
    profile = pl.DataFrame(
        {
            "layer": [None, None, 0, 0],
            "class": ["name", "sign", "name", "sign"],
            "n_tokens": [90, 10, 90, 10],
            "n_docs": [4, 1, 4, 1],
            "mean": [2.0, 1.0, 2.1, 0.9],
            "lo": [1.8, None, None, None],
            "hi": [2.3, None, None, None],
        }
    )
    hard = pl.DataFrame(
        {
            "layer": [0, 0, 1, 1],
            "align": ["input", "target"] * 2,
            "rho_token": [0.1, None, 0.2, 0.0],
            "rho_token_lo": [0.0, None, None, -0.1],
            "rho_token_hi": [0.2, None, None, 0.1],
            "rho_raw": [0.3, None, 0.2, 0.1],
            "verdict": ["aligned", "static", "too few documents", "weak"],
        }
    )
    devices = [(layer, device, 0.5 * device) for layer in range(4) for device in range(4)]
    placed = pl.DataFrame(devices, schema=["layer", "device", "load"], orient="row")
    points = pl.DataFrame({"x": [1.0, 2.0], "loss": [3.0, 2.9], "group": ["", ""]})
    dead = load_frame([[0.0, 2.0, 1.0], [1.0, 1.5, 0.5]])
    return layer_map(3, 48) | {
        "expert_load, dead": figures.expert_load(dead),
        "coactivation": figures.coactivation(pairs(48)),
        "transitions": figures.transitions(passages(48)),
        "frontier": figures.frontier(RUNS),
        "class_profile": figures.class_profile(profile),
        "difficulty_map": figures.difficulty_map(hard),
        "placement_load": figures.placement_load(placed),
        "law_fit": figures.law_fit(points, points, "ratio"),
    }


def shown_values(trace: Any, name: str, index: str) -> np.ndarray:
    """What a field of a hover text reads, at the points that have a mark."""
    data = getattr(trace, name)
    if isinstance(data, dict | np.ndarray):
        found = values(data)
        found = found[..., int(index)] if index else found
    else:
        found = np.array([row[int(index)] if index else row for row in data], dtype=float)
    marks = trace.z if trace.type == "heatmap" else trace.y
    there = values(marks) if isinstance(marks, dict) else np.array(marks, dtype=float)
    return found[np.isfinite(there) | np.isinf(there)]


def test_no_hover_text_shows_a_missing_value() -> None:
    seen = 0
    for name, figure in drawn_figures().items():
        for trace in figure.data:
            assert trace.type != "heatmap" or trace.hoverongaps is False, name
            for field, index, _ in FIELD.findall(trace.hovertemplate or ""):
                assert np.isfinite(shown_values(trace, field, index)).all(), (name, field, index)
                seen += 1
    assert seen > 12


def test_no_legend_has_two_equal_names() -> None:
    for name, figure in drawn_figures().items():
        legend = [trace.name for trace in figure.data if trace.showlegend is not False]
        named = [entry for entry in legend if entry is not None]
        assert len(named) == len(set(named)), name


def test_a_map_of_one_colour_is_a_sentence() -> None:
    even = load_frame([[1.0, 1.01, 0.99]] * 2)
    assert figures.expert_load.canvas(even).in_words == "every value is 1 (within 1.0 %)"
    assert figures.transitions.canvas(passages(8, lift=1.0)).in_words == "every value is 1"
    assert not figures.expert_load.canvas(load_frame([[1.0, 1.2, 0.8]])).in_words
    assert not figures.expert_load.canvas(load_frame([[1.0, 1.0, 0.0]])).in_words
    assert not figures.transitions.canvas(passages(8)).in_words
    nobody = even.with_columns(load=pl.lit(None, dtype=pl.Float64))
    assert figures.expert_load.canvas(nobody).in_words == "no expert ran"


def test_variants_of_one_colour_are_named_and_left_out() -> None:
    flat, told = Canvas(), Canvas()
    flat.in_words = "every value is 1"
    data = pl.DataFrame({"a": [1]})
    variants = [Variant("topk 1:1", flat), Variant("topk 8:1", told)]
    block = one_plot("expert_load", "n = 1 token.", "Load.", variants, data)
    assert [variant.name for variant in block.plots[0].variants] == ["topk 8:1"]
    assert block.caption == "Not drawn: topk 1:1: every value is 1. n = 1 token."
    assert one_plot("expert_load", "n = 1 token.", "Load.", flat, data).plots == ()


def test_the_widest_pairs_do_not_all_share_one_class() -> None:
    kinds = "abcdef"
    rows = [
        (a, b, layer, 0.9 if a == "a" else 0.1 + 0.01 * kinds.index(b), 0.05)
        for place, a in enumerate(kinds)
        for b in kinds[place + 1 :]
        for layer in range(2)
    ]
    columns = ["domain_a", "domain_b", "layer", "bits", "shuffled_95"]
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(lo=None, hi=None)
    frame = frame.cast({"lo": pl.Float64, "hi": pl.Float64})
    names = [trace.name for trace in figures.domain_divergence(frame).data][:-1]
    assert len(names) >= 4
    assert all(sum(kind in name.split(" | ") for name in names) <= 2 for kind in kinds)
    few = frame.filter(pl.col("domain_a").is_in(["a", "b"]) & pl.col("domain_b").is_in(["b", "c"]))
    drawn: Any = figures.domain_divergence(few).data
    assert len(drawn) - 1 == 3


def test_intervals_of_several_series_stand_beside_each_other() -> None:
    rows = pl.DataFrame(
        {"run": ["a", "a", "b", "b"], "layer": [0, 1, 0, 1], "load_cv": [0.5] * 4, "lo": [0.4] * 4}
    ).with_columns(hi=pl.lit(0.6), even=pl.lit(0.1))
    first, second, _ = figures.load_interval(rows).data
    assert np.subtract(second.x, first.x) == pytest.approx([0.06, 0.06])
    assert list(first.customdata) == [0, 1]


def test_the_gain_of_each_doubling_lies_between_labelled_ratios() -> None:
    gains = pl.DataFrame({"ratio_from": [1.0, 2.0], "ratio_to": [2.0, 4.0], "gain": [0.05, 0.04]})
    gains = gains.with_columns(lo=pl.lit(0.03), hi=pl.lit(0.06), margin=pl.lit(0.02))
    axis = wall_gain(gains).layout.xaxis
    assert 10 ** np.array(axis.range) == pytest.approx([1, 4])
    assert list(axis.ticktext) == ["1", "2", "4"]
