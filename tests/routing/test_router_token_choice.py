"""Token choice beyond softmax top-k: groups, capacity, noise, SparseMixer, and the fields that each
kind refuses.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.errors import ConfigError
from moe_lab.routing import (
    FACTS,
    ROUTERS,
    CapacityScope,
    ControllerConfig,
    GroupFill,
    RouterConfig,
    RouterContext,
    SecondPolicy,
    build_router,
    losses,
)
from moe_lab.routing.select import within_capacity

D = 12


def route(
    config: RouterConfig,
    logits: torch.Tensor,
    context: RouterContext | None = None,
    training: bool = False,
):
    """The routing of given logits: the router's weight is the identity."""
    router = build_router(config, logits.shape[1]).train(training)
    with torch.no_grad():
        router.weight.copy_(torch.eye(router.weight.shape[0], logits.shape[1]))
    return router(logits, context)


def group_limited_by_hand(
    choice: np.ndarray, groups: int, kept: int, top_k: int, best: int
) -> set[int]:
    size = len(choice) // groups
    rank = sorted(
        range(groups), key=lambda g: -np.sort(choice[g * size : (g + 1) * size])[-best:].sum()
    )
    allowed = [e for g in rank[:kept] for e in range(g * size, (g + 1) * size)]
    return set(sorted(allowed, key=lambda e: -choice[e])[:top_k])


@pytest.mark.parametrize(("kind", "best"), [("deepseek_v2", 1), ("deepseek_v3", 2)])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"), [(16, 4, 2, 3), (24, 8, 3, 4), (12, 2, 1, 6)]
)
def test_groups_are_ranked_by_their_best_or_best_two(kind, best, experts, groups, kept, top_k):
    config = RouterConfig(
        kind=kind,
        num_experts=experts,
        top_k=top_k,
        num_groups=groups,
        topk_groups=kept,
        controller=ControllerConfig(),
    )
    router = build_router(config, D)
    assert router.controller is not None
    router.controller.bias.normal_(std=0.1)
    routing = router(torch.randn(60, D))
    choice = (routing.scores + router.controller.bias).detach().double().numpy()
    for t in range(60):
        assert set(routing.indices[t].tolist()) == group_limited_by_hand(
            choice[t], groups, kept, top_k, best
        )


def test_a_zero_filled_group_beats_negative_choices():
    fields: dict[str, Any] = {
        "num_experts": 4,
        "top_k": 2,
        "num_groups": 2,
        "topk_groups": 1,
        "controller": ControllerConfig(),
    }
    logits = torch.tensor([[0.0, 0.1, -1.0, -1.1]])
    for fill, expected in ((GroupFill.EXCLUDE, {0, 1}), (GroupFill.ZERO, {2, 3})):
        router = build_router(RouterConfig(kind="deepseek_v3", group_fill=fill, **fields), 4)
        with torch.no_grad():
            router.weight.copy_(torch.eye(4))
        assert router.controller is not None
        router.controller.bias.fill_(-0.9)
        assert set(router(logits).indices[0].tolist()) == expected


def test_the_softcap_bounds_logits_and_keeps_their_order():
    config = RouterConfig(
        kind="sigmoid_topk", num_experts=6, top_k=2, logit_softcap=2.0, logit_scale=3.0
    )
    logits = torch.randn(20, 6) * 10
    routing = route(config, logits)
    torch.testing.assert_close(routing.logits, 2 * torch.tanh(3 * logits / 2))
    assert routing.logits.abs().max() <= 2
    assert torch.equal(routing.indices, logits.topk(2).indices) or routing.logits.abs().max() == 2


def test_sqrt_softplus_is_deepseek_v4s_score():
    routing = route(
        RouterConfig(kind="sqrt_softplus_topk", num_experts=3, top_k=1),
        torch.tensor([[0.0, 3.0, -2.0]]),
    )
    by_hand = [math.sqrt(math.log1p(math.exp(v))) for v in (0.0, 3.0, -2.0)]
    assert routing.scores[0].tolist() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_p_norm_weights_have_unit_p_norm(p):
    weights = route(
        RouterConfig(kind="pnorm_topk", num_experts=8, top_k=3, norm_p=p), torch.randn(30, 8)
    ).weights
    torch.testing.assert_close(weights.pow(p).sum(dim=1), torch.ones(30))


