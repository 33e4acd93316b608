"""Expert load of a trace, counted again from the ids themselves."""

import numpy as np
import polars as pl
import pytest
from refusals import refused

from moe_lab.analysis import expert_load, load_interval, load_over_windows, load_summary
from moe_lab.errors import AnalysisError
from moe_lab.trace import import_trace


def test_load_is_in_fair_shares_of_the_real_experts(make_trace):
    """3 real experts run 2 + 1 + 0 slots and one zero-compute expert 3: a real fair share is 1
    slot.
    """
    load = expert_load(make_trace([[0, 3], [0, 3], [1, 3]], 3, 1))
    assert load.columns == ["layer", "expert", "is_zero", "count", "share", "load"]
    assert load["count"].to_list() == [2, 1, 0, 3]
    assert load["is_zero"].to_list() == [False, False, False, True]
    assert load["share"].to_list() == pytest.approx([2 / 6, 1 / 6, 0, 3 / 6])
    assert load["load"].to_list() == pytest.approx([2, 1, 0, 3])


def test_load_of_a_layer_without_real_expert_runs_is_null(make_trace):
    load = expert_load(make_trace([[2], [2]], 2, 1))
    assert load["load"].to_list() == [None] * 3
    assert load["share"].to_list() == [0, 0, 1]


def test_load_by_a_token_column_counts_each_value_apart(make_trace, draw):
    ids, kind = draw(0, 300, 9, 3, shares=[5, 1, 1, 1, 1, 1, 1, 1, 1e-9]), np.arange(300) % 3
    names = np.array(["name", "space", None], dtype=object)[kind]
    load = expert_load(
        make_trace(
            {4: ids, 11: ids[:, ::-1].copy()},
            7,
            2,
            kind=pl.Series(names, dtype=pl.String),
            rows_per_part=64,
        ),
        by="kind",
    )
    assert load.columns == ["layer", "kind", "expert", "is_zero", "count", "share", "load"]
    assert load.height == 2 * 2 * 9
    for (layer, value), part in load.group_by("layer", "kind"):
        assert layer in (4, 11)
        counts = np.bincount(ids[kind == ["name", "space"].index(str(value))].ravel(), minlength=9)
        assert part.sort("expert")["count"].to_list() == counts.tolist()
        assert part.sort("expert")["load"].to_list() == pytest.approx(counts / counts[:7].mean())
        assert part["share"].sum() == pytest.approx(1)


def test_an_unknown_column_is_refused_with_the_known_ones(make_trace):
    with refused("column", AnalysisError):
        expert_load(make_trace([[0]], 2), by="lexer")


def test_summary_keeps_dead_and_zero_compute_experts_apart(make_trace):
    """Real counts 4, 2, 0, 0; the zero-compute expert takes half of the slots and moves none of the
    statistics.
    """
    ids = [[0, 4], [0, 4], [0, 4], [0, 4], [1, 4], [1, 4]]
    (row,) = load_summary(make_trace(ids, 4, 1)).rows(named=True)
    assert row["slots"] == 12
    assert row["zero_share"] == pytest.approx(0.5)
    assert row["max_over_mean"] == pytest.approx(4 / 1.5)
    assert row["max_violation"] == pytest.approx(4 / 1.5 - 1)
    assert row["load_cv"] == pytest.approx(np.std([4, 2, 0, 0]) / 1.5)
    assert row["effective_experts"] == pytest.approx(np.exp(row["entropy"]))
    assert row["entropy"] == pytest.approx(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    assert row["dead"] == 2


def test_summary_by_a_column_has_a_row_for_each_layer_and_value(make_trace, draw):
    trace = make_trace({0: draw(1, 60, 4, 2), 1: draw(2, 60, 4, 2)}, 4, lexer=["a", "b"] * 30)
    summary = load_summary(trace, by="lexer")
    assert summary.select("layer", "lexer").rows() == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert summary["slots"].to_list() == [60] * 4


def test_a_balance_that_holds_over_the_whole_can_fail_in_each_window(make_trace):
    """Two experts take turns: even over the trace, one of the two idle in every window."""
    trace = make_trace(np.repeat([[0], [1]], 50, axis=0), 2)
    assert load_summary(trace)["max_over_mean"].to_list() == [1]
    windows = load_over_windows(trace, window=40)
    assert windows["tokens"].to_list() == [40, 40, 20]
    assert windows["balancedness"].to_list() == pytest.approx([1 / 2, 20 / 30, 1 / 2])


def test_windows_need_a_token_table(tmp_path):
    np.save(tmp_path / "routes.npy", np.zeros((20, 2, 1), np.int32))
    trace = import_trace("vllm", tmp_path / "routes.npy", tmp_path / "t", num_experts=4)
    with refused("tokens", AnalysisError):
        load_over_windows(trace, window=10)


def test_an_empty_trace_has_no_load(make_trace):
    load = expert_load(make_trace(np.zeros((0, 2), int), 3))
    assert load["count"].to_list() == [0, 0, 0]
    assert load["load"].null_count() == 3
    assert load_summary(make_trace(np.zeros((0, 2), int), 3))["load_cv"].to_list() == [None]


def test_an_even_router_lies_at_the_sampling_null_and_a_skewed_one_above(make_trace, draw):
    columns = {"doc": np.arange(4000) // 100, "pos": np.arange(4000) % 100}
    skewed = [4, 3, 2, 1, 1, 1, 1, 1]
    trace = make_trace({0: draw(0, 4000, 8, 2), 1: draw(1, 4000, 8, 2, skewed)}, 8, **columns)
    even, uneven = load_interval(trace).rows(named=True)
    assert even["even"] == pytest.approx(np.sqrt(0.75 / (4000 * 0.25)))
    assert even["load_cv"] < 2 * even["even"] < uneven["lo"] < uneven["load_cv"] < uneven["hi"]
    assert uneven["load_cv"] == load_summary(trace)["load_cv"][1]
    few = make_trace(draw(0, 400, 8, 2), 8, doc=np.arange(400) // 100, pos=np.arange(400) % 100)
    assert load_interval(few).row(0, named=True)["lo"] is None
