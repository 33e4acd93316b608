"""Which experts, with which weights: ``RouterConfig`` -> ``Router`` -> ``Routing``, with losses,
controllers and monitors.
"""

from moe_lab.routing import controllers, losses, monitors, routers
from moe_lab.routing.config import (
    CapacityScope,
    GroupFill,
    GroupScore,
    HashTable,
    RouterConfig,
    ScoreFunc,
    SecondPolicy,
    SelectOn,
    Weighting,
    ZeroExpertKind,
)
from moe_lab.routing.controllers import ControllerConfig, ControllerKind
from moe_lab.routing.router import ROUTERS, Router, RouterContext, build_router, register
from moe_lab.routing.routers.scored_hash import hash_twin
from moe_lab.routing.routing import UNUSED, Routing

__all__ = [
    "ROUTERS",
    "UNUSED",
    "CapacityScope",
    "ControllerConfig",
    "ControllerKind",
    "GroupFill",
    "GroupScore",
    "HashTable",
    "Router",
    "RouterConfig",
    "RouterContext",
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
    "routers",
]
