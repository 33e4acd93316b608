"""DeepSeek-V4's hash layers (arXiv 2606.19348): a table of token ids selects, the learned router
weighs.

Experts are ``table[token id]``; their weights are the router's scores at those experts,
renormalised and scaled as in the other layers: ``g = c s_i / (sum s + eps)``.
"""

from torch import Tensor

from moe_lab.routing.config import RouterConfig, ScoreFunc
from moe_lab.routing.router import RouterContext, register
from moe_lab.routing.routers.hash import TableRouter
from moe_lab.routing.routers.token_choice import SCORES
from moe_lab.routing.routing import Routing


@register("scored_hash")
class ScoredHash(TableRouter):
    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.score_func: ScoreFunc = self.setting("score_func")

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = SCORES[self.score_func](logits_TE)
        indices_TK = self.look_up(context, logits_TE.shape[0])
        weights_TK = scores_TE.gather(1, indices_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (
                weights_TK.sum(dim=1, keepdim=True) + self.setting("norm_eps")
            )
        return self.routing(
            indices_TK,
            weights_TK * self.config.routed_scaling_factor,
            logits_TE,
            scores_TE,
            context,
        )
