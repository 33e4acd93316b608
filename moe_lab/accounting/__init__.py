"""What a model costs, from its configuration alone: parameters, active parameters, floating point
operations, the published models.
"""

from moe_lab.accounting.counts import ParameterCount, count
from moe_lab.accounting.figures import parts_treemap
from moe_lab.accounting.published import find_model, models
from moe_lab.accounting.tokens import ActiveDistribution, active_distribution
from moe_lab.accounting.work import Work, flops
from moe_lab.cost.parts import Part

__all__ = [
    "ActiveDistribution",
    "ParameterCount",
    "Part",
    "Work",
    "active_distribution",
    "count",
    "find_model",
    "flops",
    "models",
    "parts_treemap",
]
