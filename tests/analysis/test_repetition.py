"""Repetition of experts, entropy and margin, zero-compute slots: known answers and closed forms."""

import itertools
import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

from moe_lab.analysis import repetition, router_entropy, zero_compute
from moe_lab.analysis.repetition import chance_of_meeting


def test_chance_levels_are_those_of_the_mixtral_paper():
    """Table 5 of arXiv 2401.04088: 12.5 % for the first choice, about 46 % for either of two."""
    assert chance_of_meeting(8, 1) == pytest.approx(0.125)
    assert chance_of_meeting(8, 2) == pytest.approx(0.4643, abs=5e-5)
    assert chance_of_meeting(4, 3) == 1


def test_pairs_stay_within_a_document_and_across_files(make_trace):
    """Documents 0 (three tokens) and 1 (two, with a gap after); files of two rows."""
    ids = [[0, 1], [0, 2], [3, 0], [3, 0], [3, 1], [3, 1]]
    columns = {"doc": [0, 0, 0, 1, 1, 1], "pos": [0, 1, 2, 0, 1, 3]}
    table = repetition(make_trace(ids, 4, rows_per_part=2, **columns))
    assert table["n_pairs"].to_list() == [3, 3]
    assert dict(table.select("choice", "rate").rows()) == {
        "first": pytest.approx(2 / 3),
        "either": 1.0,
    }


def test_experts_drawn_at_random_repeat_by_chance(make_trace, draw):
    columns = {"doc": np.arange(20_000) // 100, "pos": np.arange(20_000) % 100}
    table = repetition(
        make_trace(
            {0: draw(0, 20_000, 8, 2), 1: draw(1, 20_000, 8, 2, [8, 4, 2, 1, 1, 1, 1, 1])},
            8,
            **columns,
        )
    )
    even, skewed = table.partition_by("layer")
    assert even["rate"].to_list() == pytest.approx([1 / 8, chance_of_meeting(8, 2)], abs=0.01)
    assert even["chance"].to_list() == [1 / 8, chance_of_meeting(8, 2)]
    assert (skewed["rate"] > skewed["chance"] + 0.05).all()  # loads alone repeat experts
    assert skewed["rate"].to_list() == pytest.approx(skewed["chance_by_load"].to_list(), abs=0.015)
    assert ((table["lo"] < table["rate"]) & (table["rate"] < table["hi"])).all()


def test_rows_in_the_order_of_a_batched_decode_are_put_in_order(make_trace):
    """Two documents, written step by step as a batch decodes them."""
    ids, doc, pos = [[0], [1], [0], [1], [0], [2]], [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]
    table = repetition(make_trace(ids, 3, doc=doc, pos=pos))
    assert table.select("n_pairs", "rate").rows() == [(4, 0.75), (4, 0.75)]


@pytest.mark.parametrize("experts", [3, 64, 65, 200])
def test_sets_meet_where_slots_are_equal(make_trace, draw, experts):
    ids = draw(0, 400, experts, 2)
    ids[::7, 1] = -1
    (rate,) = repetition(make_trace(ids, experts)).filter(choice="either")["rate"]
    used = [set(row[row >= 0]) for row in ids]
    pairs = [bool(one & two) for one, two in itertools.pairwise(used)]
    assert rate == np.mean(pairs)


def test_unused_slots_repeat_nothing(make_trace):
    table = repetition(make_trace([[-1, -1], [-1, -1], [1, -1]], 3, top_k=2))
    assert table["rate"].to_list() == [0, 0]
    assert table.filter(pl.col("choice") == "either")["chance"].to_list() == [None]


def test_entropy_and_margin_are_means_over_tokens(make_trace):
    scores = np.log(np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]))
    columns = {"doc": range(6), "pos": [0] * 6}
    trace = make_trace([[0]] * 6, 3, scores=np.tile(np.exp(scores), (3, 1)), **columns)
    (row,) = router_entropy(trace).rows(named=True)
    recorded = trace.routing.select("entropy", "margin").collect()
    assert row["entropy"] == pytest.approx(recorded["entropy"].mean())
    assert row["entropy"] == pytest.approx((1.5 * math.log(2) + math.log(3)) / 2, abs=1e-6)
    assert row["margin"] == pytest.approx(0.125, abs=1e-6)
    assert row["entropy_max"] == pytest.approx(math.log(3))
    assert (row["n_tokens"], row["n_docs"], row["n_margin"]) == (6, 6, 6)
    assert row["entropy_lo"] < row["entropy"] < row["entropy_hi"]


def test_without_a_next_expert_there_is_no_margin(make_trace):
    (row,) = router_entropy(make_trace([[0, 1]], 2)).rows(named=True)
    assert (row["margin"], row["n_margin"]) == (None, 0)


def test_zero_compute_slots_and_polarisation(make_trace):
    """Two slots over two real and two zero-compute experts: 2, 2, 0 and 1 real ones."""
    ids = [[0, 1], [1, 0], [2, 3], [0, 2]] * 3
    trace = make_trace(ids, 2, 2, doc=np.arange(12) // 2, pos=[0, 1] * 6)
    (row,) = zero_compute(trace).rows(named=True)
    assert (row["zero_ratio"], row["compute_intensity"]) == (3 / 8, 5 / 8)
    assert (row["at_zero"], row["at_full"], row["polarisation"]) == (0.25, 0.5, 0.75)
    assert row["binomial"] == pytest.approx(
        stats.binom.pmf(0, 2, 5 / 8) + stats.binom.pmf(2, 2, 5 / 8)
    )
    assert row["lo"] <= row["zero_ratio"] <= row["hi"]


def test_layers_without_zero_compute_experts_are_left_out(make_trace):
    assert zero_compute(make_trace([[0]], 2)).height == 0
