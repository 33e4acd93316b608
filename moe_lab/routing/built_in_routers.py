"""The facts of every built-in router kind: one row a kind, read without torch.

The class of a kind, with its formula and paper, is in ``routers/<kind>.py``. ``RouterFacts`` says
what the columns mean; a column that a row leaves out has the default of a plain top-k router.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moe_lab.config import require
from moe_lab.cost.parts import ExpertsRun, Part, Pieces, linear, norm, vector
from moe_lab.routing.choices import (
    BudgetShift,
    CapacityScope,
    DecidesOver,
    GroupFill,
    GroupScore,
    HashTable,
    ScoreFunc,
    SecondPolicy,
    SelectOn,
    Weighting,
    ZeroExpertKind,
)
from moe_lab.routing.config import RouterConfig
from moe_lab.routing.controllers.config import ControllerConfig, ControllerKind, Moves
from moe_lab.routing.facts import FACTS, ROUTERS, RouterFacts, fixed_count, matrix

# ------------------------------------------------------------------------------------------------
# fields that kinds share: name -> value where the configuration leaves it unset

SCALED = {"routed_scaling_factor": 1.0}
COMMON = SCALED | {"controller": None, "router_bias": False}
NORM = {"norm_topk_prob": False, "norm_eps": 0.0, "norm_min": 0.0}
CAP = {"logit_scale": 1.0, "logit_softcap": None}
GROUPS = {"num_groups": None, "topk_groups": None, "group_fill": GroupFill.EXCLUDE}
ZERO = {"num_zero_experts": 0, "zero_expert_kinds": None}
CAPACITY = {"capacity_factor": 1.25, "expert_capacity": None, "batch_prioritized": False}
TABLE = {"vocab_size": None, "hash_table": HashTable.RANDOM, "hash_seed": 0}

# ------------------------------------------------------------------------------------------------
# what is learned beside the weight matrix


def no_parameters(config: RouterConfig, d_model: int) -> Pieces:
    return ()


def matrix_and(*sizes: Callable[[RouterConfig, int], int]) -> Callable[..., Pieces]:
    """The pieces of the router's matrix and of a learned vector of each of these sizes."""

    def learns(config: RouterConfig, d_model: int) -> Pieces:
        scales = (vector(Part.ROUTER, "scale", size(config, d_model)) for size in sizes)
        return (*matrix(config, d_model), *scales)

    return learns


def one(config: RouterConfig, d_model: int) -> int:
    return 1


def num_experts(config: RouterConfig, d_model: int) -> int:
    return config.num_experts


def width(config: RouterConfig, d_model: int) -> int:
    return d_model


def matrix_and_noise(config: RouterConfig, d_model: int) -> Pieces:
    return (
        *matrix(config, d_model),
        linear(Part.ROUTER, "noise", d_model, config.num_experts),
    )


def matrix_and_residual(config: RouterConfig, d_model: int) -> Pieces:
    choices = config.num_choices
    return (*matrix(config, d_model), linear(Part.ROUTER, "residual", choices, choices))


def matrix_and_predictor(config: RouterConfig, d_model: int) -> Pieces:
    return (*matrix(config, d_model), linear(Part.ROUTER, "predictor", d_model, 1))


def matrix_with_shared_gates(config: RouterConfig, d_model: int) -> Pieces:
    rows = config.num_experts + config.setting("num_shared_gates")
    return (
        linear(Part.ROUTER, "router", d_model, rows),
        vector(Part.ROUTER, "global_scale", 1),
    )


def small_mlp(config: RouterConfig, d_model: int) -> Pieces:
    rank = config.setting("d_router")
    return (
        linear(Part.ROUTER, "down", d_model, rank, True),
        vector(Part.ROUTER, "state_scale", rank),
        norm("router.norm", rank),
        linear(Part.ROUTER, "hidden1", rank, rank, True),
        linear(Part.ROUTER, "hidden2", rank, rank, True),
        linear(Part.ROUTER, "router", rank, config.num_choices),
    )


