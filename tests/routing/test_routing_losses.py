"""Losses against literal formulas, published values, and the conventions of other code bases."""

import math

import numpy as np
import pytest
import torch
from refusals import refused

from moe_lab.errors import ConfigError
from moe_lab.routing import RouterConfig, RouterContext, Routing, build_router, losses

D = 8


def random_routing(tokens=60, experts=8, top_k=2, zero=0, valid=None, seed=0, kind=None) -> Routing:
    torch.manual_seed(seed)
    config = RouterConfig(
        kind=kind or ("longcat" if zero else "softmax_topk"),
        num_experts=experts,
        num_zero_experts=zero,
        top_k=top_k,
    )
    return build_router(config, D).double()(
        torch.randn(tokens, D, dtype=torch.float64) * 2, RouterContext(valid=valid)
    )


def uniform_routing(
    experts: int, top_k: int, zero: int = 0, num_experts: int | None = None
) -> Routing:
    """Every expert selected equally often, every probability equal."""
    choices = experts + zero
    indices = (torch.arange(choices).unsqueeze(1) + torch.arange(top_k)) % choices
    scores = torch.full((choices, choices), 1 / choices, dtype=torch.float64)
    return Routing(
        indices, scores.gather(1, indices), torch.zeros_like(scores), scores, experts, zero
    )


def collapsed_on_a_pair(pair: int, tokens=4096, experts=8) -> Routing:
    logits = torch.zeros(tokens, experts, dtype=torch.float64)
    logits[:, 2 * pair], logits[:, 2 * pair + 1] = 8.0, 7.5
    scores = logits.softmax(dim=1)
    weights, indices = scores.topk(2, dim=1)
    return Routing(indices, weights, logits, scores, experts)


# The published numbers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "value"), [(2, 2.0), (1, 1.0)])
def test_transformers_value_at_uniform_load_is_k(top_k, value):
    routing = uniform_routing(8, top_k)
    assert losses.load_balancing_loss(routing, scale="top_k").item() == pytest.approx(
        value, abs=1e-9
    )
    assert losses.hf_pooled_loss([routing]).item() == pytest.approx(value, abs=1e-9)
    assert losses.load_balancing_loss(routing).item() == pytest.approx(1.0, abs=1e-9)  # Megatron's


def test_pooling_four_collapsed_layers_looks_perfect_and_the_mean_over_layers_does_not():
    layers = [collapsed_on_a_pair(pair) for pair in range(4)]
    assert losses.hf_pooled_loss(layers).item() == pytest.approx(2.0, abs=1e-9)
    mean = torch.stack(
        [losses.load_balancing_loss(layer, scale="top_k") for layer in layers]
    ).mean()
    assert mean.item() == pytest.approx(7.989987850189209, rel=1e-6)
    assert torch.stack(
        [losses.hf_pooled_loss([layer]) for layer in layers]
    ).mean().item() == pytest.approx(7.989987850189209, rel=1e-6)


@pytest.mark.hf
@pytest.mark.parametrize("padded", [False, True])
def test_the_pooled_value_is_that_of_transformers(padded):
    modeling = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="needs the extra hf"
    )
    valid = (torch.arange(60) % 5 > 0) if padded else None
    layers = [random_routing(seed=seed, valid=valid) for seed in range(3)]
    theirs = modeling.load_balancing_loss_func(
        tuple(layer.logits.float() for layer in layers),
        8,
        2,
        None if valid is None else valid.view(2, 30).long(),
    )
    assert losses.hf_pooled_loss(layers).item() == pytest.approx(theirs.item(), rel=1e-5)


# Scope and scale
# ------------------------------------------------------------------------------------------------


