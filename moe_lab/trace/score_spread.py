"""Entropy and margin of router scores, for many tokens at a time and at low cost.

Shape letters: T tokens, K slots, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.measures import router_entropy, score_margin
from moe_lab.routing.config import ScoreFunc


class Spread(NamedTuple):
    """[T] entropy in nats of the scores over their sum, and [T] margin: the K-th largest score less
    the next (inf where K = E).
    """

    entropy: Tensor
    margin: Tensor


def spread_of_scores(scores_TE: Tensor, indices_TK: Tensor) -> Spread:
    """Entropy and margin from scores (probabilities, or the scores of a router of moe_lab)."""
    return Spread(router_entropy(scores_TE), margin(scores_TE, indices_TK))


def spread_of_logits(logits_TE: Tensor, indices_TK: Tensor, score_func: ScoreFunc) -> Spread:
    """Entropy and margin from logits and the function that makes scores of them.

    Softmax needs one exponential and no logarithm per expert.
    """
    if score_func is not ScoreFunc.SOFTMAX:
        return spread_of_scores(_pointwise(logits_TE, score_func), indices_TK)
    below_TE = logits_TE - logits_TE.amax(dim=1, keepdim=True)
    raised_TE = below_TE.exp()
    total_T = raised_TE.sum(dim=1)
    # H = log Z - sum(e^m m) / Z; an expert at minus infinity adds nothing.
    below_TE.clamp_min_(torch.finfo(below_TE.dtype).min)
    negative = raised_TE.mul(below_TE).sum(dim=1) / total_T - total_T.log()
    # Subtracted from 0, and without what rounding left: one certain expert has entropy 0, not -0.
    entropy = 0 - negative.clamp_max(0)
    return Spread(entropy, margin(raised_TE, indices_TK) / total_T)


def margin(scores_TE: Tensor, indices_TK: Tensor) -> Tensor:
    """[T]: the K-th largest score less the next one; inf where K = E.

    Where the selected scores are the K largest (no bias, no groups, all slots used) a maximum over
    the others replaces the sort.
    """
    slots, experts = indices_TK.shape[1], scores_TE.shape[1]
    if slots >= experts or scores_TE.shape[0] == 0:
        return scores_TE.new_full((scores_TE.shape[0],), float("inf"))
    used = indices_TK.clamp_min(0)
    lowest_T = scores_TE.gather(1, used).amin(dim=1)
    margin_T = lowest_T - scores_TE.scatter(1, used, -torch.inf).amax(dim=1)
    # ``not >=`` also catches NaN, which the sort keeps.
    others = (~(margin_T >= 0) | (indices_TK < 0).any(dim=1)).nonzero()[:, 0]
    if len(others):
        margin_T[others] = score_margin(scores_TE[others], slots)
    return margin_T


def infer_score_func(logits_TE: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> ScoreFunc | None:
    """The function under which the weights are in proportion to the scores of the selected experts,
    or None where none or several fit.

    Renormalising and scaling do not change proportions. With one slot the weights themselves must
    be the scores.
    """
    used = indices_TK.clamp_min(0)
    fits = []
    for score_func in ScoreFunc:
        chosen = scores_of(logits_TE, score_func).gather(1, used)
        if weights_TK.shape[1] > 1:
            chosen, found = (
                chosen / chosen.sum(dim=1, keepdim=True),
                weights_TK / weights_TK.sum(dim=1, keepdim=True),
            )
        else:
            found = weights_TK
        if torch.allclose(chosen.float(), found.float(), rtol=2e-2, atol=1e-4):
            fits.append(score_func)
    return fits[0] if len(fits) == 1 else None


def scores_of(logits_TE: Tensor, score_func: ScoreFunc) -> Tensor:
    """[T, E] scores that the function makes of logits."""
    if score_func is ScoreFunc.SOFTMAX:
        return torch.softmax(logits_TE, dim=1)
    return _pointwise(logits_TE, score_func)


def _pointwise(logits_TE: Tensor, score_func: ScoreFunc) -> Tensor:
    return (
        torch.sigmoid(logits_TE)
        if score_func is ScoreFunc.SIGMOID
        else torch.nn.functional.softplus(logits_TE).sqrt()
    )
