"""Whether compute follows difficulty: association within token ids, null models, and marginal gain.

What needs a model (``marginal_gain``) is imported when it is first used.
"""

from typing import TYPE_CHECKING

from moe_lab.analysis.difficulty.association import difficulty_association
from moe_lab.analysis.difficulty.compute_budget import (
    compute_budget,
    compute_variance,
    omega_squared,
)
from moe_lab.analysis.difficulty.curves import difficulty_curves, difficulty_information
from moe_lab.analysis.difficulty.difficulty_verdict import DifficultyVerdict
from moe_lab.analysis.difficulty.nulls import (
    Baseline,
    baseline_association,
    baseline_router,
    difficulty_nulls,
)
from moe_lab.analysis.difficulty.study import LEARNABILITY, difficulty_frame, learnability
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
