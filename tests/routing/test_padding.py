"""Padding takes no part: whatever rows that are not valid hold, NaN included, every output, loss
and gradient of the valid rows is the same to the bit.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing.test_router_properties import QUICK, VOCABULARY, config_of
from torch import Tensor

from moe_lab.model import MoEConfig
from moe_lab.routing import ROUTERS, RouterConfig, RouterContext, Routing, build_router, losses

FILLS = [0.0, math.nan, math.inf, 1e30]


def outcome(
    config: RouterConfig, x: Tensor, valid: Tensor, fill: float, ids: Tensor, training: bool
) -> list[Tensor]:
    """Everything that a layer of this router gives the valid rows of ``x``: routing, losses,
    output, gradients.
    """
    torch.manual_seed(5)
    layer = MoEConfig(x.shape[1], 4, config, dispatch="cpu").build().train(training)
    with torch.no_grad():  # so that a residual between layers has something to say
        for parameter in layer.router.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before = build_router(RouterConfig(num_experts=config.num_choices, top_k=1), x.shape[1])(x)
    previous = replace(
        before.detach(),
        logits=torch.where(valid.unsqueeze(1), before.logits.detach(), fill),
        state=None if config.kind != "zaya" else torch.full((len(x), 256), 0.5).where(
            valid.unsqueeze(1), torch.tensor(fill)
        ),
    )  # fmt: skip
    x = torch.where(valid.unsqueeze(1), x, fill).requires_grad_()
    context = RouterContext(
        token_ids=torch.where(valid, ids, -100),
        sequence_length=len(x) // 2,
        previous=previous,
        valid=valid,
    )
    torch.manual_seed(7)
    y, routing = layer(x, context, return_routing=True)
    terms = [losses.load_balancing_loss(routing), losses.z_loss(routing), *routing.losses.values()]
    total = sum((term.sum() for term in terms), y[valid].square().sum())
    total.backward()
    if training:
        layer.router.update([routing])
    assert x.grad is not None
    assert x.grad[~valid].eq(0).all()
    return [
        routing.indices[valid],
        routing.weights[valid],
        routing.counts(),
        routing.selected_counts(),
        *terms,
        y[valid],
        x.grad[valid],
        *(p.grad for p in layer.parameters() if p.grad is not None),
        *layer.router.buffers(),
    ]


@pytest.mark.parametrize("kind", sorted(ROUTERS))
@QUICK
@given(data=st.data())
def test_what_padding_holds_changes_nothing(kind, data):
    config = config_of(kind, data.draw(st.integers(2, 6)), data.draw(st.integers(1, 2)))
    if kind in ("switch", "gshard_top2", "moepp"):
        config = config.replace(capacity_factor=1.0)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, ids = torch.randn(12, 5), torch.randint(VOCABULARY, (12,))
    valid = torch.rand(12) < 0.6
    training = data.draw(st.booleans())
    first = outcome(config, x, valid, FILLS[0], ids, training)
    other = outcome(config, x, valid, data.draw(st.sampled_from(FILLS[1:])), ids, training)
    assert len(first) == len(other)
    for one, two in zip(first, other, strict=True):
        assert one.isfinite().all() or kind in ("expert_threshold", "quantile_threshold")
        assert torch.equal(one.nan_to_num(), two.nan_to_num())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("switch", {"top_k": 1, "capacity_factor": 1.0}),
        ("switch", {"top_k": 2, "capacity_factor": 0.7, "batch_prioritized": True}),
        ("switch", {"top_k": 1, "capacity_factor": 1.0, "capacity_scope": "sequence"}),
        ("gshard_top2", {"top_k": 2}),
        ("gshard_top2", {"top_k": 2, "eval_capacity_fraction": 0.3}),
        ("moepp", {"top_k": 2, "capacity_factor": 0.8, "num_zero_experts": 3}),
        ("mixture_of_depths", {"top_k": 1, "num_experts": 1, "capacity_factor": 0.5}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_capacity_is_that_of_the_tokens_without_padding(kind, fields, training):
    torch.manual_seed(0)
    config = RouterConfig(**{"kind": kind, "num_experts": 4} | fields)
    router = build_router(config, 8).train(training)
    x, valid = torch.randn(12, 8), torch.arange(48) % 24 < 6
    padded = torch.randn(48, 8)
    padded[valid] = x
    alone = router(x, RouterContext(sequence_length=6))
    among = router(padded, RouterContext(sequence_length=24, valid=valid))
    assert torch.equal(among.indices[valid], alone.indices)
    torch.testing.assert_close(among.weights[valid], alone.weights)
    assert kind == "mixture_of_depths" or alone.dropped().any()


OF_ROUTINGS = {
    **{name: losses.LOSSES[name] for name in losses.LOSSES},
    "device": lambda routing: losses.device_loss(routing, 2),
    "longcat device": lambda routing: losses.longcat_device_loss(routing, 2, 1.0),
    "sequence": lambda routing: losses.load_balancing_loss(
        routing, scope="sequence", sequence_length=4
    ),
    "pooled": lambda routing: losses.hf_pooled_loss([routing]),
    "load": lambda routing: losses.load_loss(
        routing, noisy_logits=routing.logits + 0.1, noise_std=0.5
    ),
    "norms": lambda routing: losses.norm_regression_loss(routing, routing.scores * 2),
}


@pytest.mark.parametrize("name", sorted(OF_ROUTINGS))
@pytest.mark.parametrize("fill", FILLS[1:3])
def test_a_loss_leaves_out_rows_that_are_not_valid(name, fill):
    """A captured routing may hold NaN where another model's padding was."""
    valid = torch.arange(8) % 4 > 0
    values = []
    for content in (0.3, fill):
        torch.manual_seed(3)
        logits = torch.where(valid.unsqueeze(1), torch.randn(8, 6), content).requires_grad_()
        scores = torch.where(valid.unsqueeze(1), torch.rand(8, 6), content).requires_grad_()
        weights = torch.where(valid.unsqueeze(1), torch.rand(8, 2), content).requires_grad_()
        indices = torch.stack([torch.randperm(6)[:2] for _ in range(8)])
        routing = Routing(indices, weights, logits, scores, 4, 2, valid=valid)
        loss = OF_ROUTINGS[name](routing)
        loss.backward()
        gradients = [value.grad for value in (logits, scores, weights) if value.grad is not None]
        assert gradients
        values.append([loss, *gradients])
    for one, two in zip(*values, strict=True):
        assert two.isfinite().all()
        assert torch.equal(one, two)
