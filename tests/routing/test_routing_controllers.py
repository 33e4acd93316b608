"""Controllers: each rule against its equation, on a simulated plant, and against everything that
makes counters count twice.
"""

import copy
import math

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    Router,
    RouterConfig,
    RouterContext,
    build_router,
)
from moe_lab.routing.controllers import (
    BudgetSignBias,
    CentredSignBias,
    Controller,
    PIDBias,
    ProportionalBias,
    QuantileBias,
    ReluLambda,
    SignBias,
    ThresholdEMA,
    TopPController,
)

Kind = ControllerKind


def config(kind: ControllerKind, **fields) -> ControllerConfig:
    return ControllerConfig(kind=kind, **fields)


# The rules
# ------------------------------------------------------------------------------------------------


def test_the_centred_sign_never_moves_all_biases_together():
    plain, centred = (
        SignBias(config(Kind.SIGN, rate=1.0), 4, 0, 1),
        CentredSignBias(config(Kind.CENTRED_SIGN, rate=1.0), 4, 0, 1),
    )
    counts = torch.tensor([97, 1, 1, 1])
    plain.update(counts)
    centred.update(counts)
    assert plain.bias.tolist() == [-1, 1, 1, 1]
    assert centred.bias.tolist() == [-1.5, 0.5, 0.5, 0.5]
    assert centred.bias.sum() == 0


def test_the_sign_rule_follows_a_target_of_real_experts_where_it_has_one():
    controller = SignBias(
        config(Kind.SIGN, rate=1.0, target_ffn_count=1), num_experts=2, num_zero_experts=2, top_k=2
    )
    # Target: half of the slots on two real experts, half on two zero-compute ones.
    controller.update(torch.tensor([30, 20, 25, 25]))
    assert controller.bias.tolist() == [-1, 1, 0, 0]


def test_pid_without_gains_and_limits_is_the_proportional_rule():
    torch.manual_seed(0)
    pid = PIDBias(config(Kind.PID, rate=0.3, target_ffn_count=2), 6, 3, 4)
    plain = ProportionalBias(config(Kind.PROPORTIONAL, rate=0.3, target_ffn_count=2), 6, 3, 4)
    for _ in range(5):
        counts = torch.randint(0, 50, (9,))
        pid.update(counts)
        plain.update(counts)
    torch.testing.assert_close(pid.bias, plain.bias)


def test_pid_adds_the_gap_and_its_change():
    pid = PIDBias(config(Kind.PID, rate=0.0, proportional_gain=2.0, derivative_gain=3.0), 2, 0, 1)
    pid.update(torch.tensor([60, 40]))
    assert pid.bias.tolist() == pytest.approx([-0.2, 0.2])  # 2 * gap; nothing to differentiate yet
    pid.update(torch.tensor([50, 50]))
    assert pid.bias.tolist() == pytest.approx([0.3, -0.3])  # 3 * (0 - -0.1)


def test_pid_does_not_wind_up_at_its_limit():
    """After a hundred steps against the limit one step of the opposite gap moves the bias off it at
    once.
    """
    counts, opposite = torch.tensor([100, 0]), torch.tensor([0, 100])
    wound = PIDBias(config(Kind.PID, rate=0.1), 2, 0, 1)
    held = PIDBias(config(Kind.PID, rate=0.1, limit=0.2), 2, 0, 1)
    for _ in range(100):
        wound.update(counts)
        held.update(counts)
    assert held.bias.tolist() == pytest.approx([-0.2, 0.2])
    assert wound.bias[1].item() == pytest.approx(5.0, rel=1e-4)
    for _ in range(6):
        held.update(opposite)
        wound.update(opposite)
    assert held.bias[1] < 0
    assert wound.bias[1] > 4


