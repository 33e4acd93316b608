"""``Routing``: derived values against counting by hand, and the invariants it refuses to break."""

import math
from collections import Counter

import pytest
import torch
from refusals import refused

from moe_lab.errors import TraceError
from moe_lab.routing import Routing

INDICES = torch.tensor([[0, 3, 5], [5, 4, -1], [1, -1, -1], [2, 0, 4]])


def make(indices=INDICES, num_experts=4, num_zero_experts=2, **extra) -> Routing:
    choices = num_experts + num_zero_experts
    scores = torch.softmax(
        torch.linspace(-1, 2, indices.shape[0] * choices).reshape(-1, choices).sin() * 3, dim=1
    )
    return Routing(
        indices=indices,
        weights=(indices >= 0).float(),
        logits=scores.log(),
        scores=scores,
        num_experts=num_experts,
        num_zero_experts=num_zero_experts,
        **extra,
    )


def test_counts_are_integers_over_all_experts_and_sum_to_the_used_slots():
    counts = make().counts()
    by_hand = Counter(int(i) for i in INDICES.flatten() if i >= 0)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [by_hand[e] for e in range(6)]
    assert counts.sum() == (INDICES >= 0).sum()


def test_the_expert_axis_comes_from_the_configuration_not_from_the_largest_id():
    routing = make(indices=torch.tensor([[0], [1]]), num_experts=7, num_zero_experts=0)
    assert routing.counts().tolist() == [1, 1, 0, 0, 0, 0, 0]


def test_ffn_count_never_includes_a_zero_compute_expert():
    assert make().ffn_count().tolist() == [2, 0, 1, 2]
    assert make().zero_count().tolist() == [1, 2, 0, 1]


def test_padding_is_routed_but_not_counted():
    valid = torch.tensor([True, False, True, False])
    assert make(valid=valid).counts().tolist() == [1, 1, 0, 1, 0, 1]


def test_dropped_slots_are_told_from_unused_ones():
    selected = torch.tensor([[0, 3, 5], [5, 4, 2], [1, 0, -1], [2, 0, 4]])
    dropped = make(selected=selected).dropped()
    assert dropped.tolist() == [
        [False] * 3,
        [False, False, True],
        [False, True, False],
        [False] * 3,
    ]
    assert not make().dropped().any()
    assert make(selected=selected).selected_counts().tolist() == [3, 1, 2, 1, 2, 2]


def test_without_dropping_the_selected_counts_are_the_counts():
    assert torch.equal(make().selected_counts(), make().counts())


def test_entropy_is_that_of_the_normalised_scores_in_nats():
    uniform = make(indices=torch.tensor([[0]]), num_experts=6, num_zero_experts=0)
    doubled = Routing(
        uniform.indices, uniform.weights, torch.zeros(1, 6), torch.full((1, 6), 2.0), 6
    )
    assert doubled.entropy().item() == pytest.approx(math.log(6), rel=1e-6)
    one_hot = Routing(uniform.indices, uniform.weights, torch.zeros(1, 6), torch.eye(6)[:1], 6)
    assert one_hot.entropy().item() == 0


def test_margin_is_the_gap_between_the_kth_score_and_the_next():
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    routing = Routing(torch.tensor([[1, 3]]), torch.ones(1, 2), scores, scores, 4)
    assert routing.margin().item() == pytest.approx(0.10)
    everyone = Routing(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4), scores, scores, 4)
    assert everyone.margin().item() == math.inf


def test_detach_drops_the_graph_and_keeps_every_decision():
    logits = torch.randn(4, 6, requires_grad=True)
    scores = logits.softmax(dim=1)
    routing = Routing(
        INDICES,
        scores.gather(1, INDICES.clamp_min(0)),
        logits,
        scores,
        4,
        2,
        losses={"entropy": scores.sum()},
    )
    detached = routing.detach()
    assert not any(t.requires_grad for t in (detached.weights, detached.logits, detached.scores))
    assert torch.equal(detached.indices, INDICES)
    assert detached.losses == {}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([[0, 6]]), "expected expert ids between -1 and 5, got 0..6"),
        (torch.tensor([[-2, 0]]), "expected expert ids between -1 and 5, got -2..0"),
        (
            torch.tensor([[3, 1], [4, 4]]),
            "expected each token to name an expert at most once, got a repeated id",
        ),
    ],
)
def test_check_says_what_is_wrong(indices, message):
    with pytest.raises(TraceError) as caught:
        make(indices=indices).check()
    assert str(caught.value) == message


def test_check_refuses_weights_that_are_not_finite():
    routing = make()
    routing.weights[0, 0] = math.nan
    with refused("weights", TraceError):
        routing.check()


def test_check_accepts_good_decisions_and_an_empty_batch():
    assert make().check() is not None
    make(indices=torch.empty(0, 3, dtype=torch.int64)).check()
    assert make(indices=torch.empty(0, 3, dtype=torch.int64)).counts().tolist() == [0] * 6
