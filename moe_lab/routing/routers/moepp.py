"""MoE++ (arXiv 2410.07348): zero, copy and constant experts beside the real ones, and gating
residuals between layers.

``l_j = W_j x + V_j l_{j-1}`` for every MoE layer but the first, l_{j-1} the logits of the MoE layer
before (``RouterContext.previous``); ``s = softmax(l)`` over all N + Z; top k. The weight of a zero
expert is set to 0 and the others are renormalised over what is left, as in the release. The
zero-compute experts are, by default and in the release's order, constants, then one copy, then one
zero.

With ``capacity_factor`` gamma real and zero-compute experts have capacities ``gamma tau S / (tau N
+ Z)`` and ``gamma S / (tau N + Z)``, tau = ``ffn_share``, S = k T slots (the paper writes T; with T
tokens half of the slots of its top-2 would be dropped). The loss that goes with it is
``losses.heterogeneous_loss(routing, ffn_share=tau)``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig, ZeroExpertKind
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.switch import drop, rounded_up, tokens_of
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import Routing, valid_rows
from moe_lab.routing.select import within_capacity


@register("moepp")
class MoEPlusPlus(TokenChoice):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        # Zero: the first step routes as if there were no residual, and the gradient of V is already
        # not zero.
        self.residual_weight = nn.Parameter(torch.zeros(config.num_choices, config.num_choices))
        returns_nothing = torch.tensor(
            [False] * config.num_experts
            + [kind == ZeroExpertKind.ZERO for kind in config.zero_kinds]
        )
        self.register_buffer("returns_nothing", returns_nothing, persistent=False)

    returns_nothing: Tensor

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        before = context.previous
        before_TE = torch.zeros_like(logits_TE)
        if before is not None and before.logits.shape == logits_TE.shape:
            before_TE = valid_rows(before.logits, context.valid).to(logits_TE.dtype)
        # The first layer adds zeros, so that DDP meets a gradient of every parameter.
        logits_TE = logits_TE + F.linear(before_TE, self.residual_weight.to(logits_TE.dtype))
        routing = super().route(logits_TE, context)
        gamma = self.config.capacity_factor
        if gamma is None:
            return routing
        sizes = (self.config.num_experts, self.config.num_zero_experts)
        real, other = (
            slots.expand(size)
            if isinstance(slots, Tensor)
            else torch.full((size,), slots, device=logits_TE.device)
            for slots, size in zip(
                capacities(
                    self.config, self.setting("ffn_share"), gamma, context.num_valid(logits_TE)
                ),
                sizes,
                strict=True,
            )
        )
        fits_TK = within_capacity(
            routing.indices,
            torch.cat([real, other]),
            sequence_length=logits_TE.shape[0],
            valid=context.valid,
        )
        return drop(routing, fits_TK)

    def weigh(self, scores_TE: Tensor, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        weights_TK = torch.where(
            self.returns_nothing[indices_TK], 0.0, scores_TE.gather(1, indices_TK)
        )
        total = weights_TK.sum(dim=1, keepdim=True)
        # A token that chose nothing but zero experts keeps weight 0 instead of 0 / 0.
        return (
            weights_TK
            / total.clamp_min(torch.finfo(total.dtype).tiny)
            * self.config.routed_scaling_factor
        )


def capacities(
    config: RouterConfig, ffn_share: float, gamma: float, tokens: Tensor | int
) -> tuple[Tensor | int, Tensor | int]:
    """Slots of a real and of a zero-compute expert (arXiv 2410.07348, eq. 8, on slots)."""
    weight = ffn_share * config.num_experts + config.num_zero_experts
    unit = gamma * config.top_k * tokens_of(tokens) / weight
    return rounded_up(unit * ffn_share), rounded_up(unit)
