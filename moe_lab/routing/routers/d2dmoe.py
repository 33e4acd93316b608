"""D2DMoE (arXiv 2310.04361, section 3.3): the router predicts the norm of each expert's output;
experts near the largest one run.

``R = |x W^T|``, active iff ``R_i >= threshold * max_j R_j``, at most ``top_k`` experts; outputs are
added with weight 1, as the experts are pieces of a dense layer. The weights carry no gradient: the
router learns from ``losses.norm_regression_loss(routing, norms)`` alone. (The paper's router has a
hidden layer of its own.)
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask


@register("d2dmoe")
class D2DMoE(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.abs()
        active_TE = scores_TE.detach() >= self.setting("threshold") * scores_TE.detach().amax(
            dim=1, keepdim=True
        )
        indices_TK = slots_from_mask(active_TE, scores_TE, self.config.top_k)
        return self.routing(
            indices_TK,
            torch.where(
                indices_TK >= 0,
                1.0,
                torch.zeros((), dtype=scores_TE.dtype, device=scores_TE.device),
            ),
            logits_TE,
            scores_TE,
            context,
        )
