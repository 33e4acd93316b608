"""``RouterFacts``: everything about a kind of router that other parts of moe_lab ask for by its
name, readable without torch.

Accounting asks what a router learns and how many experts a token runs; training, which tokens it
looks at together; traces, its score function; the difficulty analysis, how its budget is moved. The
facts of the built-in kinds are the rows of ``built_in_routers.py``; a router from outside the
package passes its own to ``register``, or none: the defaults describe a plain token-choice top-k
with one weight matrix. Every callable takes the ``RouterConfig`` in question.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from moe_lab.config import require
from moe_lab.cost.parts import ExpertsRun, Part, Pieces, linear
from moe_lab.registry import Registry
from moe_lab.routing.choices import BudgetShift, DecidesOver, ScoreFunc, ZeroExpertKind
from moe_lab.routing.controllers.config import ControllerConfig, ControllerKind, Moves

Settings: TypeAlias = Any
"""A ``RouterConfig``, whose file reads this one."""


def matrix(config: Settings, d_model: int) -> Pieces:
    """One weight matrix [E, D], with a bias where the configuration has one."""
    return (linear(Part.ROUTER, "router", d_model, config.num_choices, config.router_bias),)


def fixed_count(config: Settings) -> ExpertsRun:
    """K slots, of which zero-compute experts take some.

    The mean is the controller's target, or that of equal load: ``K E / (E + Z)``.
    """
    real, zero, k = config.num_experts, config.num_zero_experts, config.top_k
    least, most = max(k - zero, 0), min(k, real)
    target = None if config.controller is None else config.controller.target_ffn_count
    mean = k * real / (real + zero) if target is None else target
    require(least <= mean <= most, f"target_ffn_count between {least} and {most}", mean)
    return ExpertsRun(least, mean, most)


def equal_load(config: Settings) -> str:
    """The assumption behind the mean of ``fixed_count``; "" for no assumption."""
    target = None if config.controller is None else config.controller.target_ffn_count
    if not config.num_zero_experts or target is not None:
        return ""
    return (
        f"{fixed_count(config).mean:g} real experts per token on average "
        f"(all {config.num_choices} experts equally loaded; set target_ffn_count)"
    )


@dataclass(frozen=True)
class RouterFacts:
    """The facts of one kind of router.

    Attributes:
        options: optional ``RouterConfig`` fields that the kind reads -> value where the
            configuration leaves them unset. Setting any other field is an error.
        fixed: fields whose value the kind fixes.
        controllers: the controllers it can follow: kinds, or what they move.
        default_controller: the controller where the configuration has none.
        learns: (config, d_model) -> all parameters, as pieces of cost.
        experts_run: real experts of a token: least, mean, most.
        assumes: a sentence on what the mean of ``experts_run`` assumes; "" where it is exact.
        slots: K of the routings: the most experts one token can have.
        zero_kinds: what each zero-compute expert returns where the configuration does not say.
        decides_over: which tokens decide together.
        sees_later_tokens: whether in evaluation later tokens of a sequence can change the routing
            of earlier ones, which no causal model can do when it generates.
        score_func: from logits to scores, where neither ``fixed`` nor the configuration says.
        sparse_scores: whether the score of an expert that a token does not run is exactly 0, so
            that the entropy of the scores says how many experts run, not how sure the router is.
        budget_shift: what moves the number of real experts per token.
        has_hash_twin: whether each weight is a score of its selected expert, normalised and
            scaled, so that a model can mix it with hash layers (``hash_twin``).
        checks: further checks; each raises ``ConfigError``.
        hf_weights: Hugging Face parameter name -> ours, beside matrix and biases.
        hf_optional: our parameters that a Hugging Face module may lack.
        hf_ignored: of theirs, stored and left out of their forward pass.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    controllers: frozenset[ControllerKind | Moves | str] = frozenset()
    default_controller: ControllerConfig | None = None
    learns: Callable[[Settings, int], Pieces] = matrix
    experts_run: Callable[[Settings], ExpertsRun] = fixed_count
    assumes: Callable[[Settings], str] = equal_load
    slots: Callable[[Settings], int] = lambda config: config.top_k
    zero_kinds: Callable[[Settings], tuple[ZeroExpertKind, ...]] = lambda config: (
        (ZeroExpertKind.IDENTITY,) * config.num_zero_experts
    )
    decides_over: Callable[[Settings], DecidesOver] = lambda config: DecidesOver.TOKEN
    sees_later_tokens: Callable[[Settings], bool] = lambda config: False
    score_func: ScoreFunc = ScoreFunc.SOFTMAX
    sparse_scores: bool = False
    budget_shift: BudgetShift = BudgetShift.NONE
    has_hash_twin: bool = False
    checks: tuple[Callable[[Settings], None], ...] = ()
    hf_weights: Mapping[str, str] = field(default_factory=dict)
    hf_optional: frozenset[str] = frozenset()
    hf_ignored: frozenset[str] = frozenset()


LATER_TOKENS = (
    "later tokens of a text change how earlier ones are routed, which no model can do while it "
    "generates: its validation loss is not that of a causal model"
)
"""What is said wherever the validation loss of a router that ``sees_later_tokens`` is shown."""

FACTS: dict[str, RouterFacts] = {}
"""``RouterConfig.kind`` -> its facts: the rows of ``built_in_routers.py`` and those of plugins."""

ROUTERS: Registry = Registry("a router kind")
"""``RouterConfig.kind`` -> class. The built-in class of a kind is the one of
``moe_lab/routing/routers/<kind>.py``, imported on first use."""
