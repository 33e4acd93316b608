"""DeepSeek-V4's hash layers (arXiv 2606.19348): a table of token ids selects, the learned router weighs.

Experts are ``table[token id]``; their weights are the router's scores at those experts, renormalised and scaled as in the other layers:
``g = c s_i / (sum s + eps)``.
"""

from torch import Tensor

from moe_lab.config import require
from moe_lab.routing.config import HashTable, RouterConfig, ScoreFunc, Weighting, router_class
from moe_lab.routing.router import RouterContext, fields, register
from moe_lab.routing.routers.hash import TABLE, TableRouter
from moe_lab.routing.routers.token_choice import SCORES, TokenChoice
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
            weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + self.setting("norm_eps"))
        return Routing(
            indices=indices_TK,
            weights=weights_TK * self.config.routed_scaling_factor,
            logits=logits_TE,
            scores=scores_TE,
            num_experts=self.config.num_experts,
            valid=context.valid,
        )


def hash_twin(router: RouterConfig, vocab_size: int, seed: int = 0) -> RouterConfig:
    """The hash layer that stands beside layers of ``router``: as many experts and slots, weights made by the same formula.

    Raises:
        ConfigError: routers with zero-compute experts, or a kind whose weights are no per-expert score (it has no such twin).
    """
    kind = router_class(router.kind)
    require(router.num_zero_experts == 0, "no zero-compute experts in hash layers", router.num_zero_experts)
    require(issubclass(kind, TokenChoice), "a token-choice router beside hash layers", repr(router.kind))
    require(router.norm_p is None, "no norm_p beside hash layers", router.norm_p)
    asked = {name: getattr(kind, "fixed", {}).get(name) or getattr(router, name) for name in ("score_func", "weighting", "norm_topk_prob")}
    # The softmax of the selected logits is the softmax of all of them, renormalised.
    selected = asked["weighting"] == Weighting.SELECTED_SOFTMAX
    return RouterConfig(
        kind="scored_hash",
        num_experts=router.num_experts,
        top_k=router.top_k,
        norm_topk_prob=selected or bool(asked["norm_topk_prob"]),
        norm_eps=kind.options.get("norm_eps") if router.norm_eps is None else router.norm_eps,
        routed_scaling_factor=router.routed_scaling_factor,
        score_func=ScoreFunc.SOFTMAX if selected else asked["score_func"] or kind.options.get("score_func"),
        vocab_size=vocab_size,
        hash_seed=seed,
    )
