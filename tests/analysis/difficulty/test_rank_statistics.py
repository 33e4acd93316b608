"""Rank statistics, residuals and intervals by themselves, against scipy and plain regressions."""

import numpy as np
import pytest
from scipy import stats

from moe_lab.analysis.difficulty import within_groups
from moe_lab.analysis.difficulty.intervals import (
    Bootstrap,
    false_discovery,
    moments,
)
from moe_lab.analysis.difficulty.rank_statistics import (
    Order,
    somers_d,
    standard_ranks,
    xi,
)
from moe_lab.analysis.difficulty.within_groups import Within, crosstab, joint_code
from moe_lab.analysis.document_bootstrap import expanded_quantiles


def spearman(x, y):
    ranks_x, ranks_y = standard_ranks(Order.of(x)), standard_ranks(Order.of(y))
    scale = np.sqrt((ranks_x @ ranks_x) * (ranks_y @ ranks_y))
    return ranks_x @ ranks_y / scale if scale > 0 else float("nan")


@pytest.fixture(params=[0, 1, 2])
def rows(request):
    """Hardness (with ties for seed 2) and a count with many ties."""
    generator = np.random.default_rng(request.param)
    hard = generator.normal(size=400)
    count = generator.binomial(6, 1 / (1 + np.exp(-hard)))
    return (np.round(hard, 1) if request.param == 2 else hard), count


def test_spearman_is_that_of_scipy(rows):
    assert spearman(*rows) == pytest.approx(stats.spearmanr(*rows).statistic, abs=1e-12)


def test_somers_d_is_that_of_scipy(rows):
    hard, count = rows
    assert somers_d(Order.of(hard), Order.of(count).group) == pytest.approx(
        stats.somersd(hard, count).statistic, abs=1e-12
    )


def test_xi_is_that_of_scipy_where_difficulty_has_no_ties():
    generator = np.random.default_rng(5)
    hard = generator.normal(size=500)
    count = np.round(np.abs(hard) * 2).astype(int)  # not monotone: rho is near 0 and xi is not
    found = xi(Order.of(hard), Order.of(count).group)
    assert found == pytest.approx(stats.chatterjeexi(hard, count).statistic, abs=1e-12)
    assert found > 0.5 > 0.1 > abs(spearman(hard, count))


def test_midranks_are_those_of_scipy(rows):
    assert np.array_equal(Order.of(rows[1]).midranks(), stats.rankdata(rows[1]))


def test_quantile_bins_are_even_and_never_split_a_tie():
    assert np.bincount(Order.of(np.arange(1000.0)).quantile_bins(10)).tolist() == [100] * 10
    bins = Order.of(np.repeat([0.0, 1.0, 2.0], [5, 900, 95])).quantile_bins(10)
    assert [len(set(bins[part])) for part in (slice(0, 5), slice(5, 905), slice(905, None))] == [
        1,
        1,
        1,
    ]


def test_constant_rows_have_no_correlation():
    assert np.isnan(spearman(np.ones(5), np.arange(5)))
    assert np.isnan(xi(Order.of(np.arange(5.0)), np.zeros(5, dtype=int)))


def test_two_way_residuals_are_those_of_a_regression():
    generator = np.random.default_rng(0)
    codes = (generator.zipf(1.5, 600).clip(max=40) - 1, generator.integers(0, 15, 600))
    values = generator.normal(size=600) + codes[0] + np.sin(codes[1])
    design = np.hstack([np.eye(40)[codes[0]], np.eye(15)[codes[1]]])
    expected = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    within = Within(codes)
    assert within.residual(values)[~within.alone] == pytest.approx(
        expected[~within.alone], abs=1e-8
    )


def test_two_way_residuals_hold_on_a_chain_of_rare_ids():
    """Each id is seen three times and tied to the next: the slowest case for methods that take out
    one grouping after the other.
    """
    chain = np.repeat(np.arange(300), 3)
    codes = (chain[:-1], chain[1:])
    values = np.random.default_rng(0).normal(size=len(codes[0]))
    design = np.hstack([np.eye(300)[codes[0]], np.eye(300)[codes[1]]])
    expected = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    assert Within(codes).residual(values) == pytest.approx(expected, abs=1e-6)


def test_joint_codes_name_each_combination_once():
    codes = joint_code([np.array([0, 0, 7, 7, 0]), np.array([5_000_000_000, 1, 1, 1, 1])])
    assert codes.tolist() == [1, 0, 2, 2, 0]


