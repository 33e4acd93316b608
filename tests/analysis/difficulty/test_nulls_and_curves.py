"""Nulls, curves, information, budget and baselines: by hand, by plain loops, or on routers of known
answer.
"""

import numpy as np
import polars as pl
import pytest
from refusals import refused
from scipy import stats
from simulated_routers import Corpus, World, simulate_corpus, simulate_router

from moe_lab.analysis.difficulty import (
    baseline_association,
    baseline_router,
    compute_budget,
    compute_variance,
    difficulty_curves,
    difficulty_information,
    difficulty_nulls,
    omega_squared,
)
from moe_lab.analysis.difficulty.curves import conditional_information
from moe_lab.analysis.difficulty.nulls import shifted_sums, shuffle_moments, turns
from moe_lab.errors import AnalysisError


@pytest.fixture(scope="module")
def tokens():
    return simulate_corpus(Corpus(documents=210, tokens=120, vocabulary=60), seed=11)


def routed_by(tokens, **weights):
    return simulate_router(tokens, World(**weights), "difficulty", seed=12).with_columns(
        layer=pl.lit(0)
    )


def test_shuffle_moments_are_those_of_many_shuffles():
    generator = np.random.default_rng(0)
    cells = generator.integers(0, 12, 200)
    x, y = generator.normal(size=(2, 200)) + cells / 4
    drawn = []
    for _ in range(4000):
        order = np.lexsort((generator.random(200), cells))
        permuted = np.empty(200)
        permuted[np.sort(np.argsort(cells, kind="stable"))] = 0
        permuted[np.argsort(cells, kind="stable")] = y[order]
        drawn.append(x @ permuted)
    mean, variance = shuffle_moments(x, y, cells)
    assert np.mean(drawn) == pytest.approx(mean, abs=4 * np.std(drawn) / 4000**0.5)
    assert np.var(drawn) == pytest.approx(variance, rel=0.08)


def test_shifts_are_those_of_rolling_each_document():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 9))
    found = set(np.round(shifted_sums(y, turns(x, np.array([0, 4]), 500, 0)), 9))
    every = {
        round(float(x[:4] @ np.roll(y[:4], -i) + x[4:] @ np.roll(y[4:], -j)), 9)
        for i in range(4)
        for j in range(5)
    }
    assert found == every


def test_nulls_reject_a_router_that_follows_difficulty_and_keep_one_that_does_not(tokens):
    follows = difficulty_nulls(routed_by(tokens, frequency=0.5, difficulty=0.2), "difficulty").row(
        0, named=True
    )
    ignores = difficulty_nulls(routed_by(tokens, frequency=0.5), "difficulty").row(0, named=True)
    assert follows["p_shift"] == pytest.approx(1 / 1000)
    assert follows["p_shuffle"] < 1e-6
    assert min(ignores["p_shift"], ignores["p_shuffle"]) > 0.005


def test_a_static_layer_has_no_null(tokens):
    row = difficulty_nulls(
        tokens.with_columns(layer=pl.lit(0), ffn_count=pl.lit(2)), "difficulty"
    ).row(0, named=True)
    assert row["p_shift"] is None


def test_curves_rise_with_difficulty_within_ids_although_the_raw_ones_fall(tokens):
    curve = difficulty_curves(
        routed_by(tokens, frequency=-0.8, difficulty=0.25), "difficulty", resamples=200
    )
    rows = curve.filter(pl.col("align") == "input")
    raw, within = rows["mean"].to_numpy(), rows["within"].to_numpy()
    assert raw[-1] < raw[0]
    assert within[-1] > within[0] + 0.5
    assert stats.spearmanr(np.arange(10), within).statistic > 0.95
    assert ((rows["within_lo"] < rows["within"]) & (rows["within"] < rows["within_hi"])).all()


