"""Routing metrics of a step, per layer first and then the mean, as tensors that stay on the device
until they are logged.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.measures import load_cv, max_violation
from moe_lab.routing import Routing
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