def expert_loss_by_hand(routing: Routing, rows: np.ndarray, eta=None) -> float:
    """E sum_i eta_i f_i P_i over the given rows."""
    experts = routing.scores.shape[1]
    count = np.zeros(experts)
    for row in routing.indices.numpy()[rows]:
        np.add.at(count, row[row >= 0], 1)
    share = routing.scores.detach().numpy()[rows]
    mean = (share / share.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(
        experts * (np.ones(experts) if eta is None else eta) @ (count / count.sum() * mean)
    )


def test_the_sequence_loss_is_the_mean_over_sequences():
    """DeepSeek-V3, arXiv 2412.19437, eq. 17-20: f_i = E/(K T) count, P_i the mean normalised score,
    per sequence.
    """
    routing = random_routing(tokens=60)
    by_hand = np.mean(
        [expert_loss_by_hand(routing, np.arange(start, start + 20)) for start in (0, 20, 40)]
    )
    found = losses.load_balancing_loss(routing, scope="sequence", sequence_length=20)
    assert found.item() == pytest.approx(by_hand, rel=1e-9)
    assert found > losses.load_balancing_loss(routing)


def test_the_sequence_loss_leaves_padding_and_empty_sequences_out():
    valid = torch.ones(60, dtype=torch.bool)
    valid[15:20] = False
    valid[40:] = False
    routing = random_routing(tokens=60, valid=valid)
    by_hand = np.mean(
        [
            expert_loss_by_hand(routing, np.arange(0, 15)),
            expert_loss_by_hand(routing, np.arange(20, 40)),
        ]
    )
    assert losses.load_balancing_loss(
        routing, scope="sequence", sequence_length=20
    ).item() == pytest.approx(by_hand, rel=1e-9)


def test_the_global_loss_over_micro_batches_adds_up_to_the_loss_of_the_whole_batch():
    """arXiv 2501.11873: all-reduced counts, local probabilities; value and gradient of the mean
    over micro-batches are the batch's.
    """
    torch.manual_seed(1)
    router = build_router(RouterConfig(num_experts=8, top_k=2), D).double()
    x = torch.randn(80, D, dtype=torch.float64)
    whole = losses.load_balancing_loss(router(x))
    (gradient,) = torch.autograd.grad(whole, [router.weight])
    parts = [router(part) for part in x.chunk(4)]
    counts = torch.stack([part.selected_counts() for part in parts]).sum(dim=0)
    mean = torch.stack(
        [losses.load_balancing_loss(part, scope="global", counts=counts) for part in parts]
    ).mean()
    (summed,) = torch.autograd.grad(mean, [router.weight])
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(summed, gradient)
    local = torch.stack([losses.load_balancing_loss(part) for part in parts]).mean()
    assert local > whole


@pytest.mark.parametrize(
    "loss", [losses.load_balancing_loss, losses.heterogeneous_loss, losses.null_loss]
)
def test_the_two_scales_differ_by_the_slots_per_token(loss):
    routing = random_routing(zero=4, experts=6, top_k=3)
    assert (loss(routing, scale="top_k") / loss(routing)).item() == pytest.approx(3.0)
    free = random_routing(kind="remoe")
    assert (loss(free, scale="top_k") / loss(free)).item() == pytest.approx(
        free.ffn_count().double().mean().item()
    )


def test_the_gradient_of_a_balance_loss_reaches_the_scores_alone():
    routing = random_routing()
    (gradient,) = torch.autograd.grad(losses.load_balancing_loss(routing), [routing.scores])
    counts = routing.counts().double()
    # d/ds_tj of E sum_i f_i P_i with P normalised: (E / T) (f_j - sum_i f_i p_i) / sum_i s_i, and
    # the scores sum to 1.
    f = counts / counts.sum()
    p = routing.scores.detach()
    torch.testing.assert_close(gradient, 8 / 60 * (f - (p * f).sum(dim=1, keepdim=True)))


# The other balance losses
# ------------------------------------------------------------------------------------------------


def test_the_heterogeneous_loss_weighs_zero_compute_experts_by_tau():
    routing = random_routing(zero=4, experts=6, top_k=3)
    eta = np.array([1.0] * 6 + [0.25] * 4)
    by_hand = expert_loss_by_hand(routing, np.arange(60), eta)
    assert losses.heterogeneous_loss(routing, ffn_share=0.25).item() == pytest.approx(
        by_hand, rel=1e-9
    )
    # The paper's own form: sum eta f P with f the share of tokens.
    assert losses.heterogeneous_loss(
        routing, ffn_share=0.25, scale="top_k"
    ).item() / 10 == pytest.approx(by_hand * 3 / 10, rel=1e-9)


def test_the_null_loss_does_not_care_which_null_was_chosen():
    routing = random_routing(zero=4, experts=6, top_k=3)
    shuffled = routing.indices.clone()
    nulls = shuffled >= 6
    shuffled[nulls] = 6 + (shuffled[nulls] - 6 + 1) % 4
    other = Routing(shuffled, routing.weights, routing.logits, routing.scores, 6, 4)
    assert losses.null_loss(routing).item() == pytest.approx(
        losses.null_loss(other).item(), rel=1e-12
    )
    assert losses.load_balancing_loss(routing).item() != pytest.approx(
        losses.load_balancing_loss(other).item(), rel=1e-6
    )
    count = routing.counts().double()
    count[6:] = count[6:].mean()
    by_hand = 10 * (count / count.sum() * routing.scores.mean(dim=0)).sum()
    torch.testing.assert_close(losses.null_loss(routing), by_hand)


@pytest.mark.parametrize("groups", [2, [[0, 3], [1, 2, 4, 5, 6, 7]]])
def test_the_device_loss_is_deepseekmoes(groups):
    """arXiv 2401.06066, eq. 15-17, in loops; 1 at uniform load however large the groups are."""
    routing = random_routing()
    count, mean = routing.counts().double(), routing.scores.mean(dim=0)
    members = [range(4), range(4, 8)] if groups == 2 else groups
    by_hand = sum(
        sum(8 * count[i] / 120 for i in group) / len(group) * sum(mean[i] for i in group)
        for group in members
    )
    torch.testing.assert_close(losses.device_loss(routing, groups), torch.as_tensor(by_hand))
    assert losses.device_loss(uniform_routing(8, 3), groups).item() == pytest.approx(1.0)


def test_the_longcat_loss_is_one_at_its_target_and_counts_slots():
    """At K_e = 4 of K = 6 with 8 real and 4 zero-compute experts, uniform load is the target."""
    routing = uniform_routing(8, 6, zero=4)
    assert losses.longcat_device_loss(routing, 2, target_ffn_count=4).item() == pytest.approx(1.0)
    skewed = random_routing(experts=8, zero=4, top_k=6)
    count, mean = skewed.counts().double(), skewed.scores.mean(dim=0)
    tokens, devices, target = 60, 4, 3.0
    groups = [range(d * 2, d * 2 + 2) for d in range(devices)]
    by_hand = sum(
        devices / (target * tokens) * sum(count[i] for i in g) * sum(mean[i] for i in g)
        for g in groups
    )
    by_hand += 1 / ((6 - target) * tokens) * count[8:].sum() * mean[8:].sum()
    torch.testing.assert_close(
        losses.longcat_device_loss(skewed, devices, target), torch.as_tensor(by_hand)
    )


def test_groups_must_hold_every_expert_once():
    routing = random_routing()
    with refused("groups"):
        losses.device_loss(routing, 3)
    with refused("groups"):
        losses.device_loss(routing, [[0, 1], [1, 2]])
    with refused("num_zero_experts"):
        losses.longcat_device_loss(routing, 2, 1)
    with refused("target_ffn_count"):
        losses.longcat_device_loss(random_routing(zero=4, top_k=3), 2, 3)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (
            {"scope": "sequence"},
            "sequence_length",
        ),
        (
            {"scope": "sequence", "sequence_length": 7},
            "sequence_length",
        ),
        (
            {"scope": "global"},
            "counts",
        ),
        (
            {"scope": "global", "counts": torch.ones(7)},
            "counts",
        ),
        ({"scope": "world"}, "scope"),
        ({"scale": "two"}, "scale"),
    ],
)
def test_a_scope_without_its_argument_is_refused(arguments, field):
    with pytest.raises(ConfigError) as caught:
        losses.load_balancing_loss(random_routing(), **arguments)
    assert caught.value.field == field


