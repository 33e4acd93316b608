"""DTop-p (arXiv 2512.13996): top-p whose p a PI controller moves so that a token has ``top_k``
experts on average.

``l' = theta (l - mean l) / std l`` with a learned theta, so that no layer can change its count by
the size of its logits; then top-p with the controller's p. The paper shares one p over all layers;
here each router has its own, from its own count.

The gains are not published. The defaults, K_i 0.2 and K_p 0.05 on the error per expert, settle in
some twenty steps and are stable while the mean count moves by less than six N per unit of p (flat
scores: N); see experiments/balance_control.
"""

import torch
from torch import Tensor, nn

from moe_lab.routing.config import RouterConfig
from moe_lab.routing.controllers import TopPController
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.top_p import TopP
from moe_lab.routing.routing import Routing


@register("dtop_p")
class DTopP(TopP):
    controller: TopPController

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        centred = logits_TE - logits_TE.mean(dim=1, keepdim=True)
        std = centred.square().mean(dim=1, keepdim=True).add(1e-12).sqrt()
        return self.scale.to(logits_TE.dtype) * centred / std

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        return self.until(logits_TE, self.controller.p, context)
