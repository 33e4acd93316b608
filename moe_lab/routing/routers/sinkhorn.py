"""Sinkhorn routing (arXiv 2202.01169 as in Megatron-LM): in training the top k of a doubly
normalised matrix, in evaluation of the logits.

``M = exp(l)``; rows and columns are scaled in turn until every row sums to 1/T and every column to
1/E, i.e. until the mean change of the column factors is below 1e-4; the k largest entries of a row
are its experts. Weights are ``sigmoid(l)`` for k = 1, else the softmax over all experts, never the
transport plan. The loop waits for the device at every turn.
"""

import torch
from torch import Tensor

from moe_lab.cpu_kernels.top_k import top_k
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing

TOLERANCE, MOST_TURNS = 1e-4, 1000


@register("sinkhorn")
class Sinkhorn(Router):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        choice_TE = balanced(logits_TE.detach(), context.valid) if self.training else logits_TE
        indices_TK = top_k(choice_TE, self.config.top_k)
        scores_TE = logits_TE.sigmoid() if self.config.top_k == 1 else logits_TE.softmax(dim=1)
        return self.routing(
            indices_TK,
            scores_TE.gather(1, indices_TK) * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )


def balanced(logits_TE: Tensor, valid: Tensor | None = None) -> Tensor:
    """[T, E]: ``exp(logits)`` with rows summing to 1/T and columns to 1/E over the valid tokens;
    padding gets the same column factors.
    """
    # A factor per row is absorbed by the row scaling, so the largest entry may be 1 and nothing
    # overflows.
    kernel_TE = (logits_TE - logits_TE.amax(dim=1, keepdim=True)).exp()
    used_T = torch.ones_like(kernel_TE[:, 0]) if valid is None else valid.to(kernel_TE.dtype)
    tokens, experts = used_T.sum().clamp_min(1), kernel_TE.shape[1]
    column_E, row_T = kernel_TE.new_ones(experts), used_T
    for _ in range(MOST_TURNS):
        row_T = 1 / (tokens * (kernel_TE * column_E).sum(dim=1) + 1e-8)
        moved_E = 1 / (experts * (kernel_TE * (row_T * used_T).unsqueeze(1)).sum(dim=0) + 1e-8)
        change = float((moved_E - column_E).abs().mean())
        column_E = moved_E
        if change < TOLERANCE:
            break
    return kernel_TE * column_E * row_T.unsqueeze(1)
