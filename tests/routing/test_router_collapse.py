"""Every router with a free count, driven into its collapse or runaway on purpose, and what holds
it.

Each test is a small experiment whose outcome is asserted: the failure, as the literature tells it,
and its remedy beside it.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lab.routing import (
    ControllerConfig,
    ControllerKind,
    Router,
    RouterConfig,
    RouterContext,
    build_router,
)

EXPERTS, D = 16, 8
Kind = ControllerKind


def fixed(**fields) -> ControllerConfig:
    return ControllerConfig(kind=Kind.FIXED, **fields)


def counts_at(router: Router, size: float, tokens: int = 2000, seed: int = 0) -> float:
    """Mean count of a router whose logits are normal with standard deviation ``size``."""
    logits = size * torch.randn(
        tokens, router.config.num_choices, generator=torch.Generator().manual_seed(seed)
    )
    with torch.no_grad():
        return router.route(logits, RouterContext()).ffn_count().double().mean().item()


def expert_mix(routing, outputs_ED: Tensor) -> Tensor:
    """[T, D]: sum of gates times one fixed output per expert, the smallest stand-in for a layer."""
    gates_TE = torch.zeros_like(routing.scores).scatter_add(
        1, routing.indices.clamp_min(0), routing.weights
    )
    return gates_TE @ outputs_ED


# Fixed cuts on probabilities
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "value"), [("top_p", "top_p", 0.4), ("xmoe", "threshold", 0.9)]
)
def test_a_fixed_mass_drifts_with_the_temperature_of_the_logits(kind, field, value):
    """The same p: one expert per token where logits are sharp, most of them where they are flat.

    Training moves their size freely.
    """
    router = build_router(
        RouterConfig(kind=kind, num_experts=EXPERTS, top_k=EXPERTS, **{field: value}), D
    )
    counts = [counts_at(router, size) for size in (0.1, 1.0, 4.0, 16.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3.5 * counts[2]
    assert counts[-1] < 1.5


def test_a_small_move_of_p_is_a_large_move_of_the_count():
    """DTop-p reports 0.30 -> 0.35 moving about 8 experts to more than 11; flat scores over 64
    experts move 20 to 23.
    """
    flat = [
        counts_at(
            build_router(RouterConfig(kind="top_p", num_experts=64, top_k=64, top_p=p), D), 0.05
        )
        for p in (0.30, 0.35)
    ]
    assert flat[1] - flat[0] > 2.5


def test_the_pi_controller_holds_the_count_where_a_fixed_p_drifts():
    """Logits turn from normal to heavy-tailed at step 60. p adapts within 40 steps; the p that was
    right before is off by a third.
    """
    router = build_router(RouterConfig(kind="dtop_p", num_experts=EXPERTS, top_k=4), D)
    generator = torch.Generator().manual_seed(0)
    means, p = [], []
    for step in range(100):
        logits = torch.randn(1000, EXPERTS, generator=generator)
        logits = logits if step < 60 else 2 * logits.abs() ** 2 * logits.sign()
        with torch.no_grad():
            routing = router.route(logits, RouterContext())
        router.update([routing])
        means.append(routing.ffn_count().double().mean().item())
        p.append(router.state_dict()["controller.p"].item())
    assert np.mean(means[50:60]) == pytest.approx(4, rel=0.02)
    assert means[60] < 4 / 1.33
    assert np.mean(means[90:]) == pytest.approx(4, rel=0.02)
    assert p[-1] > p[59]


def test_dtop_p_rests_at_its_bound_and_comes_back_without_delay():
    """A target that no p can reach: p rests at 1 and its sum does not wind up, so the first dense
    batch is answered at once.
    """
    router = build_router(RouterConfig(kind="dtop_p", num_experts=EXPERTS, top_k=4, max_slots=2), D)
    x = torch.randn(500, D)
    for _ in range(300):
        router.update([router(x)])
    assert router.state_dict()["controller.p"] == 1.0
    assert router.controller is not None
    router.controller.update(torch.full((EXPERTS,), 500), num_tokens=500)  # all experts everywhere
    assert router.state_dict()["controller.p"] < 0.9


# Free counts with nothing below them
# ------------------------------------------------------------------------------------------------


def train_with_a_price_on_gates(
    min_slots: int | None, steps: int = 120
) -> tuple[Router, list[float], Tensor]:
    """Fit a linear teacher through a threshold router whose gates cost something."""
    torch.manual_seed(0)
    config = RouterConfig(
        kind="expert_threshold",
        num_experts=EXPERTS,
        top_k=4,
        controller=fixed(),
        router_bias=True,
        min_slots=min_slots,
    )
    router = build_router(config, D)
    outputs, teacher = torch.randn(EXPERTS, D), torch.randn(D, D) / D
    optimiser = torch.optim.Adam(router.parameters(), lr=0.05)
    counts = []
    for _ in range(steps):
        x = torch.randn(256, D)
        routing = router(x)
        task = (expert_mix(routing, outputs) - x @ teacher).square().mean()
        optimiser.zero_grad()
        (task + 2.0 * routing.scores.mean() * EXPERTS).backward()
        optimiser.step()
        counts.append(routing.ffn_count().double().mean().item())
    x = torch.randn(256, D)
    router.zero_grad()
    (expert_mix(router(x), outputs) - x @ teacher).square().mean().backward() if counts[
        -1
    ] > 0 else None
    gradient = torch.zeros(()) if router.weight.grad is None else router.weight.grad.abs().sum()
    return router, counts, gradient


def test_without_a_floor_a_price_on_experts_ends_at_zero_experts_for_good():
    """K_min = 0: the count goes to zero, and then no gate carries a gradient of the task (marin
    reports losses of 3.8 to 4.9).
    """
    _, counts, gradient = train_with_a_price_on_gates(min_slots=None)
    assert counts[0] > 5
    assert counts[-1] == 0
    assert gradient == 0


def test_with_a_floor_of_one_the_router_keeps_learning():
    _, counts, gradient = train_with_a_price_on_gates(min_slots=1)
    assert counts[-1] >= 1
    assert gradient > 0


def train_remoe(frozen: int, limit: float | None, steps: int = 300) -> tuple[list[float], float]:
    """ReMoE on the same teacher; for the first ``frozen`` steps the router cannot follow (learning
    rate 0).
    """
    torch.manual_seed(0)
    controller = ControllerConfig(kind=Kind.RELU_LAMBDA, initial=1e-3, limit=limit)
    router = build_router(
        RouterConfig(
            kind="remoe", num_experts=EXPERTS, top_k=4, controller=controller, router_bias=True
        ),
        D,
    )
    outputs, teacher = torch.randn(EXPERTS, D), torch.randn(D, D)
    optimiser = torch.optim.SGD(router.parameters(), lr=0.0)
    counts, largest = [], 0.0
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 0.0 if step < frozen else 0.05
        x = torch.randn(256, D)
        routing = router(x)
        loss = (expert_mix(routing, outputs) - x @ teacher).square().mean() + routing.losses["l1"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        router.update([routing])
        counts.append(routing.ffn_count().double().mean().item())
        largest = max(largest, router.state_dict()["controller.coefficient"].item())
    return counts, largest


def test_remoes_lambda_finds_the_target_when_the_router_can_follow():
    counts, largest = train_remoe(frozen=1, limit=None)
    assert np.mean(counts[-50:]) == pytest.approx(4, rel=0.25)
    assert largest < 10


def test_remoes_lambda_winds_up_while_the_router_is_frozen_and_then_kills_every_expert():
    counts, largest = train_remoe(frozen=150, limit=None)
    assert largest > 1e8
    assert counts[149] > 7
    assert np.mean(counts[-50:]) < 0.5


def test_a_limit_on_lambda_prevents_the_collapse():
    counts, largest = train_remoe(frozen=150, limit=1.0)
    assert largest == 1.0
    assert np.mean(counts[-50:]) == pytest.approx(4, rel=0.25)


def test_without_a_router_bias_and_on_centred_inputs_relu_routing_cannot_become_sparse():
    """The sign of x.w does not depend on the length of w: half of the experts stay active and
    lambda grows without end.
    """
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind="remoe", num_experts=EXPERTS, top_k=2), D)
    optimiser, routing = torch.optim.SGD(router.parameters(), lr=0.05), router(torch.randn(256, D))
    for _ in range(200):
        routing = router(torch.randn(256, D))
        optimiser.zero_grad()
        routing.losses["l1"].backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimiser.step()
        router.update([routing])
    assert routing.ffn_count().double().mean().item() == pytest.approx(EXPERTS / 2, rel=0.1)
    assert router.state_dict()["controller.coefficient"] > 1e7


# Learned and relative thresholds
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("direction", "training_count", "evaluation_count"), [(+1.0, 0, 1), (-1.0, EXPERTS, EXPERTS)]
)
def test_dynmoes_thresholds_run_away_to_all_or_to_nothing(
    direction, training_count, evaluation_count
):
    """Nothing in the gate bounds G: pushed up, no expert wants a token (evaluation falls back to
    one); pushed down, all do.
    """
    torch.manual_seed(0)
    router = build_router(RouterConfig(kind="dynmoe", num_experts=EXPERTS, top_k=EXPERTS), D)
    thresholds = dict(router.named_parameters())["thresholds"]
    with torch.no_grad():
        thresholds.add_(direction * 5.0)
    x = torch.randn(200, D)
    assert router(x).ffn_count().double().mean().item() == training_count
    assert router.eval()(x).ffn_count().double().mean().item() == evaluation_count


def test_d2dmoe_cannot_tell_easy_tokens_where_all_norms_are_alike():
    """The cut is relative to the token's own maximum: predictions that are alike run every expert,
    however small they are.
    """
    router = build_router(
        RouterConfig(kind="d2dmoe", num_experts=EXPERTS, top_k=EXPERTS, threshold=0.5), D
    )
    alike = 1e-6 * (1 + 0.1 * torch.rand(50, EXPERTS))
    assert router.route(alike, RouterContext()).ffn_count().tolist() == [EXPERTS] * 50
    alike[:, 3] *= 3
    assert router.route(alike, RouterContext()).ffn_count().tolist() == [1] * 50


def test_a_frozen_cutoff_does_not_hold_the_count_when_the_input_shifts():
    """Expert Threshold is causal because its cut-offs do not look at the batch: at inference a
    shift of the logits moves the count.
    """
    router = build_router(RouterConfig(kind="expert_threshold", num_experts=EXPERTS, top_k=4), D)
    logits = torch.randn(4000, EXPERTS)
    router.update([router.route(logits, RouterContext())])
    router.eval()
    counts = [
        router.route(logits + shift, RouterContext()).ffn_count().double().mean().item()
        for shift in (-1.0, 0.0, 1.0)
    ]
    assert counts[1] == pytest.approx(4, rel=0.01)
    assert counts[0] < 2
    assert counts[2] > 8


def test_a_long_memory_follows_a_shift_slowly_and_a_short_one_at_once():
    shifted = []
    for kind in ("expert_threshold", "quantile_threshold"):
        torch.manual_seed(0)
        router = build_router(RouterConfig(kind=kind, num_experts=EXPERTS, top_k=4), D)
        router.update([router.route(torch.randn(1000, EXPERTS), RouterContext())])
        assert router.controller is not None
        router.controller.steps.fill_(100_000)  # an old router: a young one forgets faster
        for step in range(40):
            router.update(
                [
                    router.route(
                        torch.randn(1000, EXPERTS) + (0.0 if step < 10 else 1.0), RouterContext()
                    )
                ]
            )
        shifted.append(
            router.route(torch.randn(1000, EXPERTS) + 1.0, RouterContext())
            .ffn_count()
            .double()
            .mean()
            .item()
        )
    assert shifted[0] > 7  # 0.999: 30 steps are 3 % of the way
    assert shifted[1] == pytest.approx(4, rel=0.1)  # 0.9: 96 %


# Shared budgets
# ------------------------------------------------------------------------------------------------


def test_a_shared_budget_starves_the_uncertain_and_a_floor_feeds_them():
    """SeqTopK compares probabilities across tokens: confident tokens first, and a token with flat
    scores may get nothing.
    """
    logits = torch.zeros(8, 8)
    logits[:4] = torch.tensor([4.0, 3.9, 3.8, 3.7, -9, -9, -9, -9])
    starved = build_router(RouterConfig(kind="seq_topk", num_experts=8, top_k=2), 8).route(
        logits, RouterContext()
    )
    assert starved.ffn_count().tolist() == [4] * 4 + [0] * 4
    fed = build_router(RouterConfig(kind="seq_topk", num_experts=8, top_k=2, min_slots=1), 8).route(
        logits, RouterContext()
    )
    assert fed.ffn_count()[4:].tolist() == [1] * 4


def test_expert_choice_leaves_tokens_without_any_expert():
    torch.manual_seed(0)
    logits = torch.randn(256, EXPERTS)
    logits[:32] += 3 * torch.randn(32, EXPERTS)
    routing = build_router(
        RouterConfig(kind="expert_choice", num_experts=EXPERTS, top_k=1), D
    ).route(logits, RouterContext())
    assert (routing.ffn_count() == 0).sum() > 40
    assert routing.ffn_count().max() > 1


def test_mixture_of_depths_predictor_does_not_know_the_capacity():
    """In evaluation nothing holds the share of tokens that pass: an untrained predictor stops them
    all, a biased one lets all pass.
    """
    router = build_router(
        RouterConfig(kind="mixture_of_depths", num_experts=1, top_k=1, capacity_factor=0.25), D
    ).eval()
    x = torch.randn(100, D) + 1
    assert router(x).ffn_count().sum() == 0
    with torch.no_grad():
        dict(router.named_parameters())["predictor"].fill_(1.0)
    assert router(x).ffn_count().double().mean() > 0.9
