"""Dynamic quantile balancing (kexue.fm 11626): active iff ``l_ti - beta_i > 0``, beta an
exponential mean of the batch's quantiles.

``beta <- m beta + (1 - m) q`` with q the (T k/E + 1)-th largest logit of the expert and m = 0.9:
the first one left out, where Expert Threshold takes the last one kept, and a memory of ten steps
instead of a thousand.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.expert_threshold import ExpertThreshold


@register("quantile_threshold")
class QuantileThreshold(ExpertThreshold):
    """``expert_threshold`` under ``QuantileEMA``."""
