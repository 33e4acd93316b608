"""``gradient_ratios``: LongCat-Flash's R_g of every MoE layer, how hard the balance losses pull on
a router against the language loss.

``R_g = ||d balance / dP||_2 / ||d language / dP||_2`` on the batch-mean expert probabilities P
(arXiv 2509.01322, section 3); above 0.1 balance begins to decide what the router learns.
"""

import torch
from torch import Tensor

from moe_lab.model import Decoder
from moe_lab.routing.losses import load_balancing_loss
from moe_lab.routing.monitors import gradient_ratio
from moe_lab.training.config import Dtype, RunConfig


def gradient_ratios(model: Decoder, config: RunConfig, batch: Tensor) -> list[float]:
    """R_g of each MoE layer on one batch [B, S + 1] of token ids, with the run's coefficients.
    Parameters and their gradients are left as they are; the z-loss, which balances nothing, is left
    out. 0 where no balance loss is taken, infinity where only it reaches the scores.
    """
    was = model.training
    model.train()
    try:
        with torch.autocast(
            batch.device.type, dtype=torch.bfloat16, enabled=config.dtype == Dtype.BFLOAT16
        ):
            output = model(batch[:, :-1], batch[:, 1:])
    finally:
        model.train(was)
    assert output.loss is not None
    found = []
    for routing in output.routings:
        balance = torch.zeros((), device=batch.device)
        if config.router_aux_loss_coef:
            balance = balance + config.router_aux_loss_coef * load_balancing_loss(routing)
        for own in routing.losses.values():
            balance = balance + config.router_own_loss_coef * own
        learns = routing.scores.requires_grad
        ratio = (
            gradient_ratio(balance / len(output.routings), output.loss, routing)
            if learns
            else torch.zeros(())
        )
        found.append(float(ratio))
    return found
