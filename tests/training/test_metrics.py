"""The metrics of a step: per layer over all micro-batches first, then the mean over layers; real
experts only, dead ones included.
"""

import pytest
import torch

from moe_lab.routing import Routing
from moe_lab.training.metrics import routing_metrics


def routing(indices: list[list[int]], num_experts: int = 4, num_zero_experts: int = 1) -> Routing:
    ids = torch.tensor(indices)
    scores = torch.full((len(indices), num_experts + num_zero_experts), 0.2)
    return Routing(ids, torch.ones(ids.shape), scores.log(), scores, num_experts, num_zero_experts)


def test_micro_batches_are_added_and_layers_averaged() -> None:
    balanced = [routing([[0, 1], [2, 3]]), routing([[1, 0], [3, 2]])]
    skewed = [routing([[0, 4], [0, 4]]), routing([[0, 1], [0, 1]])]  # real counts 4, 2, 0, 0
    metrics = {name: float(value) for name, value in routing_metrics([balanced, skewed]).items()}
    assert metrics["load_cv"] == pytest.approx((0 + (2.75 / 1.5**2) ** 0.5) / 2)
    assert metrics["max_violation"] == pytest.approx((0 + 4 / 1.5 - 1) / 2)
    assert metrics["mean_ffn_count"] == pytest.approx((2 + 1.5) / 2)
    assert metrics["router_entropy"] == pytest.approx(torch.log(torch.tensor(5.0)).item())


def test_a_dense_model_has_no_routing_metrics() -> None:
    assert routing_metrics([]) == {}
