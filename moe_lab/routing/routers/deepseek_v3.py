"""DeepSeek-V3's node-limited routing (arXiv 2412.19437, section 2.1.2): sigmoid scores, bias for
selection, best two per group.

``s = sigmoid(l)``; a group's score is the sum of its two largest ``s + b``; top k of ``s + b`` in
the best ``topk_groups`` groups; ``g = routed_scaling_factor * s / (sum s + 1e-20)``. Kimi K2,
GLM-4.5, Ling 2.0, dots.llm1, Nemotron 3 and others share it.
"""

from moe_lab.routing.config import GroupScore, ScoreFunc
from moe_lab.routing.router import fields, register
from moe_lab.routing.routers.token_choice import COMMON, GROUPS, NORM, TokenChoice


@register("deepseek_v3")
class DeepSeekV3(TokenChoice):
    options = fields(COMMON, NORM, GROUPS, norm_eps=1e-20)
    fixed = fields(score_func=ScoreFunc.SIGMOID, group_score=GroupScore.BEST_TWO)