def test_a_smallest_divisor_keeps_small_probabilities_small():
    logits = torch.zeros(1, 100)
    clamped = route(
        RouterConfig(num_experts=100, top_k=2, norm_topk_prob=True, norm_min=0.5), logits
    )
    assert clamped.weights[0].tolist() == pytest.approx([0.01 / 0.5] * 2)


def test_topk_softmax_weighs_the_selected_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0, -50.0]])
    routing = route(RouterConfig(kind="topk_softmax", num_experts=4, top_k=2), logits)
    assert routing.weights[0].tolist() == pytest.approx(
        [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
    )
    torch.testing.assert_close(routing.scores.sum(dim=1), torch.ones(1))


def test_llama4_multiplies_the_input_of_its_expert():
    routing = route(
        RouterConfig(kind="llama4", num_experts=4, top_k=1), torch.tensor([[0.3, 2.0, -1.0, 0.0]])
    )
    assert routing.weights_on_input
    assert routing.weights.item() == pytest.approx(1 / (1 + math.exp(-2)))


def queue_by_hand(indices, capacity, length, priority=None):
    """First choices of all tokens before second ones, tokens in order (of priority)."""
    tokens, slots = indices.shape
    fits = np.zeros((tokens, slots), dtype=bool)
    for start in range(0, tokens, length):
        free = list(capacity)
        order = list(range(start, start + length))
        if priority is not None:
            order.sort(key=lambda t: -priority[t])
        for k in range(slots):
            for t in order:
                if indices[t, k] >= 0 and free[indices[t, k]] > 0:
                    free[indices[t, k]] -= 1
                    fits[t, k] = True
    return fits


@pytest.mark.parametrize("seed", range(8))
def test_capacity_queues_first_choices_before_second_ones(seed):
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(5)[:3] for _ in range(24)])
    indices[rng.random(indices.shape) < 0.15] = -1
    capacity = rng.integers(0, 6, size=5)
    length = int(rng.choice([6, 12, 24]))
    priority = rng.random(24) if seed % 2 else None
    fits = within_capacity(
        torch.from_numpy(indices),
        torch.from_numpy(capacity),
        sequence_length=length,
        priority_T=None if priority is None else torch.from_numpy(priority),
    )
    np.testing.assert_array_equal(fits.numpy(), queue_by_hand(indices, capacity, length, priority))


def test_padding_takes_no_place_in_an_experts_queue():
    indices, valid = (
        torch.zeros(5, 1, dtype=torch.int64),
        torch.tensor([False, True, False, True, True]),
    )
    fits = within_capacity(indices, torch.tensor([2]), sequence_length=5, valid=valid)
    assert fits[:, 0].tolist() == [True, True, True, True, False]


def test_switch_drops_beyond_capacity_and_remembers_what_was_selected():
    logits = torch.zeros(8, 4)
    logits[:, 2] = 5.0
    routing = route(
        RouterConfig(kind="switch", num_experts=4, top_k=1, capacity_factor=1.0), logits
    )
    assert routing.indices[:, 0].tolist() == [2, 2] + [-1] * 6
    assert routing.selected is not None
    assert routing.selected[:, 0].tolist() == [2] * 8
    assert routing.dropped().sum() == 6
    assert routing.counts().sum() == 2
    assert (routing.weights[2:] == 0).all()


def test_the_balance_loss_sees_the_demand_that_capacity_hides():
    logits = torch.zeros(8, 4)
    logits[:, 2] = 5.0
    dropped = route(RouterConfig(kind="switch", num_experts=4, top_k=1, expert_capacity=1), logits)
    whole = route(RouterConfig(kind="switch", num_experts=4, top_k=1, expert_capacity=8), logits)
    assert losses.load_balancing_loss(dropped) == losses.load_balancing_loss(whole)


