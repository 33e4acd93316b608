"""Balance, spread, stability and geometry losses: scalars without coefficient. docs/routing.md
converts between code bases.
"""

from moe_lab.registry import Registry
from moe_lab.routing.losses.balance import (
    Scale,
    Scope,
    device_loss,
    heterogeneous_loss,
    hf_pooled_loss,
    load_balancing_loss,
    longcat_device_loss,
    null_loss,
)
from moe_lab.routing.losses.conversion import CODE_BASES, convert_coefficient
from moe_lab.routing.losses.geometry import dynmoe_loss, orthogonality_loss, simbal_loss
from moe_lab.routing.losses.spread import (
    cv_squared,
    entropy_loss,
    importance_loss,
    importance_of,
    load_loss,
    smooth_load,
    variance_loss,
)
from moe_lab.routing.losses.stability import hidden_z_loss, z_loss
from moe_lab.routing.losses.targets import norm_regression_loss

__all__ = [
    "CODE_BASES",
    "LOSSES",
    "Scale",
    "Scope",
    "convert_coefficient",
    "cv_squared",
    "device_loss",
    "dynmoe_loss",
    "entropy_loss",
    "heterogeneous_loss",
    "hf_pooled_loss",
    "hidden_z_loss",
    "importance_loss",
    "importance_of",
    "load_balancing_loss",
    "load_loss",
    "longcat_device_loss",
    "norm_regression_loss",
    "null_loss",
    "orthogonality_loss",
    "simbal_loss",
    "smooth_load",
    "variance_loss",
    "z_loss",
]

LOSSES = Registry("a loss")
"""Name -> ``loss(routing) -> scalar``, for ``RunConfig.losses``: a layer's decisions in, a loss
without coefficient out. Another one is added by ``@LOSSES.register("name")``."""

_OF_A_ROUTING = {
    "load_balancing": load_balancing_loss,
    "heterogeneous": heterogeneous_loss,
    "null": null_loss,
    "importance": importance_loss,
    "entropy": entropy_loss,
    "variance": variance_loss,
    "z": z_loss,
}
for _name, _loss in _OF_A_ROUTING.items():
    LOSSES.add(_name, _loss)