# Spread, stability, geometry
# ------------------------------------------------------------------------------------------------


def test_importance_and_its_variation():
    routing = random_routing()
    summed = np.zeros(8)
    np.add.at(summed, routing.indices.numpy().ravel(), routing.weights.detach().numpy().ravel())
    assert losses.importance_loss(routing).item() == pytest.approx(
        summed.var() / summed.mean() ** 2
    )
    assert losses.importance_loss(routing, unbiased=True).item() == pytest.approx(
        summed.var(ddof=1) / summed.mean() ** 2
    )
    assert losses.cv_squared(torch.tensor([3.0])).item() == 0.0


def test_the_load_loss_is_smooth_in_the_logits():
    routing = random_routing()
    noisy = routing.logits.detach() + 0.1 * torch.randn_like(routing.logits)
    loss = losses.load_loss(routing, noisy_logits=noisy, noise_std=1 / 8, unbiased=True)
    load = losses.smooth_load(routing.logits, noisy, 1 / 8, 2)
    assert load.sum().item() == pytest.approx(120, rel=0.15)
    assert loss.item() == pytest.approx(load.var().item() / load.mean().item() ** 2)
    assert loss.requires_grad


def test_the_hidden_z_loss_takes_absolute_values():
    hidden = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    by_hand = [math.log(math.exp(1) + math.exp(2)) ** 2, math.log(1 + math.exp(3)) ** 2]
    assert losses.hidden_z_loss(hidden).item() == pytest.approx(np.mean(by_hand), rel=1e-6)
    assert losses.hidden_z_loss(hidden, torch.tensor([True, False])).item() == pytest.approx(
        by_hand[0], rel=1e-6
    )


