"""DBRX: softmax over all experts, top k, weights divided by their p-norm (p = 1 in the release: a
renormalisation).

``g = s / ||s_selected||_p``; p = 2 gives weights of unit length, whose sum lies between 1 and
sqrt(k).
"""

from moe_lab.routing.config import ScoreFunc
from moe_lab.routing.router import fields, register
from moe_lab.routing.routers.token_choice import COMMON, TokenChoice


@register("pnorm_topk")
class PNormTopK(TokenChoice):
    options = fields(COMMON, norm_p=1.0, jitter_eps=0.0)
    fixed = fields(score_func=ScoreFunc.SOFTMAX)
