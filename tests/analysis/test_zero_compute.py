"""The spread of ffn_count beside what token-independent routing gives."""

import numpy as np
import pytest
from scipy import stats

from moe_lab.analysis import ffn_spread
from moe_lab.analysis.zero_compute import hypergeometric


@pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning"
)  # scipy also computes the kurtosis, which Z = 0 does not have
@pytest.mark.parametrize(
    ("experts", "zero", "k", "mean", "sd"),
    [
        (512, 256, 12, 8.0, 1.621),
        (256, 128, 12, 8.0, 1.609),
        (768, 128, 12, 10.286, 1.205),
        (64, 0, 8, 8.0, 0.0),
    ],
)
def test_hypergeometric_spread_of_the_longcat_models(experts, zero, k, mean, sd):
    """LongCat-Flash, Flash-Lite and 2.0 (arXiv 2509.01322 and 2601.21204), to the digits quoted for
    them.
    """
    assert hypergeometric(experts, zero, k) == pytest.approx((mean, sd), abs=5.1e-4)
    exact_mean, exact_variance = stats.hypergeom.stats(experts + zero, experts, k, moments="mv")
    assert hypergeometric(experts, zero, k) == pytest.approx((exact_mean, exact_variance**0.5))


def test_random_routing_shows_no_more_than_the_benchmarks(make_trace, draw):
    doc = np.repeat(np.arange(40), 500)
    trace = make_trace(draw(0, 20_000, 48, 6), 32, 16, doc=doc, pos=np.arange(20_000) % 500)
    (row,) = ffn_spread(trace).rows(named=True)
    assert row["n_tokens"] == 20_000
    assert row["n_docs"] == 40
    assert row["hypergeometric_mean"] == 4
    for name in ("hypergeometric_sd", "matched_sd", "independent_sd"):
        assert row[name] == pytest.approx(row["sd"], rel=0.02), name
    assert row["sd_lo"] < row["hypergeometric_sd"] < row["sd_hi"]


def test_skewed_loads_need_the_benchmark_that_keeps_them(make_trace, draw):
    """Two zero-compute experts that nearly every token takes: the even benchmark is far too wide,
    the fitted one is not.
    """
    shares = np.r_[np.ones(20), np.full(2, 200), np.full(8, 0.01)]
    (row,) = ffn_spread(make_trace(draw(1, 20_000, 30, 4, shares), 20, 10)).rows(named=True)
    assert row["independent_sd"] == pytest.approx(row["sd"], rel=0.1)
    assert row["matched_sd"] > 2 * row["sd"]


def test_compute_that_follows_the_token_exceeds_every_benchmark(make_trace, draw):
    """Half of the tokens run four real experts and half none; all loads are even."""
    ids = np.concatenate([draw(2, 2000, 8, 4), draw(3, 2000, 8, 4) + 8])
    (row,) = ffn_spread(make_trace(ids, 8, 8)).rows(named=True)
    assert row["sd"] == pytest.approx(2)
    assert (row["min"], row["max"]) == (0, 4)
    assert row["independent_sd"] == pytest.approx(row["hypergeometric_sd"], rel=0.01)
    assert row["hypergeometric_sd"] < 1


def test_a_layer_with_unused_slots_has_no_benchmark(make_trace):
    (row,) = ffn_spread(make_trace([[0, 1], [0, -1]], 2, 2)).rows(named=True)
    assert row["mean"] == 1.5
    assert row["sd"] == 0.5
    assert row["hypergeometric_sd"] is None
    assert row["independent_sd"] is None
    assert row["sd_lo"] is None


def test_fixed_k_without_zero_compute_experts_has_no_spread(make_trace, draw):
    (row,) = ffn_spread(make_trace(draw(4, 50, 6, 2), 6)).rows(named=True)
    assert (row["mean"], row["sd"], row["hypergeometric_sd"], row["independent_sd"]) == (2, 0, 0, 0)
