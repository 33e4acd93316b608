"""Zero-compute experts: LongCat's two readings, MoE++, null experts, ZAYA's skip."""

import math

import pytest
import torch
import torch.nn.functional as F
from refusals import refused

from moe_lab.errors import ConfigError
from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    RouterConfig,
    RouterContext,
    ZeroExpertKind,
    build_router,
)
from moe_lab.routing.routers.moepp import capacities

IDENTITY, ZERO, CONSTANT = ZeroExpertKind.IDENTITY, ZeroExpertKind.ZERO, ZeroExpertKind.CONSTANT
D = 10


def with_identity_weight(config: RouterConfig):
    router = build_router(config, config.num_choices)
    with torch.no_grad():
        router.weight.copy_(torch.eye(config.num_choices))
    return router


@pytest.mark.parametrize(("scaling", "factor"), [(None, 6.0), (True, 6.0), (False, 1.0)])
def test_longcat_scales_zero_experts_unless_told_otherwise(scaling, factor):
    config = RouterConfig(
        kind="longcat",
        num_experts=3,
        num_zero_experts=3,
        top_k=4,
        routed_scaling_factor=6.0,
        zero_expert_scaling=scaling,
    )
    routing = with_identity_weight(config)(torch.randn(40, 6))
    probabilities = routing.scores.gather(1, routing.indices)
    is_zero = routing.indices >= 3
    torch.testing.assert_close(routing.weights[is_zero], factor * probabilities[is_zero])
    torch.testing.assert_close(routing.weights[~is_zero], 6 * probabilities[~is_zero])


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (RouterConfig(kind="longcat", num_experts=4, num_zero_experts=2, top_k=2), (IDENTITY,) * 2),
        (RouterConfig(kind="adamoe", num_experts=4, num_zero_experts=3, top_k=2), (ZERO,) * 3),
        (RouterConfig(kind="zaya", num_experts=4, num_zero_experts=1, top_k=1), (ZERO,)),
        (
            RouterConfig(kind="moepp", num_experts=8, num_zero_experts=4, top_k=2),
            (CONSTANT, CONSTANT, IDENTITY, ZERO),
        ),
        (RouterConfig(kind="moepp", num_experts=8, num_zero_experts=1, top_k=2), (ZERO,)),
        (RouterConfig(kind="softmax_topk", num_experts=8, top_k=2), ()),
        (
            RouterConfig(
                kind="longcat",
                num_experts=4,
                num_zero_experts=2,
                top_k=2,
                zero_expert_kinds=(ZERO, CONSTANT),
            ),
            (ZERO, CONSTANT),
        ),
    ],
)
def test_the_configuration_says_what_each_zero_compute_expert_returns(config, kinds):
    assert config.zero_kinds == kinds
    assert RouterConfig.from_dict(config.to_dict()).zero_kinds == kinds


def test_moepp_renormalises_over_what_is_left_without_zero_experts():
    config = RouterConfig(
        kind="moepp", num_experts=2, num_zero_experts=2, top_k=2
    )  # copy = 2, zero = 3
    router = with_identity_weight(config)
    logits = torch.tensor([[1.0, 0.0, -5.0, 2.0], [-5.0, 0.0, 1.0, -5.0], [-9.0, -9.0, -9.0, 5.0]])
    routing = router(logits)
    assert routing.indices[0].tolist() == [3, 0]
    assert routing.weights[0].tolist() == [0.0, 1.0]
    share = math.e / (1 + math.e)
    assert routing.indices[1].tolist() == [2, 1]
    assert routing.weights[1].tolist() == pytest.approx([share, 1 - share])


def test_a_token_with_nothing_but_zero_experts_weighs_nothing():
    config = RouterConfig(
        kind="moepp", num_experts=2, num_zero_experts=2, top_k=2, zero_expert_kinds=(ZERO, ZERO)
    )
    routing = with_identity_weight(config)(torch.tensor([[-3.0, -3.0, 2.0, 2.0]])).check()
    assert routing.weights.tolist() == [[0.0, 0.0]]
    assert routing.ffn_count().tolist() == [0]


def test_moepps_logits_continue_those_of_the_layer_before():
    config = RouterConfig(kind="moepp", num_experts=4, num_zero_experts=3, top_k=2)
    first, second = build_router(config, D), build_router(config, D)
    assert isinstance(second.residual_weight, torch.nn.Parameter)
    torch.nn.init.normal_(second.residual_weight)
    x = torch.randn(20, D)
    below = first(x)
    above = second(x, RouterContext(previous=below))
    torch.testing.assert_close(
        above.logits, F.linear(x, second.weight) + below.logits @ second.residual_weight.t()
    )
    above.weights.sum().backward()
    assert first.weight.grad is not None
    assert first.weight.grad.abs().sum() > 0


def test_moepp_capacities_hold_gamma_times_all_slots_in_the_ratio_tau():
    config = RouterConfig(kind="moepp", num_experts=8, num_zero_experts=4, top_k=2, ffn_share=0.75)
    real, other = capacities(config, 0.75, 1.1, tokens=4000)
    assert real / other == pytest.approx(0.75, rel=1e-3)
    assert 8 * real + 4 * other == pytest.approx(1.1 * 2 * 4000, rel=2e-3)
    # The share of slots that real experts can take is the paper's compute ratio.
    assert 8 * real / (8 * real + 4 * other) == pytest.approx(0.75 * 8 / (0.75 * 8 + 4), rel=1e-3)