def test_the_inflation_undoes_the_tie_between_residuals_of_a_small_group():
    """Pairs whose two tokens lie in two documents: the two residuals mirror each other, and
    independent documents would see half the variance of the sum of products.
    """
    generator = np.random.default_rng(0)
    pairs, spread = 4000, []
    for _ in range(200):
        x, y = generator.normal(size=(2, pairs, 2))
        spread.append(
            float(((x - x.mean(1, keepdims=True)) * (y - y.mean(1, keepdims=True))).sum())
        )
    true = np.var(spread)
    within = Within((np.repeat(np.arange(pairs), 2),))
    x, y = (within.residual(generator.normal(size=2 * pairs)) for _ in range(2))
    assert ((x * y) ** 2).sum() == pytest.approx(true / 2, rel=0.25)
    assert ((x * y * within.inflation) ** 2).sum() == pytest.approx(true, rel=0.25)


def test_the_bootstrap_redraws_documents_and_not_tokens():
    """Every token of a document repeats one draw: the standard error must be that of documents."""
    generator = np.random.default_rng(1)
    documents, length = 400, 50
    x, y = (np.repeat(generator.normal(size=documents), length) for _ in range(2))
    x, y = x - x.mean(), y - y.mean()
    interval = Bootstrap(documents, 1000, 0, 0.95).interval(
        moments(x, y, np.arange(0, documents * length, length))
    )
    assert interval.se == pytest.approx(documents**-0.5, rel=0.15)
    assert interval.lo < interval.value < interval.hi


def test_very_many_documents_are_bundled_without_changing_the_spread():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(2, 20_000))
    interval = Bootstrap(20_000, 400, 0, 0.95).interval(moments(x, y, np.arange(20_000)))
    assert interval.se == pytest.approx(20_000**-0.5, rel=0.15)


def test_expanded_quantiles_are_those_of_t():
    normal = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    low, high = expanded_quantiles(normal, 0.95, 10)
    assert high == pytest.approx(stats.t.ppf(0.975, 9) * np.sqrt(10 / 9), rel=1e-3)
    assert low == pytest.approx(-high, rel=1e-3)


def test_false_discoveries_are_those_of_scipy_and_leave_missing_ones_missing():
    p = np.array([0.01, 0.04, 0.03, 0.5, 0.001])
    assert false_discovery(p) == pytest.approx(stats.false_discovery_control(p))
    with_gap = false_discovery(np.insert(p, 2, np.nan))
    assert np.isnan(with_gap[2])
    assert np.delete(with_gap, 2) == pytest.approx(stats.false_discovery_control(p))


def test_residuals_beside_a_grouping_are_those_of_projections_token_by_token():
    generator = np.random.default_rng(4)
    first, second, code = (generator.integers(0, size, 400) for size in (90, 12, 7))
    values = generator.normal(size=400)
    for codes in ((first,), (first, second)):
        within = Within(codes)
        left = values
        for _ in range(3):
            left = left - (np.bincount(code, left) / np.bincount(code))[code]
            left = within.residual(left)
        assert within.beside(code).residual(values, 3) == pytest.approx(left, abs=1e-10)


def test_a_table_of_pairs_is_the_same_dense_or_sparse(monkeypatch):
    first, second = np.array([0, 2, 2, 0]), np.array([3, 1, 1, 0])
    dense = crosstab(first, second).toarray()
    monkeypatch.setattr(within_groups, "LARGEST_TABLE", 1)
    assert np.array_equal(dense, [[1, 0, 0, 1], [0, 0, 0, 0], [0, 2, 0, 0]])
    assert np.array_equal(crosstab(first, second).toarray(), dense)


def test_moments_are_sums_over_the_tokens_of_each_document():
    generator = np.random.default_rng(5)
    x, y, inflation = generator.normal(size=(3, 90_000))
    starts = np.array([0, 1, 40_000, 40_010, 75_000])  # more tokens than are multiplied at once
    plain = moments(x, y, starts)
    assert plain.value == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), rel=1e-12)
    assert plain.n.tolist() == [1, 39_999, 10, 34_990, 15_000]
    assert plain.xy == pytest.approx(np.add.reduceat(x * y, starts), rel=1e-12)
    scaled = moments(x, y, starts, inflation)
    assert scaled.value == plain.value
    assert scaled.xx == pytest.approx(np.add.reduceat(x * x * inflation, starts), rel=1e-9)
    assert scaled.yy == pytest.approx(np.add.reduceat(y * y * inflation, starts), rel=1e-9)
