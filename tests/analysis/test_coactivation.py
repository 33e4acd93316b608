"""Pairs of experts, counted again by a plain loop over tokens."""

from itertools import combinations

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

from moe_lab.analysis import coactivation
from moe_lab.errors import AnalysisError


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tokens=st.integers(0, 50), experts=st.integers(2, 8), data=st.data())
def test_every_pair_of_a_token_counts_once(make_trace, draw, tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    ids = draw(tokens, tokens, experts, k)
    ids[np.random.default_rng(0).random(ids.shape) < 0.2] = -1
    wanted = dict.fromkeys(combinations(range(experts), 2), 0)
    for row in ids:
        for pair in combinations(sorted(int(i) for i in row if i >= 0), 2):
            wanted[pair] += 1
    pairs = coactivation(make_trace(ids, experts - 1, 1, rows_per_part=20))
    assert {
        (a, b): n for a, b, n in pairs.select("expert_a", "expert_b", "count").iter_rows()
    } == wanted


def test_shares_and_lift_have_their_plain_meaning(make_trace):
    """Expert 0 runs on 4 tokens, with 1 on three of them and with 2 on one; 3 is dead."""
    pairs = coactivation(make_trace([[0, 1], [1, 0], [0, 1], [2, 0]], 4))
    (row,) = pairs.filter(pl.col("expert_a") == 0, pl.col("expert_b") == 1).rows(named=True)
    assert (row["count"], row["given_a"], row["given_b"]) == (3, 0.75, 1.0)
    assert row["expected"] == pytest.approx(4 * 12 / (12 + 4 + 3))
    assert row["lift"] == pytest.approx(3 / row["expected"])
    (dead,) = pairs.filter(pl.col("expert_a") == 0, pl.col("expert_b") == 3).rows(named=True)
    assert (dead["count"], dead["given_a"], dead["given_b"], dead["lift"]) == (0, 0, None, None)


@pytest.mark.parametrize("more", [[], [-1]])
def test_experts_of_tokens_with_one_slot_have_a_load_and_no_pairs(make_trace, more):
    pairs = coactivation(make_trace([[0, *more], [2, *more], [0, *more]], 4))
    given = {
        a: value for a, b, value in pairs.select("expert_a", "expert_b", "given_a").iter_rows()
    }
    assert given == {0: 0, 1: None, 2: 0}
    assert pairs["count"].sum() == 0


def test_independent_choices_have_a_lift_of_one_at_any_k(make_trace, draw):
    """The naive product of shares would say 0.57 for top-2 of 8: distinct experts cannot be
    independent.
    """
    pairs = coactivation(make_trace(draw(0, 40_000, 8, 2), 8))
    assert pairs["lift"].to_list() == pytest.approx([1] * 28, abs=0.1)
    assert pairs["lift"].mean() == pytest.approx(1, abs=0.01)
    assert pairs["expected"].sum() == pytest.approx(40_000)


def test_layers_can_be_chosen_and_must_exist(make_trace, draw):
    trace = make_trace({0: draw(0, 9, 4, 2), 5: draw(1, 9, 4, 2)}, 4)
    assert coactivation(trace, layers=[5])["layer"].unique().to_list() == [5]
    with refused("layers", AnalysisError):
        coactivation(trace, layers=[1])
