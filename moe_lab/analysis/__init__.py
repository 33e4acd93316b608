"""Trace in, polars frame out: load, spread of compute, token classes, co-activation,
specialisation, saturation, difficulty.

Every function takes an opened ``Trace`` (or several), returns a frame with documented columns, and
prints nothing; ``docs/analysis.md`` says what each measure may and may not claim. All of them read
a trace a few files at a time; inside ``mapped`` several workers do.
"""

from typing import TYPE_CHECKING

from moe_lab.analysis.class_profile import class_profile
from moe_lab.analysis.coactivation import coactivation, coactivation_order
from moe_lab.analysis.compare import compare, load_shift
from moe_lab.analysis.difficulty import difficulty_association
from moe_lab.analysis.expert_load import (
    expert_load,
    load_interval,
    load_over_windows,
    load_summary,
)
from moe_lab.analysis.map_reduce import mapped
from moe_lab.analysis.repetition import repetition
from moe_lab.analysis.router_entropy import router_entropy
from moe_lab.analysis.saturation import saturation
from moe_lab.analysis.specialisation import (
    domain_divergence,
    domain_specialisation,
    expert_vocabulary,
    vocabulary_specialisation,
)
from moe_lab.analysis.token_loss import token_loss
from moe_lab.analysis.transitions import transitions
from moe_lab.analysis.zero_compute import ffn_spread, zero_compute
from moe_lab.lazy import on_first_use

if TYPE_CHECKING:
    from moe_lab.analysis.difficulty.gain import marginal_gain

__getattr__ = on_first_use(__name__, {"difficulty.gain": ("marginal_gain",)})  # torch

specialisation = domain_specialisation

__all__ = [
    "class_profile",
    "coactivation",
    "coactivation_order",
    "compare",
    "difficulty_association",
    "domain_divergence",
    "domain_specialisation",
    "expert_load",
    "expert_vocabulary",
    "ffn_spread",
    "load_interval",
    "load_over_windows",
    "load_shift",
    "load_summary",
    "mapped",
    "marginal_gain",
    "repetition",
    "router_entropy",
    "saturation",
    "specialisation",
    "token_loss",
    "transitions",
    "vocabulary_specialisation",
    "zero_compute",
]