# ------------------------------------------------------------------------------------------------
# experts run, slots


def up_to(least: int) -> Callable[[RouterConfig], ExpertsRun]:
    """From ``least`` to K experts, decided for each token alone; the mean depends on the data."""
    return lambda config: ExpertsRun(least, fixed_count(config).most, fixed_count(config).most)


def depends_on_data(config: RouterConfig) -> str:
    return (
        f"{fixed_count(config).most:g} experts per token on average (the most that "
        f"{config.kind} allows; its mean depends on the data)"
    )


def mean_of_top_k(config: RouterConfig) -> ExpertsRun:
    """K experts in the mean, between ``min_slots`` and ``max_slots`` for one token."""
    most = config.num_experts if config.max_slots is None else config.max_slots
    return ExpertsRun(config.min_slots or 0, fixed_count(config).mean, most)


def share_of_tokens(config: RouterConfig) -> ExpertsRun:
    """Mixture of depths: a share of the tokens passes."""
    return ExpertsRun(0, config.setting("capacity_factor"), 1)


def max_slots(config: RouterConfig) -> int:
    return config.num_choices if config.max_slots is None else config.max_slots


# ------------------------------------------------------------------------------------------------
# what decides together


def whole_batch(config: RouterConfig) -> DecidesOver:
    return DecidesOver.BATCH


def each_sequence(config: RouterConfig) -> DecidesOver:
    return DecidesOver.SEQUENCE


def capacity_scope(config: RouterConfig) -> DecidesOver:
    by_sequence = config.setting("capacity_scope") is CapacityScope.SEQUENCE
    return DecidesOver.SEQUENCE if by_sequence else DecidesOver.BATCH


def batch_if_capacity(config: RouterConfig) -> DecidesOver:
    return DecidesOver.TOKEN if config.capacity_factor is None else DecidesOver.BATCH


def always(config: RouterConfig) -> bool:
    return True


def queue_is_not_causal(config: RouterConfig) -> bool:
    """First choices of later tokens are placed before second choices of earlier ones, and
    confident tokens before others, where anything is dropped in evaluation at all.
    """
    keeps_all = (config.eval_capacity_fraction or 0) >= 1
    unlimited = config.kind == "moepp" and config.capacity_factor is None
    return (config.top_k > 1 or config.batch_prioritized) and not (keeps_all or unlimited)


# ------------------------------------------------------------------------------------------------
# checks


def exactly(name: str, value: int, hint: str = "", why: str = "") -> Callable[..., None]:
    """A check that the field has this value."""

    def check(config: RouterConfig) -> None:
        got = getattr(config, name)
        what = f"{name} of {value} for {config.kind}{why}"
        require(got == value, what, got, hint, field=name)

    return check


def some_zero_experts(config: RouterConfig) -> None:
    require(
        config.num_zero_experts >= 1,
        f"num_zero_experts of at least 1 for {config.kind}",
        config.num_zero_experts,
        'kind="softmax_topk"',
        field="num_zero_experts",
    )


def a_vocabulary(config: RouterConfig) -> None:
    require(
        config.vocab_size is not None,
        f"vocab_size for {config.kind}",
        None,
        "the tokenizer's vocab_size",
        field="vocab_size",
    )


def a_share(config: RouterConfig) -> None:
    share = config.capacity_factor
    require(share is None or share <= 1, f"capacity_factor of at most 1 for {config.kind}", share)


def device_groups(config: RouterConfig) -> None:
    """LongCat's device-level loss has groups of real experts and one of zero-compute experts."""
    groups = config.device_groups
    if groups is None:
        return
    require(
        config.num_experts % groups == 0,
        f"device_groups dividing {config.num_experts} experts",
        groups,
        field="device_groups",
    )
    require(
        config.num_zero_experts > 0,
        "zero-compute experts for device_groups",
        0,
        field="num_zero_experts",
    )
    target = None if config.controller is None else config.controller.target_ffn_count
    require(
        target is None or target < config.top_k,
        f"target_ffn_count below top_k {config.top_k} for device_groups, whose last is all "
        "zero-compute experts",
        target,
        field="target_ffn_count",
    )


