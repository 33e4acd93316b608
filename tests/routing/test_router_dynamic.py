"""Routers whose count per token is free: each selection against its rule in plain Python, each
budget against arithmetic.
"""

import math

import numpy as np
import pytest
import torch

from moe_lab.errors import ConfigError
from moe_lab.routing import (
    UNUSED,
    ControllerConfig,
    ControllerKind,
    RouterConfig,
    RouterContext,
    build_router,
    losses,
)

D = 12


def of_logits(
    config: RouterConfig,
    logits: torch.Tensor,
    context: RouterContext | None = None,
    training: bool = False,
):
    router = build_router(config, logits.shape[1]).to(logits.dtype).train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(logits.shape[1])[: router.weight.shape[0]])
    return router(logits, context).check()


def sets(routing) -> list[set[int]]:
    return [{i for i in row if i != UNUSED} for row in routing.indices.tolist()]


def smallest_set_by_hand(p: np.ndarray, mass: float, most: int) -> set[int]:
    chosen: set[int] = set()
    for expert in np.argsort(-p)[:most]:
        if sum(p[e] for e in chosen) >= mass:
            break
        chosen.add(int(expert))
    return chosen


@pytest.mark.parametrize(
    ("kind", "field", "mass"),
    [("top_p", "top_p", 0.4), ("top_p", "top_p", 0.95), ("xmoe", "threshold", 0.9)],
)
def test_experts_are_taken_until_their_probability_reaches_the_mass(kind, field, mass):
    logits = torch.randn(80, 10) * 2
    routing = of_logits(RouterConfig(kind=kind, num_experts=10, top_k=7, **{field: mass}), logits)
    p = logits.double().softmax(dim=1).numpy()
    assert sets(routing) == [smallest_set_by_hand(row, mass, 7) for row in p]
    assert len(set(routing.ffn_count().tolist())) > 1
    mass_by_hand = torch.tensor(
        [row[list(chosen)].sum() for row, chosen in zip(p, sets(routing), strict=True)]
    )
    torch.testing.assert_close(routing.weights.sum(dim=1), mass_by_hand.float())


def test_the_expert_that_crosses_the_mass_is_included():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert sets(
        of_logits(RouterConfig(kind="top_p", num_experts=4, top_k=4, top_p=0.6), logits)
    ) == [{0, 1}]
    assert sets(
        of_logits(RouterConfig(kind="top_p", num_experts=4, top_k=4, top_p=0.4), logits)
    ) == [{0}]


def test_top_p_of_one_takes_every_slot_and_a_tiny_one_takes_one():
    logits = torch.randn(20, 6)
    assert (
        of_logits(RouterConfig(kind="top_p", num_experts=6, top_k=6, top_p=1.0), logits)
        .ffn_count()
        .tolist()
        == [6] * 20
    )
    assert (
        of_logits(RouterConfig(kind="top_p", num_experts=6, top_k=6, top_p=1e-9), logits)
        .ffn_count()
        .tolist()
        == [1] * 20
    )


def test_top_p_carries_its_entropy_loss():
    routing = of_logits(RouterConfig(kind="top_p", num_experts=6, top_k=6), torch.zeros(5, 6))
    assert routing.losses["entropy"].item() == pytest.approx(math.log(6), rel=1e-6)


def test_dtop_p_is_blind_to_the_size_of_the_logits():
    router = build_router(RouterConfig(kind="dtop_p", num_experts=16, top_k=4), D)
    x = torch.randn(40, D)
    with torch.no_grad():
        one = router(x)
        router.weight.mul_(7)
        seven = router(x)
    assert torch.equal(one.ffn_count(), seven.ffn_count())


