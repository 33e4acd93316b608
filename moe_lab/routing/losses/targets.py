"""Losses with a target that is not balance."""

import torch
from torch import Tensor

from moe_lab.routing.routing import Routing


def norm_regression_loss(routing: Routing, norms_TE: Tensor) -> Tensor:
    """D2DMoE's router loss (arXiv 2310.04361, eq. 5): mean squared error between scores and the
    experts' output norms [T, E].

    The norms are those of every expert on every token (the experts are frozen while the router
    learns); no gradient reaches them.
    """
    squared_TE = (routing.scores - norms_TE.detach()).square()
    if routing.valid is None:
        return squared_TE.mean()
    return torch.where(routing.valid.unsqueeze(1), squared_TE, 0.0).sum() / (
        routing.num_valid() * squared_TE.shape[1]
    ).clamp_min(1)
