"""DeepSeek-V4's hash layers (arXiv 2606.19348): a table of token ids selects, the learned router
weighs.

Experts are ``table[token id]``; their weights are the router's scores at those experts,
renormalised and scaled as in the other layers: ``g = c s_i / (sum s + eps)``.
"""

from typing import Any

from torch import Tensor

from moe_lab.config import require
from moe_lab.routing.config import HashTable, RouterConfig, ScoreFunc, Weighting, router_class
from moe_lab.routing.router import RouterContext, fields, register
from moe_lab.routing.routers.hash import TABLE, TableRouter
from moe_lab.routing.routers.token_choice import SCORES
from moe_lab.routing.routing import Routing


@register("scored_hash")
class ScoredHash(TableRouter):
    options = fields(
        TABLE,
        hash_table=HashTable.RANDOM,
        score_func=ScoreFunc.SQRT_SOFTPLUS,
        norm_topk_prob=False,
        norm_eps=0.0,
        routed_scaling_factor=1.0,
    )

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
        return Routing(
            indices=indices_TK,
            weights=weights_TK * self.config.routed_scaling_factor,
            logits=logits_TE,
            scores=scores_TE,
            num_experts=self.config.num_experts,
            valid=context.valid,
        )


def hash_twin(router: RouterConfig, vocab_size: int, seed: int = 0) -> RouterConfig:
    """The hash layer that stands beside layers of ``router``: as many experts and slots, weights
    made by the same formula.

    A selection bias and limits on groups have no part in it: they only select.

    Raises:
        ConfigError: routers with zero-compute experts, and those whose weights are more than a
            score of each selected expert, normalised by their sum and scaled: they have no such
            twin.
    """
    kind = router_class(router.kind)
    require(
        router.num_zero_experts == 0,
        "no zero-compute experts in hash layers",
        router.num_zero_experts,
    )
    require(
        router.kind in WITH_A_TWIN,
        f"a router among {', '.join(WITH_A_TWIN)} beside hash layers",
        repr(router.kind),
    )
    for name in UNLIKE_ITS_TWIN:
        require(not getattr(router, name), f"no {name} beside hash layers", getattr(router, name))
    fixed, options = getattr(kind, "fixed", {}), kind.options

    def setting(name: str) -> Any:
        value = fixed.get(name, getattr(router, name))
        return options.get(name) if value is None else value

    p = setting("norm_p")
    require(p in (None, 1.0), "norm_p of 1 beside hash layers", p)
    # The softmax of the selected logits is the softmax of all of them, renormalised.
    selected = setting("weighting") == Weighting.SELECTED_SOFTMAX
    return RouterConfig(
        kind="scored_hash",
        num_experts=router.num_experts,
        top_k=router.top_k,
        norm_topk_prob=selected or p is not None or setting("norm_topk_prob"),
        norm_eps=None if selected or p is not None else setting("norm_eps"),
        routed_scaling_factor=router.routed_scaling_factor,
        score_func=ScoreFunc.SOFTMAX if selected else setting("score_func"),
        vocab_size=vocab_size,
        hash_seed=seed,
    )


WITH_A_TWIN = (
    *("deepseek_v2", "deepseek_v3", "longcat", "pnorm_topk", "quantile_balanced"),
    *("sigmoid_topk", "softmax_topk", "sqrt_softplus_topk", "token_choice", "topk_softmax"),
)
"""Kinds whose weights are the scores of the selected, normalised and scaled."""

UNLIKE_ITS_TWIN = ("router_bias", "norm_min", "logit_scale", "logit_softcap", "jitter_eps")
"""Fields that change a token-choice router's weights and that hash layers do not have."""
