"""Expert Threshold (arXiv 2603.11535): an expert takes every token whose logit exceeds its cut-off.

Active iff ``l_ti > c_i``; gates ``sigmoid(l)``. After each step ``c_i`` moves towards the logit at
which expert i takes its fair share ``top_k T / E`` of the batch (an exponential mean, 0.999):
causal at inference, balanced on average, and free in the count per token. Until the controller's
``warmup`` is over (one update; the paper's is 4000) the cut-offs are those of the batch itself:
expert choice.

With the ``budget_sign`` controller the same router follows the rule of kexue.fm 10815.
``min_slots`` = 0, the default, lets a token have no expert at all; whatever rewards small counts
then drives all of them to zero, and no gradient brings them back.
"""

import torch
from torch import Tensor

from moe_lab.routing.controllers import (
    ThresholdEMA,
    batch_cutoffs,
)
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask, take


@register("expert_threshold")
class ExpertThreshold(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        above_TE = logits_TE.detach() - self.cutoffs(logits_TE.detach(), context)
        # Of a token with more experts than slots the ones furthest above their cut-off stay;
        # finite, where nothing is cut.
        order_TE = above_TE.clamp(-1e30, 1e30)
        indices_TK = slots_from_mask(
            above_TE > 0, order_TE, self.config.num_slots, self.setting("min_slots")
        )
        scores_TE = logits_TE.sigmoid()
        return self.routing(
            indices_TK,
            take(scores_TE, indices_TK) * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )

    def cutoffs(self, logits_TE: Tensor, context: RouterContext) -> Tensor:
        """[E]: what a logit must exceed."""
        controller = self.controller
        assert controller is not None
        if not isinstance(controller, ThresholdEMA) or logits_TE.shape[0] == 0:
            return -controller.bias
        if self.config.top_k >= self.config.num_experts:
            # Nobody is left out, so there is nothing to cut.
            return torch.full_like(logits_TE[0], float("-inf"))
        if context.valid is None:
            tokens, seen_TE = torch.full((), logits_TE.shape[0], device=logits_TE.device), logits_TE
        else:
            tokens, seen_TE = (
                context.valid.sum(),
                logits_TE.masked_fill(~context.valid.unsqueeze(1), float("-inf")),
            )
        own_E = batch_cutoffs(seen_TE, tokens, self.config.top_k, offset=0)
        return torch.where(
            controller.warming_up(self.training), own_E, -controller.bias.to(logits_TE.dtype)
        )
