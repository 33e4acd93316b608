"""``RouterConfig``: one flat configuration for every router, and the choices that appear in it.

Each router class lists the optional fields it reads (``Router.options``, with their defaults); a
field that is set but not read by the kind is an error, so nothing is ever silently ignored.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moe_lab.config import Config, require
from moe_lab.errors import ConfigError, expected
from moe_lab.routing.controllers import ControllerConfig
from moe_lab.routing.controllers.base import choice

if TYPE_CHECKING:
    from moe_lab.routing.router import Router

ROUTERS: dict[str, type["Router"]] = {}
"""Name -> class; ``RouterConfig.kind`` is one of these names."""


class ScoreFunc(StrEnum):
    """From logits to scores: softmax over all experts, or one function per expert."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt_softplus"


class SelectOn(StrEnum):
    """What the selection bias is added to and the top k is taken of."""

    SCORES = "scores"
    LOGITS = "logits"


class Weighting(StrEnum):
    """Where the weights of the selected experts come from: their scores, or a softmax over their
    logits alone.
    """

    SCORES = "scores"
    SELECTED_SOFTMAX = "selected_softmax"


class GroupScore(StrEnum):
    """The score of a group of experts: its best two added (DeepSeek-V3), or its best (DeepSeek-V2)."""

    BEST_TWO = "best_two"
    MAX = "max"


class GroupFill(StrEnum):
    """What stands for the scores of the groups left out: minus infinity, or zero (which a negative
    biased score can lose to: A.X K2).
    """

    EXCLUDE = "exclude"
    ZERO = "zero"


class ZeroExpertKind(StrEnum):
    """What a zero-compute expert returns: its input, nothing, or a learned mixture of its input and
    a constant vector (MoE++).
    """

    IDENTITY = "identity"
    ZERO = "zero"
    CONSTANT = "constant"


class CapacityScope(StrEnum):
    """Over which tokens an expert's capacity counts."""

    BATCH = "batch"
    SEQUENCE = "sequence"


class SecondPolicy(StrEnum):
    """How GShard's second expert is chosen in training: always the runner-up, the runner-up with
    probability min(1, 2 g_2), or sampled.
    """

    ALL = "all"
    RANDOM = "random"
    SAMPLING = "sampling"


class HashTable(StrEnum):
    """How a hash router's table is drawn: at random, or greedily so that expected loads are even
    under given token frequencies.
    """

    RANDOM = "random"
    BALANCED = "balanced"


