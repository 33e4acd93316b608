"""SeqTopK (arXiv 2511.06494): a budget per sequence instead of per token. The S k largest (token,
expert) pairs of a sequence run.

``s = softmax(l)``; over all pairs of one sequence the S * ``top_k`` largest scores are kept, so
hard tokens can take experts from easy ones and the cost of a sequence is fixed. Padding brings no
budget and takes none. The choice looks at the whole sequence: at inference on a prefix the same
rule decides otherwise than it did in training.
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask, take


@register("seq_topk")
class SeqTopK(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.softmax(dim=1)
        kept_TE = best_pairs(scores_TE.detach(), self.config.top_k, context)
        indices_TK = slots_from_mask(
            kept_TE, scores_TE, self.config.num_slots, self.setting("min_slots")
        )
        weights_TK = take(scores_TE, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp_min(
                torch.finfo(weights_TK.dtype).tiny
            )
        return self.routing(
            indices_TK,
            weights_TK * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )


def best_pairs(scores_TE: Tensor, top_k: int, context: RouterContext) -> Tensor:
    """[T, E] bool: exactly ``top_k`` pairs per valid token of each sequence, the ones of largest
    score.
    """
    tokens, experts = scores_TE.shape
    length = context.tokens_per_sequence(tokens)
    if tokens == 0:
        return torch.zeros_like(scores_TE, dtype=torch.bool)
    valid_NS = (
        torch.ones_like(scores_TE[:, 0], dtype=torch.bool)
        if context.valid is None
        else context.valid
    )
    valid_NS = valid_NS.view(-1, length)
    pairs_NP = (
        scores_TE.view(-1, length, experts)
        .masked_fill(~valid_NS.unsqueeze(2), float("-inf"))
        .flatten(1)
    )
    best_NB = pairs_NP.topk(length * top_k, dim=1).indices
    within_NB = torch.arange(best_NB.shape[1], device=scores_TE.device) < (
        valid_NS.sum(dim=1) * top_k
    ).unsqueeze(1)
    return (
        torch.zeros_like(pairs_NP, dtype=torch.bool)
        .scatter_(1, best_NB, within_NB)
        .view(tokens, experts)
    )
