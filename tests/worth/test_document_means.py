"""Means over tokens and their intervals over documents."""

import numpy as np
import polars as pl
import pytest
from refusals import refused
from scipy.stats import t as student

from moe_lab.errors import AnalysisError, ConfigError
from moe_lab.worth.document_means import ratios, tables


def test_the_error_is_that_of_leaving_out_one_document_at_a_time():
    generator = np.random.default_rng(0)
    below = generator.integers(1, 40, (9, 1)).astype(float)
    above = generator.normal(size=(9, 1)) * below
    above -= above.sum() / below.sum() * below
    above[:, 0] += below[:, 0]  # a mean of 1
    mean, low, high = ratios(above, below)
    rest = [(above.sum() - a) / (below.sum() - b) for a, b in zip(above, below, strict=True)]
    error = np.sqrt(8 / 9 * ((np.array(rest) - mean) ** 2).sum())
    effective = below.sum() ** 2 / (below**2).sum()
    moves = mean[0] - np.array(rest)
    kurtosis = effective * (moves**4).sum() / (moves**2).sum() ** 2
    free = min(effective - 1, 2 * (effective - 1) / (kurtosis - 1)) - 1
    reach = student.ppf(0.975, free)
    assert mean[0] == pytest.approx(1)
    ends = (mean[0] - low[0]) / error, (high[0] - mean[0]) / error
    assert min(ends) == pytest.approx(reach)
    assert max(ends) > reach
    assert (ends[1] > ends[0]) == (((mean[0] - rest) ** 3).sum() > 0)


def test_documents_that_are_alike_have_the_interval_of_student_with_one_degree_less():
    values = np.array([1.0, 2, 3, 4, 5, 6])[:, None]
    mean, low, high = ratios(10 * values, np.full((6, 1), 10.0), level=0.9)
    half = student.ppf(0.95, 4) * values.std(ddof=1) / np.sqrt(6)
    assert (mean[0], low[0], high[0]) == pytest.approx((3.5, 3.5 - half, 3.5 + half))


def test_an_interval_is_wider_where_one_document_moves_the_mean():
    even, one = np.tile([1.0, -1.0], 10), np.array([20.0] + [0.0] * 19)
    _, low, _ = ratios(np.stack([even, one], axis=1), np.ones((20, 2)))
    errors = np.array([even.std(ddof=1), one.std(ddof=1)]) / np.sqrt(20)
    reach = (np.array([0.0, 1.0]) - low) / errors  # the end without the long tail
    assert reach == pytest.approx(
        student.ppf(0.975, [18, 2 * 19 / (20 * (19**4 + 19) / (19**2 + 19) ** 2 - 1) - 1])
    )


def test_an_interval_rests_on_five_documents():
    below = np.ones((9, 3))
    below[4:, 1] = 0
    above = np.arange(9.0)[:, None] * below
    touched = np.ones((9, 3))
    touched[4:, 2] = 0
    mean, low, high = ratios(above, below, touched=touched)
    assert mean.tolist() == [4, 1.5, 4]
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [False, True, True]
    nothing = ratios(np.zeros((9, 1)), np.zeros((9, 1)))
    assert np.isnan(np.concatenate(nothing)).all()
    with refused("level", ConfigError):
        ratios(above, below, level=1)


def test_intervals_of_skewed_means_cover_at_their_rate():
    generator = np.random.default_rng(0)
    below = generator.integers(10, 40, (30, 2000)).astype(float)
    values = generator.exponential(size=(30, 2000)) ** 1.2
    truth = 1.101802490879713  # gamma(2.2)
    _, low, high = ratios(values * below, below)
    assert 0.93 < ((low < truth) & (truth < high)).mean() < 0.97


def test_documents_without_a_row_count_as_zero_and_double_rows_are_refused():
    frame = pl.DataFrame({"expert": [1, 0, 0], "doc": [4, 2, 4], "tokens": [3.0, 5, 7]})
    names, sums = tables(frame, ["expert"], ["tokens"])
    assert names["expert"].to_list() == [0, 1]
    assert sums["tokens"].tolist() == [[5, 0], [7, 3]]
    with refused("losses", AnalysisError):
        tables(pl.concat([frame, frame]), ["expert"], ["tokens"])
    with refused("losses", AnalysisError):
        tables(frame.clear(), ["expert"], ["tokens"])
