"""Top k of the logits, then a softmax over the selected alone (gpt-oss with ``router_bias``;
Granite, JetMoE, Aria without).

``g = softmax(l_selected)``: the same numbers as softmax_topk with ``norm_topk_prob``, computed
without the other experts. The scores that balance losses read are the softmax over all experts.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.token_choice import TokenChoice


@register("topk_softmax")
class TopKSoftmax(TokenChoice):
    """``token_choice`` that selects logits and weighs by their softmax."""
