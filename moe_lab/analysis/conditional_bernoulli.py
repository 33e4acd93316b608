"""Choosing K of M experts with given marginal rates and nothing else: conditional Bernoulli
sampling.

Each expert i flips a coin with odds w_i and only outcomes with exactly K heads are kept: P(S) is
proportional to the product of w_i over S. Among all ways to choose K experts with given inclusion
rates it has the largest entropy, so it is what a router would do that knows the marginal loads and
not the token. (Chen, Dempster and Liu, Biometrika 81:457-469, 1994.)

Shape letters: M experts, K slots.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MAX_MOVE = 4.0
"""Longest step in a log-odds: far from the solution the quadratic picture overshoots."""


def symmetric_polynomials(odds_M: Floats, slots: int) -> Floats:
    """[K + 1]: e_0 .. e_K, where e_j sums the products of all j-subsets of ``odds``."""
    e = np.zeros(slots + 1)
    e[0] = 1
    for w in odds_M:
        e[1:] += w * e[:-1]
    return e


def inclusion_rates(odds_M: Floats, slots: int) -> Floats:
    """[M]: probability that each expert is among the K chosen; sums to K.

    Exact, by convolving the experts before and after each.
    """
    experts = len(odds_M)
    before, after = np.zeros((experts + 1, slots + 1)), np.zeros((experts + 1, slots + 1))
    before[0, 0] = after[experts, 0] = 1
    for i in range(experts):
        before[i + 1] = before[i]
        before[i + 1, 1:] += odds_M[i] * before[i, :-1]
        j = experts - 1 - i
        after[j] = after[j + 1]
        after[j, 1:] += odds_M[j] * after[j + 1, :-1]
    without = (before[:-1, :slots] * after[1:, :slots][:, ::-1]).sum(axis=1)
    return odds_M * without / before[experts, slots]


def fit_odds(
    rates_M: Floats, slots: int, tolerance: float = 1e-7, max_steps: int = 200
) -> Floats | None:
    """Odds [M] whose inclusion rates are ``rates`` (each strictly between 0 and 1, sum = K), or
    None where that does not settle.

    Minimises the convex ``log e_K(exp x) - rates . x`` over log-odds x by quasi-Newton steps. The
    Hessian is the covariance of the inclusions; Hajek's approximation of it, ``diag(d) - d d' /
    sum(d)`` with d matched to the variances, makes the step a division.
    """
    log_odds = np.log(rates_M / (1 - rates_M))
    value = _objective(log_odds, rates_M, slots)
    for _ in range(max_steps):
        odds = _scaled(log_odds, slots)
        present = inclusion_rates(odds, slots)
        error = rates_M - present
        if np.abs(error / np.minimum(rates_M, 1 - rates_M)).max() < tolerance:
            return odds
        variance = present * (1 - present)
        d = variance.copy()
        for _ in range(30):
            d = variance + d * d / d.sum()
        move = np.clip(error / d, -MAX_MOVE, MAX_MOVE)
        while (
            not (lower := _objective(log_odds + move, rates_M, slots)) <= value + 1e-12
            and np.abs(move).max() > 1e-9
        ):
            move /= 2
        log_odds, value = log_odds + move, lower
    return None


def _scaled(log_odds_M: Floats, slots: int) -> Floats:
    """Odds that sum to K: the choice depends on their ratios alone, and this keeps the polynomials
    in range.
    """
    odds = np.exp(log_odds_M - log_odds_M.max())
    return odds * (slots / odds.sum())


def _objective(log_odds_M: Floats, rates_M: Floats, slots: int) -> float:
    odds = _scaled(log_odds_M, slots)
    return float(np.log(symmetric_polynomials(odds, slots)[-1]) - rates_M @ np.log(odds))


def group_count(rates_M: Floats, in_group_M: NDArray[np.bool_], slots: int) -> Floats | None:
    """[K + 1]: distribution of how many of the K chosen belong to the group, at the given inclusion
    rates.

    Rates of 0 and 1 are taken out first. None where ``fit_odds`` does not settle.
    """
    always, possible = rates_M >= 1, (rates_M > 0) & (rates_M < 1)
    free = slots - int(always.sum())
    certain = int((always & in_group_M).sum())
    distribution = np.zeros(slots + 1)
    if not possible.any():
        distribution[certain] = 1
        return distribution
    odds = fit_odds(rates_M[possible], free)
    if odds is None:
        return None
    inside = symmetric_polynomials(odds[in_group_M[possible]], free)
    outside = symmetric_polynomials(odds[~in_group_M[possible]], free)
    weight = inside * outside[::-1]
    distribution[certain : certain + free + 1] = weight / weight.sum()
    return distribution
