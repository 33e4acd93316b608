"""A router of your own, known by its name to every function and, with --plugin, every command."""

import torch

from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import Router, RouterConfig, register
from moe_lab.routing.select import take


@register("second_best")
class SecondBest(Router):
    """Leaves out the best expert and takes the next top_k."""

    def route(self, logits_TE, context):
        scores_TE = logits_TE.softmax(dim=1)
        indices_TK = scores_TE.topk(self.config.top_k + 1, dim=1).indices[:, 1:]
        return self.routing(indices_TK, take(scores_TE, indices_TK), logits_TE, scores_TE, context)


layer = MoELayer(MoEConfig(32, 16, RouterConfig(kind="second_best", num_experts=8, top_k=2)))
y, routing = layer(torch.randn(100, 32), return_routing=True)
print(layer)
print(routing.check())
