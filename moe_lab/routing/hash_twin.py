"""``hash_twin``: the hash layer of a model whose other layers have another router (DeepSeek-V4,
arXiv 2606.19348), as a configuration.
"""

from moe_lab.config import require
from moe_lab.routing.choices import ScoreFunc, Weighting
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.facts import FACTS


def hash_twin(router: RouterConfig, vocab_size: int, seed: int = 0) -> RouterConfig:
    """The hash layer of a model whose other layers have ``router``: as many experts and slots,
    weights made by the same formula.

    A selection bias and limits on groups have no part in it: they only select.

    Raises:
        ConfigError: routers with zero-compute experts, and those whose weights are more than a
            score of each selected expert, normalised by their sum and scaled: they have no such
            twin.
    """
    require(
        router.num_zero_experts == 0,
        "no zero-compute experts in hash layers",
        router.num_zero_experts,
        field="num_zero_experts",
    )
    require(
        router.facts.has_hash_twin,
        f"a router among {', '.join(with_hash_twin())} beside hash layers",
        repr(router.kind),
        field="kind",
    )
    for name in UNLIKE_ITS_TWIN:
        require(
            not getattr(router, name),
            f"no {name} beside hash layers",
            getattr(router, name),
            field=name,
        )
    p = router.setting("norm_p")
    require(p in (None, 1.0), "norm_p of 1 beside hash layers", p, field="norm_p")
    # The softmax of the selected logits is the softmax of all of them, renormalised.
    selected = router.setting("weighting") == Weighting.SELECTED_SOFTMAX
    normalised = selected or p is not None
    return RouterConfig(
        kind="scored_hash",
        num_experts=router.num_experts,
        top_k=router.top_k,
        norm_topk_prob=normalised or router.setting("norm_topk_prob"),
        norm_eps=None if normalised else router.setting("norm_eps"),
        routed_scaling_factor=router.routed_scaling_factor,
        score_func=ScoreFunc.SOFTMAX if selected else router.scored_by,
        vocab_size=vocab_size,
        hash_seed=seed,
    )


def with_hash_twin() -> list[str]:
    """The kinds of routers that have a hash twin."""
    return sorted(kind for kind, facts in FACTS.items() if facts.has_hash_twin)


UNLIKE_ITS_TWIN = ("router_bias", "norm_min", "logit_scale", "logit_softcap", "jitter_eps")
"""Fields that change a token-choice router's weights and that hash layers do not have."""
