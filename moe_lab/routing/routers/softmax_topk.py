"""Softmax over all experts, then the top k (Mixtral, Qwen3-MoE with ``norm_topk_prob``; OLMoE,
Jamba without).

``s = softmax(x W^T)`` in float32; the k largest ``s_i + b_i`` are selected (b absent unless there
is a controller: ERNIE-4.5 has one), their weights are ``s_i``, divided by ``max(sum, norm_min)`` if
``norm_topk_prob``, times ``routed_scaling_factor``.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("softmax_topk")
class SoftmaxTopK(TokenChoice):
    """``token_choice`` with softmax scores."""
