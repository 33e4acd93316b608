"""Latent experts: routed experts on a projection of the stream, everything else on the stream
itself.
"""

from typing import Any

import pytest
import torch
from hf_copied import randomise
from refusals import refused
from torch import Tensor

from moe_lab.model import MoEConfig, MoELayer, dispatch
from moe_lab.routing import RouterConfig

LONGCAT = RouterConfig(
    kind="longcat", num_experts=5, num_zero_experts=3, top_k=4, routed_scaling_factor=2.5
)
LATENT = MoEConfig(12, 7, LONGCAT, num_shared_experts=1, d_latent=6)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * gate.sigmoid() * up)


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """Token by token: ``U rms(sum w E(D x)) + x sum of the zero weights + shared(x)``."""
    routing = layer.router(x)
    rows = []
    for token in range(len(x)):
        small, inner, zero = (
            layer.latent_down.weight @ x[token],
            torch.zeros(6, dtype=x.dtype),
            torch.zeros((), dtype=x.dtype),
        )
        for expert, weight in zip(
            routing.indices[token].tolist(), routing.weights[token], strict=True
        ):
            if expert < 5:
                inner = inner + weight * swiglu(
                    small, layer.experts.gate_up[expert], layer.experts.down[expert]
                )
            else:
                zero = zero + weight
        y = layer.latent_up.weight @ rms(inner, layer.latent_norm.weight) + zero * x[token]
        rows.append(y + swiglu(x[token], layer.shared.gate_up, layer.shared.down))
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["auto", *sorted(set(dispatch.BACKENDS) - {"liger", "quack"})])
def test_a_latent_layer_by_hand_forward_and_backward(backend: str) -> None:
    config = LATENT.replace(dispatch=backend)
    layer = MoELayer(config)
    if backend in ("auto", "oracle"):
        layer, tolerance = layer.double(), 1e-10
    else:
        tolerance = 1e-5
    randomise(layer, 1)
    x = torch.randn(20, 12, dtype=layer.latent_up.weight.dtype, requires_grad=True)  # type: ignore[union-attr]
    wanted = by_hand(layer, x)
    routing = layer.router(x)
    assert (routing.zero_count() > 0).any()
    assert (routing.ffn_count() > 1).any()
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(found)
    leaves = [x, *layer.parameters()]
    for mine, their in zip(
        torch.autograd.grad(found, leaves, weight),
        torch.autograd.grad(wanted, leaves, weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, their, rtol=10 * tolerance, atol=10 * tolerance)


def test_with_identity_projections_the_routed_sum_is_normed_and_nothing_else_changes() -> None:
    plain, latent = (
        MoELayer(LATENT.replace(d_latent=None)).double(),
        MoELayer(LATENT.replace(d_latent=12)).double(),
    )
    randomise(plain, 2)
    latent.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        latent.latent_down.weight.copy_(torch.eye(12))  # type: ignore[union-attr]
        latent.latent_up.weight.copy_(torch.eye(12))  # type: ignore[union-attr]
    x = torch.randn(9, 12, dtype=torch.float64)
    y, routing = plain(x, return_routing=True)
    assert plain.zero_experts is not None
    assert plain.shared is not None
    beside = plain.zero_experts(x, routing) + plain.shared(x)
    torch.testing.assert_close(
        latent(x),
        beside + rms(y - beside, torch.ones(12, dtype=torch.float64)),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_token_of_zero_experts_alone_returns_its_full_stream() -> None:
    layer = MoELayer(LATENT.replace(num_shared_experts=0, router=LONGCAT.replace(top_k=3))).double()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[5:] = 1.0
    x = torch.rand(4, 12, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    assert routing.ffn_count().tolist() == [0] * 4
    torch.testing.assert_close(y, x * routing.weights.sum(dim=1, keepdim=True))


def test_routed_experts_are_as_wide_as_the_latent_and_shared_ones_as_the_stream() -> None:
    layer = MoELayer(LATENT)
    shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
    assert shapes["experts.gate_up"] == (5, 14, 6)
    assert shapes["experts.down"] == (5, 6, 7)
    assert shapes["shared.gate_up"] == (14, 12)
    assert shapes["router.weight"] == (8, 12)
    assert shapes["latent_down.weight"] == (6, 12)
    assert shapes["latent_up.weight"] == (12, 6)
    with refused("d_latent"):
        LATENT.replace(d_latent=0)
