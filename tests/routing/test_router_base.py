"""The first routers, losses and controllers against their definitions, computed here in plain
Python or numpy.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.errors import ConfigError
from moe_lab.model import MoEConfig
from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    RouterConfig,
    RouterContext,
    ScoreFunc,
    ZeroExpertKind,
    build_router,
    losses,
)
from moe_lab.routing.controllers import ProportionalBias, SignBias
from moe_lab.routing.facts import FACTS, ROUTERS, RouterFacts


def softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_softmax_topk_takes_the_largest_probabilities(norm_topk_prob):
    config = RouterConfig(
        kind="softmax_topk",
        num_experts=10,
        top_k=3,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=1.7,
    )
    router = build_router(config, 12)
    x = torch.randn(40, 12)
    routing = router(x).check()
    probabilities = softmax64(x.numpy() @ router.weight.detach().numpy().T)
    for t in range(40):
        chosen = np.argsort(-probabilities[t])[:3]
        assert set(routing.indices[t].tolist()) == set(chosen.tolist())
        weights = probabilities[t][routing.indices[t].numpy()] / (
            probabilities[t][chosen].sum() if norm_topk_prob else 1
        )
        np.testing.assert_allclose(routing.weights[t].detach().numpy(), 1.7 * weights, rtol=1e-5)


def test_longcat_selects_with_the_bias_and_weighs_without_it():
    config = RouterConfig(
        kind="longcat",
        num_experts=6,
        num_zero_experts=3,
        top_k=4,
        routed_scaling_factor=6.0,
        controller=ControllerConfig(kind=ControllerKind.PROPORTIONAL, target_ffn_count=2.5),
    )
    router = build_router(config, 8)
    router.controller.bias.copy_(torch.linspace(-0.2, 0.3, 9))
    x = torch.randn(50, 8)
    routing = router(x).check()
    probabilities = softmax64(x.numpy() @ router.weight.detach().numpy().T)
    biased = probabilities + np.linspace(-0.2, 0.3, 9)
    for t in range(50):
        assert set(routing.indices[t].tolist()) == set(np.argsort(-biased[t])[:4].tolist())
        np.testing.assert_allclose(
            routing.weights[t].detach().numpy(),
            6 * probabilities[t][routing.indices[t].numpy()],
            rtol=1e-5,
            atol=1e-7,
        )
    assert (routing.ffn_count() + routing.zero_count() == 4).all()


def test_the_bias_gets_no_gradient_and_the_weights_do():
    config = RouterConfig(
        kind="longcat", num_experts=4, num_zero_experts=2, top_k=2, controller=ControllerConfig()
    )
    router = build_router(config, 5)
    router(torch.randn(7, 5)).weights.sum().backward()
    assert router.weight.grad is not None
    assert not router.controller.bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_are_float32_whatever_the_input_and_float64_stays(dtype):
    router = build_router(RouterConfig(num_experts=4, top_k=2), 6)
    routing = router(torch.randn(3, 6, dtype=dtype))
    assert routing.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_does_not_lower_the_precision_of_routing():
    router = build_router(RouterConfig(num_experts=64, top_k=8), 32)
    x = torch.randn(20, 32)
    plain = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).logits, plain.logits)


def test_padding_changes_no_decision_of_other_tokens():
    router = build_router(RouterConfig(num_experts=8, top_k=2), 4)
    x = torch.randn(6, 4)
    valid = torch.tensor([True] * 4 + [False] * 2)
    routing = router(x, RouterContext(valid=valid))
    assert torch.equal(routing.counts(), router(x[:4]).counts())


def balance_by_hand(indices, scores, top_k_scale: bool) -> float:
    """E * sum_i f_i P_i in plain Python loops."""
    tokens, experts = scores.shape
    share = np.zeros(experts)
    for row in indices:
        for expert in row:
            if expert >= 0:
                share[expert] += 1
    mean = (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)
    total = sum(share) if not top_k_scale else tokens
    return float(experts * sum(share[i] / total * mean[i] for i in range(experts)))


@pytest.mark.parametrize("scale", ["one", "top_k"])
def test_load_balancing_loss_equals_its_definition(scale):
    router = build_router(RouterConfig(num_experts=9, top_k=3), 7)
    routing = router(torch.randn(31, 7) * 3)
    by_hand = balance_by_hand(
        routing.indices.numpy(), routing.scores.detach().double().numpy(), scale == "top_k"
    )
    assert losses.load_balancing_loss(routing, scale=scale).item() == pytest.approx(
        by_hand, rel=1e-5
    )


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_balancing_loss_at_uniform_load_is_one_or_k(top_k):
    router = build_router(RouterConfig(num_experts=10, top_k=top_k), 10)
    with torch.no_grad():
        router.weight.copy_(torch.eye(10) * 4)
    routing = router(torch.stack([torch.roll(torch.linspace(1, 0, 10), i) for i in range(10)]))
    assert routing.counts().tolist() == [top_k] * 10
    assert losses.load_balancing_loss(routing, scale="one").item() == pytest.approx(1.0, abs=1e-5)
    assert losses.load_balancing_loss(routing, scale="top_k").item() == pytest.approx(
        top_k, abs=1e-5
    )


def test_losses_leave_padding_out():
    router = build_router(RouterConfig(num_experts=8, top_k=2), 4)
    x = torch.randn(12, 4)
    valid = torch.arange(12) < 9
    padded, short = router(x, RouterContext(valid=valid)), router(x[:9])
    for loss in (losses.load_balancing_loss, losses.z_loss):
        assert loss(padded).item() == pytest.approx(loss(short).item(), rel=1e-6)


def test_z_loss_is_the_mean_squared_log_sum_exp():
    routing = build_router(RouterConfig(num_experts=5, top_k=1), 4)(torch.randn(6, 4))
    by_hand = np.mean(
        [math.log(sum(math.exp(v) for v in row)) ** 2 for row in routing.logits.tolist()]
    )
    assert losses.z_loss(routing).item() == pytest.approx(by_hand, rel=1e-5)


def test_sign_bias_raises_the_underloaded_and_lowers_the_overloaded():
    controller = SignBias(
        ControllerConfig(kind=ControllerKind.SIGN, rate=0.25),
        num_experts=4,
        num_zero_experts=0,
        top_k=1,
    )
    controller.update(torch.tensor([10, 0, 5, 5]))
    assert controller.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_proportional_bias_is_at_rest_exactly_at_its_fixed_point():
    config = ControllerConfig(kind=ControllerKind.PROPORTIONAL, rate=1.0, target_ffn_count=8)
    controller = ProportionalBias(config, num_experts=768, num_zero_experts=128, top_k=12)
    # 1152 tokens x 12 slots: each real expert gets K_e/(K N) of the slots, zero experts the
    # remaining third.
    counts = torch.cat([torch.full((768,), 12), torch.full((128,), 36)])
    controller.update(counts)
    assert controller.bias.abs().max() < 1e-8


def test_proportional_bias_moves_by_the_gap_in_shares_and_holds_zero_experts_still():
    config = ControllerConfig(kind=ControllerKind.PROPORTIONAL, rate=2.0, target_ffn_count=2)
    controller = ProportionalBias(config, num_experts=4, num_zero_experts=2, top_k=3)
    controller.update(torch.tensor([6, 0, 2, 2, 10, 10]))
    target = 2 / 3 / 4
    torch.testing.assert_close(
        controller.bias,
        2 * torch.tensor([target - 0.2, target, target - 1 / 15, target - 1 / 15, 0, 0]),
    )


def test_a_step_without_tokens_changes_nothing():
    controller = ProportionalBias(
        ControllerConfig(kind=ControllerKind.PROPORTIONAL, target_ffn_count=1), 4, 2, 2
    )
    controller.update(torch.zeros(6, dtype=torch.int64))
    assert controller.steps == 0
    assert not controller.bias.any()


def test_the_rate_decays_with_the_number_of_updates():
    controller = SignBias(ControllerConfig(kind=ControllerKind.SIGN, rate=1.0, decay=1.0), 2, 0, 1)
    moves = []
    for _ in range(3):
        before = controller.bias[1].item()
        controller.update(torch.tensor([5, 0]))
        moves.append(controller.bias[1].item() - before)
    assert moves == pytest.approx([1, 1 / 2, 1 / 3])


def test_update_over_micro_batches_equals_one_update_over_the_whole_batch():
    config = RouterConfig(
        num_experts=6, top_k=2, controller=ControllerConfig(kind=ControllerKind.SIGN, rate=0.1)
    )
    split, whole = build_router(config, 4), build_router(config, 4)
    whole.load_state_dict(split.state_dict())
    x = torch.randn(30, 4)
    split.update([split(part) for part in x.chunk(3)])
    whole.update([whole(x)])
    assert torch.equal(split.controller.bias, whole.controller.bias)
    assert split.controller.steps == 1


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (
            lambda: RouterConfig(num_experts=4, top_k=5),
            "top_k",
        ),
        (lambda: RouterConfig(num_experts=0), "num_experts"),
        (lambda: RouterConfig(top_k=0), "top_k"),
        (
            lambda: RouterConfig(num_zero_experts=-1, kind="longcat"),
            "num_zero_experts",
        ),
        (
            lambda: RouterConfig(routed_scaling_factor=0.0),
            "routed_scaling_factor",
        ),
        (
            lambda: build_router(RouterConfig(kind="nope"), 4),
            "a router kind",
        ),
        (lambda: build_router(RouterConfig(num_zero_experts=2), 4), "num_zero_experts"),
        (
            lambda: build_router(RouterConfig(kind="longcat", norm_topk_prob=True), 4),
            "norm_topk_prob",
        ),
        (lambda: RouterConfig(kind="nope"), "a router kind"),
        (lambda: ControllerConfig(kind="nope"), "a controller kind"),  # type: ignore[arg-type]
        (
            lambda: RouterConfig(controller=ControllerConfig(kind=ControllerKind.RELU_LAMBDA)),
            "controller",
        ),
        (
            lambda: RouterConfig(num_groups=4, topk_groups=2),
            "num_groups",
        ),
        (
            lambda: RouterConfig(
                kind="deepseek_v3", num_experts=10, top_k=2, num_groups=4, topk_groups=2
            ),
            "num_groups",
        ),
        (
            lambda: RouterConfig(
                kind="deepseek_v3", num_experts=8, top_k=5, num_groups=4, topk_groups=2
            ),
            "top_k",
        ),
        (
            lambda: RouterConfig(
                kind="deepseek_v3", num_experts=8, top_k=2, num_groups=8, topk_groups=4
            ),
            "num_groups",
        ),
        (
            lambda: RouterConfig(kind="deepseek_v3", num_experts=8, top_k=2, num_groups=4),
            "topk_groups",
        ),
        (
            lambda: RouterConfig(kind="token_choice", score_func="tanh"),  # type: ignore[arg-type]
            "score_func",
        ),
        (
            lambda: RouterConfig(
                kind="longcat", num_zero_experts=2, zero_expert_kinds=(ZeroExpertKind.ZERO,)
            ),
            "zero_expert_kinds",
        ),
        (
            lambda: ControllerConfig(kind=ControllerKind.SIGN, momentum=0.5),
            "momentum",
        ),
        (lambda: ControllerConfig(rate=-1), "rate"),
        (
            lambda: ProportionalBias(
                ControllerConfig(kind=ControllerKind.PROPORTIONAL, target_ffn_count=9.0), 16, 4, 8
            ),
            "target_ffn_count",
        ),
        (
            lambda: ProportionalBias(ControllerConfig(kind=ControllerKind.PROPORTIONAL), 16, 4, 8),
            "target_ffn_count",
        ),
    ],
)
def test_a_bad_configuration_is_one_line_that_names_its_field(build, field):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field
    assert "expected " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_choices_may_be_given_as_plain_strings():
    choices: dict[str, Any] = {"kind": "token_choice", "score_func": "sigmoid"}
    config = RouterConfig(**choices, controller=ControllerConfig(kind="sign"))
    assert config.score_func is ScoreFunc.SIGMOID
    assert config.hash() == RouterConfig.from_dict(config.to_dict()).hash()


def test_a_batch_of_another_width_is_refused():
    router = build_router(RouterConfig(num_experts=4, top_k=1), 6)
    with refused("x"):
        router(torch.randn(3, 5))


def test_router_config_round_trips_and_its_hash_follows_every_field():
    config = RouterConfig(
        kind="longcat",
        num_experts=8,
        num_zero_experts=4,
        top_k=3,
        controller=ControllerConfig(kind=ControllerKind.SIGN),
    )
    assert RouterConfig.from_dict(config.to_dict()) == config
    assert config.replace(top_k=2).hash() != config.hash()
    assert (
        config.replace(controller=ControllerConfig(kind=ControllerKind.SIGN, rate=0.5)).hash()
        != config.hash()
    )


def test_a_router_that_learns_more_than_its_facts_say_is_refused_when_it_is_built(monkeypatch):
    kind = "learns_more"
    plain = type(RouterConfig(num_experts=4, top_k=2).build(8))

    class LearnsMore(plain):
        def __init__(self, config, d_model):
            super().__init__(config, d_model)
            self.gain = torch.nn.Parameter(torch.ones(d_model))

    monkeypatch.setitem(FACTS, kind, RouterFacts())
    monkeypatch.setitem(ROUTERS._values, kind, LearnsMore)
    with refused("learns"):
        build_router(RouterConfig(kind=kind, num_experts=4, top_k=2), 8)


@pytest.mark.parametrize("kind", ["softmax_topk", "seq_topk", "hash"])
def test_a_batch_of_sequences_is_routed_as_its_tokens(kind):
    config = RouterConfig(
        kind=kind, num_experts=4, top_k=2, vocab_size=50 if kind == "hash" else None
    )
    router = build_router(config, 6)
    x_BSD, ids = torch.randn(3, 5, 6), torch.randint(50, (3, 5))
    valid = torch.arange(15).view(3, 5) % 4 != 3
    batch = router(x_BSD, RouterContext(token_ids=ids, valid=valid))
    flat = router(
        x_BSD.flatten(0, 1),
        RouterContext(token_ids=ids.flatten(), valid=valid.flatten(), sequence_length=5),
    )
    assert torch.equal(batch.indices, flat.indices)
    assert torch.equal(batch.weights, flat.weights)
    assert torch.equal(batch.valid, valid.flatten())


def test_a_controller_takes_one_routing_or_several():
    config = RouterConfig(
        kind="deepseek_v3",
        num_experts=4,
        top_k=1,
        controller=ControllerConfig(kind=ControllerKind.SIGN),
    )
    one, several = build_router(config, 6), build_router(config, 6)
    several.load_state_dict(one.state_dict())
    routing = one(torch.randn(20, 6))
    one.update(routing)
    several.update([routing])
    assert torch.equal(one.selection_bias(), several.selection_bias())  # type: ignore
    assert one.selection_bias().any()


def test_a_nested_field_is_replaced_by_its_path():
    layer = MoEConfig(8, 4, RouterConfig(num_experts=4, top_k=2))
    assert layer.replace(router__top_k=3, d_expert=2) == MoEConfig(
        8, 2, RouterConfig(num_experts=4, top_k=3)
    )
    for wrong in ({"router__top": 3}, {"d_model__x": 1}, {"routr": None}):
        with pytest.raises(ConfigError):
            layer.replace(**wrong)
