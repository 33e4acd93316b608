"""Routing of tokens to experts: ``RouterConfig`` -> ``Router`` -> ``Routing``, with losses,
controllers and monitors.

Configurations and the facts of every kind import without torch; the rest on first use. A router is
a file in ``routers/`` and a row in ``built_in_routers.py``; CONTRIBUTING.md says how to add one,
inside the package or outside.

Shape letters of this package: T tokens, K slots, E experts (real ones first, then zero-compute
ones), D d_model, S sequence, V vocabulary. Tensors carry them as suffix: ``scores_TE``.
"""

from typing import TYPE_CHECKING

from moe_lab.lazy import on_first_use
from moe_lab.routing import built_in_routers  # noqa: F401  (fills FACTS and ROUTERS)
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
from moe_lab.routing.controllers.config import (
    CONTROLLERS,
    ControllerConfig,
    ControllerKind,
    Moves,
)
from moe_lab.routing.facts import FACTS, ROUTERS, RouterFacts
from moe_lab.routing.hash_twin import hash_twin

if TYPE_CHECKING:
    from moe_lab.routing import controllers, losses, monitors, routers
    from moe_lab.routing.controllers.base import Controller, register_controller
    from moe_lab.routing.router import Router, RouterContext, build_router, register
    from moe_lab.routing.routing import UNUSED, Routing

__all__ = [
    "CONTROLLERS",
    "FACTS",
    "ROUTERS",
    "UNUSED",
    "BudgetShift",
    "CapacityScope",
    "Controller",
    "ControllerConfig",
    "ControllerKind",
    "DecidesOver",
    "GroupFill",
    "GroupScore",
    "HashTable",
    "Moves",
    "Router",
    "RouterConfig",
    "RouterContext",
    "RouterFacts",
    "Routing",
    "ScoreFunc",
    "SecondPolicy",
    "SelectOn",
    "Weighting",
    "ZeroExpertKind",
    "build_router",
    "controllers",
    "hash_twin",
    "losses",
    "monitors",
    "register",
    "register_controller",
    "routers",
]

__getattr__ = on_first_use(
    __name__,
    {
        "router": ("Router", "RouterContext", "build_router", "register"),
        "routing": ("UNUSED", "Routing"),
        "controllers.base": ("Controller", "register_controller"),
        "losses": (),
        "monitors": (),
        "routers": (),
    },
)
