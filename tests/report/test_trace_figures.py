"""Figures of trace analyses, and the page of several bare traces: what a reader would read off
them.
"""

import base64
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from refusals import refused
from report_fixtures import Shape, make_trace

from moe_lab import analysis
from moe_lab.errors import AnalysisError
from moe_lab.report import figures, write_report
from moe_lab.trace import open_trace


def values(data):
    if isinstance(data, dict):
        raw = np.frombuffer(base64.b64decode(data["bdata"]), dtype=data["dtype"])
        return (
            raw.reshape([int(size) for size in data["shape"].split(",")])
            if "shape" in data
            else raw
        )
    return np.asarray(data, dtype=float)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return open_trace(
        make_trace(
            tmp_path_factory.mktemp("trace") / "t",
            Shape(layers=3, experts=10, zero_experts=2, top_k=3),
        )
    )


def test_a_map_of_pairs_shows_the_lift_in_the_order_of_the_clustering(trace):
    pairs = analysis.coactivation(trace)
    order = analysis.coactivation_order(pairs)
    (heat,) = figures.coactivation(pairs, layer=1, order=order).data
    names = [int(name) for name in heat.x]
    assert names == order.filter(pl.col("layer") == 1).sort("place")["expert"].to_list()
    row = pairs.filter(pl.col("layer") == 1, pl.col("expert_a") == 2, pl.col("expert_b") == 7).row(
        0, named=True
    )
    assert values(heat.customdata)[names.index(2), names.index(7)] == pytest.approx(
        row["lift"], rel=1e-5
    )
    np.testing.assert_allclose(values(heat.customdata), values(heat.customdata).T)


def test_many_experts_are_binned_by_sums_of_counts(trace):
    table = analysis.transitions(trace)
    (heat,) = figures.transitions(table, layers=(0, 1), bins=4).data
    assert values(heat.z).shape == (4, 4)
    whole = figures.transitions(table, layers=(0, 1)).data[0]
    assert list(heat.y) == ["0 +2", "3 +2", "6 +2", "9 +2"]
    assert len(whole.y) == 12


def test_a_domain_can_be_chosen_and_must_exist(trace):
    frame = analysis.domain_specialisation(trace, "lexer", resamples=0)
    assert values(figures.domain_specialisation(frame, domain="name").data[0].z).shape == (3, 12)
    with refused("domain", AnalysisError):
        figures.domain_specialisation(frame, domain="poem")


def test_every_measure_over_depth_has_a_point_a_layer(trace):
    drawn = {
        figures.router_entropy: analysis.router_entropy(trace, resamples=9),
        figures.zero_compute: analysis.zero_compute(trace, resamples=9),
        figures.repetition: analysis.repetition(trace, resamples=9),
        figures.saturation: analysis.saturation([trace, trace], resamples=9),
        figures.vocabulary_specialisation: analysis.vocabulary_specialisation(trace),
        figures.load_interval: analysis.load_interval(trace, resamples=9),
        figures.domain_divergence: analysis.domain_divergence(trace, "lexer", resamples=9),
        figures.compare: analysis.compare(trace, trace, resamples=9),
    }
    for draw, frame in drawn.items():
        figure = draw(frame)
        assert figure.data, draw.__name__
        for series in figure.data:  # marks do not overlap; hover names the layer
            assert list(np.round(series.x)) == [0, 1, 2], draw.__name__
            assert list(series.x if series.customdata is None else series.customdata) == [0, 1, 2]
    assert values(
        figures.load_shift(analysis.load_shift(trace, trace, resamples=9)).data[0].z
    ).shape == (3, 12)
    windows = figures.load_over_windows(analysis.load_over_windows(trace, 100))
    assert [series.name for series in windows.data] == ["layer 0", "layer 1", "layer 2"]


@pytest.mark.slow
def test_checkpoints_of_one_text_are_shown_with_their_saturation(tmp_path: Path):
    traces = [
        make_trace(tmp_path / name, Shape(layers=2, experts=6, documents=3, tokens=80))
        for name in ("step-1", "step-2")
    ]
    page = write_report(traces, tmp_path / "page.html").read_text()
    assert 'id="figure-saturation"' in page
    assert pl.read_parquet(tmp_path / "page_data" / "saturation.parquet")[
        "checkpoint"
    ].unique().to_list() == ["1: step-1"]


@pytest.mark.slow
def test_a_page_of_94_layers_and_512_experts_stays_under_15_megabytes(tmp_path: Path):
    trace = make_trace(
        tmp_path / "large", Shape(layers=94, experts=512, top_k=8, documents=3, tokens=120)
    )
    path = write_report(trace, tmp_path / "page.html")
    assert path.stat().st_size < 15e6
    page = path.read_text()
    assert {"coactivation", "transitions", "domain_specialisation", "expert_load"} <= set(
        re.findall(r'<figure id="figure-(\w+)"', page)
    )
    assert "neighbours sharing a cell" in page
