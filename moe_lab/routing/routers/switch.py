"""Switch Transformer (arXiv 2101.03961, eq. 1-3): softmax, top 1, and a capacity beyond which
tokens are dropped.

``C = ceil(capacity_factor * k T / E)``, or ``expert_capacity``; tokens queue in order of position
(or of confidence, if ``batch_prioritized``), first choices before second ones. A dropped slot has
id -1 and weight 0 in ``indices`` and keeps its expert in ``selected``: ``Routing.dropped`` tells it
from a slot that was never used, and balance losses count what was selected.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from moe_lab.routing.config import CapacityScope, RouterConfig
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import UNUSED, Routing
from moe_lab.routing.select import within_capacity


@register("switch")
class Switch(TokenChoice):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        routing = super().route(logits_TE, context)
        tokens = logits_TE.shape[0]
        by_sequence = self.setting("capacity_scope") == CapacityScope.SEQUENCE
        length = context.tokens_per_sequence(tokens) if by_sequence else tokens
        fits = within_capacity(
            routing.indices,
            torch.full(
                (self.config.num_experts,), capacity(self.config, length), device=logits_TE.device
            ),
            sequence_length=length,
            valid=context.valid,
            priority_T=routing.scores.amax(dim=1) if self.config.batch_prioritized else None,
        )
        return drop(routing, fits)


def capacity(config: RouterConfig, tokens: int, factor: float = 1.25) -> int:
    """Slots of one expert for that many tokens."""
    if config.expert_capacity is not None:
        return config.expert_capacity
    factor = factor if config.capacity_factor is None else config.capacity_factor
    return math.ceil(factor * config.top_k * tokens / config.num_experts)


def drop(routing: Routing, fits_TK: Tensor) -> Routing:
    """The routing without the slots that do not fit; ``selected`` keeps what they chose."""
    return replace(
        routing,
        indices=torch.where(fits_TK, routing.indices, UNUSED),
        weights=torch.where(fits_TK, routing.weights, 0.0),
        selected=routing.indices,
    )
