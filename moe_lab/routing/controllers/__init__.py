"""Controllers: small state machines that move a router's selection bias, threshold or loss
coefficient once per optimiser step.

``ControllerConfig`` and the facts of each kind import without torch; classes on first use.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.routing.controllers.config import (
    CONTROLLER_FACTS,
    CONTROLLERS,
    ControllerConfig,
    ControllerFacts,
    ControllerKind,
    Moves,
)

if TYPE_CHECKING:
    from moe_lab.routing.controllers.base import Controller, all_reduced, register_controller
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

__all__ = [
    "CONTROLLERS",
    "CONTROLLER_FACTS",
    "BudgetSignBias",
    "CentredSignBias",
    "Controller",
    "ControllerConfig",
    "ControllerFacts",
    "ControllerKind",
    "Moves",
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
    "register_controller",
]

__getattr__ = on_first_use(
    __name__,
    {
        "base": ("Controller", "all_reduced", "register_controller"),
        "bias": (
            "BudgetSignBias",
            "CentredSignBias",
            "PIDBias",
            "ProportionalBias",
            "SignBias",
        ),
        "quantile": ("QuantileBias", "QuantileEMA", "ThresholdEMA", "batch_cutoffs"),
        "scalar": ("ReluLambda", "TopPController"),
    },
)