def test_capacity_per_sequence_starts_anew_in_each():
    logits = torch.zeros(8, 4)
    logits[:, 1] = 3.0
    config = RouterConfig(
        kind="switch",
        num_experts=4,
        top_k=1,
        expert_capacity=1,
        capacity_scope=CapacityScope.SEQUENCE,
    )
    assert (
        route(config, logits, RouterContext(sequence_length=4)).indices[:, 0] == 1
    ).nonzero().flatten().tolist() == [0, 4]
    with refused("sequence_length"):
        route(config, logits, RouterContext(sequence_length=3))


def test_batch_prioritised_capacity_keeps_the_confident():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    config = RouterConfig(
        kind="switch", num_experts=2, top_k=1, expert_capacity=1, batch_prioritized=True
    )
    assert route(config, logits).indices[:, 0].tolist() == [-1, 0, -1]


@pytest.mark.parametrize("before", [False, True])
def test_gshard_gives_a_dropped_first_choices_weight_to_the_second_only_after_dropping(before):
    logits = torch.tensor([[2.0, 1.0, -9.0], [2.0, 1.0, -9.0]])
    config = RouterConfig(
        kind="gshard_top2", num_experts=3, top_k=2, expert_capacity=1, norm_before_drop=before
    )
    routing = route(config, logits, training=True)
    # Both first choices are expert 0 and it has one place; expert 1 then has one place for two
    # second choices.
    assert routing.indices.tolist() == [[0, 1], [-1, -1]]
    ratio = 1 / (1 + math.exp(-1))
    assert routing.weights[0].tolist() == pytest.approx([ratio, 1 - ratio], rel=1e-5)
    alone = route(config.replace(expert_capacity=2), torch.cat([logits, logits[:1]]), training=True)
    assert alone.indices[2].tolist() == [-1, -1]


def test_gshard_drops_nothing_in_evaluation_at_a_fraction_of_one():
    config = RouterConfig(
        kind="gshard_top2", num_experts=3, top_k=2, expert_capacity=1, eval_capacity_fraction=1.0
    )
    assert not route(config, torch.randn(20, 3)).dropped().any()
    assert route(config, torch.randn(20, 3), training=True).dropped().any()


def test_gshards_random_policy_keeps_the_second_expert_with_probability_twice_its_gate():
    torch.manual_seed(0)
    config = RouterConfig(
        kind="gshard_top2",
        num_experts=4,
        top_k=2,
        expert_capacity=9999,
        second_expert_policy=SecondPolicy.RANDOM,
    )
    logits = torch.tensor([[2.0, 0.0, -1.0, -1.0]]).repeat(4000, 1)
    routing = route(config, logits, training=True)
    chance = 2 * torch.softmax(logits[0], dim=0)[1].item()
    assert (routing.indices[:, 1] >= 0).double().mean().item() == pytest.approx(
        chance, abs=4 * math.sqrt(chance * (1 - chance) / 4000)
    )
    assert not routing.dropped().any()
    assert (route(config, logits).indices[:, 1] == 1).all()


def test_noise_decides_in_training_only():
    torch.manual_seed(1)
    router = build_router(RouterConfig(kind="noisy_topk", num_experts=8, top_k=2), D)
    x = torch.randn(50, D)
    assert not torch.equal(router(x).indices, router(x).indices)
    router.eval()
    quiet = router(x)
    assert torch.equal(quiet.indices, quiet.logits.topk(2).indices)
    assert quiet.losses == {}


def test_the_smooth_load_is_the_chance_of_selection_under_fresh_noise():
    """Equation 8 of arXiv 1701.06538 against redrawing the noise of one expert 20,000 times."""
    torch.manual_seed(2)
    clean = torch.randn(1, 6, dtype=torch.float64)
    std = torch.rand(1, 6, dtype=torch.float64) + 0.5
    noisy = clean + torch.randn(1, 6, dtype=torch.float64) * std
    chance = losses.smooth_load(clean, noisy, std, top_k=2)
    for expert in range(6):
        redrawn = noisy.repeat(20_000, 1)
        redrawn[:, expert] = (
            clean[0, expert] + torch.randn(20_000, dtype=torch.float64) * std[0, expert]
        )
        selected = (redrawn.topk(2, dim=1).indices == expert).any(dim=1).double().mean().item()
        assert chance[expert].item() == pytest.approx(selected, abs=0.015)


