"""Controllers: small state machines that move a router's selection bias, threshold or loss
coefficient once per optimiser step.
"""

from typing import TYPE_CHECKING

from moe_lab.routing.controllers.base import (
    CONTROLLERS,
    Controller,
    ControllerConfig,
    ControllerKind,
    all_reduced,
)
from moe_lab.routing.controllers.bias import (
    BudgetSignBias,
    CentredSignBias,
    PIDBias,
    ProportionalBias,
    SignBias,
)
from moe_lab.routing.controllers.quantile import (
    QuantileBias,
    QuantileEMA,
    ThresholdEMA,
    batch_cutoffs,
)
from moe_lab.routing.controllers.scalar import ReluLambda, TopPController

if TYPE_CHECKING:
    from moe_lab.routing.config import RouterConfig

__all__ = [
    "BIAS_KINDS",
    "CONTROLLERS",
    "THRESHOLD_KINDS",
    "BudgetSignBias",
    "CentredSignBias",
    "Controller",
    "ControllerConfig",
    "ControllerKind",
    "PIDBias",
    "ProportionalBias",
    "QuantileBias",
    "QuantileEMA",
    "ReluLambda",
    "SignBias",
    "ThresholdEMA",
    "TopPController",
    "all_reduced",
    "batch_cutoffs",
    "build_controller",
]

BIAS_KINDS = frozenset(
    {
        ControllerKind.FIXED,
        ControllerKind.SIGN,
        ControllerKind.CENTRED_SIGN,
        ControllerKind.PROPORTIONAL,
        ControllerKind.PID,
        ControllerKind.QUANTILE,
    }
)
"""Rules for routers that take the top k of scores plus bias."""

THRESHOLD_KINDS = frozenset(
    {
        ControllerKind.FIXED,
        ControllerKind.THRESHOLD_EMA,
        ControllerKind.QUANTILE_EMA,
        ControllerKind.BUDGET_SIGN,
    }
)
"""Rules for routers that select where logit plus bias is above zero."""


def build_controller(
    config: "RouterConfig", default: ControllerConfig | None = None
) -> Controller | None:
    """The controller of a router configuration, or that of ``default`` where it has none, or None."""
    chosen = default if config.controller is None else config.controller
    if chosen is None:
        return None
    return CONTROLLERS[chosen.kind](
        chosen, config.num_experts, config.num_zero_experts, config.top_k
    )
