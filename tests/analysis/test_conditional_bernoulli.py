"""Conditional Bernoulli sampling against enumeration of every subset and against rejection
sampling.
"""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.analysis.conditional_bernoulli import (
    fit_odds,
    group_count,
    inclusion_rates,
    symmetric_polynomials,
)


def enumerate_choices(odds, slots):
    """Every subset of ``slots`` experts with its probability."""
    subsets = list(combinations(range(len(odds)), slots))
    weights = np.array([np.prod([odds[i] for i in subset]) for subset in subsets])
    return subsets, weights / weights.sum()


odds_and_slots = st.lists(st.floats(0.01, 20), min_size=2, max_size=7).flatmap(
    lambda odds: st.tuples(st.just(np.array(odds)), st.integers(1, len(odds) - 1))
)


def test_symmetric_polynomials_are_the_coefficients_of_the_product():
    assert symmetric_polynomials(np.array([1.0, 2, 3]), 3) == pytest.approx([1, 6, 11, 6])


@settings(deadline=None)
@given(odds_and_slots)
def test_inclusion_rates_agree_with_enumeration(case):
    odds, slots = case
    subsets, probability = enumerate_choices(odds, slots)
    expected = [
        sum(p for subset, p in zip(subsets, probability, strict=True) if i in subset)
        for i in range(len(odds))
    ]
    assert inclusion_rates(odds, slots) == pytest.approx(expected)


@settings(deadline=None)
@given(odds_and_slots)
def test_fitted_odds_give_the_wanted_rates_and_the_true_ratios(case):
    odds, slots = case
    rates = inclusion_rates(odds, slots)
    fitted = fit_odds(rates, slots)
    assert fitted is not None
    assert inclusion_rates(fitted, slots) == pytest.approx(rates, rel=1e-6)
    assert fitted / fitted[0] == pytest.approx(odds / odds[0], rel=1e-3)


@pytest.mark.parametrize(("experts", "slots"), [(768, 12), (8, 4), (10, 6), (64, 30), (6, 1)])
def test_odds_are_found_for_very_skewed_loads(experts, slots):
    odds = np.random.default_rng(0).gamma(0.05, 20, experts) + 1e-6
    assert fit_odds(inclusion_rates(odds / odds.sum() * slots, slots), slots) is not None


def test_group_count_agrees_with_rejection_sampling():
    generator = np.random.default_rng(0)
    odds, in_group, slots = generator.gamma(1, 1, 20), np.arange(20) < 13, 5
    flips = generator.random((400_000, 20)) < odds / (1 + odds)
    kept = flips[flips.sum(axis=1) == slots]
    found = group_count(inclusion_rates(odds, slots), in_group, slots)
    assert found is not None
    drawn = np.bincount(kept[:, in_group].sum(axis=1), minlength=slots + 1) / len(kept)
    assert np.abs(found - drawn).max() < 4 / np.sqrt(len(kept))


def test_group_count_with_certain_and_impossible_experts():
    """One real expert is always chosen and one never; the other slot goes to a real or a
    zero-compute expert, half each.
    """
    assert group_count(
        np.array([1, 0, 0.5, 0.5]), np.array([True, True, True, False]), 2
    ) == pytest.approx([0, 0.5, 0.5])
    assert group_count(np.array([1.0, 1, 0]), np.array([True, False, False]), 2) == pytest.approx(
        [0, 1, 0]
    )