def test_raw_curve_means_are_plain_means(tokens):
    routed = routed_by(tokens, difficulty=0.2)
    used = routed.filter(pl.col("pos") > 0).sort("difficulty")
    tenth = used.head(used.height // 10)["ffn_count"].to_numpy().mean()
    found = difficulty_curves(routed, "difficulty", resamples=50).row(0, named=True)
    assert found["mean"] == pytest.approx(tenth, abs=0.02)


def test_conditional_information_is_that_of_the_definition():
    """Two groups by hand: in one y repeats x (ln 2 nats), in the other it is constant (0)."""
    group, x, y = (np.repeat(row, 500) for row in ([0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]))
    # Miller and Madow: (2 + 2 - 2 - 1) / 2 in the first group, (2 + 1 - 2 - 1) / 2 in the second.
    assert conditional_information(group, x, y) == pytest.approx(0.5 * np.log(2) + 0.5 / 2000)


def test_information_is_left_only_where_there_is_some(tokens):
    follows = difficulty_information(
        routed_by(tokens, identity=1.0, difficulty=0.4), "difficulty"
    ).row(0, named=True)
    ignores = difficulty_information(routed_by(tokens, identity=1.0), "difficulty").row(
        0, named=True
    )
    assert follows["excess"] > 0.01 > 0.002 > abs(ignores["excess"])


def test_omega_squared_is_that_of_the_f_statistic():
    generator = np.random.default_rng(2)
    groups = generator.integers(0, 4, 120)
    values = generator.normal(size=120) + groups
    f = stats.f_oneway(*(values[groups == group] for group in range(4))).statistic
    assert omega_squared(values, groups) == pytest.approx(
        3 * (f - 1) / (3 * (f - 1) + 120), abs=1e-12
    )


def test_omega_squared_of_a_table_by_hand():
    """Groups 1 2 3 and 5 6 7: SSB 24, SSW 4, SST 28, MSW 1, so (24 - 1) / (28 + 1)."""
    assert omega_squared(
        np.array([1.0, 2, 3, 5, 6, 7]), np.array([0, 0, 0, 9, 9, 9])
    ) == pytest.approx(23 / 29)


def test_the_budget_of_four_tokens_by_hand():
    frame = pl.DataFrame(
        {
            "layer": 3,
            "doc": [0, 0, 0, 1, 1, 1],
            "pos": [0, 1, 2] * 2,
            "token_id": 1,
            "ffn_count": [9, 0, 4, 9, 2, 2],
        }
    )
    row = compute_budget(frame, slots=4).row(0, named=True)
    assert (row["n_tokens"], row["n_docs"], row["mean"], row["first_mean"]) == (4, 2, 2.0, 9.0)
    assert row["sd"] == pytest.approx(np.std([0, 4, 2, 2]))
    assert (row["zero_ratio"], row["polarisation"], row["binomial_polarisation"]) == (
        0.25,
        0.5,
        pytest.approx(2 / 16),
    )


def test_identity_is_judged_on_documents_that_did_not_make_the_table(tokens):
    by_id = compute_budget(routed_by(tokens, identity=2.0)).row(0, named=True)
    blind = compute_budget(routed_by(tokens)).row(0, named=True)
    assert by_id["identity_r2"] > 0.5
    assert -0.02 < blind["identity_r2"] < 0.01
    assert (
        compute_budget(routed_by(tokens, document=1.0)).row(0, named=True)["between_documents"]
        > 0.3
        > abs(blind["between_documents"])
    )


def test_a_static_layer_has_a_budget_without_shares(tokens):
    row = compute_budget(tokens.with_columns(layer=pl.lit(0), ffn_count=pl.lit(2))).row(
        0, named=True
    )
    assert (row["mean"], row["sd"], row["identity_r2"], row["lag1"]) == (2.0, 0.0, None, None)


def test_nested_shares_rise_where_the_router_looks(tokens):
    classed = tokens.with_columns(
        lexer=pl.Series(np.random.default_rng(0).choice(["a", "b"], tokens.height))
    )
    table = compute_variance(
        routed_by(classed, identity=1.0, lexer=0.5, difficulty=0.3),
        "difficulty",
        taxonomies=["lexer"],
    )
    nested = dict(table.filter(pl.col("kind") == "nested").select("name", "explained").rows())
    assert list(nested) == ["position", "frequency", "token_id", "class", "difficulty"]
    assert abs(nested["position"]) < 0.01
    assert nested["token_id"] > nested["frequency"] + 0.05
    assert nested["class"] > nested["token_id"] + 0.05
    assert nested["difficulty"] > nested["class"] + 0.02
    alone = dict(table.filter(pl.col("kind") == "alone").select("name", "explained").rows())
    assert alone["token_id"] == pytest.approx(nested["token_id"], abs=0.02)
    assert 0.02 < alone["lexer"] < alone["token_id"]
    with refused("taxonomies", AnalysisError):
        compute_variance(routed_by(tokens), "difficulty", taxonomies=["colour"])


def test_baselines_keep_the_marginals_and_know_nothing_of_difficulty(tokens):
    routed = routed_by(tokens, frequency=0.6, difficulty=0.3)
    for kind in ("random", "token lookup", "position only"):
        drawn = baseline_router(routed, kind)
        assert drawn["ffn_count"].to_numpy().mean() == pytest.approx(
            routed["ffn_count"].to_numpy().mean(), rel=0.02
        )
    table = baseline_association(routed, "difficulty", resamples=200).filter(
        pl.col("align") == "input"
    )
    found = {row["router"]: row for row in table.to_dicts()}
    assert found["token lookup"]["rho_raw"] > 0.1 > 0.03 > abs(found["random"]["rho_raw"])
    assert all(abs(row["rho_token"]) < 0.03 for row in found.values())