def test_noisy_topk_carries_the_papers_two_losses():
    router = build_router(RouterConfig(kind="noisy_topk", num_experts=8, top_k=2), D)
    routing = router(torch.randn(64, D))
    assert set(routing.losses) == {"importance", "load"}
    by_hand = np.zeros(8)
    for experts, weights in zip(routing.indices.tolist(), routing.weights.tolist(), strict=True):
        for expert, weight in zip(experts, weights, strict=True):
            by_hand[expert] += weight
    assert routing.losses["importance"].item() == pytest.approx(
        (by_hand.std() / by_hand.mean()) ** 2, rel=1e-4
    )


def test_sparsemixer_samples_among_the_close_and_never_the_far():
    torch.manual_seed(3)
    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0]]).repeat(3000, 1)
    routing = route(
        RouterConfig(kind="sparsemixer", num_experts=4, top_k=1, sparsemixer_eps=0.05),
        logits,
        training=True,
    )
    share = torch.bincount(routing.indices[:, 0], minlength=4) / 3000
    chance = 1 / (1 + math.exp(0.1))
    assert share[1].item() == pytest.approx(chance, abs=0.03)
    assert share[2:].sum() == 0
    # Heun: a pick that is not the maximum is weighed by a third three times out of four.
    gates = torch.softmax(torch.tensor([2.0, 1.9]), dim=0)
    second = routing.weights[routing.indices[:, 0] == 1]
    third = (second - gates[1] * 0.3333).abs() < 1e-6
    assert third.double().mean().item() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(second[~third], gates[1].expand_as(second[~third]))


def test_sparsemixers_gradient_is_that_of_the_softmax_without_heuns_scale():
    torch.manual_seed(4)
    logits = torch.tensor([[2.0, 1.9, 1.85]], requires_grad=True)
    config = RouterConfig(kind="sparsemixer", num_experts=3, top_k=1, sparsemixer_eps=0.2)
    router = build_router(config, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing = router(logits)
    routing.weights.sum().backward()
    gates = torch.softmax(logits.detach(), dim=1)[0]
    chosen = int(routing.indices)
    by_hand = gates[chosen] * (torch.eye(3)[chosen] - gates)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], by_hand)


def test_input_jitter_disturbs_training_only():
    router = build_router(RouterConfig(kind="switch", num_experts=4, top_k=1, jitter_eps=0.2), D)
    x = torch.randn(10, D)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, router(x).logits)


UNREAD = {
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.0,
    "controller": ControllerConfig(),
    "num_groups": 2,
    "logit_softcap": 5.0,
    "norm_p": 2.0,
    "capacity_factor": 0.5,
    "top_p": 0.3,
    "threshold": 0.3,
    "min_slots": 1,
    "max_slots": 2,
    "num_zero_experts": 2,
    "d_router": 8,
    "jitter_eps": 0.1,
    "router_bias": True,
    "vocab_size": 10,
}


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_no_kind_ignores_a_field(kind):
    """Setting a field that the kind does not read is an error that names the field, the kind, and
    who reads it.
    """
    read = FACTS[kind].options
    for field, value in UNREAD.items():
        if field in read:
            continue
        changes: dict[str, Any] = {field: value} | (
            {"topk_groups": 1} if field == "num_groups" else {}
        )
        with pytest.raises(
            ConfigError,
            match=f"expected {field} left unset for kind '{kind}', got ",
        ):
            RouterConfig(kind=kind, num_experts=4, top_k=1, **changes)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_option_of_a_kind_is_a_field_of_the_configuration(kind):
    assert set(FACTS[kind].options) <= set(RouterConfig.__dataclass_fields__)
