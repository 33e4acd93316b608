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

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_lab.config import require
from moe_lab.routing.config import (
    GroupFill,
    GroupScore,
    RouterConfig,
    ScoreFunc,
    SelectOn,
    Weighting,
)
from moe_lab.routing.controllers import BIAS_KINDS
from moe_lab.routing.router import Router, RouterContext, fields, register
from moe_lab.routing.routing import Routing
from moe_lab.routing.select import limit_groups, select_topk

SCORES = {
    ScoreFunc.SOFTMAX: lambda logits: logits.softmax(dim=1),
    ScoreFunc.SIGMOID: torch.sigmoid,
    ScoreFunc.SQRT_SOFTPLUS: lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}

COMMON = fields(routed_scaling_factor=1.0, controller=None, router_bias=False)
NORM = fields(norm_topk_prob=False, norm_eps=0.0, norm_min=0.0)
CAP = fields(logit_scale=1.0, logit_softcap=None)
GROUPS = fields(num_groups=None, topk_groups=None, group_fill=GroupFill.EXCLUDE)
ZERO = fields(num_zero_experts=0, zero_expert_kinds=None, zero_expert_scaling=True)


@register("token_choice")
class TokenChoice(Router):
    """Every step open: the subclasses below and in the sibling files are this router with some
    steps fixed.
    """

    options = fields(
        *(COMMON, NORM, CAP, GROUPS, ZERO),
        norm_p=None,
        group_score=GroupScore.BEST_TWO,
        score_func=ScoreFunc.SOFTMAX,
        select_on=SelectOn.SCORES,
        weighting=Weighting.SCORES,
    )
    controllers = BIAS_KINDS
    fixed: ClassVar[Mapping[str, Any]] = fields()

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        self.score_func: ScoreFunc = self.choose("score_func", ScoreFunc.SOFTMAX)
        self.select_on: SelectOn = self.choose("select_on", SelectOn.SCORES)
        self.weighting: Weighting = self.choose("weighting", Weighting.SCORES)
        self.normalise: bool = self.choose("norm_topk_prob", False)
        self.norm_p: float | None = self.choose("norm_p", None)
        self.norm_eps: float = self.choose("norm_eps", 0.0)
        self.norm_min: float = self.choose("norm_min", 0.0)
        self.logit_scale: float = self.choose("logit_scale", 1.0)
        self.logit_softcap: float | None = self.choose("logit_softcap", None)
        self.group_score: GroupScore = self.choose("group_score", GroupScore.BEST_TWO)
        self.group_fill: GroupFill = self.choose("group_fill", GroupFill.EXCLUDE)
        self.zero_scaling: bool = self.choose("zero_expert_scaling", True)

    def choose(self, name: str, otherwise: Any) -> Any:
        """What the kind fixes, else what the configuration says, else the kind's default."""
        if name in self.fixed:
            return self.fixed[name]
        return self.setting(name) if name in self.options else otherwise

    @classmethod
    def check_config(cls, config: RouterConfig) -> None:
        super().check_config(config)
        score = cls.fixed.get("group_score") or config.group_score or cls.options.get("group_score")
        if config.num_groups is not None and score == GroupScore.BEST_TWO:
            size = config.num_choices // config.num_groups
            require(
                size >= 2,
                "groups of at least 2 experts, whose best two are added",
                size,
                "fewer num_groups",
            )

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
        return Routing(
            indices=indices_TK,
            weights=self.weigh(scores_TE, logits_TE, indices_TK),
            logits=logits_TE,
            scores=scores_TE,
            num_experts=self.config.num_experts,
            num_zero_experts=self.config.num_zero_experts,
            valid=context.valid,
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
        return select_topk(choice_TE, self.config.top_k)

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
