"""ReMoE (arXiv 2412.14711, eq. 5-9): ReLU instead of top k. An expert runs where its gate is
positive; everything is differentiable.

``g = ReLU(x W^T)``. Sparsity comes from a load-weighted L1 loss whose coefficient adapts after each
step: ``lambda E / (T^2 k) sum_i c_i sum_t g_ti`` with c_i the number of tokens of expert i; lambda
grows by 1.2 while more than k of E experts are active and shrinks by 1.2 otherwise. The routing
carries the loss as ``l1``, lambda included: add it with coefficient 1.

lambda winds up: while the router is too dense and cannot follow (frozen, or a small learning rate),
it grows without bound, and the sparsity overshoots to zero experts afterwards.
``ControllerConfig(kind="relu_lambda", limit=...)`` bounds it.
"""

import torch
from torch import Tensor

from moe_lab.routing.controllers import ReluLambda
from moe_lab.routing.losses.across_ranks import summed
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import slots_from_mask, take


@register("remoe")
class ReMoE(Router):
    controller: ReluLambda

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = logits_TE.relu()
        indices_TK = slots_from_mask(scores_TE.detach() > 0, scores_TE, self.config.num_slots)
        routing = self.routing(
            indices_TK,
            take(scores_TE, indices_TK) * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )
        # A copy: lambda moves in place after the step, and a graph may still be waiting for its
        # backward pass.
        routing.losses["l1"] = self.controller.coefficient.clone() * load_weighted_l1(
            routing, self.config.top_k
        )
        return routing


def load_weighted_l1(routing: Routing, top_k: int) -> Tensor:
    """``E / (T^2 k) sum_i c_i sum_t g_ti``: 1 where every gate of k experts per token is 1 and the
    load is uniform.
    """
    tokens = summed(routing.num_valid()).clamp_min(1)
    gates_TE = (
        routing.scores
        if routing.valid is None
        else torch.where(routing.valid.unsqueeze(1), routing.scores, 0.0)
    )
    experts = gates_TE.shape[1]
    share_E = summed(routing.counts()).to(gates_TE.dtype) / tokens
    return experts / top_k * (share_E * summed(gates_TE.sum(dim=0)) / tokens).sum()
