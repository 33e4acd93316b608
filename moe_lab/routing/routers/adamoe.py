"""AdaMoE (arXiv 2406.13233) and null experts as data sparsity (arXiv 2601.15370): top k over real
and null experts.

``s = softmax(l)`` over N real and M null experts; top k of s; a null expert computes nothing, and
the weights of the real ones are renormalised over the real ones alone: a token with two of three
slots on nulls gives its one real expert the weight 1. A token whose slots are all null gets weight
0 everywhere. Loss: ``losses.null_loss``, which evens out real experts and nulls as one.

``null_experts(N, rho)`` of them make k slots hold rho k real experts on average under uniform load.
"""

import torch
from torch import Tensor

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("adamoe")
class AdaMoE(TokenChoice):
    def weigh(self, scores_TE: Tensor, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        weights_TK = torch.where(
            indices_TK < self.config.num_experts, scores_TE.gather(1, indices_TK), 0.0
        )
        total = weights_TK.sum(dim=1, keepdim=True)
        return (
            weights_TK
            / total.clamp_min(torch.finfo(total.dtype).tiny)
            * self.config.routed_scaling_factor
        )
