"""Figures of caches, placements and touched experts: what a reader would read off them."""

import base64

import numpy as np
import polars as pl
import pytest

from moe_lab.errors import AnalysisError
from moe_lab.report import figures
from moe_lab.serving import place
from moe_lab.serving import placement_load as loads_of


def traces(figure):
    return {trace["name"]: trace for trace in figure.to_plotly_json()["data"]}


def test_hit_rates_rise_over_the_budget_with_intervals_and_bounds_without():
    frame = pl.DataFrame(
        {
            "share": [0.5, 0.1, 0.1, 0.5, 0.1],
            "policy": ["lru", "lru", "clairvoyant", "clairvoyant", "static"],
            "hit_rate": [0.8, 0.2, 0.4, 0.9, None],
            "hit_rate_lo": [0.7, 0.1, 0.3, 0.8, None],
            "hit_rate_hi": [0.85, 0.4, 0.5, 0.95, None],
        }
    )
    drawn = traces(figures.expert_cache(frame))
    assert list(drawn["lru"]["x"]) == [0.1, 0.5]
    assert list(drawn["lru"]["y"]) == [0.2, 0.8]
    assert list(drawn["lru"]["error_y"]["array"]) == pytest.approx([0.2, 0.05])
    assert list(drawn["lru"]["error_y"]["arrayminus"]) == pytest.approx([0.1, 0.1])
    assert "error_y" not in drawn["clairvoyant"]
    assert drawn["clairvoyant"]["line"]["dash"] == "dot"
    assert not len(drawn["static"].get("x", ()))
    with pytest.raises(AnalysisError, match="share"):
        figures.expert_cache(frame.drop("share"))


def test_the_map_of_devices_has_a_row_for_each_layer_and_is_blank_where_nothing_ran():
    load = np.array([[3.0, 1, 1, 1], [0, 0, 0, 0]])
    frame = loads_of(place(load, 2, method="contiguous"), load)
    (heatmap,) = figures.placement_load(frame).to_plotly_json()["data"]
    raw = heatmap["customdata"]
    table = np.frombuffer(base64.b64decode(raw["bdata"]), raw["dtype"]).reshape(2, 2)
    assert table[0] == pytest.approx([4 / 3, 2 / 3])
    assert np.isnan(table[1]).all()
    assert list(heatmap["y"]) == ["0", "1"]
    assert list(heatmap["x"]) == ["0", "1"]
    shade = np.frombuffer(base64.b64decode(heatmap["z"]["bdata"]), heatmap["z"]["dtype"])
    assert shade[:2] == pytest.approx(np.log2([4 / 3, 2 / 3]))


def test_touched_experts_stand_beside_both_formulas():
    rows = [
        (None, "window", 4, 5.0, 4.5, 6.0, 5.5, 7.0),
        (None, "window", 2, 3.0, 2.5, 3.5, 3.5, 3.8),
        (None, "batch", 2, 3.4, 3.3, 3.6, 3.5, 3.8),
        (None, "batch", 4, None, None, None, 5.5, 7.0),
        (0, "window", 4, 9.0, 9.0, 9.0, 9.0, 9.0),
    ]
    names = ["layer", "kind", "size", "measured", "lo", "hi", "by_load", "by_equal_load"]
    frame = pl.DataFrame(rows, schema=names, orient="row")
    figure = figures.distinct_experts(frame)
    drawn = traces(figure)
    assert list(drawn["tokens in a row"]["x"]) == [2, 4]
    assert list(drawn["tokens in a row"]["y"]) == [3, 5]
    assert list(drawn["requests together"]["x"]) == [2]
    assert list(drawn["formula, by load"]["y"]) == [3.5, 5.5]
    assert list(drawn["formula, equal load"]["y"]) == [3.8, 7]
    assert figure.layout.xaxis.type == "log"
