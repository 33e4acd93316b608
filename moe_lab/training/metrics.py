"""Routing metrics of a step, per layer first and then the mean; and the gradient ratio of a run.

Metrics are tensors that stay on the device until they are logged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.measures import load_cv, max_violation
from moe_lab.model import Decoder
from moe_lab.routing import Routing
from moe_lab.routing.losses import load_balancing_loss
from moe_lab.routing.monitors import gradient_ratio
from moe_lab.training.config import Dtype, RunConfig
from moe_lab.training.ranks import ALONE, Ranks


@torch.no_grad()
def routing_metrics(layers: Sequence[Sequence[Routing]], ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """Means over layers; each layer is the sequence of its micro-batches' routings.

    Load is that of the real experts over all ranks.
    """
    if not layers:
        return {}
    counts = [
        ranks.total(
            torch.stack([routing.counts() for routing in layer]).sum(dim=0)[: layer[0].num_experts]
        )
        for layer in layers
    ]
    return {
        "load_cv": torch.stack([load_cv(count) for count in counts]).mean(),
        "max_violation": torch.stack([max_violation(count) for count in counts]).mean(),
        "router_entropy": ranks.mean(
            torch.stack([routing.entropy().mean() for layer in layers for routing in layer]).mean()
        ),
        "mean_ffn_count": ranks.mean(
            torch.stack(
                [routing.ffn_count().double().mean() for layer in layers for routing in layer]
            ).mean()
        ),
    }


def gradient_ratios(model: Decoder, config: RunConfig, batch: Tensor) -> list[float]:
    """R_g of each MoE layer: the gradient of the balance losses over that of the language loss.

    ``R_g = ||d balance / dP||_2 / ||d language / dP||_2`` on the batch-mean expert probabilities P
    (LongCat-Flash, arXiv 2509.01322, section 3); above 0.1 balance begins to decide what the router
    learns. The z-loss, which balances nothing, is left out. Parameters and their gradients are left
    as they are.

    Args:
        batch: [B, S + 1] token ids.

    Returns:
        One ratio per layer: 0 if no balance loss is taken, infinity if only it reaches the scores.
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
    ratios = []
    for routing in output.routings:
        balance = torch.zeros((), device=batch.device)
        if config.router_aux_loss_coef:
            balance = balance + config.router_aux_loss_coef * load_balancing_loss(routing)
        for loss in routing.losses.values():
            balance = balance + config.router_own_loss_coef * loss
        learns = routing.scores.requires_grad
        ratio = (
            gradient_ratio(balance / len(output.routings), output.loss, routing)
            if learns
            else torch.zeros(())
        )
        ratios.append(float(ratio))
    return ratios
