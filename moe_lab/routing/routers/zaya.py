"""ZAYA1: a small MLP router that continues the state of the layer below, over E experts and one
that skips (transformers ``zaya``).

``r_l = x W_down + b + c_l * r_{l-1}`` (c_l a learned vector, 1 at the start; no second term in the
first layer); ``l = W_3 gelu(W_2 gelu(W_1 norm(r_l)))``; ``p = softmax(l)`` over E + 1; top k of ``p
+ b``. The last class skips: it computes nothing, its weight is 0 and its bias starts at -1. The
release writes it down as expert 0 with weight 0; here it keeps its own id, E.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.router import (
    RouterContext,
    check_finite,
    full_precision,
    register,
    working_dtype,
)
from moe_lab.routing.routers.token_choice import TokenChoice
from moe_lab.routing.routing import Routing, valid_rows


@register("zaya")
class Zaya(TokenChoice):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        width: int = self.setting("d_router")
        self.weight = nn.Parameter(torch.empty(config.num_choices, width))
        nn.init.normal_(self.weight, std=width**-0.5)
        self.down = nn.Linear(d_model, width)
        self.state_scale = nn.Parameter(torch.ones(width))
        self.state_norm = nn.RMSNorm(width, eps=self.setting("rms_norm_eps"))
        self.hidden1, self.hidden2 = nn.Linear(width, width), nn.Linear(width, width)
        if self.controller is not None:
            self.controller.bias[-1] = -1.0

    def decide(self, x_TD: Tensor, context: RouterContext) -> Routing:
        with full_precision(x_TD):
            dtype = working_dtype(x_TD)
            state_TR = _linear(x_TD.to(dtype), self.down)
            # The first layer adds zeros, so that DDP meets a gradient of every parameter.
            before_TR = torch.zeros_like(state_TR)
            if context.previous is not None and context.previous.state is not None:
                before_TR = valid_rows(context.previous.state, context.valid)
            state_TR = state_TR + before_TR * self.state_scale.to(dtype)
            hidden_TR = F.rms_norm(
                state_TR,
                self.state_norm.normalized_shape,
                self.state_norm.weight.to(dtype),
                self.state_norm.eps,
            )
            hidden_TR = F.gelu(_linear(F.gelu(_linear(hidden_TR, self.hidden1)), self.hidden2))
            logits_TE = F.linear(hidden_TR, self.weight.to(dtype))
        check_finite(logits_TE, context.valid)
        routing = self.route(logits_TE, context)
        weights_TK = torch.where(routing.indices < self.config.num_experts, routing.weights, 0.0)
        return replace(routing, weights=weights_TK, state=state_TR)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
