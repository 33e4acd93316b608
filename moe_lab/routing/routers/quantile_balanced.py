"""Quantile balancing (kexue.fm 11619; Kimi K3, arXiv 2607.24653): sigmoid top-k whose bias solves
the balanced assignment's dual.

The router is ``sigmoid_topk``; after each step the bias is set, not nudged: one exact turn of the
dual from last step's scores (``controllers.QuantileBias``), used from the next step on and frozen
at inference.
"""

from moe_lab.routing.router import register
from moe_lab.routing.routers.sigmoid_topk import SigmoidTopK


@register("quantile_balanced")
class QuantileBalanced(SigmoidTopK):
    """``sigmoid_topk`` under ``QuantileBias``."""
