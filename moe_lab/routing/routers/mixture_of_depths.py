"""Mixture-of-Depths (arXiv 2404.02258, eq. 1 and section 3.5): the "expert" is the block, and only
the best tokens pass through it.

One score per token, ``r = x w``; the ``capacity_factor * S`` tokens of largest r in each sequence
pass (12.5 % by default) and get ``x + r block(x)``; the others skip the block. ``num_experts`` is
1. Which tokens pass depends on later ones, so in evaluation a predictor on the same input (gradient
stopped) decides instead: active iff its logit is positive. Its loss is carried as ``predictor``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import (
    Router,
    RouterContext,
    check_finite,
    register,
    working_dtype,
)
from moe_lab.routing.routing import UNUSED, Routing


@register("mixture_of_depths")
class MixtureOfDepths(Router):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.predictor = nn.Parameter(torch.zeros(1, d_model))

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        logits_T1 = self.logits(x_TD)
        check_finite(logits_T1, context.valid)
        predicted_T1 = F.linear(
            x_TD.detach().to(working_dtype(x_TD)), self.predictor.to(logits_T1.dtype)
        )
        best_T1 = self.best(logits_T1.detach(), context)
        passes_T1 = best_T1 if self.training else predicted_T1 > 0
        losses = F.binary_cross_entropy_with_logits(
            predicted_T1, best_T1.to(predicted_T1.dtype), reduction="none"
        )
        valid_T1 = torch.ones_like(best_T1) if context.valid is None else context.valid.unsqueeze(1)
        return self.routing(
            torch.where(passes_T1, 0, UNUSED),
            torch.where(passes_T1, logits_T1, 0.0),
            logits_T1,
            logits_T1.sigmoid(),
            context,
            losses={"predictor": (losses * valid_T1).sum() / valid_T1.sum().clamp_min(1)},
        )

    def best(self, logits_T1: Tensor, context: RouterContext) -> Tensor:
        """[T, 1] bool: the tokens of largest score in each sequence, padding never."""
        tokens = logits_T1.shape[0]
        length = context.tokens_per_sequence(tokens)
        if tokens == 0:
            return torch.zeros_like(logits_T1, dtype=torch.bool)
        valid_NS = (
            torch.ones_like(logits_T1[:, 0], dtype=torch.bool)
            if context.valid is None
            else context.valid
        ).view(-1, length)
        ranked_NS = logits_T1.view(-1, length).masked_fill(~valid_NS, float("-inf"))
        share = self.setting("capacity_factor")
        best_NC = ranked_NS.topk(math.ceil(share * length), dim=1).indices
        # Of a sequence with padding, that share of its own tokens.
        kept_N1 = (share * valid_NS.sum(dim=1, keepdim=True).double()).ceil()
        within_NC = torch.arange(best_NC.shape[1], device=best_NC.device) < kept_N1
        passing_NS = torch.zeros_like(valid_NS).scatter_(1, best_NC, within_NC)
        return (passing_NS & valid_NS).view(tokens, 1)
