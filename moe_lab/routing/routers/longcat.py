"""LongCat-Flash: real and zero-computation experts in one softmax (arXiv 2509.01322 section 2.1;
transformers ``longcat_flash``).

``s = softmax(x W^T)`` in float32 over all N + Z experts; the K largest ``s_i + b_i`` are selected;
the weights are ``routed_scaling_factor * s_i`` without renormalisation. A zero-computation expert
returns its input, so a token's compute varies between 0 and K real experts, and the controller
holds its mean at K_e.

The release scales the identity part too; readings of LongCat-2.0's code add it unscaled:
``zero_expert_scaling=False``. With ``device_groups`` the routing carries the device-level balance
loss of the same paper, one group of which is all zero experts.
"""

from dataclasses import replace

from torch import Tensor

from moe_lab.routing.losses.balance import longcat_device_loss
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import Routing


@register("longcat")
class LongCat(TokenChoice):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        routing = super().route(logits_TE, context)
        config = self.config
        if config.device_groups is None or not self.training:
            return routing
        target = None if config.controller is None else config.controller.target_ffn_count
        uniform = config.top_k * config.num_experts / config.num_choices
        loss = longcat_device_loss(
            routing, config.device_groups, uniform if target is None else target
        )
        return replace(routing, losses={**routing.losses, "device": loss})
