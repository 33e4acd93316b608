"""``gradcheck`` in float64 for every differentiable path: from tokens, weights and extra parameters
to gate weights and losses.
"""

import pytest
import torch
from torch import Tensor

from moe_lab.routing import (
    ROUTERS,
    ControllerConfig,
    ControllerKind,
    RouterConfig,
    RouterContext,
    Weighting,
    ZeroExpertKind,
    build_router,
    losses,
)

D, T = 5, 6
IDENTITY, ZERO = ZeroExpertKind.IDENTITY, ZeroExpertKind.ZERO
GROUPS = {"num_groups": 2, "topk_groups": 1}

CONFIGS: dict[str, dict] = {
    "softmax_topk": {
        "norm_topk_prob": True,
        "norm_min": 0.1,
        "logit_softcap": 3.0,
        "controller": ControllerConfig(),
    },
    "topk_softmax": {"router_bias": True},
    "sigmoid_topk": {"norm_topk_prob": True, "norm_eps": 1e-6, "logit_scale": 0.7},
    "sqrt_softplus_topk": {"norm_topk_prob": True, "routed_scaling_factor": 1.5},
    "deepseek_v2": {**GROUPS, "num_experts": 6},
    "deepseek_v3": {**GROUPS, "num_experts": 6, "norm_topk_prob": True},
    "pnorm_topk": {"norm_p": 2.0},
    "token_choice": {
        "weighting": Weighting.SELECTED_SOFTMAX,
        "score_func": "sqrt_softplus",
        "num_zero_experts": 2,
    },
    "longcat": {"num_zero_experts": 2, "zero_expert_scaling": False, "routed_scaling_factor": 6.0},
    "adamoe": {"num_zero_experts": 2},
    "moepp": {"num_zero_experts": 2, "capacity_factor": 1.1, "zero_expert_kinds": (IDENTITY, ZERO)},
    "zaya": {"num_zero_experts": 1, "d_router": 4},
    "llama4": {"top_k": 1},
    "gemma": {},
    "inkling": {"num_shared_gates": 2},
    "switch": {"expert_capacity": 2, "norm_topk_prob": True},
    "gshard_top2": {"expert_capacity": 2},
    "sparsemixer": {"sparsemixer_eps": 0.3},
    "noisy_topk": {},
    "top_p": {"top_k": 4, "norm_topk_prob": True},
    "xmoe": {"top_k": 4},
    "dtop_p": {},
    "expert_threshold": {},
    "quantile_threshold": {"min_slots": 1},
    "remoe": {"controller": ControllerConfig(kind=ControllerKind.RELU_LAMBDA, initial=0.5)},
    "seq_topk": {"norm_topk_prob": True},
    "mixture_of_depths": {"num_experts": 1, "top_k": 1, "capacity_factor": 0.5},
    "expert_choice": {},
    "sinkhorn": {},
    "base": {"top_k": 1},
    "scored_hash": {"vocab_size": 9, "norm_topk_prob": True},
    "quantile_balanced": {},
}
NOT_DIFFERENTIABLE = {
    "hash": "no parameter",
    "random": "no parameter",
    "token_lookup": "no parameter",
    "d2dmoe": "weights are 1; its router learns by regression (below)",
    "dynmoe": "straight-through step: the gradient is not that of the value (test_router_dynamic)",
}


def test_every_router_is_checked_or_has_a_reason():
    assert set(CONFIGS) | set(NOT_DIFFERENTIABLE) == set(ROUTERS)


