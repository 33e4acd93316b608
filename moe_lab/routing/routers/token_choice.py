"""The general token-choice router: logits -> scores -> selection -> weights, each step a
configuration field.

1. ``l = c tanh(scale (x W^T + bias) / c)`` (scale and cap c optional);
2. ``s = softmax(l)``, ``sigmoid(l)`` or ``sqrt(softplus(l))``;
3. selected: the K largest of ``s + b`` (or ``l + b``), b the controller's bias, within the best
    groups if there are groups;
4. ``g = s`` of the selected, or the softmax of their logits alone; divided by ``max(||g||_p + eps,
   min)`` if normalised; times ``routed_scaling_factor``.

The named kinds fix some of these steps; each says which model and paper it is. The bias never
enters a weight.
"""

import torch
from torch import Tensor

from moe_lab.cpu_kernels.top_k import top_k
from moe_lab.routing.config import (
    GroupFill,
    GroupScore,
    RouterConfig,
    ScoreFunc,
    SelectOn,
    Weighting,
)
from moe_lab.routing.router import Router, RouterContext, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import limit_groups

SCORES = {
    ScoreFunc.SOFTMAX: lambda logits: logits.softmax(dim=1),
    ScoreFunc.SIGMOID: torch.sigmoid,
    ScoreFunc.SQRT_SOFTPLUS: lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}


@register("token_choice")
class TokenChoice(Router):
    """The general token-choice router: every step can be configured. Most other routers are this
    one with some steps fixed.
    """

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        setting = config.setting
        self.score_func: ScoreFunc = setting("score_func", ScoreFunc.SOFTMAX)
        self.select_on: SelectOn = setting("select_on", SelectOn.SCORES)
        self.weighting: Weighting = setting("weighting", Weighting.SCORES)
        self.normalise: bool = setting("norm_topk_prob")
        self.norm_p: float | None = setting("norm_p")
        self.norm_eps: float = setting("norm_eps", 0.0)
        self.norm_min: float = setting("norm_min", 0.0)
        self.logit_scale: float = setting("logit_scale", 1.0)
        self.logit_softcap: float | None = setting("logit_softcap")
        self.group_score: GroupScore = setting("group_score", GroupScore.BEST_TWO)
        self.group_fill: GroupFill = setting("group_fill", GroupFill.EXCLUDE)
        self.zero_scaling: bool = setting("zero_expert_scaling", True)

    def logits(self, x_TD: Tensor) -> Tensor:
        logits_TE = super().logits(x_TD)
        if self.logit_scale != 1.0:
            logits_TE = logits_TE * self.logit_scale
        if self.logit_softcap is not None:
            logits_TE = torch.tanh(logits_TE / self.logit_softcap) * self.logit_softcap
        return logits_TE

    def route(self, logits_TE: Tensor, context: RouterContext) -> Routing:
        scores_TE = SCORES[self.score_func](logits_TE)
        indices_TK = self.select(scores_TE, logits_TE)
        return self.routing(
            indices_TK, self.weigh(scores_TE, logits_TE, indices_TK), logits_TE, scores_TE, context
        )

    def select(self, scores_TE: Tensor, logits_TE: Tensor) -> Tensor:
        """[T, K] ids."""
        choice_TE = (scores_TE if self.select_on == SelectOn.SCORES else logits_TE).detach()
        bias_E = self.selection_bias()
        if bias_E is not None:
            choice_TE = choice_TE + bias_E
        groups, kept = self.config.num_groups, self.config.topk_groups
        if groups is not None and kept is not None:
            choice_TE = limit_groups(choice_TE, groups, kept, self.group_score, self.group_fill)
        return top_k(choice_TE, self.config.top_k)

    def weigh(self, scores_TE: Tensor, logits_TE: Tensor, indices_TK: Tensor) -> Tensor:
        """[T, K] weights of the selected."""
        if self.weighting == Weighting.SELECTED_SOFTMAX:
            weights_TK = logits_TE.gather(1, indices_TK).softmax(dim=1)
        else:
            weights_TK = scores_TE.gather(1, indices_TK)
        if self.norm_p is not None:
            weights_TK = weights_TK / torch.linalg.vector_norm(
                weights_TK, ord=self.norm_p, dim=1, keepdim=True
            )
        elif self.normalise:
            total = weights_TK.sum(dim=1, keepdim=True) + self.norm_eps
            weights_TK = weights_TK / (total.clamp_min(self.norm_min) if self.norm_min else total)
        factor = self.config.routed_scaling_factor
        if self.zero_scaling:
            return weights_TK * factor
        return torch.where(indices_TK < self.config.num_experts, weights_TK * factor, weights_TK)
