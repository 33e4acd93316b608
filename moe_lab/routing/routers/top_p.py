"""Top-p routing (arXiv 2403.07652, eq. 4-7): the smallest set of experts whose probability reaches
p, at most ``top_k`` of them.

``s = softmax(l)``, sorted; an expert is kept while the probability of those before it is below p,
so the one that crosses p is included and every token has at least one. Weights are the
probabilities, not renormalised unless ``norm_topk_prob``. The routing carries the paper's
``entropy`` loss, without which the router learns flat distributions and the count runs away.

A fixed p does not fix the count: sharpening or flattening the logits by a factor moves it freely
(``dtop_p`` steers p).
"""

import torch
from torch import Tensor

from moe_lab.routing.losses import entropy_loss
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import UNUSED, Routing
from moe_lab.routing.select import take


@register("top_p")
class TopP(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        return self.until(logits_TE, self.setting("top_p"), context)

    def until(self, logits_TE: Tensor, mass: Tensor | float, context: RouterContext) -> Routing:
        """The routing that keeps experts until their probability reaches ``mass``."""
        scores_TE = logits_TE.softmax(dim=1)
        indices_TK = smallest_set(scores_TE, mass, self.config.num_slots)
        weights_TK = take(scores_TE, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
        routing = self.routing(
            indices_TK,
            weights_TK * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )
        routing.losses["entropy"] = entropy_loss(routing)
        return routing


def smallest_set(scores_TE: Tensor, mass: Tensor | float, slots: int) -> Tensor:
    """[T, slots] ids: experts in descending order while the probability before them is below
    ``mass``, then -1.
    """
    ranked = scores_TE.detach().topk(slots, dim=1)
    before = ranked.values.cumsum(dim=1) - ranked.values
    # The first has nothing before it and is kept whatever rounding says.
    kept = before < mass
    kept[:, 0] = True
    return torch.where(kept, ranked.indices, UNUSED)
