"""Losses with a target that is not balance."""

from torch import Tensor

from moe_lab.routing.routing import Routing, valid_rows


def norm_regression_loss(routing: Routing, norms_TE: Tensor) -> Tensor:
    """D2DMoE's router loss (arXiv 2310.04361, eq. 5): mean squared error between scores and the
    experts' output norms [T, E].

    The norms are those of every expert on every token (the experts are frozen while the router
    learns); no gradient reaches them.
    """
    error_TE = valid_rows(routing.scores - norms_TE.detach(), routing.valid)
    if routing.valid is None:
        return error_TE.square().mean()
    return error_TE.square().sum() / (routing.num_valid() * error_TE.shape[1]).clamp_min(1)
