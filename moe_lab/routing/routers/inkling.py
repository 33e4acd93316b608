"""Inkling: the gates of the shared experts enter the normaliser of the routed ones.

The router has E + S rows. Selected: the k largest of ``sigmoid(l_e) + b_e`` over the routed
experts. Weights of the selected and of the S shared experts together: ``sigmoid(l) / sum
sigmoid(l)``, times ``routed_scaling_factor`` times a learned global scale. The shared experts' part
is ``Routing.shared_weights``.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import Routing


@register("inkling")
class Inkling(TokenChoice):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.global_scale = nn.Parameter(torch.ones(1))

    def width(self) -> int:
        return self.config.num_experts + self.setting("num_shared_gates")

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        routed_TE, shared_TS = logits_TE.split(
            [self.config.num_experts, self.setting("num_shared_gates")], dim=1
        )
        routing = super().route(routed_TE, context)
        log_gates = F.logsigmoid(
            torch.cat([routed_TE.gather(1, routing.indices), shared_TS], dim=1)
        )
        gates = (
            log_gates.softmax(dim=1)
            * self.config.routed_scaling_factor
            * self.global_scale.to(log_gates.dtype)
        )
        return replace(
            routing,
            weights=gates[:, : self.config.top_k],
            shared_weights=gates[:, self.config.top_k :],
        )
