"""Losses that keep magnitudes in bounds."""

import torch
from torch import Tensor

from moe_lab.routing.routing import Routing, valid_rows


def z_loss(routing: Routing) -> Tensor:
    """ST-MoE's router z-loss (arXiv 2202.08906, eq. 5): mean squared log-sum-exp of the logits."""
    return _mean_squared_lse(routing.logits, routing.valid)


def hidden_z_loss(hidden_TD: Tensor, valid: Tensor | None = None) -> Tensor:
    """LongCat-Flash's hidden z-loss (arXiv 2509.01322, section 3): mean of ``(log sum_i
    exp|z_i|)^2`` over tokens.

    Args:
        hidden_TD: final hidden states before the last norm. valid: [T] bool, False for padding.
    """
    return _mean_squared_lse(hidden_TD.abs(), valid)


def _mean_squared_lse(values: Tensor, valid: Tensor | None) -> Tensor:
    squared = torch.logsumexp(valid_rows(values, valid), dim=1).square()
    if valid is None:
        return squared.sum() / max(squared.shape[0], 1)
    return torch.where(valid, squared, 0.0).sum() / valid.sum().clamp_min(1)