# ------------------------------------------------------------------------------------------------
# zero-compute experts


def zeros(config: RouterConfig) -> tuple[ZeroExpertKind, ...]:
    return (ZeroExpertKind.ZERO,) * config.num_zero_experts


def constants_copy_zero(config: RouterConfig) -> tuple[ZeroExpertKind, ...]:
    """MoE++'s order: constants, then one copy, then one zero."""
    last = (ZeroExpertKind.IDENTITY, ZeroExpertKind.ZERO)[-config.num_zero_experts :]
    return (ZeroExpertKind.CONSTANT,) * (config.num_zero_experts - len(last)) + last


# ------------------------------------------------------------------------------------------------
# rows


def scored(score_func: ScoreFunc, options: dict[str, Any], **columns: Any) -> RouterFacts:
    """A token-choice router with this score function; ``fixed`` adds to what it fixes."""
    fixed = {"score_func": score_func} | columns.pop("fixed", {})
    columns = {"controllers": frozenset({Moves.BIAS})} | columns
    return RouterFacts(options=options, fixed=fixed, **columns)


SIGMOID_TOPK = scored(
    ScoreFunc.SIGMOID,
    COMMON | NORM | CAP | {"select_on": SelectOn.SCORES},
    has_hash_twin=True,
)
CUT_OFFS = RouterFacts(
    options=COMMON | {"min_slots": 0, "max_slots": None},
    controllers=frozenset({Moves.CUTOFF}),
    default_controller=ControllerConfig(ControllerKind.THRESHOLD_EMA),
    experts_run=mean_of_top_k,
    slots=max_slots,
    decides_over=whole_batch,
    score_func=ScoreFunc.SIGMOID,
    budget_shift=BudgetShift.BIAS,
)
TOP_P = RouterFacts(
    options={"top_p": 0.4, "norm_topk_prob": False, "router_bias": False} | SCALED,
    experts_run=up_to(1),
    assumes=depends_on_data,
    budget_shift=BudgetShift.MASS,
)
BY_TABLE = RouterFacts(options=TABLE, learns=no_parameters, checks=(a_vocabulary,))

