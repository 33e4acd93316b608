"""R_g of a run: against the definition on a batch, recorded once, and without a trace in the run's
weights.
"""

import math

import pytest
import torch

from moe_lab.model import Decoder, DecoderConfig, MoEConfig
from moe_lab.routing import ControllerConfig, ControllerKind, RouterConfig
from moe_lab.training import RunConfig
from moe_lab.training.metrics import gradient_ratios

CONTROLLER = ControllerConfig(kind=ControllerKind.PROPORTIONAL, target_ffn_count=2.0)
ZERO = RouterConfig(
    kind="longcat",
    num_experts=4,
    num_zero_experts=2,
    top_k=3,
    device_groups=2,
    controller=CONTROLLER,
)


def run(router: RouterConfig, **fields: float) -> RunConfig:
    model = DecoderConfig(
        vocab_size=13,
        num_layers=2,
        d_model=8,
        num_heads=2,
        context_length=12,
        moe=MoEConfig(8, 6, router),
        init_std=0.4,
    )
    return RunConfig(model=model, seq_length=12, batch_size=2, **fields)  # type: ignore[arg-type]


def test_the_ratio_is_that_of_the_two_gradients_on_the_mean_probability() -> None:
    torch.manual_seed(0)
    config = run(ZERO, router_aux_loss_coef=0.02, router_own_loss_coef=0.5)
    model, batch = Decoder(config.model).eval(), torch.randint(0, 13, (2, 13))
    found = gradient_ratios(model, config, batch)
    model.train()
    output = model(batch[:, :-1], batch[:, 1:])
    model.eval()
    for layer, routing in enumerate(output.routings):
        # f is a constant for the gradient: d/dP of the losses is their slope, a E f and a' f_group,
        # over the layers; probabilities are scores over their sum, so that a slope that is the same
        # for all experts pulls on none.
        counts = routing.counts().double()
        slope = 0.02 * 6 * counts / counts.sum()
        groups = torch.tensor([0, 0, 1, 1])
        load = torch.stack([counts[:4][groups == g].sum() for g in range(2)]) * 2 / (2.0 * 24)
        slope = slope + 0.5 * torch.cat([load[groups], (counts[4:].sum() / (1.0 * 24)).expand(2)])
        assert output.loss is not None
        (language,) = torch.autograd.grad(output.loss, routing.scores, retain_graph=True)
        slope = slope - (slope * routing.scores.double().mean(dim=0)).sum()
        expected = (slope / 2).norm() / language.sum(dim=0).norm()
        assert found[layer] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_balance_loss_is_no_pressure_and_a_router_that_learns_nothing_has_none() -> None:
    torch.manual_seed(0)
    batch = torch.randint(0, 13, (2, 13))
    plain = run(RouterConfig(num_experts=4, top_k=2), router_aux_loss_coef=0.0)
    assert gradient_ratios(Decoder(plain.model), plain, batch) == [0.0, 0.0]
    fixed = run(RouterConfig(kind="hash", num_experts=4, top_k=2, vocab_size=13))
    assert gradient_ratios(Decoder(fixed.model), fixed, batch) == [0.0, 0.0]
    # Top-1 weights that are renormalised to 1 do not depend on the scores: balance alone reaches
    # them.
    only = run(RouterConfig(num_experts=4, top_k=1, norm_topk_prob=True))
    ratios = gradient_ratios(Decoder(only.model), only, batch)
    assert all(ratio > 1e3 or math.isinf(ratio) for ratio in ratios)
