"""DeepSeek-V4's scores (arXiv 2606.19348): ``s = sqrt(softplus(l))``, top k of ``s + b`` without
groups, renormalised and scaled.

Unlike a sigmoid the score has no ceiling, so a confident expert keeps a gradient.
"""

from moe_lab.routing.config import ScoreFunc
from moe_lab.routing.router import fields, register
from moe_lab.routing.routers.token_choice import CAP, COMMON, NORM, TokenChoice


@register("sqrt_softplus_topk")
class SqrtSoftplusTopK(TokenChoice):
    options = fields(COMMON, NORM, CAP)
    fixed = fields(score_func=ScoreFunc.SQRT_SOFTPLUS)
