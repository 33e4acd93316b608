"""One sigmoid per expert, top k of the score plus a bias (loss-free balancing, arXiv 2408.15664;
MiniMax-M2, Step-3.5, Hy3, Laguna).

``s = sigmoid(l)``; the k largest ``s_i + b_i``; ``g = s``, divided by its sum if
``norm_topk_prob``, times ``routed_scaling_factor``.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("sigmoid_topk")
class SigmoidTopK(TokenChoice):
    """``token_choice`` with sigmoid scores."""
