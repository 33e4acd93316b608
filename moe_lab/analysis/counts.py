"""Pure functions of expert counts: how uneven a load is, in the numbers that papers and engines
quote.

Every function takes counts [..., E] of the real experts of one layer (dead experts present, as
zeros), works over the last axis, and returns [...]. Where nothing was counted the answer is NaN.
They take published count tables as well as a trace's own counts.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def load_cv(counts: ArrayLike) -> Floats:
    """Coefficient of variation: population standard deviation over mean.

    0 when even, sqrt(E - 1) when one expert takes all.
    """
    counts = np.asarray(counts, dtype=np.float64)
    return _over(counts.std(axis=-1), counts.mean(axis=-1))


def max_over_mean(counts: ArrayLike) -> Floats:
    """Load of the busiest expert in fair shares: what a synchronous layer waits for.

    1 when even, E when one expert takes all.
    """
    counts = np.asarray(counts, dtype=np.float64)
    return _over(counts.max(axis=-1), counts.mean(axis=-1))


def max_violation(counts: ArrayLike) -> Floats:
    """MaxVio of arXiv 2408.15664 (eq. 4): ``max / mean - 1``. 0 when even."""
    return max_over_mean(counts) - 1


def balancedness(counts: ArrayLike) -> Floats:
    """``mean / max``, as serving engines report it. 1 when even, 1/E when one expert takes all."""
    counts = np.asarray(counts, dtype=np.float64)
    return _over(counts.mean(axis=-1), counts.max(axis=-1))


def gini(counts: ArrayLike) -> Floats:
    """Gini coefficient. 0 when even, (E - 1) / E when one expert takes all."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    experts = ordered.shape[-1]
    rank = np.arange(1, experts + 1)
    return _over(((2 * rank - experts - 1) * ordered).sum(axis=-1), experts * ordered.sum(axis=-1))


def load_entropy(counts: ArrayLike) -> Floats:
    """Entropy in nats of the load as a distribution over experts. log E when even."""
    counts = np.asarray(counts, dtype=np.float64)
    share = _over(counts, counts.sum(axis=-1, keepdims=True))
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), share).sum(axis=-1)


def effective_experts(counts: ArrayLike) -> Floats:
    """exp(entropy): how many evenly loaded experts would be as uneven.

    E when even, 1 when one expert takes all.
    """
    return np.exp(load_entropy(counts))


def dead_experts(counts: ArrayLike) -> NDArray[np.int64]:
    """How many experts never ran."""
    return (np.asarray(counts) == 0).sum(axis=-1)


def jensen_shannon_bits(counts: ArrayLike, others: ArrayLike) -> Floats:
    """Jensen-Shannon divergence in bits between two loads [..., E] as distributions.

    0 when alike, 1 when disjoint.
    """
    first, second = (np.asarray(item, dtype=np.float64) for item in (counts, others))
    first, second = (_over(item, item.sum(axis=-1, keepdims=True)) for item in (first, second))
    middle = load_entropy(first + second)
    return (middle - (load_entropy(first) + load_entropy(second)) / 2) / np.log(2)


def _over(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
