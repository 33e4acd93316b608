"""Random routing: k different experts for every token, drawn anew each time, each with weight 1/k.
The floor of any comparison.

Draws from torch's global generator, which activation checkpointing restores, so a recomputation
decides the same.
"""

import torch
from torch import Tensor

from moe_lab.routing.router import Router, RouterContext, fields, register
from moe_lab.routing.routers.hash import unlearned
from moe_lab.routing.routing import Routing


@register("random")
class UniformRandom(Router):
    options = fields(num_zero_experts=0, zero_expert_kinds=None)
    learned = False

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        draw_TE = torch.rand(x_TD.shape[0], self.config.num_choices, device=x_TD.device)
        return unlearned(
            x_TD, draw_TE.topk(self.config.top_k, dim=1).indices, self.config, context.valid
        )
