"""DeepSeek-V2's device-limited routing (arXiv 2405.04434, section 2.1.2): softmax, the best groups
by their best expert, top k in them.

``g = routed_scaling_factor * s`` without renormalisation. Mistral 4 ranks its groups by their best
two and renormalises: the same router with ``group_score="best_two"``.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("deepseek_v2")
class DeepSeekV2(TokenChoice):
    """``token_choice`` with softmax scores and groups ranked by their best expert."""
