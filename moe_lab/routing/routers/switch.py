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

from moe_lab.routing.choices import DecidesOver
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import UNUSED, Routing
from moe_lab.routing.select import within_capacity


@register("switch")
class Switch(TokenChoice):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        routing = super().route(logits_TE, context)
        by_sequence = self.config.decides_over is DecidesOver.SEQUENCE
        length = context.tokens_per_sequence(logits_TE.shape[0]) if by_sequence else None
        slots = capacity(self.config, context.num_valid(logits_TE, length))
        return drop(routing, self.within(slots, routing.indices, routing.scores, context, length))

    def within(
        self,
        slots: Tensor | int,
        indices_TK: Tensor,
        scores_TE: Tensor,
        context: RouterContext,
        sequence_length: int | None = None,
    ) -> Tensor:
        """[T, K] bool: the slots that fit if every expert has ``slots`` of them, in the batch or
        [N, 1] in each sequence.
        """
        if isinstance(slots, int):  # ``full`` copies nothing to the device
            slots = torch.full((), slots, device=indices_TK.device)
        return within_capacity(
            indices_TK,
            slots.expand(*slots.shape[:-1], self.config.num_experts),
            sequence_length=sequence_length or indices_TK.shape[0],
            valid=context.valid,
            priority_T=scores_TE.amax(dim=1) if self.config.batch_prioritized else None,
        )


def capacity(config: RouterConfig, tokens: Tensor | int) -> Tensor | int:
    """Slots of one expert for that many tokens, padding left out."""
    if config.expert_capacity is not None:
        return config.expert_capacity
    return rounded_up(
        config.setting("capacity_factor") * config.top_k * tokens_of(tokens) / config.num_experts
    )


def tokens_of(tokens: Tensor | int) -> Tensor | int:
    """A number of tokens for arithmetic that rounds as Python's does."""
    return tokens if isinstance(tokens, int) else tokens.double()


def rounded_up(value: Tensor | float) -> Tensor | int:
    """The next whole number, without waiting for the device."""
    return value.ceil().long() if isinstance(value, Tensor) else math.ceil(value)


def drop(routing: Routing, fits_TK: Tensor) -> Routing:
    """The routing without the slots that do not fit; ``selected`` keeps what they chose."""
    return replace(
        routing,
        indices=torch.where(fits_TK, routing.indices, UNUSED),
        weights=torch.where(fits_TK, routing.weights, 0.0),
        selected=routing.indices,
    )