def test_the_budget_rule_evens_the_load_and_steers_the_count():
    controller = BudgetSignBias(
        config(Kind.BUDGET_SIGN, rate=1.0), num_experts=4, num_zero_experts=0, top_k=2
    )
    controller.update(
        torch.tensor([10, 10, 10, 10]), num_tokens=40
    )  # one expert per token, two wanted
    assert controller.bias.tolist() == [1, 1, 1, 1]
    controller.update(torch.tensor([50, 10, 30, 30]), num_tokens=40)  # three per token
    assert controller.bias.tolist() == [-1, 1, 0, 0]


def test_the_budget_rule_also_learns_from_a_step_in_which_nothing_was_selected():
    controller = BudgetSignBias(config(Kind.BUDGET_SIGN, rate=1.0), 4, 0, 2)
    controller.update(torch.zeros(4, dtype=torch.int64), num_tokens=40)
    assert controller.bias.tolist() == [1, 1, 1, 1]
    controller.update(torch.zeros(4, dtype=torch.int64), num_tokens=0)
    assert controller.steps == 1


def test_the_quantile_rule_is_one_turn_of_the_dual():
    """Alpha: the (k+1)-th largest of s - beta per token; beta: the (T k/E + 1)-th largest of s -
    alpha per expert; b = -beta, centred.
    """
    torch.manual_seed(1)
    router = build_router(RouterConfig(kind="quantile_balanced", num_experts=6, top_k=2), 5)
    controller = router.controller
    assert isinstance(controller, QuantileBias)
    controller.bias.copy_(torch.randn(6) * 0.1)
    beta = -controller.bias.numpy().astype(float)
    routing = router(torch.randn(30, 5))
    scores = routing.scores.detach().double().numpy()
    router.update([routing])
    alpha = np.sort(scores - beta, axis=1)[:, ::-1][:, 2]
    new = np.sort(scores - alpha[:, None], axis=0)[::-1][30 * 2 // 6]
    np.testing.assert_allclose(controller.bias.numpy(), new.mean() - new, atol=1e-6)


def test_threshold_rules_average_the_cutoffs_of_their_batches():
    """c <- m c + (1 - m) c_batch; the first update sets c, and a young mean forgets fast: m is at
    most (1 + t) / (10 + t).
    """
    torch.manual_seed(2)
    for momentum, kept in ((0.1, 0.1), (0.999, 2 / 11)):
        rule = config(Kind.THRESHOLD_EMA, momentum=momentum)
        router = build_router(
            RouterConfig(kind="expert_threshold", num_experts=4, top_k=1, controller=rule), 5
        )
        controller, cutoffs = router.controller, []
        assert isinstance(controller, ThresholdEMA)
        routings = [router(torch.randn(40, 5)) for _ in range(2)]
        for routing in routings:
            cutoffs.append(routing.logits.detach().sort(dim=0, descending=True).values[9])
            router.update([routing])
        torch.testing.assert_close(controller.bias, -(kept * cutoffs[0] + (1 - kept) * cutoffs[1]))
        controller.steps.fill_(10**6)
        before = controller.bias.clone()
        router.update(routings[1:])
        torch.testing.assert_close(controller.bias, momentum * before - (1 - momentum) * cutoffs[1])


def test_warm_up_routes_by_the_batch_in_training_and_by_the_mean_in_evaluation():
    rule = config(Kind.THRESHOLD_EMA, warmup=3)
    router = build_router(
        RouterConfig(kind="expert_threshold", num_experts=4, top_k=1, controller=rule), 5
    )
    router.update([router(torch.randn(40, 5))])
    shifted = torch.randn(40, 4) + 9
    assert router.route(shifted, RouterContext()).counts().tolist() == [10] * 4
    assert router.eval().route(shifted, RouterContext()).counts().tolist() == [40] * 4
    router.train()
    for _ in range(2):
        router.update([router(torch.randn(40, 5))])
    assert router.route(shifted, RouterContext()).counts().tolist() == [40] * 4


def test_score_rules_do_not_take_counts():
    with refused("routings"):
        QuantileBias(config(Kind.QUANTILE), 4, 0, 1).update(torch.ones(4))


def test_padding_has_no_vote_in_a_quantile():
    torch.manual_seed(3)
    x, valid = torch.randn(40, 5), torch.arange(40) % 4 > 0
    for kind in ("quantile_balanced", "expert_threshold", "quantile_threshold"):
        padded = build_router(RouterConfig(kind=kind, num_experts=4, top_k=1), 5)
        short = copy.deepcopy(padded)
        padded.update([padded(x, RouterContext(valid=valid))])
        short.update([short(x[valid])])
        assert padded.controller is not None
        assert short.controller is not None
        torch.testing.assert_close(padded.controller.bias, short.controller.bias)


def test_lambda_multiplies_while_too_dense_and_divides_while_too_sparse():
    controller = ReluLambda(config(Kind.RELU_LAMBDA), num_experts=4, num_zero_experts=0, top_k=1)
    assert controller.coefficient.item() == pytest.approx(1e-8)
    for _ in range(10):
        controller.update(torch.tensor([5, 5, 5, 5]), num_tokens=10)
    assert controller.coefficient.item() == pytest.approx(1e-8 * 1.2**10, rel=1e-4)
    for _ in range(4):
        controller.update(torch.tensor([2, 2, 2, 2]), num_tokens=10)
    assert controller.coefficient.item() == pytest.approx(1e-8 * 1.2**6, rel=1e-4)


def test_top_p_follows_its_pi_law_within_bounds():
    controller = TopPController(
        config(Kind.TOP_P, rate=0.5, proportional_gain=1.0, initial=0.4), 10, 0, 4
    )
    controller.update(torch.tensor([3] * 10), num_tokens=10)  # 3 per token, 4 wanted: e = 0.1
    assert controller.p.item() == pytest.approx(0.4 + 0.1 + 0.05)
    controller.update(torch.tensor([5] * 10), num_tokens=10)  # e = -0.1
    assert controller.p.item() == pytest.approx(0.4 - 0.1 + 0.0)
    for _ in range(200):
        controller.update(torch.ones(10, dtype=torch.int64), num_tokens=10)
    assert controller.p.item() == 1.0
    controller.update(torch.tensor([9] * 10), num_tokens=10)
    assert controller.p.item() < 1.0  # the sum has not run away behind the bound


@pytest.mark.parametrize("kind", [Kind.BUDGET_SIGN, Kind.TOP_P, Kind.RELU_LAMBDA])
def test_rules_on_the_count_per_token_ask_for_the_tokens(kind):
    router_kind = {
        Kind.BUDGET_SIGN: "expert_threshold",
        Kind.TOP_P: "dtop_p",
        Kind.RELU_LAMBDA: "remoe",
    }[kind]
    router = build_router(
        RouterConfig(kind=router_kind, num_experts=4, top_k=1, controller=config(kind)), 5
    )
    assert router.controller is not None
    with refused("num_tokens"):
        router.controller.update(torch.ones(4))


@pytest.mark.parametrize("kind", [Kind.SIGN, Kind.PROPORTIONAL, Kind.PID, Kind.BUDGET_SIGN])
def test_counts_of_another_number_of_experts_are_refused(kind):
    from moe_lab.routing.controllers import CONTROLLERS

    controller = CONTROLLERS[kind](config(kind), 4, 0, 2)
    with refused("counts"):
        controller.update(torch.ones(5), num_tokens=3)


# The plant: fixed preferences plus noise
# ------------------------------------------------------------------------------------------------


def simulate(
    router: Router, steps: int, tokens: int = 1024, spread: float = 0.5, seed: int = 0
) -> tuple[list[float], torch.Tensor]:
    """Mean ffn_count per step, and the counts summed over the last quarter."""
    generator = torch.Generator().manual_seed(seed)
    width = router.config.num_choices
    preference = torch.randn(width, generator=generator) * spread
    means, summed = [], torch.zeros(width, dtype=torch.int64)
    for step in range(steps):
        logits = preference + torch.randn(tokens, width, generator=generator)
        with torch.no_grad():
            routing = router.route(logits, RouterContext())
        router.update([routing])
        means.append(routing.ffn_count().double().mean().item())
        if step >= 3 * steps // 4:
            summed += routing.counts()
    return means, summed


@pytest.mark.slow
@pytest.mark.parametrize(("real", "zero", "at_rest"), [(512, 256, 8.0), (768, 128, 10.29)])
def test_longcats_rule_brings_the_mean_ffn_count_within_one_percent_of_its_target(
    real, zero, at_rest
):
    """Flash's shape, where the target is uniform load, and 2.0's, where each zero-compute expert
    must carry three times a real one.
    """
    controller = config(Kind.PROPORTIONAL, rate=1.0, target_ffn_count=8)
    router = build_router(
        RouterConfig(
            kind="longcat", num_experts=real, num_zero_experts=zero, top_k=12, controller=controller
        ),
        4,
    )
    means, counts = simulate(router, steps=120)
    assert means[0] == pytest.approx(at_rest, rel=0.05)
    assert np.mean(means[-30:]) == pytest.approx(8.0, rel=0.01)
    share = counts.double() / counts.sum()
    ratio = share[real:].mean() / share[:real].mean()
    assert ratio.item() == pytest.approx((4 / zero) / (8 / real), rel=0.03)
    assert not router.controller.bias[real:].any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.SIGN, {"rate": 0.005}),
        (Kind.CENTRED_SIGN, {"rate": 0.005}),
        (Kind.PROPORTIONAL, {"rate": 1.0}),
        (Kind.PID, {"rate": 1.0, "proportional_gain": 1.0, "derivative_gain": 0.2, "limit": 1.0}),
        (Kind.QUANTILE, {}),
    ],
)
def test_every_bias_rule_evens_out_a_skewed_router(kind, fields):
    uneven = build_router(RouterConfig(kind="sigmoid_topk", num_experts=16, top_k=2), 4)
    even = build_router(
        RouterConfig(
            kind="sigmoid_topk", num_experts=16, top_k=2, controller=config(kind, **fields)
        ),
        4,
    )
    _, before = simulate(uneven, steps=8)
    _, after = simulate(even, steps=200)
    assert before.max() / before.double().mean() > 1.8
    assert after.max() / after.double().mean() < 1.06


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("expert_threshold", Kind.THRESHOLD_EMA), ("quantile_threshold", Kind.QUANTILE_EMA)],
)
def test_threshold_rules_hold_the_mean_count(kind, rule):
    router = build_router(
        RouterConfig(kind=kind, num_experts=16, top_k=3, controller=config(rule, momentum=0.9)), 4
    )
    means, counts = simulate(router, steps=40)
    assert np.mean(means[-10:]) == pytest.approx(3.0, rel=0.03)
    assert counts.max() / counts.double().mean() < 1.05


def test_the_budget_rule_holds_the_mean_count_of_a_threshold_router():
    controller = config(Kind.BUDGET_SIGN, rate=0.02)
    router = build_router(
        RouterConfig(kind="expert_threshold", num_experts=16, top_k=3, controller=controller), 4
    )
    means, _ = simulate(router, steps=300)
    assert means[0] > 6
    assert np.mean(means[-50:]) == pytest.approx(3.0, rel=0.05)


def test_an_unmoved_controller_is_a_bias_that_someone_else_sets():
    controller = Controller(config(Kind.FIXED), 4, 0, 1)
    controller.bias.copy_(torch.arange(4.0))
    controller.update(torch.tensor([9, 0, 0, 0]))
    assert controller.bias.tolist() == [0, 1, 2, 3]
    assert math.isclose(controller.steps.item(), 1)