def test_expert_threshold_before_its_first_update_is_expert_choice():
    torch.manual_seed(0)
    logits = torch.randn(64, 8)
    routing = of_logits(RouterConfig(kind="expert_threshold", num_experts=8, top_k=2), logits)
    assert routing.counts().tolist() == [64 * 2 // 8] * 8
    for expert in range(8):
        taken = {t for t, chosen in enumerate(sets(routing)) if expert in chosen}
        assert taken == set(logits[:, expert].topk(16).indices.tolist())


def test_expert_threshold_then_keeps_its_cutoffs():
    torch.manual_seed(1)
    router = build_router(RouterConfig(kind="expert_threshold", num_experts=8, top_k=2), D)
    first = router(torch.randn(400, D))
    router.update([first])
    cutoffs = first.logits.detach().sort(dim=0, descending=True).values[400 * 2 // 8 - 1]
    assert router.controller is not None
    torch.testing.assert_close(router.controller.bias, -cutoffs)
    later = router(torch.randn(7, D))
    assert sets(later) == [
        {e for e in range(8) if row[e] > cutoffs[e]} for row in later.logits.detach()
    ]
    torch.testing.assert_close(later.scores, later.logits.sigmoid())


def test_one_token_does_not_change_anothers_experts_after_the_first_update():
    """Causality: what expert choice lacks."""
    router = build_router(RouterConfig(kind="expert_threshold", num_experts=8, top_k=2), D)
    router.update([router(torch.randn(100, D))])
    x = torch.randn(30, D)
    assert sets(router(x))[:10] == sets(router(x[:10]))


def test_quantile_threshold_cuts_at_the_first_token_left_out():
    router = build_router(RouterConfig(kind="quantile_threshold", num_experts=4, top_k=1), D)
    first = router(torch.randn(40, D))
    router.update([first])
    assert router.controller is not None
    torch.testing.assert_close(
        router.controller.bias, -first.logits.detach().sort(dim=0, descending=True).values[10]
    )


def test_min_slots_is_a_floor_and_max_slots_a_ceiling():
    logits = torch.full((6, 5), -3.0)
    logits[3:] = 3.0
    fixed = ControllerConfig(kind=ControllerKind.FIXED)
    config = RouterConfig(
        kind="expert_threshold", num_experts=5, top_k=2, controller=fixed, min_slots=1, max_slots=3
    )
    assert of_logits(config, logits).ffn_count().tolist() == [1, 1, 1, 3, 3, 3]
    assert of_logits(config.replace(min_slots=None), logits).ffn_count().tolist() == [
        0,
        0,
        0,
        3,
        3,
        3,
    ]
    assert config.num_slots == 3


def test_remoe_runs_the_experts_whose_gate_is_positive():
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    routing = of_logits(RouterConfig(kind="remoe", num_experts=4, top_k=2), logits)
    assert sets(routing) == [{0, 2}, set()]
    assert routing.weights.tolist() == [[2.0, 1.0, 0.0, 0.0], [0.0] * 4]


def test_remoes_l1_loss_is_equation_eight():
    torch.manual_seed(2)
    logits = torch.randn(50, 6)
    start = ControllerConfig(kind=ControllerKind.RELU_LAMBDA, initial=0.5)
    routing = of_logits(
        RouterConfig(kind="remoe", num_experts=6, top_k=2, controller=start), logits
    )
    gates = logits.clamp_min(0).double()
    by_hand = (
        sum(int((logits[:, i] > 0).sum()) * gates[:, i].sum() for i in range(6)) * 6 / (50**2 * 2)
    )
    assert routing.losses["l1"].item() == pytest.approx(0.5 * float(by_hand), rel=1e-5)


def test_dynmoe_averages_the_experts_that_want_the_token():
    torch.manual_seed(3)
    router = build_router(RouterConfig(kind="dynmoe", num_experts=6, top_k=6), D)
    x = torch.randn(60, D)
    routing = router(x)
    cosine = torch.nn.functional.cosine_similarity(
        x.unsqueeze(1), router.weight.unsqueeze(0), dim=2
    )
    # G = 0: the threshold is one half, i.e. cosine zero.
    assert sets(routing) == [set((row > 0).nonzero().flatten().tolist()) for row in cosine]
    count = routing.ffn_count().clamp_min(1)
    torch.testing.assert_close(routing.weights.sum(dim=1), (routing.ffn_count() / count).float())


def test_dynmoe_leaves_a_token_alone_in_training_and_not_in_evaluation():
    router = build_router(RouterConfig(kind="dynmoe", num_experts=3, top_k=3), 4)
    with torch.no_grad():
        router.thresholds.fill_(9.0)  # type: ignore[union-attr, operator]
    x = torch.randn(5, 4)
    assert router(x).ffn_count().tolist() == [0] * 5
    router.eval()
    routing = router(x)
    assert routing.ffn_count().tolist() == [1] * 5
    assert torch.equal(routing.indices[:, 0], routing.scores.argmax(dim=1))


def test_dynmoes_thresholds_learn_through_the_step():
    router = build_router(RouterConfig(kind="dynmoe", num_experts=4, top_k=4), D)
    router(torch.randn(30, D)).weights.sum().backward()
    thresholds = dict(router.named_parameters())["thresholds"]
    assert thresholds.grad is not None
    assert (thresholds.grad < 0).any()


def test_d2dmoe_runs_experts_near_the_largest_predicted_norm():
    logits = torch.tensor([[4.0, -3.0, 1.9, 2.0], [-0.1, 0.0, 0.02, 0.06]])
    routing = of_logits(RouterConfig(kind="d2dmoe", num_experts=4, top_k=4, threshold=0.5), logits)
    assert sets(routing) == [{0, 1, 3}, {0, 3}]
    assert routing.weights.tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert losses.norm_regression_loss(routing, logits.abs() + 2.0).item() == pytest.approx(4.0)


@pytest.mark.parametrize(("length", "top_k"), [(8, 2), (24, 1), (4, 3)])
def test_seq_topk_spends_exactly_the_budget_of_each_sequence(length, top_k):
    torch.manual_seed(4)
    logits = torch.randn(24, 6)
    routing = of_logits(
        RouterConfig(kind="seq_topk", num_experts=6, top_k=top_k),
        logits,
        RouterContext(sequence_length=length),
    )
    scores = logits.softmax(dim=1)
    for start in range(0, 24, length):
        pairs = sorted(
            ((float(scores[t, e]), t, e) for t in range(start, start + length) for e in range(6)),
            reverse=True,
        )
        best = {(t, e) for _, t, e in pairs[: length * top_k]}
        assert {(t, e) for t in range(start, start + length) for e in sets(routing)[t]} == best
    assert routing.ffn_count().double().std() > 0


def test_padding_brings_seq_topk_no_budget():
    torch.manual_seed(5)
    x = torch.randn(12, D)
    valid = torch.tensor([True] * 5 + [False] + [True] * 6)
    router = build_router(RouterConfig(kind="seq_topk", num_experts=6, top_k=2), D)
    routing = router(x, RouterContext(sequence_length=6, valid=valid))
    assert routing.counts().sum() == 11 * 2
    assert routing.ffn_count()[5] == 0


@pytest.mark.parametrize(("share", "passing"), [(0.125, 1), (0.5, 4), (1.0, 8)])
def test_mixture_of_depths_lets_a_share_of_each_sequence_pass(share, passing):
    router = build_router(
        RouterConfig(kind="mixture_of_depths", num_experts=1, top_k=1, capacity_factor=share), D
    )
    x = torch.randn(24, D)
    routing = router(x, RouterContext(sequence_length=8))
    assert routing.ffn_count().view(3, 8).sum(dim=1).tolist() == [passing] * 3
    for start in (0, 8, 16):
        best = routing.logits[start : start + 8, 0].topk(passing).indices.tolist()
        assert {t for t in range(8) if routing.indices[start + t, 0] == 0} == set(best)
    kept = routing.indices[:, 0] == 0
    torch.testing.assert_close(routing.weights[kept], routing.logits[kept])


def test_mixture_of_depths_learns_to_predict_and_then_decides_causally():
    torch.manual_seed(6)
    router = build_router(
        RouterConfig(kind="mixture_of_depths", num_experts=1, top_k=1, capacity_factor=0.5), D
    )
    optimiser = torch.optim.Adam([dict(router.named_parameters())["predictor"]], lr=0.1)
    for _ in range(60):
        loss = router(torch.randn(512, D)).losses["predictor"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = torch.randn(400, D)
    best = router(x).indices[:, 0]
    router.eval()
    predicted = router(x).indices[:, 0]
    assert (best == predicted).double().mean() > 0.9
    assert torch.equal(router(x[:3]).indices[:, 0], predicted[:3])


def test_the_predictors_loss_does_not_move_the_model():
    router = build_router(RouterConfig(kind="mixture_of_depths", num_experts=1, top_k=1), D)
    x = torch.randn(16, D, requires_grad=True)
    router(x).losses["predictor"].backward()
    assert x.grad is None
    assert router.weight.grad is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "top_p", "top_p": 0.0}, "top_p"),
        ({"kind": "top_p", "top_p": 1.5}, "top_p"),
        ({"kind": "xmoe", "threshold": -0.1}, "threshold"),
        ({"kind": "d2dmoe", "threshold": 2.0}, "threshold"),
        ({"kind": "remoe", "max_slots": 99}, "max_slots"),
        (
            {"kind": "expert_threshold", "min_slots": 4, "max_slots": 2},
            "max_slots",
        ),
        (
            {"kind": "mixture_of_depths"},
            "num_experts",
        ),
        (
            {"kind": "dtop_p", "controller": ControllerConfig()},
            "controller",
        ),
    ],
)
def test_bad_budgets_are_refused_in_one_line(fields, field):
    with pytest.raises(ConfigError) as caught:
        RouterConfig(num_experts=8, top_k=2, **fields)
    assert caught.value.field == field