def test_entropy_and_variance_losses():
    routing = random_routing()
    p = routing.scores.detach().numpy()
    assert losses.entropy_loss(routing).item() == pytest.approx(
        float(-(p * np.log(p)).sum(axis=1).mean())
    )
    assert losses.variance_loss(routing).item() == pytest.approx(-float(p.var(axis=0).mean()))
    valid = torch.arange(60) < 30
    padded = random_routing(valid=valid)
    assert losses.variance_loss(padded).item() == pytest.approx(-float(p[:30].var(axis=0).mean()))


def test_losses_on_rows_are_zero_for_orthonormal_rows_and_largest_for_equal_ones():
    eye = torch.eye(4, 6)
    assert losses.simbal_loss(eye) == 0
    assert losses.orthogonality_loss(eye) == 0
    assert losses.dynmoe_loss(eye).item() == pytest.approx(1.0)  # the mean row length
    equal = torch.ones(4, 6)
    assert losses.orthogonality_loss(equal).item() == pytest.approx(1.0)
    assert losses.simbal_loss(equal).item() == pytest.approx(4 * 5 + 12 * 6)
    weight = torch.randn(5, 7, dtype=torch.float64)
    by_hand = np.abs(weight.numpy() @ weight.numpy().T - np.eye(5)).sum()
    assert losses.simbal_loss(weight).item() == pytest.approx(by_hand)


def test_dynmoes_loss_leaves_idle_experts_out():
    weight = torch.randn(5, 7)
    active = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(
        losses.dynmoe_loss(weight, active), losses.dynmoe_loss(weight[active])
    )


@pytest.mark.parametrize(
    "loss",
    [
        losses.load_balancing_loss,
        losses.z_loss,
        losses.importance_loss,
        losses.entropy_loss,
        losses.variance_loss,
    ],
)
def test_losses_of_no_tokens_are_zero_and_finite(loss):
    empty = random_routing(tokens=0)
    assert loss(empty).item() == 0
    nobody = random_routing(tokens=6, valid=torch.zeros(6, dtype=torch.bool))
    assert loss(nobody).item() == 0


# Eight code bases
# ------------------------------------------------------------------------------------------------


