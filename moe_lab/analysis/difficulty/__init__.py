"""Does compute follow difficulty? Identity-controlled association, its nulls and intervals, and
what a marginal expert gains.

``worlds`` simulates routers of known answer; what needs a model (``marginal_gain``) is imported
from its module when it is called for.
"""

from typing import TYPE_CHECKING

from moe_lab.analysis.difficulty.association import difficulty_association
from moe_lab.analysis.difficulty.baselines import Baseline, baseline_association, baseline_router
from moe_lab.analysis.difficulty.compute_budget import (
    compute_budget,
    compute_variance,
    omega_squared,
)
from moe_lab.analysis.difficulty.curves import difficulty_curves, difficulty_information
from moe_lab.analysis.difficulty.difficulty_verdict import DifficultyVerdict
from moe_lab.analysis.difficulty.learnability import LEARNABILITY, learnability
from moe_lab.analysis.difficulty.nulls import difficulty_nulls
from moe_lab.analysis.difficulty.sources import compute_columns, difficulty_frame
from moe_lab.lazy import on_first_use

if TYPE_CHECKING:
    from moe_lab.analysis.difficulty.gain import (
        gain_association,
        marginal_gain,
        reallocation_regret,
    )

__getattr__ = on_first_use(
    __name__, {"gain": ("gain_association", "marginal_gain", "reallocation_regret")}
)  # torch

__all__ = [
    "LEARNABILITY",
    "Baseline",
    "DifficultyVerdict",
    "baseline_association",
    "baseline_router",
    "compute_budget",
    "compute_columns",
    "compute_variance",
    "difficulty_association",
    "difficulty_curves",
    "difficulty_frame",
    "difficulty_information",
    "difficulty_nulls",
    "gain_association",
    "learnability",
    "marginal_gain",
    "omega_squared",
    "reallocation_regret",
]
