"""Noisy top-k gating (Shazeer et al., arXiv 1701.06538, eq. 3-5, and its appendix A for the load).

``H = x W_g + N(0, 1) softplus(x W_noise)`` in training, ``x W_g`` in evaluation; ``g = softmax``
over the k largest H alone. The routing carries the paper's two losses: ``importance`` = CV^2 of the
summed gates and ``load`` = CV^2 of the smooth load ``sum_t Phi((x W_g - threshold) / softplus(x
W_noise))``, where the threshold of an expert is the k-th largest H of the others. Both noises are
off at T = 0 and where k = E, when nobody competes.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.cpu_kernels.top_k import top_k
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.losses import cv_squared, importance_of, smooth_load
from moe_lab.routing.router import (
    Router,
    RouterContext,
    check_finite,
    full_precision,
    register,
    working_dtype,
)
from moe_lab.routing.routing import Routing


@register("noisy_topk")
class NoisyTopK(Router):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        # Zero weights: noise of standard deviation softplus(0) = 0.69 at the start, as in the
        # paper's appendix A.
        self.noise_weight = nn.Parameter(torch.zeros(config.num_experts, d_model))

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        clean_TE = self.logits(x_TD)
        check_finite(clean_TE, context.valid)
        if not self.training:
            return self.route(clean_TE, context)
        with full_precision(x_TD):
            std_TE = F.softplus(
                F.linear(x_TD.to(working_dtype(x_TD)), self.noise_weight.to(clean_TE.dtype))
            )
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        routing = self.route(noisy_TE, context)
        load_E = smooth_load(clean_TE, noisy_TE, std_TE, self.config.top_k, context.valid)
        losses = {"importance": cv_squared(importance_of(routing)), "load": cv_squared(load_E)}
        # The logits of a routing are the router's outputs; the noise only decides and weighs.
        return replace(routing, logits=clean_TE, losses=losses)

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        indices_TK = top_k(logits_TE, self.config.top_k)
        return self.routing(
            indices_TK,
            logits_TE.gather(1, indices_TK).softmax(dim=1) * self.config.routed_scaling_factor,
            logits_TE,
            logits_TE.softmax(dim=1),
            context,
        )
