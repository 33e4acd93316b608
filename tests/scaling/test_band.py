"""The band of the frontier: what it was fitted on, what it foresees, and what it misses."""

import math

import numpy as np
import polars as pl
import pytest

from moe_lab.scaling import frontier_band


def sweep(truth, seed=0, sd=0.003, top=8):
    rng = np.random.default_rng(seed)
    rows = [
        {"ratio": 2.0**e, "seed": s, "loss": truth(e) + rng.normal(0, sd)}
        for e in range(top)
        for s in range(3)
    ]
    return pl.DataFrame(rows).with_columns(active_params=pl.lit(1e7), tokens=pl.lit(1e9))


def test_a_line_is_foreseen_and_its_largest_ratio_lies_in_the_band():
    found = frontier_band(sweep(lambda x: 3 - 0.03 * x))
    assert found.form == "line"
    assert found.means.filter("held_out")["ratio"].to_list() == [128.0]
    last = found.curve.row(-1, named=True)
    assert last["lo"] < 3 - 0.03 * 7 < last["hi"]
    assert abs(found.forms.filter(pl.col("form") == "line")["error"][0]) < 0.01


def test_the_band_covers_the_truth_as_often_as_it_says():
    """The middle of the grid, where the line is an interpolation: 90 % of the bands hold it."""
    inside = []
    for seed in range(200):
        curve = frontier_band(sweep(lambda x: 3 - 0.03 * x, seed), draws=200).curve
        row = curve[int(np.abs(np.log2(curve["ratio"].to_numpy()) - 3).argmin())]
        inside.append(row["lo"][0] <= 3 - 0.03 * math.log2(row["ratio"][0]) <= row["hi"][0])
    assert 0.8 < np.mean(inside) < 0.97


def test_a_wall_at_the_edge_is_what_no_form_foresees():
    found = frontier_band(sweep(lambda x: 3 - 0.03 * min(x, 5), top=8), hold_out=2)
    line = found.forms.filter(pl.col("form") == "line").row(0, named=True)
    assert line["error"] == pytest.approx(0.06, abs=0.015), "two doublings of .03 that did not come"
    assert line["rmse"] < line["error"]


def test_three_ratios_leave_nothing_to_hold_out():
    found = frontier_band(sweep(lambda x: 3 - 0.03 * x, top=3))
    assert not found.means["held_out"].any()
    assert found.forms["error"].null_count() == found.forms.height
