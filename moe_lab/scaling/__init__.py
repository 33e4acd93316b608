"""Losses of many runs in, a law and a verdict out: published scaling laws, fits with their
uncertainty, and the sparsity wall.
"""

from moe_lab.scaling.adding_experts import expected_gain
from moe_lab.scaling.alternatives_compared import Alternative, against_experts, crossing
from moe_lab.scaling.confounds import SHORT, confounds
from moe_lab.scaling.datasets import DATASETS, datasets, published
from moe_lab.scaling.fit import HUBER, SQUARES, Fit, fit
from moe_lab.scaling.fit_quality import LawCurves, Quality, law_curves, quality
from moe_lab.scaling.frontier_band import Band, frontier_band
from moe_lab.scaling.law import Law
from moe_lab.scaling.laws import LAWS
from moe_lab.scaling.optimum import (
    Isoflop,
    Optimum,
    compute_optimal,
    constrained_optimum,
    fixed_total_optima,
    isoflop,
)
from moe_lab.scaling.run_files import LossUnit, main_arm, read_runs, with_budgets
from moe_lab.scaling.sweep_losses import MissingColumnsError, SeveralBudgetsError
from moe_lab.scaling.uncertainty import (
    Saturation,
    bootstrap,
    leave_largest_out,
    profile,
    profile_interval,
    saturation,
)
from moe_lab.scaling.wall_planner import Plan, parse_truth, plan_power, typical_noise
from moe_lab.scaling.wall_power import Design, Truth, cheapest, default_truths, designs, power
from moe_lab.scaling.wall_rule import Outcome
from moe_lab.scaling.wall_study import WallStudy, wall_study
from moe_lab.scaling.wall_verdict import FormScore, Gain, Verdict, verdict_by_budget, wall_verdict
from moe_lab.seed_intervals import seed_intervals

__all__ = [
    "DATASETS",
    "HUBER",
    "LAWS",
    "SHORT",
    "SQUARES",
    "Alternative",
    "Band",
    "Design",
    "Fit",
    "FormScore",
    "Gain",
    "Isoflop",
    "Law",
    "LawCurves",
    "LossUnit",
    "MissingColumnsError",
    "Optimum",
    "Outcome",
    "Plan",
    "Quality",
    "Saturation",
    "SeveralBudgetsError",
    "Truth",
    "Verdict",
    "WallStudy",
    "against_experts",
    "bootstrap",
    "cheapest",
    "compute_optimal",
    "confounds",
    "constrained_optimum",
    "crossing",
    "datasets",
    "default_truths",
    "designs",
    "expected_gain",
    "fit",
    "fixed_total_optima",
    "frontier_band",
    "isoflop",
    "law_curves",
    "leave_largest_out",
    "main_arm",
    "parse_truth",
    "plan_power",
    "power",
    "profile",
    "profile_interval",
    "published",
    "quality",
    "read_runs",
    "saturation",
    "seed_intervals",
    "typical_noise",
    "verdict_by_budget",
    "wall_study",
    "wall_verdict",
    "with_budgets",
]
