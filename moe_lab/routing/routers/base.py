"""BASE layers (arXiv 2103.16716): in training each token gets one expert by the best assignment
that is exactly balanced.

Maximise ``sum_t l_t,a(t)`` where every expert gets T/E tokens (at most ceil(T/E) where E does not
divide T); solved exactly on the host (``scipy.optimize.linear_sum_assignment``, cubic in T: batches
of some thousand tokens). In evaluation ``argmax l``. The weight is ``sigmoid(l)``; the rows start
orthogonal with gain 0.1. Padding takes part in no assignment and goes to its argmax.
"""

import math

import torch
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing


@register("base")
class Base(Router):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        nn.init.orthogonal_(self.weight, gain=0.1)

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        indices_T = logits_TE.argmax(dim=1)
        if self.training:
            rows = (
                torch.arange(logits_TE.shape[0], device=logits_TE.device)
                if context.valid is None
                else context.valid.nonzero()[:, 0]
            )
            indices_T = indices_T.index_copy(0, rows, balanced_assignment(logits_TE.detach()[rows]))
        indices_T1 = indices_T.unsqueeze(1)
        scores_TE = logits_TE.sigmoid()
        return self.routing(
            indices_T1,
            scores_TE.gather(1, indices_T1) * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )


def balanced_assignment(scores_TE: Tensor) -> Tensor:
    """[T] expert ids that maximise the summed score with at most ceil(T/E) tokens per expert."""
    from scipy.optimize import linear_sum_assignment

    tokens, experts = scores_TE.shape
    if tokens == 0:
        return scores_TE.new_zeros(0, dtype=torch.int64)
    seats = scores_TE.double().cpu().numpy().repeat(math.ceil(tokens / experts), axis=1)
    _, seat = linear_sum_assignment(seats, maximize=True)
    return torch.from_numpy(seat // math.ceil(tokens / experts)).to(scores_TE.device)
