"""DeepSeek-V3's node-limited routing (arXiv 2412.19437, section 2.1.2): sigmoid scores, bias for
selection, best two per group.

``s = sigmoid(l)``; a group's score is the sum of its two largest ``s + b``; top k of ``s + b`` in
the best ``topk_groups`` groups; ``g = routed_scaling_factor * s / (sum s + 1e-20)``. Kimi K2,
GLM-4.5, Ling 2.0, dots.llm1, Nemotron 3 and others share it.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("deepseek_v3")
class DeepSeekV3(TokenChoice):
    """``token_choice`` with sigmoid scores and groups ranked by their best two experts."""
