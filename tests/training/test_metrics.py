"""The numbers of a step: per layer over all micro-batches first, then the mean over layers; real
experts only, dead ones included.
"""

import math

import pytest
import torch

from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import RouterConfig, Routing
from moe_lab.training.metrics import layer_means, layers_line, loads_line
from moe_lab.training.readings import LayerReading, read_layers

CONFIG = RouterConfig(kind="longcat", num_experts=4, num_zero_experts=1, top_k=2)


def routing(indices: list[list[int]]) -> Routing:
    ids = torch.tensor(indices)
    scores = torch.full((len(indices), 5), 0.2)
    return Routing(ids, torch.ones(ids.shape), scores.log(), scores, 4, 1)


def readings(*layers: list[Routing]) -> list[LayerReading]:
    blocks = {number: MoELayer(MoEConfig(8, 4, CONFIG)) for number in range(1, len(layers) + 1)}
    return read_layers(5, blocks, layers)


BALANCED = [routing([[0, 1], [2, 3]]), routing([[1, 0], [3, 2]])]
SKEWED = [routing([[0, 4], [0, 4]]), routing([[0, 1], [0, 1]])]  # real counts 4, 2, 0, 0


def test_micro_batches_are_added_and_layers_averaged() -> None:
    metrics = layer_means(readings(BALANCED, SKEWED))
    assert metrics["load_cv"] == pytest.approx((0 + (2.75 / 1.5**2) ** 0.5) / 2)
    assert metrics["max_violation"] == pytest.approx((0 + 4 / 1.5 - 1) / 2)
    assert metrics["mean_ffn_count"] == pytest.approx((2 + 1.5) / 2)
    assert metrics["router_entropy"] == pytest.approx(torch.log(torch.tensor(5.0)).item())


def test_a_dense_model_has_no_routing_metrics() -> None:
    assert layer_means([]) == {}


def test_a_line_of_the_tables_has_each_layer() -> None:
    both = readings(BALANCED, SKEWED)
    line, loads = layers_line(both), loads_line(both)
    assert (line["step"], line["layer"]) == (5, [1, 2])
    assert line["dead_experts"] == [0, 2]
    assert line["entropy_max"] == pytest.approx([math.log(5)] * 2)
    assert line["gradient_ratio"] == [None, None]
    assert loads == {
        "step": 5,
        "layer": [1, 2],
        "load": [[0.25] * 4, [0.666667, 0.333333, 0, 0]],
    }


def test_what_is_not_a_number_is_not_recorded() -> None:
    (empty,) = readings([routing([[4, 4]])])  # no real expert ran
    line = layers_line([empty])
    assert (line["load_cv"], line["max_violation"]) == ([None], [None])
    assert "load_cv" not in layer_means([empty])
    assert loads_line([empty])["load"] == [[0, 0, 0, 0]]