@dataclass(frozen=True)
class RouterConfig(Config):
    """What a router is made of. ``None`` means "the kind's own default"; ``docs/routing.md`` lists
    which kind reads which field.

    Attributes:
        kind: a name in ``ROUTERS``.
        num_experts: real experts (N in the LongCat papers, E elsewhere).
        top_k: slots per token, K, of kinds with a fixed count; the largest count of kinds that cut
            each token on its own (top_p, xmoe, d2dmoe); the mean count aimed at of kinds with a
            budget (expert choice, thresholds, ReMoE, ...), whose slots are ``max_slots``.
        num_zero_experts: zero-compute experts (Z), whose ids follow the real ones.
        norm_topk_prob: divide the selected weights by their sum.
        routed_scaling_factor: multiplies every weight.
        controller: what moves the selection bias or threshold (None: no bias, or the kind's own
            rule).
        score_func, select_on, weighting: the general token-choice router, ``kind="token_choice"``.
        norm_p, norm_eps, norm_min: p of the norm that divides the weights (None: their sum); added
            to, and smallest value of, the divisor.
        router_bias: a learned bias on the logits.
        logit_scale, logit_softcap: logits become ``c * tanh(scale * l / c)``; no cap if None.
        num_groups, topk_groups, group_score, group_fill: keep the experts of the best
            ``topk_groups`` of ``num_groups`` groups.
        jitter_eps: in training the input is multiplied by noise uniform in [1 - eps, 1 + eps].
        sparsemixer_eps: relative gap to the maximum beyond which SparseMixer masks an expert,
            halved.
        capacity_factor: an expert's capacity over its fair share (dropping routers); share of
            tokens that pass (mixture of depths).
        eval_capacity_fraction: in evaluation the capacity is this share of all tokens (NLLB; 1:
            nothing is dropped).
        expert_capacity: capacity in slots, instead of a factor; ``capacity_scope``: per batch or
            per sequence.
        batch_prioritized: capacity goes to the most confident tokens first, not to the earliest.
        norm_before_drop, second_expert_policy: of GShard's top-2.
        zero_expert_kinds: what each zero-compute expert returns, ``num_zero_experts`` entries
            (None: the kind's own).
        zero_expert_scaling: whether ``routed_scaling_factor`` multiplies the weights of
            zero-compute experts too.
        device_groups: of real experts, for the LongCat router's device-level balance loss (None:
            the router makes no such loss).
        ffn_share: MoE++'s tau, the capacity and loss weight of zero-compute experts against real
            ones.
        d_router: width of a recurrent router's state (ZAYA). rms_norm_eps: of routers that
            normalise.
        num_shared_gates: shared experts whose gates enter the normaliser (Inkling).
        top_p: probability mass that the selected experts must reach. threshold: cut of xmoe and
            d2dmoe.
        min_slots, max_slots: fewest and most experts of a token where the count is free (None: 0
            and all).
        vocab_size, hash_table, hash_seed: token-id tables.
    """

    kind: str = "softmax_topk"
    num_experts: int = 64
    top_k: int = 8
    num_zero_experts: int = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    controller: ControllerConfig | None = None
    score_func: ScoreFunc | None = None
    select_on: SelectOn | None = None
    weighting: Weighting | None = None
    norm_p: float | None = None
    norm_eps: float | None = None
    norm_min: float | None = None
    router_bias: bool = False
    logit_scale: float | None = None
    logit_softcap: float | None = None
    num_groups: int | None = None
    topk_groups: int | None = None
    group_score: GroupScore | None = None
    group_fill: GroupFill | None = None
    jitter_eps: float | None = None
    sparsemixer_eps: float | None = None
    capacity_factor: float | None = None
    eval_capacity_fraction: float | None = None
    expert_capacity: int | None = None
    capacity_scope: CapacityScope | None = None
    batch_prioritized: bool = False
    norm_before_drop: bool = False
    second_expert_policy: SecondPolicy | None = None
    zero_expert_kinds: tuple[ZeroExpertKind, ...] | None = None
    zero_expert_scaling: bool | None = None
    device_groups: int | None = None
    ffn_share: float | None = None
    d_router: int | None = None
    rms_norm_eps: float | None = None
    num_shared_gates: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    min_slots: int | None = None
    max_slots: int | None = None
    vocab_size: int | None = None
    hash_table: HashTable | None = None
    hash_seed: int | None = None

    def __post_init__(self) -> None:
        for name, options in _CHOICES.items():
            if getattr(self, name) is not None:
                object.__setattr__(
                    self, name, choice(options, getattr(self, name), f"{name} among")
                )
        if self.zero_expert_kinds is not None:
            kinds = tuple(
                choice(ZeroExpertKind, kind, "zero_expert_kinds among")
                for kind in self.zero_expert_kinds
            )
            object.__setattr__(self, "zero_expert_kinds", kinds)
        require(self.num_experts >= 1, "num_experts of at least 1", self.num_experts)
        require(self.num_zero_experts >= 0, "num_zero_experts of at least 0", self.num_zero_experts)
        require(self.top_k >= 1, "top_k of at least 1", self.top_k)
        require(
            self.top_k <= self.num_choices,
            f"top_k of at most {self.num_choices} (num_experts {self.num_experts} + num_zero_experts {self.num_zero_experts})",
            self.top_k,
            "a smaller top_k or more experts",
        )
        require(
            self.routed_scaling_factor > 0,
            "routed_scaling_factor above 0",
            self.routed_scaling_factor,
        )
        for name, low, strict in _RANGES:
            value = getattr(self, name)
            fits = value is None or (value > low if strict else value >= low)
            require(fits, f"{name} {'above' if strict else 'of at least'} {low}", value)
        require(self.top_p is None or self.top_p <= 1, "top_p of at most 1", self.top_p)
        require(
            self.threshold is None or self.threshold <= 1, "threshold of at most 1", self.threshold
        )
        self._check_slots()
        self._check_groups()
        router_class(self.kind).check_config(self)

    def _check_slots(self) -> None:
        low, high = (
            self.min_slots or 0,
            self.num_choices if self.max_slots is None else self.max_slots,
        )
        require(
            low <= high <= self.num_choices,
            f"min_slots <= max_slots <= {self.num_choices}",
            f"{low} and {high}",
        )
        kinds = self.zero_expert_kinds
        require(
            kinds is None or len(kinds) == self.num_zero_experts,
            f"one entry of zero_expert_kinds for each of {self.num_zero_experts} zero-compute experts",
            "none" if kinds is None else len(kinds),
        )

    def _check_groups(self) -> None:
        require(
            (self.num_groups is None) == (self.topk_groups is None),
            "num_groups and topk_groups together",
            "only one of them",
        )
        if self.num_groups is None or self.topk_groups is None:
            return
        require(
            self.num_choices % self.num_groups == 0,
            f"num_groups dividing {self.num_choices} experts",
            self.num_groups,
            f"one of {', '.join(str(n) for n in range(1, min(self.num_choices, 64) + 1) if self.num_choices % n == 0)}",
        )
        require(
            self.topk_groups <= self.num_groups,
            f"topk_groups of at most num_groups {self.num_groups}",
            self.topk_groups,
        )
        reachable = self.topk_groups * (self.num_choices // self.num_groups)
        require(
            self.top_k <= reachable,
            f"top_k of at most {reachable}, the experts of topk_groups {self.topk_groups} groups",
            self.top_k,
        )

    @property
    def num_choices(self) -> int:
        """Real and zero-compute experts together: the width of the logits."""
        return self.num_experts + self.num_zero_experts

    @property
    def num_slots(self) -> int:
        """K of the ``Routing`` that this router returns: the most experts one token can have."""
        return router_class(self.kind).slots(self)

    @property
    def zero_kinds(self) -> tuple[ZeroExpertKind, ...]:
        """What each zero-compute expert returns; entry z belongs to expert id ``num_experts + z``."""
        if self.zero_expert_kinds is not None:
            return self.zero_expert_kinds
        return router_class(self.kind).default_zero_kinds(self)

    def build(self, d_model: int) -> "Router":
        from moe_lab.routing.router import build_router

        return build_router(self, d_model)

    @staticmethod
    def from_hf(config: Any, layer: int | None = None) -> "RouterConfig":
        """The router of a Hugging Face model: ``config`` is a ``PretrainedConfig`` or the
        dictionary of a ``config.json``.

        Args:
            layer: for models whose layers differ (HunYuan's lists, the hash layers of DeepSeek-V4).

        Raises:
            ConfigError: the model type is unknown, or the configuration lacks a value the router
                needs.
        """
        from moe_lab.routing.hf import router_config

        return router_config(config, layer)


_CHOICES: dict[str, type[StrEnum]] = {
    "score_func": ScoreFunc,
    "select_on": SelectOn,
    "weighting": Weighting,
    "group_score": GroupScore,
    "group_fill": GroupFill,
    "capacity_scope": CapacityScope,
    "second_expert_policy": SecondPolicy,
    "hash_table": HashTable,
}

_RANGES: tuple[tuple[str, float, bool], ...] = (
    ("norm_p", 0, True),
    ("norm_eps", 0, False),
    ("norm_min", 0, False),
    ("logit_scale", 0, True),
    ("logit_softcap", 0, True),
    ("num_groups", 1, False),
    ("topk_groups", 1, False),
    ("jitter_eps", 0, False),
    ("sparsemixer_eps", 0, False),
    ("capacity_factor", 0, True),
    ("eval_capacity_fraction", 0, True),
    ("expert_capacity", 1, False),
    ("device_groups", 1, False),
    ("ffn_share", 0, True),
    ("d_router", 1, False),
    ("rms_norm_eps", 0, True),
    ("num_shared_gates", 1, False),
    ("top_p", 0, True),
    ("threshold", 0, False),
    ("min_slots", 0, False),
    ("max_slots", 1, False),
    ("vocab_size", 1, False),
)
"""Field, lower bound, whether the bound itself is excluded."""

ALWAYS_READ = frozenset({"kind", "num_experts", "top_k"})


def router_class(kind: str) -> type["Router"]:
    """The class of that name. Raises ``ConfigError`` for an unknown one."""
    if kind not in ROUTERS:
        raise ConfigError(expected(f"a router kind among {', '.join(sorted(ROUTERS))}", repr(kind)))
    return ROUTERS[kind]


def check_only_read_fields(config: RouterConfig, options: frozenset[str]) -> None:
    """Raise ``ConfigError`` if ``config`` sets a field that its kind does not read."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ALWAYS_READ or field.name in options or value == field.default:
            continue
        readers = sorted(kind for kind, router in ROUTERS.items() if field.name in router.options)
        got = repr(value.value) if isinstance(value, StrEnum) else value
        raise ConfigError(
            expected(
                f"{field.name} left unset for kind {config.kind!r}",
                got,
                f"a kind that reads it ({', '.join(readers)})" if readers else "removing it",
            )
        )
