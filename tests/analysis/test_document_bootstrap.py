"""The document bootstrap: tails of Student's t, no interval of few documents, and its coverage."""

import numpy as np
import pytest
from scipy import stats

from moe_lab.analysis.document_bootstrap import (
    MIN_DOCUMENTS,
    Resampling,
    document_weights,
    expanded_interval,
    expanded_quantiles,
)


def test_below_five_documents_there_is_no_interval():
    values = np.arange(MIN_DOCUMENTS, dtype=np.float64)
    for documents in range(1, MIN_DOCUMENTS + 1):
        sums = values[:documents, None]
        low, high = Resampling(200).interval(lambda weights, sums=sums: weights @ sums, documents)
        assert np.isfinite(low).all() == np.isfinite(high).all() == (documents == MIN_DOCUMENTS)


def test_each_value_has_the_tail_of_the_documents_that_it_rests_on():
    samples = np.random.default_rng(0).normal(size=(20_000, 3))
    low, high = expanded_interval(samples, 0.95, np.array([4, 6, 1000]))
    assert np.isnan([low[0], high[0]]).all()
    for column, documents in ((1, 6), (2, 1000)):
        tail = stats.norm.cdf(
            stats.t.ppf(0.025, documents - 1) * (documents / (documents - 1)) ** 0.5
        )
        expected = np.quantile(samples[:, column], [tail, 1 - tail])
        assert [low[column], high[column]] == pytest.approx(expected, abs=1e-12)


def test_samples_that_define_no_value_are_left_out():
    samples = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, np.nan]])
    low, high = expanded_quantiles(samples, 0.5, 1_000_000)
    assert [low[0], high[0]] == pytest.approx(np.quantile([1, 2, 3], [0.25, 0.75]), abs=1e-5)
    assert np.isnan([low[1], high[1]]).all()


def test_coverage_at_five_documents_is_better_than_that_of_plain_percentiles():
    generator = np.random.default_rng(0)
    (weights,) = document_weights(5, 400, 0)
    plain, expanded = 0, 0
    for _ in range(1000):
        samples = weights @ generator.normal(size=5) / 5
        low, high = np.quantile(samples, [0.025, 0.975])
        plain += low < 0 < high
        low, high = expanded_quantiles(samples, 0.95, 5)
        expanded += low < 0 < high
    assert plain < 860
    assert expanded > 890
