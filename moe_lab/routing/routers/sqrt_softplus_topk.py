"""DeepSeek-V4's scores (arXiv 2606.19348): ``s = sqrt(softplus(l))``, top k of ``s + b`` without
groups, renormalised and scaled.

Unlike a sigmoid the score has no ceiling, so a confident expert keeps a gradient.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("sqrt_softplus_topk")
class SqrtSoftplusTopK(TokenChoice):
    """``token_choice`` with the square root of the softplus as score."""
