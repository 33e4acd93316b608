"""What a model costs, from its configuration alone: parameters, active parameters, floating point
operations, the published models.
"""

from moe_lab.accounting.cache_size import CacheSize, cache_size
from moe_lab.accounting.flop_count import FlopCount, flops
from moe_lab.accounting.measured import ActiveDistribution, active_distribution
from moe_lab.accounting.model_names import find_model
from moe_lab.accounting.parameter_count import ParameterCount, count
from moe_lab.accounting.published import models
from moe_lab.cost.parts import Part

__all__ = [
    "ActiveDistribution",
    "CacheSize",
    "FlopCount",
    "ParameterCount",
    "Part",
    "active_distribution",
    "cache_size",
    "count",
    "find_model",
    "flops",
    "models",
]