def context(previous=None) -> RouterContext:
    return RouterContext(token_ids=torch.arange(T) % 9, sequence_length=3, previous=previous)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_gradient_of_weights_and_losses_is_that_of_their_values(kind):
    # Sampled routers are checked in evaluation; test_router_token_choice has their training
    # gradients.
    torch.manual_seed(0)
    config = RouterConfig(**({"kind": kind, "num_experts": 4, "top_k": 2} | CONFIGS[kind]))
    router = build_router(config, D).double().train(kind not in ("sparsemixer", "noisy_topk"))
    names = [name for name, _ in router.named_parameters()]
    parameters = [
        parameter.detach().clone().requires_grad_() for _, parameter in router.named_parameters()
    ]
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    previous = (
        router(torch.randn(T, D, dtype=torch.float64), context()).detach()
        if kind in ("moepp", "zaya")
        else None
    )

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(
            router, dict(zip(names, values, strict=True)), (x, context(previous))
        )
        outputs = [
            routing.weights,
            losses.z_loss(routing),
            losses.load_balancing_loss(routing),
            *routing.losses.values(),
        ]
        if routing.shared_weights is not None:
            outputs.append(routing.shared_weights)
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(run, (x, *parameters), eps=1e-7, atol=1e-5, nondet_tol=0.0)


def test_noisy_topks_training_losses_have_true_gradients():
    torch.manual_seed(1)
    router = build_router(RouterConfig(kind="noisy_topk", num_experts=4, top_k=2), D).double()
    x = torch.randn(T, D, dtype=torch.float64)
    noise_weight = dict(router.named_parameters())["noise_weight"]

    def run(weight: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        routing = torch.func.functional_call(
            router, {"weight": weight, "noise_weight": noise}, (x,)
        )
        return routing.weights, routing.losses["importance"], routing.losses["load"]

    inputs = tuple(p.detach().clone().requires_grad_() for p in (router.weight, noise_weight))
    assert torch.autograd.gradcheck(run, inputs, eps=1e-7, atol=1e-5)


def routing_of(scores: Tensor, zero: int = 0):
    from moe_lab.routing import Routing

    indices = scores.detach().topk(2, dim=1).indices
    return Routing(
        indices, scores.gather(1, indices), scores.log(), scores, scores.shape[1] - zero, zero
    )


LOSSES = {
    "batch": lambda r: losses.load_balancing_loss(r, scale="top_k"),
    "sequence": lambda r: losses.load_balancing_loss(r, scope="sequence", sequence_length=3),
    "global": lambda r: losses.load_balancing_loss(
        r, scope="global", counts=torch.tensor([5, 1, 2, 0, 3, 1])
    ),
    "heterogeneous": lambda r: losses.heterogeneous_loss(r, ffn_share=0.3),
    "null": losses.null_loss,
    "device": lambda r: losses.device_loss(r, 3),
    "longcat": lambda r: losses.longcat_device_loss(r, 2, 1.2),
    "pooled": lambda r: losses.hf_pooled_loss([r, r]),
    "z": losses.z_loss,
    "importance": losses.importance_loss,
    "entropy": losses.entropy_loss,
    "variance": losses.variance_loss,
    "norm_regression": lambda r: losses.norm_regression_loss(r, torch.ones_like(r.scores)),
    "load": lambda r: losses.load_loss(
        r,
        noisy_logits=torch.linspace(-1, 1, 36, dtype=torch.float64).sin().view(6, 6),
        noise_std=0.3,
    ),
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_on_scores_has_a_true_gradient(name):
    torch.manual_seed(3)
    scores = (torch.rand(6, 6, dtype=torch.float64) + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: LOSSES[name](routing_of(s, zero=2)), (scores,), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize(
    "loss",
    [losses.simbal_loss, losses.orthogonality_loss, losses.dynmoe_loss, losses.hidden_z_loss],
)
def test_every_loss_on_matrices_has_a_true_gradient(loss):
    torch.manual_seed(4)
    matrix = (torch.randn(4, 6, dtype=torch.float64) + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(loss, (matrix,), eps=1e-7, atol=1e-5)


def test_no_gradient_reaches_a_controller_or_a_count():
    for kind in ("longcat", "expert_threshold", "dtop_p", "remoe", "quantile_balanced"):
        fields = (
            {"controller": ControllerConfig(), "num_zero_experts": 2} if kind == "longcat" else {}
        )
        router = build_router(RouterConfig(kind=kind, num_experts=4, top_k=2, **fields), D)
        assert router.controller is not None
        assert not any(buffer.requires_grad for buffer in router.controller.buffers())
        assert list(router.controller.parameters()) == []
