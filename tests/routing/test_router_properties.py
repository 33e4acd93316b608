"""Every router over random shapes, ties, empty batches, k = E, one expert, padding, NaN and
infinity.
"""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moe_lab.errors import RunError
from moe_lab.routing import ROUTERS, RouterConfig, RouterContext, build_router, losses

QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NEEDS_ZERO = {"adamoe": 2, "moepp": 3, "zaya": 1, "longcat": 2}
ONE_EXPERT_PER_TOKEN = {"base"}
TABLES = {"hash", "scored_hash", "token_lookup"}
VOCABULARY = 11


def config_of(kind: str, experts: int, top_k: int) -> RouterConfig:
    fields: dict = {"num_experts": experts, "top_k": top_k}
    if kind in ONE_EXPERT_PER_TOKEN:
        fields["top_k"] = 1
    if kind == "gshard_top2":
        fields |= {"num_experts": max(experts, 2), "top_k": 2}
    if kind == "mixture_of_depths":
        fields |= {"num_experts": 1, "top_k": 1}
    if kind in NEEDS_ZERO:
        fields["num_zero_experts"] = NEEDS_ZERO[kind]
    if kind in TABLES:
        fields["vocab_size"] = VOCABULARY
    return RouterConfig(kind=kind, **fields)


def check_invariants(config: RouterConfig, routing, tokens: int) -> None:
    routing.check()
    used = routing.indices >= 0
    assert routing.indices.shape == routing.weights.shape == (tokens, config.num_slots)
    assert routing.logits.shape == routing.scores.shape == (tokens, config.num_choices)
    assert routing.indices.dtype == torch.int64
    assert (routing.weights[~used] == 0).all()
    counted = used if routing.valid is None else used[routing.valid]
    assert routing.counts().sum() == counted.sum()
    assert torch.equal(routing.ffn_count() + routing.zero_count(), used.sum(dim=1))
    assert not (routing.dropped() & used).any()
    if routing.selected is not None:
        assert (routing.selected[used] == routing.indices[used]).all()
    for loss in (
        losses.load_balancing_loss(routing),
        losses.z_loss(routing),
        *routing.losses.values(),
    ):
        assert torch.isfinite(loss)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@QUICK
@given(data=st.data())
def test_the_invariants_hold_for_any_shape(kind, data):
    experts = data.draw(st.integers(1, 9), label="experts")
    config = config_of(kind, experts, data.draw(st.integers(1, experts), label="top_k"))
    length = data.draw(st.integers(1, 6), label="sequence_length")
    tokens = length * data.draw(st.integers(0, 4), label="sequences")
    width = data.draw(st.integers(1, 7), label="d_model")
    seed = data.draw(st.integers(0, 999), label="seed")
    tied = data.draw(st.booleans(), label="tied")
    training = data.draw(st.booleans(), label="training")
    torch.manual_seed(seed)
    x = torch.randn(tokens, width)
    if tied:
        # Few different values: equal tokens and, at zero, equal logits everywhere.
        x = x.round().clamp(0, 1) * data.draw(st.sampled_from([0.0, 1.0]), label="size")
    valid = None
    if data.draw(st.booleans(), label="padded"):
        valid = torch.rand(tokens) < 0.6
    context = RouterContext(
        token_ids=torch.randint(VOCABULARY, (tokens,)), sequence_length=length, valid=valid
    )
    router = build_router(config, width).train(training)
    check_invariants(config, router(x, context), tokens)
    router.train()
    router.update([router(x, context)])
    check_invariants(config, router.train(training)(x, context), tokens)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@pytest.mark.parametrize("experts", [1, 6])
def test_all_experts_can_be_wanted_at_once(kind, experts):
    config = config_of(kind, experts, experts)
    context = RouterContext(token_ids=torch.zeros(8, dtype=torch.int64), sequence_length=4)
    router = build_router(config, 5)
    check_invariants(config, router(torch.randn(8, 5), context), 8)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_a_batch_without_tokens_routes_nothing(kind):
    config = config_of(kind, 4, 2)
    context = RouterContext(token_ids=torch.zeros(0, dtype=torch.int64))
    for training in (True, False):
        router = build_router(config, 5).train(training)
        routing = router(torch.empty(0, 5), context)
        check_invariants(config, routing, 0)
        router.update([routing])


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - {"hash", "random", "token_lookup"}))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named_and_refused(kind, value):
    config = config_of(kind, 4, 2)
    router = build_router(config, 5)
    x = torch.randn(7, 5)
    x[3, 1] = value
    context = RouterContext(token_ids=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(RunError) as caught:
        router(x, context)
    assert str(caught.value) == (
        "expected finite router logits, got NaN or infinity for 1 of 7 tokens (first: token 3); "
        "try a lower learning rate, a router z-loss, or inputs without NaN"
    )


def test_padding_may_hold_anything():
    router = build_router(RouterConfig(num_experts=4, top_k=2), 5)
    x = torch.randn(7, 5)
    x[3] = math.nan
    valid = torch.arange(7) != 3
    assert router(x, RouterContext(valid=valid)).counts().sum() == 12


TOKEN_CHOICE = sorted(
    set(ROUTERS)
    - {
        "sinkhorn",
        "base",
        "expert_choice",
    }  # assignments: exact on the host or iterated to a tolerance
    - {"random", "hash", "token_lookup"}
)


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
@pytest.mark.parametrize("padded", [False, True])
def test_token_choice_never_waits_for_the_device(kind, padded):
    """On the meta device every read of a value raises: a forward pass and its losses must not need
    one.
    """
    config = config_of(kind, 6, 2)
    with torch.device("meta"):
        router = build_router(config, 5)
        valid = torch.ones(8, dtype=torch.bool) if padded else None
        context = RouterContext(
            token_ids=torch.zeros(8, dtype=torch.int64), sequence_length=4, valid=valid
        )
        routing = router(torch.randn(8, 5), context)
        assert routing.indices.device.type == "meta"
        losses.load_balancing_loss(routing)
        losses.z_loss(routing)
        assert routing.counts().shape == (config.num_choices,)
        assert routing.ffn_count().shape == (8,)
        assert routing.detach().weights.shape == routing.weights.shape
    router.update([routing])


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_the_same_seed_gives_the_same_router_and_decisions(kind):
    config = config_of(kind, 6, 2)
    context = RouterContext(token_ids=torch.arange(8) % VOCABULARY, sequence_length=4)
    x = torch.randn(8, 5)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        routing = build_router(config, 5)(x, context)
        runs.append(routing)
    assert torch.equal(runs[0].indices, runs[1].indices)
    assert torch.equal(runs[0].weights, runs[1].weights)


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_configuration_survives_json(kind):
    config = config_of(kind, 6, 2)
    assert RouterConfig.from_dict(config.to_dict()) == config
    assert RouterConfig.from_dict(config.to_dict()).hash() == config.hash()
