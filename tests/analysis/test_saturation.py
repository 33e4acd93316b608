"""Saturation and comparison of traces of one text: worlds with a known answer, and plain set
arithmetic.
"""

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import compare, load_shift, saturation
from moe_lab.errors import AnalysisError
from moe_lab.measures import jensen_shannon_bits


def by_sets(first, second):
    return np.mean(
        [
            len(set(a) & set(b)) / len(b)
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]
    )


def test_saturation_is_the_mean_overlap_of_chosen_sets(make_trace, draw):
    early, middle, last = (draw(seed, 500, 12, 3) for seed in range(3))
    middle[:250] = last[:250]
    doc = {"doc": np.arange(500) // 50, "pos": np.arange(500) % 50}
    traces = [
        make_trace(ids, 12, rows_per_part=rows, **doc)
        for ids, rows in ((early, 77), (middle, 500), (last, 60))
    ]
    table = saturation(traces)
    whole = table.filter(pl.col("choice") == "top-k")
    assert whole["checkpoint"].to_list() == ["0", "1"]
    assert whole["saturation"].to_list() == pytest.approx(
        [by_sets(early, last), by_sets(middle, last)]
    )
    assert whole["chance"].to_list() == [3 / 12] * 2
    top = table.filter(pl.col("choice") == "top-1")
    assert top["saturation"].to_list() == pytest.approx(
        [(early[:, 0] == last[:, 0]).mean(), (middle[:, 0] == last[:, 0]).mean()]
    )
    assert top["chance"].to_list() == [1 / 12] * 2
    assert (table["lo"] < table["saturation"]).all()
    assert (table["saturation"] < table["hi"]).all()
    assert table["n_docs"].to_list() == [10] * 4


def test_checkpoints_that_share_nothing_but_their_loads_stay_at_chance(make_trace, draw):
    """Skewed loads alone give more overlap than even ones: that is what chance_by_load says."""
    shares = [6, 3, 1, 1, 1, 1]
    traces = [make_trace(draw(seed, 20_000, 6, 2, shares), 6) for seed in (0, 1)]
    table = saturation(traces)
    assert table["saturation"].to_list() == pytest.approx(
        table["chance_by_load"].to_list(), abs=0.01
    )
    assert (table["saturation"] > table["chance"] + 0.05).all()


def test_the_first_choice_is_the_slot_of_the_largest_weight(make_trace):
    one = make_trace([[0, 1], [0, 1]], 4, weights=[[0.3, 0.7], [0.7, 0.3]])
    other = make_trace([[1, 0], [1, 0]], 4, weights=[[0.6, 0.4], [0.6, 0.4]])
    table = saturation([one, other])
    assert dict(table.select("choice", "saturation").rows()) == {"top-1": 0.5, "top-k": 1.0}


def test_tokens_without_a_slot_in_the_end_are_left_out(make_trace):
    table = saturation(
        {
            "early": make_trace([[0, 1], [2, 3]], 4),
            "end": make_trace([[0, -1], [-1, -1]], 4, top_k=2),
        }
    )
    assert table.select("checkpoint", "n_tokens", "saturation").unique().rows() == [
        ("early", 1, 1.0)
    ]


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"num_experts": 5}, "other layers or numbers of experts"),
        ({"token_id": [1, 2]}, "2 tokens of other ids"),
        ({"indices": [[0]]}, "2 and 1 tokens"),
    ],
)
def test_traces_of_other_texts_are_refused(make_trace, other, problem):
    with refused("tokens", AnalysisError):
        saturation(
            [
                make_trace([[0], [1]], 4),
                make_trace(**({"indices": [[0], [1]], "num_experts": 4} | other)),
            ]
        )


def test_one_checkpoint_is_not_enough(make_trace):
    with refused("traces", AnalysisError):
        saturation([make_trace([[0]], 2)])


def test_a_trace_compared_with_itself_has_not_changed(make_trace, draw):
    trace = make_trace(draw(0, 300, 8, 2), 6, 2, doc=np.arange(300) // 30, pos=np.arange(300) % 30)
    (row,) = compare(trace, trace).rows(named=True)
    assert (row["bits"], row["moved"], row["top1"], row["overlap"], row["shared"]) == (
        pytest.approx(0, abs=1e-12),
        0,
        1,
        1,
        300,
    )
    assert load_shift(trace, trace)["shift"].abs().max() == 0


def test_comparison_of_loads_and_choices(make_trace):
    """One token of four moves from expert 0 to expert 1."""
    before, after = make_trace([[0], [0], [1], [2]], 3, 1), make_trace([[1], [0], [1], [2]], 3, 1)
    (row,) = compare(before, after).rows(named=True)
    assert row["bits"] == pytest.approx(float(jensen_shannon_bits([2, 1, 1, 0], [1, 2, 1, 0])))
    assert (row["moved"], row["top1"], row["overlap"]) == (0.25, 0.75, 0.75)
    assert row["moved_expert"] in (0, 1)
    assert (row["bits_lo"], row["top1_lo"]) == (None, None)  # one document
    shift = load_shift(before, after)
    assert shift["shift"].to_list() == [-0.25, 0.25, 0, 0]
    assert shift["is_zero"].to_list() == [False, False, False, True]


def test_other_texts_are_compared_by_load_alone(make_trace, draw):
    doc = {"doc": np.arange(400) // 20, "pos": np.arange(400) % 20}
    first = make_trace(draw(0, 400, 6, 2), 6, token_id=1, **doc)
    second = make_trace(draw(1, 400, 6, 2, [9, 1, 1, 1, 1, 1]), 6, token_id=2, **doc)
    (row,) = compare(first, second).rows(named=True)
    assert (row["shared"], row["top1"], row["overlap_chance"]) == (0, None, None)
    assert 0 < row["bits_lo"] < row["bits"] < row["bits_hi"]
    shift = load_shift(first, second)
    assert float(shift["lo"][0]) > 0.1
    assert (shift["lo"] <= shift["shift"]).all()


def test_other_architectures_are_not_compared(make_trace):
    with refused("layers", AnalysisError):
        compare(make_trace([[0]], 2), make_trace([[0]], 3))
