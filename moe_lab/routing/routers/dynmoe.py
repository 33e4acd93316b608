"""DynMoE's top-any gating (arXiv 2405.14297, eq. 2-8): every expert decides for itself whether it
wants the token.

``s = sigmoid(scale cos(x, w_i))``, active iff ``s_i > sigmoid(G_i)`` with a learned threshold G (0
at the start); the outputs of the active experts are averaged. The threshold gets its gradient
straight through the step. In evaluation a token that no expert wants goes to the one of largest s;
in training it has none. At most ``top_k`` experts, the ones of largest s.

The routing carries the paper's auxiliary loss as ``dynmoe``: rows orthogonal and short. Adding and
removing experts while training is not part of the router.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.losses import dynmoe_loss
from moe_lab.routing.losses.across_ranks import summed
from moe_lab.routing.router import (
    Router,
    RouterContext,
    full_precision,
    register,
    working_dtype,
)
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask, take


@register("dynmoe")
class DynMoE(Router):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        nn.init.orthogonal_(self.weight)
        self.scale = nn.Parameter(torch.ones(()))
        self.thresholds = nn.Parameter(torch.zeros(config.num_experts))

    def logits(self, x_TD: Tensor) -> Tensor:
        with full_precision(x_TD):
            dtype = working_dtype(x_TD)
            rows_ED = F.normalize(self.weight.to(dtype), dim=1)
            return F.linear(F.normalize(x_TD.to(dtype), dim=1), rows_ED) * self.scale.to(dtype)

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.sigmoid()
        margin_TE = scores_TE - self.thresholds.to(scores_TE.dtype).sigmoid()
        at_least = 0 if self.training else 1
        indices_TK = slots_from_mask(margin_TE.detach() > 0, scores_TE, self.config.top_k, at_least)
        used_TK = (indices_TK >= 0).to(scores_TE.dtype)
        # Value: the step, 1 in every used slot. Gradient: that of the margin.
        passed_TK = used_TK + take(margin_TE, indices_TK) - take(margin_TE, indices_TK).detach()
        routing = self.routing(
            indices_TK,
            passed_TK
            / used_TK.sum(dim=1, keepdim=True).clamp_min(1)
            * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )
        routing.losses["dynmoe"] = dynmoe_loss(self.weight, summed(routing.counts()) > 0)
        return routing
