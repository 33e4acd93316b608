"""Monitors: the gradient ratio on a case worked by hand, cosine of rows, MaxVio per batch and
global.
"""

import pytest
import torch
from refusals import refused

from moe_lab.routing import RouterConfig, build_router, losses, monitors


def test_the_gradient_ratio_is_taken_on_the_mean_probability_vector():
    """For a balance loss linear in P with slope a f, dL/dP is a f whatever the tokens are; a
    language loss sum_t c.s_t has slope T c.
    """
    router = build_router(RouterConfig(kind="sigmoid_topk", num_experts=3, top_k=1), 4)
    routing = router(torch.randn(10, 4))
    f, c = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 0.3, 0.4])
    balance = 0.5 * (f * routing.scores.mean(dim=0)).sum()
    language = (routing.scores * c).sum()
    ratio = monitors.gradient_ratio(balance, language, routing)
    assert ratio.item() == pytest.approx(0.5 * 3 / (10 * 0.5), rel=1e-5)
    language.backward()  # the graph is still there


def test_the_gradient_ratio_doubles_with_the_coefficient():
    torch.manual_seed(0)
    router = build_router(RouterConfig(num_experts=6, top_k=2), 4)
    routing = router(torch.randn(20, 4))
    language = (routing.weights * torch.randn(20, 2)).sum()
    ratios = [
        monitors.gradient_ratio(a * losses.load_balancing_loss(routing), language, routing)
        for a in (0.01, 0.02)
    ]
    assert (ratios[1] / ratios[0]).item() == pytest.approx(2.0, rel=1e-5)


def test_losses_that_do_not_touch_the_router_have_no_ratio():
    routing = build_router(RouterConfig(num_experts=4, top_k=1), 4)(torch.randn(5, 4))
    unrelated = torch.ones((), requires_grad=True) * 2
    assert monitors.gradient_ratio(unrelated, routing.weights.sum(), routing) == 0
    assert monitors.gradient_ratio(torch.zeros(()), routing.weights.sum(), routing) == 0
    assert monitors.gradient_ratio(
        losses.z_loss(routing) + routing.scores.square().sum(), unrelated, routing
    ) == float("inf")
    with refused("routing"):
        monitors.gradient_ratio(unrelated, unrelated, routing.detach())


def test_row_cosine_is_zero_for_orthogonal_and_one_for_parallel_rows():
    assert monitors.row_cosine(torch.eye(4, 6)).item() == pytest.approx(0.0)
    assert monitors.row_cosine(
        torch.arange(1.0, 4).unsqueeze(1) * torch.ones(3, 5)
    ).item() == pytest.approx(1.0)
    weight = torch.randn(5, 3)
    pairs = [
        torch.cosine_similarity(weight[i], weight[j], dim=0)
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert monitors.row_cosine(weight).item() == pytest.approx(
        torch.stack(pairs).mean().item(), abs=1e-6
    )
    assert monitors.row_cosine(torch.randn(1, 3)) == 0


def test_global_violation_averages_out_what_batches_violate_in_turn():
    batches = [torch.tensor([8, 0, 0, 0]).roll(i) for i in range(4)]
    assert [monitors.max_violation(batch).item() for batch in batches] == [3.0] * 4
    assert monitors.max_violation(torch.stack(batches).sum(dim=0)).item() == 0.0


def test_a_dead_expert_stays_in_the_mean():
    assert monitors.max_violation(torch.tensor([6, 6, 0])).item() == pytest.approx(0.5)
    assert monitors.max_violation(torch.zeros(3)).isnan()  # nothing was counted
