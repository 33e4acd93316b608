"""Polars frames in, plotly figures out. Each function is named after the analysis whose frame it
draws; ``*_figures.py`` beside this file hold them by subject.

A figure has no title (the page sets heading and caption around it), carries the light template of
``theme``, and escapes every text that came from data, because plotly reads tags in labels.
``plotly`` is imported on the first call.
"""

from moe_lab.report.canvas import plain
from moe_lab.report.compute_figures import class_profile, ffn_spread
from moe_lab.report.depth_figures import (
    compare,
    domain_divergence,
    load_interval,
    load_over_windows,
    repetition,
    router_entropy,
    saturation,
    vocabulary_specialisation,
    zero_compute,
)
from moe_lab.report.difficulty_figures import difficulty_curves, difficulty_map, marginal_gain
from moe_lab.report.heatmap_figures import (
    coactivation,
    domain_specialisation,
    load_shift,
    transitions,
)
from moe_lab.report.load_figures import expert_load
from moe_lab.report.run_figures import frontier, training_curves
from moe_lab.report.serving_figures import distinct_experts, expert_cache, placement_load
from moe_lab.report.wall_figures import (
    against_experts,
    law_fit,
    wall_compute,
    wall_elasticity,
    wall_gain,
    wall_loss,
    wall_power,
)
from moe_lab.report.worth_figures import (
    exchange_losses,
    expert_worth,
    pair_losses,
    removal_curves,
    score_agreement,
    sorted_worth,
    top_k_losses,
)

__all__ = [
    "against_experts",
    "class_profile",
    "coactivation",
    "compare",
    "difficulty_curves",
    "difficulty_map",
    "distinct_experts",
    "domain_divergence",
    "domain_specialisation",
    "exchange_losses",
    "expert_cache",
    "expert_load",
    "expert_worth",
    "ffn_spread",
    "frontier",
    "law_fit",
    "load_interval",
    "load_over_windows",
    "load_shift",
    "marginal_gain",
    "pair_losses",
    "placement_load",
    "plain",
    "removal_curves",
    "repetition",
    "router_entropy",
    "saturation",
    "score_agreement",
    "sorted_worth",
    "top_k_losses",
    "training_curves",
    "transitions",
    "vocabulary_specialisation",
    "wall_compute",
    "wall_elasticity",
    "wall_gain",
    "wall_loss",
    "wall_power",
    "zero_compute",
]
