"""XMoE (arXiv 2403.18926): many small experts, each token takes them in order while the probability
BEFORE one is below the threshold.

The rule of top-p with another default: threshold 0.9, at most ``top_k`` experts (8 in the release,
of 64 small ones). The weights are the probabilities.
"""

from torch import Tensor

from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.top_p import TopP
from moe_lab.routing.routing import Routing


@register("xmoe")
class XMoE(TopP):
    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        return self.until(logits_TE, self.setting("threshold"), context)
