"""``RouterConfig``: one flat configuration for every router.

The facts of its kind (``facts.py``) say which optional fields it reads; a field that is set but
not read is an error, so nothing is ever silently ignored. Nothing here imports torch.
"""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from moe_lab.config import MAX_SEED, Config, above, at_least, at_most, between, choice, require
from moe_lab.cost.parts import ExpertsRun, Pieces
from moe_lab.lazy import load_name
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
from moe_lab.routing.controllers.config import CONTROLLER_FACTS, ControllerConfig
from moe_lab.routing.facts import FACTS, ROUTERS, RouterFacts


@dataclass(frozen=True)
class RouterConfig(Config):
    """The configuration of a router. ``None`` means "the kind's own default"; ``docs/routing.md``
    lists which kind reads which field.

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
    num_experts: Annotated[int, at_least(1)] = 64
    top_k: Annotated[int, at_least(1)] = 8
    num_zero_experts: Annotated[int, at_least(0)] = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: Annotated[float, above(0)] = 1.0
    controller: ControllerConfig | None = None
    score_func: ScoreFunc | None = None
    select_on: SelectOn | None = None
    weighting: Weighting | None = None
    norm_p: Annotated[float | None, above(0)] = None
    norm_eps: Annotated[float | None, at_least(0)] = None
    norm_min: Annotated[float | None, at_least(0)] = None
    router_bias: bool = False
    logit_scale: Annotated[float | None, above(0)] = None
    logit_softcap: Annotated[float | None, above(0)] = None
    num_groups: Annotated[int | None, at_least(1)] = None
    topk_groups: Annotated[int | None, at_least(1)] = None
    group_score: GroupScore | None = None
    group_fill: GroupFill | None = None
    jitter_eps: Annotated[float | None, at_least(0)] = None
    sparsemixer_eps: Annotated[float | None, at_least(0)] = None
    capacity_factor: Annotated[float | None, above(0)] = None
    eval_capacity_fraction: Annotated[float | None, above(0)] = None
    expert_capacity: Annotated[int | None, at_least(1)] = None
    capacity_scope: CapacityScope | None = None
    batch_prioritized: bool = False
    norm_before_drop: bool = False
    second_expert_policy: SecondPolicy | None = None
    zero_expert_kinds: tuple[ZeroExpertKind, ...] | None = None
    zero_expert_scaling: bool | None = None
    device_groups: Annotated[int | None, at_least(1)] = None
    ffn_share: Annotated[float | None, above(0)] = None
    d_router: Annotated[int | None, at_least(1)] = None
    rms_norm_eps: Annotated[float | None, above(0)] = None
    num_shared_gates: Annotated[int | None, at_least(1)] = None
    top_p: Annotated[float | None, above(0), at_most(1)] = None
    threshold: Annotated[float | None, between(0, 1)] = None
    min_slots: Annotated[int | None, at_least(0)] = None
    max_slots: Annotated[int | None, at_least(1)] = None
    vocab_size: Annotated[int | None, at_least(1)] = None
    hash_table: HashTable | None = None
    hash_seed: Annotated[int | None, at_least(0), at_most(MAX_SEED)] = None

    def __post_init__(self) -> None:
        if self.kind not in FACTS:
            ROUTERS.find(self.kind)
        super().__post_init__()
        if self.zero_expert_kinds is not None:
            kinds = tuple(
                choice(ZeroExpertKind, kind, "zero_expert_kinds among")
                for kind in self.zero_expert_kinds
            )
            object.__setattr__(self, "zero_expert_kinds", kinds)
        require(
            self.top_k <= self.num_choices,
            f"top_k of at most {self.num_choices} (num_experts + num_zero_experts)",
            self.top_k,
            "a smaller top_k or more experts",
            field="top_k",
        )
        self._check_slots()
        self._check_groups()
        self._check_read_fields()
        self._check_controller()
        for check in self.facts.checks:
            check(self)

    def _check_slots(self) -> None:
        low, high = (
            self.min_slots or 0,
            self.num_choices if self.max_slots is None else self.max_slots,
        )
        require(
            low <= high <= self.num_choices,
            f"min_slots <= max_slots <= {self.num_choices}",
            f"{low} and {high}",
            field="max_slots",
        )
        kinds = self.zero_expert_kinds
        require(
            kinds is None or len(kinds) == self.num_zero_experts,
            f"one entry of zero_expert_kinds for each of {self.num_zero_experts} "
            "zero-compute experts",
            "none" if kinds is None else len(kinds),
            field="zero_expert_kinds",
        )

    def _check_groups(self) -> None:
        require(
            (self.num_groups is None) == (self.topk_groups is None),
            "num_groups and topk_groups together",
            "only one of them",
            field="topk_groups" if self.topk_groups is None else "num_groups",
        )
        if self.num_groups is None or self.topk_groups is None:
            return
        require(
            self.num_choices % self.num_groups == 0,
            f"num_groups dividing {self.num_choices} experts",
            self.num_groups,
            "one of " + ", ".join(str(n) for n in range(1, 65) if self.num_choices % n == 0),
            field="num_groups",
        )
        require(
            self.topk_groups <= self.num_groups,
            f"topk_groups of at most num_groups {self.num_groups}",
            self.topk_groups,
            field="topk_groups",
        )
        if self.setting("group_score") is GroupScore.BEST_TWO:
            size = self.num_choices // self.num_groups
            hint = "fewer num_groups"
            what = "groups of at least 2 experts, whose best two are added"
            require(size >= 2, what, size, hint, field="num_groups")
        reachable = self.topk_groups * (self.num_choices // self.num_groups)
        require(
            self.top_k <= reachable,
            f"top_k of at most {reachable}, the experts of topk_groups {self.topk_groups} groups",
            self.top_k,
            field="top_k",
        )

    def _check_read_fields(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (
                field.name in ALWAYS_READ
                or field.name in self.facts.options
                or value == field.default
            ):
                continue
            readers = sorted(kind for kind, facts in FACTS.items() if field.name in facts.options)
            require(
                False,
                f"{field.name} left unset for kind {self.kind!r}",
                repr(value.value) if isinstance(value, StrEnum) else value,
                f"a kind that reads it ({', '.join(readers)})" if readers else "removing it",
                field=field.name,
            )

    def _check_controller(self) -> None:
        accepted = self.facts.controllers
        known = sorted(
            kind
            for kind, facts in CONTROLLER_FACTS.items()
            if kind in accepted or facts.moves & accepted
        )
        require(
            self.controller is None or self.controller.kind in known,
            f"a controller among {', '.join(known)} for kind {self.kind!r}",
            repr(str(self.controller and self.controller.kind)),
            field="controller",
        )

    @property
    def facts(self) -> RouterFacts:
        """The facts of routers of this kind."""
        return FACTS[self.kind]

    def setting(self, name: str, otherwise: Any = None) -> Any:
        """The value of an optional field: what the kind fixes, else what is set here, else the
        kind's default, else ``otherwise`` (the kind does not read the field).
        """
        facts = self.facts
        if name in facts.fixed:
            return facts.fixed[name]
        value = getattr(self, name)
        return facts.options.get(name, otherwise) if value is None else value

    @property
    def num_choices(self) -> int:
        """Real and zero-compute experts together: the width of the logits."""
        return self.num_experts + self.num_zero_experts

    @property
    def num_slots(self) -> int:
        """K of the ``Routing`` that this router returns: the most experts one token can have."""
        return self.facts.slots(self)

    @property
    def zero_kinds(self) -> tuple[ZeroExpertKind, ...]:
        """The output of each zero-compute expert; entry z is that of expert ``num_experts + z``."""
        if self.zero_expert_kinds is not None:
            return self.zero_expert_kinds
        return self.facts.zero_kinds(self)

    @property
    def scored_by(self) -> ScoreFunc:
        """The function from logits to scores."""
        return self.setting("score_func") or self.facts.score_func

    @property
    def decides_over(self) -> DecidesOver:
        """The tokens that the router looks at together when it decides for one of them."""
        return self.facts.decides_over(self)

    @property
    def sees_later_tokens(self) -> bool:
        """Whether in evaluation later tokens can change the routing of earlier ones."""
        return self.facts.sees_later_tokens(self)

    @property
    def budget_shift(self) -> BudgetShift:
        """The quantity that changes the number of real experts of every token."""
        shift = self.facts.budget_shift
        moved = shift is BudgetShift.NONE and self.num_zero_experts > 0
        return BudgetShift.BIAS if moved else shift

    @property
    def experts_run(self) -> ExpertsRun:
        """The number of real experts that a token runs: least, mean, most."""
        return self.facts.experts_run(self)

    def pieces(self, d_model: int) -> Pieces:
        """Everything the router learns, as pieces of cost (``moe_lab.cost``)."""
        return self.facts.learns(self, d_model)

    def build(self, d_model: int) -> Any:
        """The ``Router`` for tokens of width ``d_model``."""
        router = ROUTERS.find(self.kind)(self, d_model)
        learned = sum(parameter.numel() for parameter in router.parameters())
        stated = sum(piece.params for piece in self.pieces(d_model))
        require(
            learned == stated,
            f"{stated} parameters in the router {self.kind!r}, as its facts say",
            learned,
            "stating all that it learns in RouterFacts(learns=...)",
            field="learns",
        )
        return router

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
        return load_name("moe_lab.routing.hf_config:router_config")(config, layer)


ALWAYS_READ = frozenset({"kind", "num_experts", "top_k"})


def reads(kind: str, name: str) -> bool:
    """Whether routers of a kind read an optional field. Raises ``ConfigError`` for no such kind."""
    if kind not in FACTS:
        ROUTERS.find(kind)
    return name in FACTS[kind].options


def drop_unread(values: dict[str, Any]) -> list[str]:
    """Remove from plain ``RouterConfig`` values the fields that their kind does not read. Used when
    the kind changes and the other fields are kept.

    Returns:
        The names of those that were set.

    Raises:
        ConfigError: there is no such kind.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(RouterConfig)}
    unread = [
        name for name in values if name not in ALWAYS_READ and not reads(values["kind"], name)
    ]
    values_set = [name for name in unread if values[name] != defaults.get(name)]
    for name in unread:
        del values[name]
    return values_set
