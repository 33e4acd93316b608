"""``ControllerConfig`` and the facts of each kind of controller, readable without torch."""

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from moe_lab.config import Config, above, at_least, below, require
from moe_lab.registry import Registry


class ControllerKind(StrEnum):
    FIXED = "fixed"
    SIGN = "sign"
    CENTRED_SIGN = "centred_sign"
    PROPORTIONAL = "proportional"
    PID = "pid"
    BUDGET_SIGN = "budget_sign"
    QUANTILE = "quantile"
    QUANTILE_EMA = "quantile_ema"
    THRESHOLD_EMA = "threshold_ema"
    TOP_P = "top_p"
    RELU_LAMBDA = "relu_lambda"


class Moves(StrEnum):
    """The quantity that a controller moves; it decides which routers can follow the controller."""

    BIAS = "a selection bias"
    CUTOFF = "a cut-off"
    MASS = "a probability mass"
    COEFFICIENT = "a loss coefficient"


@dataclass(frozen=True)
class ControllerFacts:
    """
    Attributes:
        module: of ``moe_lab.routing.controllers`` that defines the class ("" for a plugin's).
        moves: routers that list one of these in ``RouterFacts.controllers`` can follow it.
        options: ``ControllerConfig`` fields that it reads beside ``rate`` and ``decay``.
    """

    module: str = ""
    moves: frozenset[Moves] = frozenset({Moves.BIAS})
    options: tuple[str, ...] = ()


_BIAS, _CUTOFF = frozenset({Moves.BIAS}), frozenset({Moves.CUTOFF})
_TARGET = ("target_ffn_count",)

CONTROLLER_FACTS: dict[str, ControllerFacts] = {
    "fixed": ControllerFacts("base", _BIAS | _CUTOFF),
    "sign": ControllerFacts("bias", _BIAS, _TARGET),
    "centred_sign": ControllerFacts("bias", _BIAS, _TARGET),
    "proportional": ControllerFacts("bias", _BIAS, _TARGET),
    "pid": ControllerFacts(
        "bias", _BIAS, (*_TARGET, "proportional_gain", "derivative_gain", "limit")
    ),
    "budget_sign": ControllerFacts("bias", _CUTOFF),
    "quantile": ControllerFacts("quantile", _BIAS, _TARGET),
    "quantile_ema": ControllerFacts("quantile", _CUTOFF, ("momentum", "warmup")),
    "threshold_ema": ControllerFacts("quantile", _CUTOFF, ("momentum", "warmup")),
    "top_p": ControllerFacts("scalar", frozenset({Moves.MASS}), ("proportional_gain", "initial")),
    "relu_lambda": ControllerFacts(
        "scalar", frozenset({Moves.COEFFICIENT}), ("factor", "initial", "limit")
    ),
}
"""Controller kind -> its facts; a plugin's are added by ``register_controller``."""

_BUILT_IN = frozenset(CONTROLLER_FACTS)

CONTROLLERS: Registry = Registry(
    "a controller kind",
    {
        kind: f"moe_lab.routing.controllers.{facts.module}"
        for kind, facts in CONTROLLER_FACTS.items()
    },
)
"""Controller kind -> class, imported on first use."""


@dataclass(frozen=True)
class ControllerConfig(Config):
    """
    Attributes:
        kind: the rule, a key of ``CONTROLLERS``.
        rate: step size: ``u`` of the sign rules, ``mu`` of the proportional rule (LongCat does not
            publish its value), the integral gain of PID and of DTop-p.
        target_ffn_count: expected number of real experts per token, K_e. Needed by the proportional
            rule where there are zero-compute experts; elsewhere None means the same share for every
            expert.
        decay: after ``update`` number t the rate is ``rate / (1 + decay * t)`` (LongCat advises a
            decaying mu; 0 keeps it constant).
        proportional_gain, derivative_gain: of PID (and the proportional gain of DTop-p); 0 if None.
        limit: largest absolute bias (PID), or largest lambda (ReMoE); None: unlimited.
        momentum: share of the old cut-off that an update keeps (threshold rules).
        warmup: updates until which training routes by the batch's own cut-offs (threshold rules; 1
            if None, Expert Threshold has 4000).
        factor: by which ReMoE's lambda grows or shrinks in a step; 1.2 if None.
        initial: first value of DTop-p's p (0.4 if None) or of ReMoE's lambda (1e-8 if None).
    """

    kind: str = ControllerKind.FIXED
    rate: Annotated[float, at_least(0)] = 1e-3
    target_ffn_count: float | None = None
    decay: Annotated[float, at_least(0)] = 0.0
    proportional_gain: Annotated[float | None, at_least(0)] = None
    derivative_gain: Annotated[float | None, at_least(0)] = None
    limit: Annotated[float | None, above(0)] = None
    momentum: Annotated[float | None, at_least(0), below(1)] = None
    warmup: Annotated[int | None, at_least(1)] = None
    factor: Annotated[float | None, above(1)] = None
    initial: Annotated[float | None, above(0)] = None

    def __post_init__(self) -> None:
        if self.kind not in CONTROLLER_FACTS:
            CONTROLLERS.find(self.kind)
        if self.kind in _BUILT_IN:
            object.__setattr__(self, "kind", ControllerKind(self.kind))
        super().__post_init__()
        readable = {"kind", "rate", "decay", *CONTROLLER_FACTS[self.kind].options}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            unread = field.name not in readable and value != field.default
            what = f"{field.name} left unset for controller {str(self.kind)!r}"
            require(not unread, what, value, field=field.name)
