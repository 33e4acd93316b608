"""Routers that assign: expert choice, Sinkhorn, BASE, hashing, quantile balancing, random, and the
token-id null model.
"""

import itertools

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.routing import UNUSED, HashTable, RouterConfig, RouterContext, build_router
from moe_lab.routing.routers.base import balanced_assignment
from moe_lab.routing.routers.hash import balanced_table
from moe_lab.routing.routers.sinkhorn import balanced

D = 10


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(32, 8, 2), (30, 4, 1), (16, 4, 4), (3, 8, 2)]
)
def test_expert_choice_gives_every_expert_its_best_tokens(tokens, experts, top_k):
    router = build_router(RouterConfig(kind="expert_choice", num_experts=experts, top_k=top_k), D)
    routing = router(torch.randn(tokens, D)).check()
    each = max(tokens * top_k // experts, 1)
    assert routing.counts().tolist() == [each] * experts
    for expert in range(experts):
        taken = {t for t in range(tokens) if expert in routing.indices[t].tolist()}
        assert taken == set(routing.scores[:, expert].topk(each).indices.tolist())


def test_no_expert_chooses_padding():
    router = build_router(RouterConfig(kind="expert_choice", num_experts=4, top_k=2), D)
    x, valid = torch.randn(24, D), torch.arange(24) % 3 > 0
    routing = router(x, RouterContext(valid=valid))
    assert routing.ffn_count()[~valid].sum() == 0
    assert torch.equal(routing.indices[valid], router(x[valid]).indices)


def test_sinkhorn_makes_rows_and_columns_even():
    plan = balanced(torch.randn(60, 6, dtype=torch.float64) * 3)
    torch.testing.assert_close(
        plan.sum(dim=0), torch.full((6,), 1 / 6, dtype=torch.float64), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        plan.sum(dim=1), torch.full((60,), 1 / 60, dtype=torch.float64), atol=1e-3, rtol=1e-2
    )


def test_sinkhorn_balances_training_and_not_evaluation():
    torch.manual_seed(0)
    router = build_router(
        RouterConfig(kind="sinkhorn", num_experts=6, top_k=1, router_bias=True), D
    )
    with torch.no_grad():
        router.bias.copy_(torch.tensor([4.0, 2.0, 0.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr]
    x = torch.randn(600, D)
    trained = router(x)
    router.eval()
    evaluated = router(x)
    assert evaluated.counts().max() > 500
    assert trained.counts().max() < 150
    assert torch.equal(evaluated.indices[:, 0], evaluated.logits.argmax(dim=1))
    torch.testing.assert_close(trained.weights, trained.logits.sigmoid().gather(1, trained.indices))
    router.eval()
    two = build_router(RouterConfig(kind="sinkhorn", num_experts=6, top_k=2), D)(x)
    torch.testing.assert_close(two.weights, two.logits.softmax(dim=1).gather(1, two.indices))


def test_sinkhorn_survives_logits_whose_exponential_overflows():
    assert torch.isfinite(balanced(torch.tensor([[1000.0, 0.0], [999.0, 998.0]]))).all()


@pytest.mark.parametrize(("tokens", "experts"), [(6, 3), (6, 2), (5, 2), (4, 4)])
def test_base_finds_the_best_balanced_assignment(tokens, experts):
    torch.manual_seed(tokens)
    scores = torch.randn(tokens, experts)
    most = -(-tokens // experts)
    feasible = (
        a
        for a in itertools.product(range(experts), repeat=tokens)
        if max(np.bincount(a, minlength=experts)) <= most
    )
    best = max(feasible, key=lambda a: float(sum(scores[t, e] for t, e in enumerate(a))))
    assert balanced_assignment(scores).tolist() == list(best)


def test_base_balances_training_and_takes_the_argmax_in_evaluation():
    torch.manual_seed(1)
    router = build_router(RouterConfig(kind="base", num_experts=4, top_k=1), D)
    gram = router.weight @ router.weight.t()
    torch.testing.assert_close(gram, 0.01 * torch.eye(4), atol=1e-6, rtol=0)
    x = torch.randn(64, D) + 2
    routing = router(x)
    assert routing.counts().tolist() == [16] * 4
    torch.testing.assert_close(routing.weights, routing.logits.sigmoid().gather(1, routing.indices))
    valid = torch.arange(64) < 40
    assert router(x, RouterContext(valid=valid)).counts().tolist() == [10] * 4
    router.eval()
    assert torch.equal(router(x).indices[:, 0], routing.logits.argmax(dim=1))


@pytest.mark.parametrize("table", list(HashTable))
def test_a_hash_router_reads_nothing_but_the_token_id(table):
    router = build_router(
        RouterConfig(kind="hash", num_experts=8, top_k=2, vocab_size=50, hash_table=table), D
    )
    ids = torch.randint(50, (40,))
    one = router(torch.randn(40, D), RouterContext(token_ids=ids)).check()
    two = router(torch.randn(40, D), RouterContext(token_ids=ids))
    assert torch.equal(one.indices, two.indices)
    assert (one.weights == 0.5).all()
    assert list(router.parameters()) == []
    assert "table" in router.state_dict()


def test_hash_tables_follow_their_seed():
    config = RouterConfig(kind="hash", num_experts=8, top_k=2, vocab_size=50)
    same, other = build_router(config, D), build_router(config.replace(hash_seed=1), D)
    assert torch.equal(build_router(config, D).state_dict()["table"], same.state_dict()["table"])
    assert not torch.equal(same.state_dict()["table"], other.state_dict()["table"])


def test_a_balanced_table_evens_out_zipfs_law():
    frequencies = 1 / torch.arange(1, 1001, dtype=torch.float64)
    table = balanced_table(frequencies, num_experts=8, top_k=2)
    assert all(len(set(row)) == 2 for row in table.tolist())
    load = torch.zeros(8, dtype=torch.float64).index_add_(
        0, table.flatten(), frequencies.repeat_interleave(2)
    )
    random_load = torch.zeros(8, dtype=torch.float64).index_add_(
        0, torch.randint(8, (2000,)), frequencies.repeat_interleave(2)
    )
    assert load.max() / load.mean() < 1.01
    assert random_load.max() / random_load.mean() > 1.05


def test_a_hash_router_can_be_balanced_for_the_corpus_it_will_see():
    router = build_router(
        RouterConfig(
            kind="hash", num_experts=2, top_k=1, vocab_size=3, hash_table=HashTable.BALANCED
        ),
        D,
    )
    router.balance(torch.tensor([10.0, 6.0, 4.0]))  # type: ignore[operator]
    assert router.state_dict()["table"].flatten().tolist() == [0, 1, 1]
    with refused("frequencies"):
        router.balance(torch.ones(2))  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["hash", "scored_hash", "token_lookup"])
def test_routers_of_token_ids_ask_for_them(kind):
    router = build_router(RouterConfig(kind=kind, num_experts=4, top_k=1, vocab_size=9), D)
    with refused("token_ids"):
        router(torch.randn(5, D))
    with refused("vocab_size"):
        RouterConfig(kind=kind, num_experts=4, top_k=1)


def test_scored_hash_weighs_with_the_learned_router():
    config = RouterConfig(
        kind="scored_hash",
        num_experts=8,
        top_k=3,
        vocab_size=20,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    )
    router = build_router(config, D)
    routing = router(torch.randn(30, D), RouterContext(token_ids=torch.randint(20, (30,)))).check()
    torch.testing.assert_close(routing.weights.sum(dim=1), torch.full((30,), 1.5))
    routing.weights[:, 0].sum().backward()
    assert router.weight.grad is not None


def test_quantile_balancing_evens_out_the_next_batch_in_few_steps():
    torch.manual_seed(2)
    router = build_router(
        RouterConfig(kind="quantile_balanced", num_experts=8, top_k=2, router_bias=True), D
    )
    with torch.no_grad():
        router.bias.copy_(torch.linspace(-2, 2, 8))  # type: ignore[union-attr]
    before = router(torch.randn(4000, D)).counts()
    for _ in range(4):
        router.update([router(torch.randn(4000, D))])
    after = router(torch.randn(4000, D)).counts()
    assert before.max() / 1000 > 1.8
    assert after.max() / 1000 < 1.1


def test_random_routing_is_even_and_new_every_time():
    torch.manual_seed(3)
    router = build_router(
        RouterConfig(kind="random", num_experts=8, top_k=2, num_zero_experts=2), D
    )
    x = torch.randn(5000, D)
    routing = router(x).check()
    assert not torch.equal(routing.indices, router(x).indices)
    share = routing.counts() / 10_000
    assert (share - 0.1).abs().max() < 0.015
    assert (routing.weights == 0.5).all()


def test_the_token_lookup_repeats_the_mean_decision_for_each_id():
    teacher = build_router(RouterConfig(kind="top_p", num_experts=6, top_k=6, top_p=0.5), D)
    table = build_router(RouterConfig(kind="token_lookup", num_experts=6, top_k=6, vocab_size=5), D)
    ids = torch.tensor([0, 0, 0, 1, 1, 3])
    x = torch.randn(6, D) * 2
    routing = teacher(x).detach()
    table.fit(ids, routing)  # type: ignore[operator]
    student = table(x, RouterContext(token_ids=ids)).check()
    count = routing.ffn_count().double()
    for token in (0, 1, 3):
        mask = ids == token
        assert student.ffn_count()[mask].unique().tolist() == [round(count[mask].mean().item())]
    # An id seen once is repeated exactly.
    assert set(student.indices[5].tolist()) == set(routing.indices[5].tolist())
    torch.testing.assert_close(student.weights[5].sort().values, routing.weights[5].sort().values)
    unseen = table(x[:1], RouterContext(token_ids=torch.tensor([4])))
    assert unseen.ffn_count().item() == round(count.mean().item())


def test_the_token_lookup_leaves_padding_out_of_its_table():
    table = build_router(RouterConfig(kind="token_lookup", num_experts=4, top_k=1, vocab_size=3), D)
    teacher = build_router(RouterConfig(num_experts=4, top_k=1), D)
    x, valid = torch.randn(8, D), torch.tensor([True] * 4 + [False] * 4)
    routing = teacher(x, RouterContext(valid=valid)).detach()
    table.fit(torch.tensor([1] * 4 + [2] * 4), routing)  # type: ignore[operator]
    votes = torch.bincount(routing.indices[:4, 0], minlength=4)
    assert votes[table.state_dict()["table"][2, 0]] == votes.max()
    assert (table.state_dict()["table"] != UNUSED).all()


def test_the_token_lookup_refuses_ids_outside_its_vocabulary():
    table = build_router(RouterConfig(kind="token_lookup", num_experts=4, top_k=1, vocab_size=3), D)
    routing = build_router(RouterConfig(num_experts=4, top_k=1), D)(torch.randn(2, D)).detach()
    with refused("token_ids"):
        table.fit(torch.tensor([1, 7]), routing)  # type: ignore[operator]
