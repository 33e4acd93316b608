"""Losses on the spread of gates, loads and scores: CV^2 of importance and load (Shazeer), entropy
(Top-P), variance.
"""

import torch
from torch import Tensor

from moe_lab.measures import router_entropy
from moe_lab.routing.losses.across_ranks import summed
from moe_lab.routing.routing import Routing, valid_rows


def cv_squared(values_E: Tensor, *, unbiased: bool = False) -> Tensor:
    """Squared coefficient of variation; 0 for a single value.

    ``unbiased``: variance over E - 1 (Tutel), else over E (Shazeer).
    """
    if values_E.shape[0] < 2:
        return (values_E * 0).sum()
    mean = values_E.mean()
    return values_E.var(correction=int(unbiased)) / mean.square().clamp_min(
        torch.finfo(values_E.dtype).tiny
    )


def importance_of(routing: Routing) -> Tensor:
    """[E]: summed gate weights of each expert over the valid tokens (arXiv 1701.06538, eq. 6)."""
    weights_TK = valid_rows(routing.weights, routing.valid)
    used = routing.indices >= 0
    importance = torch.zeros(
        routing.scores.shape[1], dtype=weights_TK.dtype, device=weights_TK.device
    )
    return summed(
        importance.index_add(
            0, routing.indices.clamp_min(0).reshape(-1), (weights_TK * used).reshape(-1)
        )
    )


def importance_loss(routing: Routing, *, unbiased: bool = False) -> Tensor:
    """CV^2 of the importance (arXiv 1701.06538, eq. 7)."""
    return cv_squared(importance_of(routing), unbiased=unbiased)


def smooth_load(
    clean_TE: Tensor,
    noisy_TE: Tensor,
    noise_std: Tensor | float,
    top_k: int,
    valid: Tensor | None = None,
) -> Tensor:
    """[E]: expected number of tokens that would select each expert if its noise were drawn again
    (arXiv 1701.06538, eq. 8-10).

    The threshold of an expert is the k-th largest noisy logit among the others: the (k+1)-th of all
    where the expert is itself among the k, else the k-th. Where k = E nobody competes and every
    token counts fully.
    """
    clean_TE, noisy_TE = valid_rows(clean_TE, valid), valid_rows(noisy_TE, valid)
    if isinstance(noise_std, Tensor) and noise_std.dim() == 2:
        noise_std = valid_rows(noise_std, valid, 1.0)
    if top_k >= clean_TE.shape[1]:
        probability_TE = torch.ones_like(clean_TE)
    else:
        largest = noisy_TE.topk(top_k + 1, dim=1).values
        inside, outside = largest[:, top_k : top_k + 1], largest[:, top_k - 1 : top_k]
        threshold_TE = torch.where(noisy_TE > inside, inside, outside)
        probability_TE = torch.special.ndtr((clean_TE - threshold_TE) / noise_std)
    return summed(
        (probability_TE if valid is None else probability_TE * valid.unsqueeze(1)).sum(dim=0)
    )


def load_loss(
    routing: Routing, *, noisy_logits: Tensor, noise_std: Tensor | float, unbiased: bool = False
) -> Tensor:
    """CV^2 of the smooth load (arXiv 1701.06538, eq. 11). Tutel: ``noise_std = noise / E``,
    ``unbiased=True``.
    """
    load_E = smooth_load(routing.logits, noisy_logits, noise_std, routing.top_k, routing.valid)
    return cv_squared(load_E, unbiased=unbiased)


def entropy_loss(routing: Routing) -> Tensor:
    """Mean entropy of the normalised scores in nats (top-p routing, arXiv 2403.07652, eq. 7): small
    means few experts suffice.
    """
    entropy_T = router_entropy(valid_rows(routing.scores, routing.valid, 1.0))
    return (entropy_T * routing.valid_mask()).sum() / routing.num_valid().clamp_min(1)


def variance_loss(routing: Routing) -> Tensor:
    """Minus the mean over experts of the variance of their score over tokens (arXiv 2505.22323):
    pushes tokens to differ in routing.
    """
    scores_TE = valid_rows(routing.scores, routing.valid)
    valid_T1 = routing.valid_mask().unsqueeze(1).to(scores_TE.dtype)
    tokens = valid_T1.sum().clamp_min(1)
    mean_E = scores_TE.sum(dim=0) / tokens
    return -(((scores_TE - mean_E).square() * valid_T1).sum(dim=0) / tokens).mean()
