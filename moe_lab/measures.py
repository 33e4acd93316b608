"""The one definition of the numbers that describe a load or a router: load CV, MaxVio, dead
experts, entropy, margin and their relatives.

Every function takes numpy arrays (or what numpy makes one of) and torch tensors alike, works over
the last axis, and returns the same kind of value without copying it off its device. A load is
``counts`` [..., E] of the real experts of one layer (dead experts present, as zeros); scores are
[..., E] of any sign that the router's score function gives. Where nothing was counted the answer
is NaN. Published count tables and a trace's own counts are read alike.

Example:
    >>> load_cv([4, 4, 4, 4]).item(), max_violation([8, 4, 4, 0]).item()
    (0.0, 1.0)
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]


def load_cv(counts: "ArrayLike | Tensor") -> Any:
    """Coefficient of variation: population standard deviation over mean.

    0 when even, sqrt(E - 1) when one expert takes all.
    """
    load = _doubles(counts)
    deviation = load.std(dim=-1, correction=0) if _is_tensor(load) else load.std(axis=-1)
    return _ratio(deviation, load.mean(axis=-1))


def max_over_mean(counts: "ArrayLike | Tensor") -> Any:
    """Load of the busiest expert over the mean load; a synchronous layer waits for this expert.

    1 when even, E when one expert takes all.
    """
    load = _doubles(counts)
    return _ratio(_largest(load), load.mean(axis=-1))


def max_violation(counts: "ArrayLike | Tensor") -> Any:
    """MaxVio of arXiv 2408.15664 (eq. 4): ``max / mean - 1``; 0 when even.

    Of one batch, or, from counts summed over batches, the global one.
    """
    return max_over_mean(counts) - 1


def balancedness(counts: "ArrayLike | Tensor") -> Any:
    """``mean / max``, as serving engines report it. 1 when even, 1/E when one expert takes all."""
    load = _doubles(counts)
    return _ratio(load.mean(axis=-1), _largest(load))


def gini(counts: ArrayLike) -> Floats:
    """Gini coefficient (arrays only). 0 when even, (E - 1) / E when one expert takes all."""
    ordered = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    experts = ordered.shape[-1]
    rank = np.arange(1, experts + 1)
    return _ratio(((2 * rank - experts - 1) * ordered).sum(axis=-1), experts * ordered.sum(axis=-1))


def load_entropy(counts: "ArrayLike | Tensor") -> Any:
    """Entropy in nats of the load as a distribution over experts. log E when even."""
    load = _doubles(counts)
    return entropy_of_shares(_ratio(load, load.sum(axis=-1, keepdims=True)))


def effective_experts(counts: "ArrayLike | Tensor") -> Any:
    """exp(entropy): the number of evenly loaded experts with the same entropy.

    E when even, 1 when one expert takes all.
    """
    entropy = load_entropy(counts)
    return np.exp(entropy) if isinstance(entropy, np.ndarray | np.generic) else entropy.exp()


def dead_experts(counts: "ArrayLike | Tensor") -> Any:
    """Number of experts that never ran (int64)."""
    load = cast(Any, counts if _is_tensor(counts) else np.asarray(counts))
    return (load == 0).sum(axis=-1)


def jensen_shannon_bits(counts: ArrayLike, others: ArrayLike) -> Floats:
    """Jensen-Shannon divergence in bits between two loads [..., E] as distributions (arrays only).

    0 when alike, 1 when disjoint.
    """
    first, second = (np.asarray(item, dtype=np.float64) for item in (counts, others))
    first, second = (_ratio(item, item.sum(axis=-1, keepdims=True)) for item in (first, second))
    middle = load_entropy(first + second)
    return (middle - (load_entropy(first) + load_entropy(second)) / 2) / np.log(2)


def router_entropy(scores: "NDArray | Tensor") -> Any:
    """[...]: entropy in nats of the scores [..., E] over their sum. log E where all are equal."""
    total = cast(Any, scores).sum(axis=-1, keepdims=True)  # torch's stub has no axis
    return entropy_of_shares(scores / _at_least(total, _tiny(total)))


def entropy_of_shares(shares: "NDArray | Tensor") -> Any:
    """[...]: ``-sum p log p`` in nats of distributions [..., E], with 0 log 0 = 0, NaN kept."""
    # The clamp takes half to a quarter of the time of ``torch.special.entr``.
    raised = _at_least(shares, _tiny(shares))
    # Subtracted from 0: a distribution on one expert has entropy 0, not -0.
    return 0 - (shares * (raised.log() if _is_tensor(raised) else np.log(raised))).sum(axis=-1)


def score_margin(scores: "NDArray | Tensor", top_k: int) -> Any:
    """[...]: the K-th largest score less the next one; inf where K is at least E.

    How close a token was to another set of experts; with ``top_k`` 1 the margin between the best
    and the second expert.
    """
    experts = scores.shape[-1]
    if top_k >= experts:
        return scores[..., 0] * 0 + float("inf")
    if _is_tensor(scores):
        top = cast("Tensor", scores).topk(top_k + 1, dim=-1).values
        return top[..., top_k - 1] - top[..., top_k]
    top = np.partition(scores, (experts - top_k - 1, experts - top_k), axis=-1)
    return top[..., experts - top_k] - top[..., experts - top_k - 1]


def _is_tensor(values: Any) -> bool:
    """Whether ``values`` is a torch tensor, found out without importing torch."""
    return hasattr(values, "clamp_min")


def _doubles(values: Any) -> Any:
    return values.double() if _is_tensor(values) else np.asarray(values, dtype=np.float64)


def _largest(values: Any) -> Any:
    return values.amax(dim=-1) if _is_tensor(values) else values.max(axis=-1)


def _at_least(values: Any, low: float) -> Any:
    return values.clamp_min(low) if _is_tensor(values) else np.maximum(values, low)


def _tiny(values: Any) -> float:
    """The smallest normal number of the values' own precision."""
    if _is_tensor(values):
        import torch

        return torch.finfo(values.dtype).tiny
    return float(np.finfo(values.dtype).tiny)


def _ratio(numerator: Any, denominator: Any) -> Any:
    """The quotient; NaN where the denominator is 0."""
    if _is_tensor(denominator):
        return (numerator / denominator).where(denominator > 0, float("nan"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, np.nan)