KINDS: dict[str, RouterFacts] = {
    "adamoe": scored(
        ScoreFunc.SOFTMAX,
        SCALED | {"num_zero_experts": 0, "controller": None},
        zero_kinds=zeros,
        checks=(some_zero_experts,),
    ),
    "base": RouterFacts(
        options=SCALED,
        decides_over=whole_batch,
        score_func=ScoreFunc.SIGMOID,
        checks=(exactly("top_k", 1),),
    ),
    "d2dmoe": RouterFacts(
        options={"threshold": 0.5, "router_bias": False},
        experts_run=up_to(1),
        assumes=depends_on_data,
    ),
    "deepseek_v2": scored(
        ScoreFunc.SOFTMAX,
        COMMON | NORM | GROUPS | {"group_score": GroupScore.MAX},
        has_hash_twin=True,
    ),
    "deepseek_v3": scored(
        ScoreFunc.SIGMOID,
        COMMON | NORM | GROUPS | {"norm_eps": 1e-20},
        fixed={"group_score": GroupScore.BEST_TWO},
        has_hash_twin=True,
    ),
    "dtop_p": RouterFacts(
        options=SCALED | {"controller": None, "norm_topk_prob": False, "max_slots": None},
        controllers=frozenset({Moves.MASS}),
        default_controller=ControllerConfig(ControllerKind.TOP_P, rate=0.2, proportional_gain=0.05),
        learns=matrix_and(one),
        experts_run=mean_of_top_k,
        slots=max_slots,
    ),
    "dynmoe": RouterFacts(
        options=SCALED,
        learns=matrix_and(one, num_experts),
        experts_run=up_to(0),
        assumes=depends_on_data,
        score_func=ScoreFunc.SIGMOID,
        budget_shift=BudgetShift.LOGITS,
    ),
    "expert_choice": RouterFacts(
        options=SCALED | {"router_bias": False, "max_slots": None},
        experts_run=mean_of_top_k,
        slots=max_slots,
        decides_over=whole_batch,
        sees_later_tokens=always,
    ),
    "expert_threshold": CUT_OFFS,
    "gemma": scored(
        ScoreFunc.SOFTMAX,
        SCALED | {"controller": None, "rms_norm_eps": 1e-6},
        fixed={"norm_topk_prob": True},
        learns=matrix_and(width, num_experts),
        hf_weights={"scale": "input_scale", "per_expert_scale": "per_expert_scale"},
    ),
    "gshard_top2": scored(
        ScoreFunc.SOFTMAX,
        COMMON
        | CAPACITY
        | {
            "capacity_factor": 1.0,
            "eval_capacity_fraction": None,
            "norm_before_drop": False,
            "second_expert_policy": SecondPolicy.ALL,
        },
        decides_over=whole_batch,
        sees_later_tokens=queue_is_not_causal,
        checks=(exactly("top_k", 2, 'kind="switch"'),),
    ),
    "hash": BY_TABLE,
    "inkling": scored(
        ScoreFunc.SIGMOID,
        SCALED | {"controller": None, "num_shared_gates": 1},
        learns=matrix_with_shared_gates,
        hf_weights={"global_scale": "global_scale"},
    ),
    "llama4": scored(ScoreFunc.SIGMOID, COMMON, fixed={"select_on": SelectOn.LOGITS}),
    "longcat": scored(
        ScoreFunc.SOFTMAX,
        COMMON | ZERO | {"zero_expert_scaling": True, "device_groups": None},
        has_hash_twin=True,
        checks=(device_groups,),
        # In its parameters there is a classifier bias that its forward pass leaves out.
        hf_ignored=frozenset({"bias"}),
    ),
    "mixture_of_depths": RouterFacts(
        options={"capacity_factor": 0.125},
        learns=matrix_and_predictor,
        experts_run=share_of_tokens,
        decides_over=each_sequence,
        score_func=ScoreFunc.SIGMOID,
        checks=(exactly("num_experts", 1, why=" (the block)"), a_share),
    ),
    "moepp": scored(
        ScoreFunc.SOFTMAX,
        SCALED | ZERO | {"ffn_share": 0.75, "capacity_factor": None},
        controllers=frozenset(),
        learns=matrix_and_residual,
        zero_kinds=constants_copy_zero,
        decides_over=batch_if_capacity,
        sees_later_tokens=queue_is_not_causal,
        checks=(some_zero_experts,),
    ),
    "noisy_topk": RouterFacts(options=SCALED, learns=matrix_and_noise),
    "pnorm_topk": scored(
        ScoreFunc.SOFTMAX, COMMON | {"norm_p": 1.0, "jitter_eps": 0.0}, has_hash_twin=True
    ),
    "quantile_balanced": replace(
        SIGMOID_TOPK,
        controllers=frozenset({ControllerKind.QUANTILE}),
        default_controller=ControllerConfig(ControllerKind.QUANTILE),
    ),
    "quantile_threshold": replace(
        CUT_OFFS, default_controller=ControllerConfig(ControllerKind.QUANTILE_EMA)
    ),
    "random": RouterFacts(options=ZERO, learns=no_parameters),
    "remoe": RouterFacts(
        options=COMMON | {"max_slots": None},
        controllers=frozenset({Moves.COEFFICIENT}),
        default_controller=ControllerConfig(ControllerKind.RELU_LAMBDA),
        experts_run=mean_of_top_k,
        slots=max_slots,
        sparse_scores=True,
        budget_shift=BudgetShift.LOGITS,
    ),
    "scored_hash": RouterFacts(
        options=TABLE
        | SCALED
        | {"score_func": ScoreFunc.SQRT_SOFTPLUS, "norm_topk_prob": False, "norm_eps": 0.0},
        checks=(a_vocabulary,),
        hf_weights={"tid2eid": "table"},
    ),
    "seq_topk": RouterFacts(
        options=SCALED
        | {"norm_topk_prob": False, "router_bias": False, "min_slots": 0, "max_slots": None},
        experts_run=mean_of_top_k,
        slots=max_slots,
        decides_over=each_sequence,
        sees_later_tokens=always,
    ),
    "sigmoid_topk": SIGMOID_TOPK,
    "sinkhorn": RouterFacts(options=SCALED | {"router_bias": False}, decides_over=whole_batch),
    "softmax_topk": scored(ScoreFunc.SOFTMAX, COMMON | NORM | CAP, has_hash_twin=True),
    "sparsemixer": RouterFacts(options=SCALED | {"sparsemixer_eps": 0.01, "jitter_eps": 0.0}),
    "sqrt_softplus_topk": scored(ScoreFunc.SQRT_SOFTPLUS, COMMON | NORM | CAP, has_hash_twin=True),
    "switch": scored(
        ScoreFunc.SOFTMAX,
        COMMON | NORM | CAPACITY | {"capacity_scope": CapacityScope.BATCH, "jitter_eps": 0.0},
        decides_over=capacity_scope,
        sees_later_tokens=queue_is_not_causal,
    ),
    "token_choice": RouterFacts(
        options=COMMON
        | NORM
        | CAP
        | GROUPS
        | ZERO
        | {
            "zero_expert_scaling": True,
            "norm_p": None,
            "group_score": GroupScore.BEST_TWO,
            "score_func": ScoreFunc.SOFTMAX,
            "select_on": SelectOn.SCORES,
            "weighting": Weighting.SCORES,
        },
        controllers=frozenset({Moves.BIAS}),
        has_hash_twin=True,
    ),
    "token_lookup": RouterFacts(
        options=ZERO | {"vocab_size": None}, learns=no_parameters, checks=(a_vocabulary,)
    ),
    "top_p": TOP_P,
    "topk_softmax": scored(
        ScoreFunc.SOFTMAX,
        COMMON | CAP,
        fixed={"select_on": SelectOn.LOGITS, "weighting": Weighting.SELECTED_SOFTMAX},
        has_hash_twin=True,
    ),
    "xmoe": replace(
        TOP_P,
        options={"threshold": 0.9, "norm_topk_prob": False, "router_bias": False} | SCALED,
        budget_shift=BudgetShift.NONE,
    ),
    "zaya": scored(
        ScoreFunc.SOFTMAX,
        {"num_zero_experts": 1, "d_router": 256, "rms_norm_eps": 1e-5, "controller": None},
        default_controller=ControllerConfig(),
        learns=small_mlp,
        zero_kinds=zeros,
        checks=(exactly("num_zero_experts", 1, why=" (the skip)"),),
        hf_weights={
            "down_proj.weight": "down.weight",
            "down_proj.bias": "down.bias",
            "router_states_scale": "state_scale",
            "router_mlp.norm.weight": "state_norm.weight",
            "router_mlp.fc1.weight": "hidden1.weight",
            "router_mlp.fc1.bias": "hidden1.bias",
            "router_mlp.fc2.weight": "hidden2.weight",
            "router_mlp.fc2.bias": "hidden2.bias",
            "router_mlp.out_proj.weight": "weight",
        },
        # The first layer continues from nothing and has no scale for it.
        hf_optional=frozenset({"state_scale"}),
    ),
}
"""``RouterConfig.kind`` -> facts."""

FACTS.update(KINDS)
ROUTERS.expect({kind: f"moe_lab.routing.routers.{kind}" for kind in KINDS})