def test_moepp_drops_beyond_its_capacities_by_kind_of_expert():
    config = RouterConfig(
        kind="moepp", num_experts=2, num_zero_experts=2, top_k=1, capacity_factor=1.0, ffn_share=0.5
    )
    logits = torch.tensor([[5.0, 0.0, 0.0, 0.0]]).repeat(12, 1)
    logits[6:, 2] = 9.0
    routing = with_identity_weight(config)(logits)
    # 12 slots: gamma tau S / (tau N + Z) = 2 for a real expert, 4 for a zero-compute one.
    assert routing.counts().tolist() == [2, 0, 4, 0]
    assert routing.dropped().sum() == 6


def test_null_experts_leave_their_weight_to_the_real_ones():
    config = RouterConfig(kind="adamoe", num_experts=3, num_zero_experts=3, top_k=3)
    logits = torch.tensor(
        [
            [2.0, -5.0, -5.0, 3.0, 2.5, -5.0],
            [2.0, 1.0, -5.0, 3.0, -5.0, -5.0],
            [-5.0, -5.0, -5.0, 1.0, 2.0, 3.0],
        ]
    )
    routing = with_identity_weight(config)(logits).check()
    assert routing.ffn_count().tolist() == [1, 2, 0]
    share = math.e / (1 + math.e)
    # Slots in order of score; nulls are 3, 4, 5.
    assert routing.weights[0].tolist() == [0.0, 0.0, 1.0]
    assert routing.weights[1].tolist() == pytest.approx([0.0, share, 1 - share])
    assert routing.weights[2].tolist() == [0.0, 0.0, 0.0]


def test_zaya_skips_only_where_its_bias_lets_it_and_with_weight_zero():
    router = build_router(
        RouterConfig(kind="zaya", num_experts=4, num_zero_experts=1, top_k=1, d_router=6), D
    )
    assert router.controller is not None
    assert router.controller.bias.tolist() == [0, 0, 0, 0, -1]
    x = torch.randn(30, D)
    assert router(x).zero_count().sum() == 0
    router.controller.bias[-1] = 2.0
    skipped = router(x).check()
    assert skipped.zero_count().tolist() == [1] * 30
    assert (skipped.weights == 0).all()
    assert (skipped.indices == 4).all()


def test_zaya_reads_the_state_and_not_the_logits_of_the_layer_before():
    config = RouterConfig(kind="zaya", num_experts=4, num_zero_experts=1, top_k=1, d_router=6)
    first, second = build_router(config, D), build_router(config, D)
    x = torch.randn(30, D)
    below = first(x)
    above = second(x, RouterContext(previous=below))
    assert above.state is not None
    assert below.state is not None
    alone = second(x).state
    assert alone is not None
    torch.testing.assert_close(above.state, alone + below.state)
    plain = build_router(RouterConfig(num_experts=4, top_k=1), D)(x)
    assert torch.equal(second(x, RouterContext(previous=plain)).logits, second(x).logits)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("adamoe", "num_zero_experts"),
        ("moepp", "num_zero_experts"),
        ("zaya", "num_zero_experts"),
    ],
)
def test_kinds_that_need_zero_compute_experts_say_so(kind, field):
    with pytest.raises(ConfigError) as caught:
        RouterConfig(kind=kind, num_experts=4, top_k=1)
    assert caught.value.field == field


def test_a_mean_of_real_experts_that_cannot_be_reached_is_refused():
    config = RouterConfig(
        kind="longcat",
        num_experts=16,
        num_zero_experts=2,
        top_k=6,
        controller=ControllerConfig(kind="proportional", target_ffn_count=3),  # type: ignore[arg-type]
    )
    with refused("target_ffn_count"):
        build_router(config, D)


def test_the_longcat_router_makes_the_device_level_loss_of_its_groups_in_training_only():
    torch.manual_seed(0)
    controller = ControllerConfig(kind=ControllerKind.PROPORTIONAL, target_ffn_count=3.0)
    config = RouterConfig(
        kind="longcat",
        num_experts=6,
        num_zero_experts=3,
        top_k=4,
        device_groups=3,
        controller=controller,
    )
    router, x = config.build(5), torch.randn(40, 5)
    routing = router(x)
    slots, mean = routing.counts().double(), routing.scores.double().mean(dim=0)
    by_hand = sum(
        3 / (3.0 * 40) * slots[2 * j : 2 * j + 2].sum() * mean[2 * j : 2 * j + 2].sum()
        for j in range(3)
    )
    by_hand = by_hand + slots[6:].sum() / ((4 - 3.0) * 40) * mean[6:].sum()
    assert routing.losses["device"].item() == pytest.approx(float(by_hand), rel=1e-5)
    assert not router.eval()(x).losses
    with refused("device_groups"):
        config.replace(device_groups=4)
    with refused("num_zero_experts"):
        config.replace(num_zero_experts=0, controller=None)
    with refused("target_ffn_count"):
        config.replace(controller=controller.replace(target_ffn_count=4.0))