def top1_counts(routing: Routing) -> torch.Tensor:
    return torch.bincount(routing.indices[:, 0], minlength=routing.scores.shape[1]).double()


FORMULAS = {
    # Each as its code writes it: s the softmax [T, E], c all-slot counts, c1 first-choice counts.
    "transformers": lambda s, c, c1, k: s.shape[1] * (c / len(s) * s.mean(dim=0)).sum(),
    "megatron": lambda s, c, c1, k: (s.sum(dim=0) * c).sum() * s.shape[1] / (len(s) ** 2 * k),
    "deepspeed": lambda s, c, c1, k: (s.mean(dim=0) * (c / len(s))).mean() * s.shape[1] ** 2 / k,
    "olmo_core": lambda s, c, c1, k: s.shape[1] / (len(s) * k) * (s.mean(dim=0) * c).sum(),
    "megablocks": lambda s, c, c1, k: s.shape[1] / (len(s) * k) * torch.dot(c, s.mean(dim=0)),
    "tutel": lambda s, c, c1, k: (s.sum(dim=0) * c1 * (s.shape[1] / len(s))).sum() / len(s),
    "gshard": lambda s, c, c1, k: (c1 / len(s) * s.mean(dim=0)).mean(),
    "moepp": lambda s, c, c1, k: (c / len(s) * s.mean(dim=0)).sum(),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (12, 4)])
def test_the_conversion_between_code_bases_at_uniform_load(name, experts, top_k):
    routing = uniform_routing(experts, top_k)
    theirs = FORMULAS[name](routing.scores, routing.counts().double(), top1_counts(routing), top_k)
    assert theirs.item() == pytest.approx(losses.CODE_BASES[name](experts, top_k))
    ours = losses.convert_coefficient(
        0.01, name, num_experts=experts, top_k=top_k
    ) * losses.load_balancing_loss(routing)
    assert ours.item() == pytest.approx(0.01 * theirs.item())


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"tutel", "gshard"}))
def test_the_conversion_is_exact_at_any_load_where_all_slots_are_counted(name):
    routing = random_routing(top_k=3)
    theirs = FORMULAS[name](routing.scores, routing.counts().double(), top1_counts(routing), 3)
    ours = losses.convert_coefficient(
        0.02, name, num_experts=8, top_k=3
    ) * losses.load_balancing_loss(routing)
    torch.testing.assert_close(ours, 0.02 * theirs)


def test_converting_there_and_back_changes_nothing():
    there = losses.convert_coefficient(
        0.01, "transformers", num_experts=64, top_k=8, target="gshard"
    )
    assert losses.convert_coefficient(
        there, "gshard", num_experts=64, top_k=8, target="transformers"
    ) == pytest.approx(0.01)
    with refused("code_base"):
        losses.convert_coefficient(0.01, "fastmoe", num_experts=8, top_k=2)


def test_a_loss_of_plain_tensors_is_that_of_the_routing():
    routing = random_routing()
    plain = Routing.from_scores(routing.scores, routing.indices)
    assert losses.load_balancing_loss(plain) == losses.load_balancing_loss(routing)
    assert torch.equal(plain.weights, routing.scores.gather(1, routing.indices))
    for scores, indices in (
        (routing.scores, routing.indices + 1),
        (routing.scores, routing.indices[1:]),
        (routing.scores[0], routing.indices[0]),
    ):
        with pytest.raises(ConfigError):
            Routing.from_scores(scores, indices)


def test_plain_scores_and_indices_have_the_loss_of_their_routing() -> None:
    scores = torch.rand(20, 8, requires_grad=True).softmax(-1)
    indices = scores.topk(2).indices
    plain = losses.load_balancing_loss(scores, indices, scale="top_k")
    assert plain.item() == losses.load_balancing_loss(
        Routing.from_scores(scores, indices), scale="top_k"
    )
    assert plain.requires_grad
    with refused("indices"):
        losses.load_balancing_loss(scores)
    with refused("indices"):
        losses.load_balancing_loss(Routing.from_scores(scores, indices), indices)
