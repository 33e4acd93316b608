"""The numbers of a step's readings as lines of the run's tables, per layer first and then the mean;
and the gradient ratio of a batch.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lab.measures import dead_experts, load_cv, max_violation
from moe_lab.model import Decoder
from moe_lab.routing.losses import load_balancing_loss
from moe_lab.routing.monitors import gradient_ratio
from moe_lab.runs.tables import Line
from moe_lab.training.config import Dtype, RunConfig
from moe_lab.training.readings import LayerReading


def layer_metrics(readings: Sequence[LayerReading]) -> dict[str, list[float | None]]:
    """The numbers of each layer: the columns of the table ``layers``, in the order of ``readings``;
    None: the layer has no such number, or it was not measured.
    """
    rows = [_numbers(reading) for reading in readings]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _numbers(reading: LayerReading) -> dict[str, float | None]:
    bias = reading.bias
    numbers = {
        "load_cv": float(load_cv(reading.counts)),
        "max_violation": float(max_violation(reading.counts)),
        "dead_experts": int(dead_experts(reading.counts)),
        "router_entropy": reading.entropy,
        "entropy_max": reading.entropy_max,
        "mean_ffn_count": reading.mean_ffn_count,
        "ffn_target": reading.ffn_target,
        "bias_spread": None if bias is None else float(bias.max() - bias.min()),
        "gradient_ratio": reading.gradient_ratio,
    }
    return {
        name: value if value is None or math.isfinite(value) else None
        for name, value in numbers.items()
    }


def layers_line(readings: Sequence[LayerReading]) -> Line:
    """A line of the table ``layers`` (``moe_lab.runs.tables``)."""
    return _places(readings) | layer_metrics(readings)


def loads_line(readings: Sequence[LayerReading]) -> Line:
    """A line of the table ``loads``: shares of the slots of real experts, to 6 digits."""
    shares = [reading.counts.double() / max(int(reading.counts.sum()), 1) for reading in readings]
    return _places(readings) | {
        "load": [share.mul(1e6).round().div(1e6).tolist() for share in shares]
    }


def _places(readings: Sequence[LayerReading]) -> Line:
    return {"step": readings[0].step, "layer": [reading.layer for reading in readings]}


MEANS = ("load_cv", "max_violation", "router_entropy", "mean_ffn_count")
"""Of the numbers of a layer, those whose mean over layers is a metric of the step."""


def layer_means(readings: Sequence[LayerReading]) -> dict[str, float]:
    """Means over layers, each layer first; empty for a dense model."""
    numbers = layer_metrics(readings)
    return {
        name: sum(values) / len(values)
        for name in MEANS
        if (values := [value for value in numbers.get(name, ()) if value is not None])
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
