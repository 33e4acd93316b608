"""DBRX: softmax over all experts, top k, weights divided by their p-norm (p = 1 in the release: a
renormalisation).

``g = s / ||s_selected||_p``; p = 2 gives weights of unit length, whose sum lies between 1 and
sqrt(k).
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("pnorm_topk")
class PNormTopK(TokenChoice):
    """``token_choice`` with softmax scores and weights over their p-norm."""
