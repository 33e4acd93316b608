"""Alarms: when each is raised, once per layer and episode, and that a resumed run continues."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import refused
from registries import registries_as_before

from moe_lab.errors import CheckpointError
from moe_lab.files import json_text
from moe_lab.model import MoEConfig, MoELayer
from moe_lab.routing import ControllerConfig, RouterConfig
from moe_lab.training.alarms import ALARMS, AlarmRule, Alarms
from moe_lab.training.readings import LayerReading, read_layers

EVEN = [64] * 8


def reading(step: int, counts=EVEN, layer: int = 0, **fields: Any) -> LayerReading:
    """A layer of 8 experts, 2 per token, healthy unless said."""
    healthy = LayerReading(
        step=step,
        layer=layer,
        counts=torch.tensor(counts),
        tokens=256,
        entropy=1.9,
        entropy_max=math.log(8),
        mean_ffn_count=2.0,
        router_norm=1 + 1e-3 * step,
        expert_norms=torch.ones(8, dtype=torch.float64),
    )
    return replace(healthy, **fields)


@pytest.mark.parametrize(
    "counts", [[64] * 7, [[64] * 8], [-1] * 8, [math.nan] * 8], ids=["7", "2-d", "below 0", "nan"]
)
def test_counts_that_cannot_be_those_of_the_layer_are_refused(counts: list) -> None:
    alarms = Alarms()
    alarms.observe([reading(1)])
    with refused("counts"):
        alarms.observe([reading(2, counts)])


@pytest.mark.parametrize("threshold", ["0.8", math.nan, None])
def test_a_threshold_that_is_no_number_is_refused(threshold: Any) -> None:
    with refused("thresholds"):
        Alarms(thresholds={"router_collapse": threshold})


def test_a_router_whose_norm_was_infinite_for_a_step_raises_nothing() -> None:
    norms = [1.0, math.inf, 1.001, math.nan, 1.002]
    steps = [reading(step, router_norm=norm) for step, norm in enumerate(norms, 1)]
    alarms = Alarms(["router_speed"])
    assert kinds(alarms, steps) == []
    assert json.dumps(alarms.state_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["bias_direction", "router_frozen"])
def test_what_is_no_number_is_remembered_as_null_or_not_at_all(kind: str) -> None:
    sick = {"bias": torch.tensor([math.nan] + [0.0] * 7), "router_norm": math.nan}
    whole, second = Alarms([kind]), Alarms([kind])
    for step in range(1, 4):
        whole.observe([reading(step, **sick)])
    second.load_state_dict(json.loads(json_text(whole.state_dict())))
    later = [reading(step, router_norm=1.0) for step in range(4, 12)]
    assert kinds(second, later) == kinds(whole, later)
    if kind == "bias_direction":
        assert json.dumps(whole.state_dict(), allow_nan=False)


def test_json_has_null_for_what_is_no_finite_number() -> None:
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf}, "d": None}
    assert json_text(value) == '{"a": [1.5, null, [null, "x"]], "b": {"c": null}, "d": null}'


def kinds(alarms: Alarms, readings) -> list[str]:
    return [alarm.kind for item in readings for alarm in alarms.observe([item])]


BAD: dict[str, Callable[[int], dict[str, Any]]] = {
    "router_collapse": lambda step: {"counts": [256, 256, 0, 0, 0, 0, 0, 0]},
    "dead_experts": lambda step: {"counts": [0, 73, 73, 73, 73, 73, 73, 74]},
    "load_drift": lambda step: {"counts": EVEN if step <= 4 else [250, 240, 10, 6, 2, 2, 1, 1]},
    "entropy_low": lambda step: {"entropy": 0.05},
    "entropy_high": lambda step: {"entropy": math.log(8) - 1e-6},
    "bias_direction": lambda step: {
        "counts": [100, 100, 100, 100, 28, 28, 28, 28],
        "bias": torch.tensor([0.01, 0.01, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0]) * step,
        "score_spread": 9.0,
    },
    "bias_runaway": lambda step: {
        "bias": torch.linspace(-1, 1, 8) * step,
        "score_spread": 0.5,
    },
    "budget_drift": lambda step: {"mean_ffn_count": 2.0 if step <= 4 else 5.0, "ffn_target": 2.0},
    "zero_share": lambda step: {
        "mean_ffn_count": 0.5,
        "ffn_target": 2.0,
        "num_zero_experts": 4,
    },
    "balance_dominates": lambda step: {"gradient_ratio": 50.0},
    "router_frozen": lambda step: {"router_norm": 1.0},
    "router_speed": lambda step: {"router_norm": 1.2**step},
}
"""Kind -> what a reading of a layer with this fault has."""


def test_every_alarm_of_the_package_is_tried_here():
    assert set(BAD) == set(ALARMS)


@pytest.mark.parametrize("kind", BAD)
def test_an_alarm_is_raised_once_per_layer_and_names_step_layer_and_numbers(kind):
    alarms = Alarms([kind])
    healthy = [reading(step, layer=0) for step in range(1, 81)]
    sick = [reading(step, layer=3, **BAD[kind](step)) for step in range(1, 81)]
    raised = [alarm for pair in zip(healthy, sick, strict=True) for alarm in alarms.observe(pair)]
    assert [(alarm.kind, alarm.layer) for alarm in raised] == [(kind, 3)]
    (alarm,) = raised
    assert alarm.sentence.startswith(f"Step {alarm.step}, layer 3: ")
    assert "\n" not in alarm.sentence
    assert alarm.advice.endswith(".")
    assert alarms.active == [(kind, 3)]
    past = alarm.value < alarm.threshold if ALARMS[kind].below else alarm.value > alarm.threshold
    assert past


def test_a_healthy_layer_raises_none_of_them():
    healthy = [reading(step, counts=[60, 68, 66, 62, 70, 58, 64, 64]) for step in range(1, 200)]
    assert kinds(Alarms(), healthy) == []


def test_an_episode_ends_after_as_many_readings_within_the_threshold_and_another_is_raised_again():
    alarms = Alarms(["entropy_low"])
    low: dict[str, Any] = {"entropy": 0.05}
    assert kinds(alarms, [reading(step, **low) for step in range(4)]) == ["entropy_low"]
    assert kinds(alarms, [reading(4), *(reading(step, **low) for step in range(5, 12))]) == []
    assert kinds(alarms, [reading(step) for step in range(12, 16)]) == []
    assert alarms.active == []
    assert kinds(alarms, [reading(step, **low) for step in range(16, 20)]) == ["entropy_low"]


@pytest.mark.parametrize("kind", BAD)
def test_a_resumed_run_raises_the_alarms_of_one_that_was_not_interrupted(kind):
    sick = [reading(step, **BAD[kind](step)) for step in range(1, 81)]
    whole = Alarms([kind])
    expected = [alarm for item in sick for alarm in whole.observe([item])]
    for stop in (1, 3, expected[0].step - 1, expected[0].step, 60):
        first, second = Alarms([kind]), Alarms([kind])
        found = [alarm for item in sick[:stop] for alarm in first.observe([item])]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [alarm for item in sick[stop:] for alarm in second.observe([item])]
        assert found == expected
        assert second.state_dict() == whole.state_dict()


def test_a_zero_expert_is_a_dead_expert_and_is_named():
    norms = torch.ones(8, dtype=torch.float64)
    norms[5] = 0
    alarms = Alarms(["dead_experts"])
    raised = [
        alarm for step in range(80) for alarm in alarms.observe([reading(step, expert_norms=norms)])
    ]
    assert len(raised) == 1
    assert "1 of 8 experts (5) return zero" in raised[0].sentence


@pytest.mark.parametrize(("reached", "first"), [(0, 96), (3, 96), (4, 36), (40, 72)])
def test_a_budget_counts_when_it_stayed_near_its_target_or_after_64_readings(reached, first):
    alarms = Alarms(["budget_drift"])
    counts = [2.2] * reached + [5.0] * 120
    found = [
        alarm.step
        for step, count in enumerate(counts, 1)
        for alarm in alarms.observe([reading(step, mean_ffn_count=count, ffn_target=2.0)])
    ]
    assert found == [first - 1 if reached < 4 else first]


def test_the_load_is_not_watched_where_tokens_run_more_than_half_of_the_experts():
    names = ["router_collapse", "load_drift"]
    for each, raised in ((4, names), (5, [])):
        busy = [256] * each + [0] * (8 - each)
        steps = [
            reading(step, counts=EVEN if step <= 4 else busy, mean_ffn_count=float(each))
            for step in range(60)
        ]
        assert sorted(kinds(Alarms(names), steps)) == sorted(raised)


def test_a_low_entropy_of_sparse_scores_raises_nothing():
    for sparse, raised in ((False, ["entropy_low"]), (True, [])):
        low = [reading(step, entropy=0.0, sparse_scores=sparse) for step in range(40)]
        assert kinds(Alarms(["entropy_low"]), low) == raised


def test_an_infinite_gradient_ratio_and_what_was_not_measured_raise_nothing():
    nothing: dict[str, Any] = {"expert_norms": None, "router_norm": None}
    readings = [reading(step, gradient_ratio=math.inf, **nothing) for step in range(80)]
    assert kinds(Alarms(), readings) == []


def test_a_threshold_can_be_chosen_and_names_are_checked():
    readings = [reading(step, gradient_ratio=0.2) for step in range(20)]
    assert kinds(Alarms(), readings) == []
    assert kinds(Alarms(thresholds={"balance_dominates": 0.1}), readings) == ["balance_dominates"]
    with refused("an alarm"):
        Alarms(["router_colapse"])
    with refused("thresholds"):
        Alarms(["entropy_low"], {"load_drift": 1.0})


def test_a_damaged_state_is_refused():
    with refused("alarms", CheckpointError):
        Alarms().load_state_dict({"entropy_low/0": {"active": False}})


def test_an_alarm_of_a_user_is_observed_beside_the_others():
    with registries_as_before():

        @ALARMS.register("busiest")
        class Busiest(AlarmRule):
            threshold = 100.0
            advice = "Look at the capacity."

            def measure(self, reading):
                return float(reading.counts.max())

            def seen(self, reading, value):
                return f"an expert has {value:.0f} slots"

        (alarm,) = Alarms().observe([reading(3, counts=[148, 52, 52, 52, 52, 52, 52, 52])])
    assert alarm.kind == "busiest"
    assert alarm.sentence == "Step 3, layer 0: an expert has 148 slots."
    assert "busiest" not in ALARMS


def test_a_controller_of_the_wrong_sign_is_found_in_a_layer_and_the_right_one_raises_nothing():
    assert not _raised_while_a_layer_is_balanced(sign=1)
    assert "bias_direction" in _raised_while_a_layer_is_balanced(sign=-1)


def _raised_while_a_layer_is_balanced(sign: int) -> list[str]:
    """Kinds of the alarms in 24 updates; ``sign`` -1 turns the moves of the bias round."""
    torch.manual_seed(0)
    controller = ControllerConfig(kind="sign", rate=1e-2)
    config = RouterConfig(kind="sigmoid_topk", num_experts=8, top_k=2, controller=controller)
    layer = MoELayer(MoEConfig(d_model=16, d_expert=8, router=config))
    router = layer.router
    assert router.controller is not None
    right = router.controller.step
    router.controller.step = lambda counts_E: sign * right(counts_E)
    alarms, found = Alarms(), []
    for step in range(1, 25):
        with torch.no_grad():
            router.weight *= 1.001  # as a router that learns
        routing = router(torch.randn(128, 16))
        router.update(routing)
        found += alarms.observe(read_layers(step, {0: layer}, [[routing]]))
    return [alarm.kind for alarm in found]
