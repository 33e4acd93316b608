"""Random routing: k different experts for every token, drawn at each call, each with weight 1/k.
The baseline of any comparison.

Draws from torch's global generator, which activation checkpointing restores, so a recomputation
decides the same.
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routers.hash import equal_weights
from moe_lab.routing.routing import Routing


@register("random")
class UniformRandom(Router):
    learned = False

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        draw_TE = torch.rand(x_TD.shape[0], self.config.num_choices, device=x_TD.device)
        indices_TK = draw_TE.topk(self.config.top_k, dim=1).indices
        return equal_weights(self, x_TD, indices_TK, context)
