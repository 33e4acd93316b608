"""Every backend under the ways in which people run layers: autocast, bfloat16, activation
checkpointing, functional calls, compilation.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from moe_lab.model import ExpertBank, MoEConfig, MoELayer
from moe_lab.model.dispatch import BACKENDS, native
from moe_lab.model.dispatch.oracle import oracle
from moe_lab.routing import RouterConfig, Routing

NAMES = [
    name
    for name in sorted(BACKENDS)
    if name not in ("oracle", "liger", "quack") and (name != "native" or native.available())
]
HALF = [name for name in NAMES if name != "native"]


def layer_of(name: str, **router: object) -> MoELayer:
    torch.manual_seed(0)
    fields = {"num_experts": 8, "top_k": 3, "norm_topk_prob": True} | router
    return MoELayer(MoEConfig(32, 16, RouterConfig.from_dict(fields), dispatch=name))


def random_routing(tokens: int, experts: int, slots: int, unused: float) -> Routing:
    generator = torch.Generator().manual_seed(5)
    indices = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :slots]
    indices = torch.where(torch.rand(tokens, slots, generator=generator) < unused, -1, indices)
    weights = torch.rand(tokens, slots, generator=generator) * (indices >= 0)
    scores = torch.full((tokens, experts), 1 / experts)
    return Routing(indices, weights, scores.log(), scores, experts)


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(
        torch.autograd.grad(
            (y * torch.arange(y.numel()).view_as(y).cos().to(y.dtype)).sum(), inputs
        )
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unused", [0.0, 0.4])
def test_float32_equals_the_float64_oracle(name: str, unused: float) -> None:
    routing, bank, x = (
        random_routing(300, 8, 3, unused),
        ExpertBank(8, 32, 16),
        torch.randn(300, 32),
    )
    routing.weights.requires_grad_()
    inside = x.requires_grad_()
    inputs = [inside, routing.weights, bank.gate_up, bank.down]
    got = BACKENDS[name](inside, routing, bank)
    wide = [value.detach().double().requires_grad_() for value in inputs]
    exact = ExpertBank(8, 32, 16).double()
    exact.gate_up, exact.down = torch.nn.Parameter(wide[2]), torch.nn.Parameter(wide[3])
    weights = wide[1]
    wanted = oracle(
        wide[0], Routing(routing.indices, weights, routing.logits, routing.scores, 8), exact
    )
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        gradients(got, inputs),
        gradients(wanted, [wide[0], weights, exact.gate_up, exact.down]),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_stays_within_its_rounding(name: str) -> None:
    """bfloat16 keeps 8 bits: 2 % of the largest output covers three rounded products."""
    routing, bank, x = random_routing(64, 8, 3, 0.2), ExpertBank(8, 32, 16), torch.randn(64, 32)
    wanted = oracle(x, routing, bank)
    got = BACKENDS[name](x.bfloat16(), routing, bank.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(
        got.float(), wanted, rtol=0, atol=0.02 * float(wanted.detach().abs().max())
    )


@pytest.mark.parametrize("name", ["auto", *HALF])
def test_autocast_runs_the_experts_in_bfloat16_and_keeps_float32_gradients(name: str) -> None:
    layer, x = layer_of(name), torch.randn(40, 32, requires_grad=True)
    wanted = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(
        y.float(), wanted, rtol=0, atol=0.03 * float(wanted.detach().abs().max())
    )
    y.float().square().sum().backward()
    assert layer.experts.gate_up.grad is not None
    assert layer.experts.gate_up.grad.dtype == torch.float32
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_no_gradient_and_counts_once(name: str) -> None:
    layer = layer_of(name, controller={"kind": "sign", "rate": 0.1})
    x = torch.randn(50, 32, requires_grad=True)
    y, routing = layer(x, return_routing=True)
    wanted = gradients(y, [x, layer.experts.gate_up])
    again, seen = checkpoint(
        lambda value: layer(value, return_routing=True), x, use_reentrant=False
    )
    for a, b in zip(gradients(again, [x, layer.experts.gate_up]), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(seen.counts(), routing.counts())
    before = layer.router.selection_bias().clone()
    layer.router.update([seen])
    after = layer.router.selection_bias()
    assert after is not None
    moved = (after - before).abs()
    assert float(moved.max()) == pytest.approx(0.1, rel=1e-5), "one update, whatever was recomputed"


@pytest.mark.parametrize("name", NAMES)
def test_functional_call_takes_other_weights(name: str) -> None:
    layer, x = layer_of(name), torch.randn(20, 32)
    doubled = {
        key: value.detach() * 2 for key, value in layer.named_parameters() if key == "experts.down"
    }
    torch.testing.assert_close(functional_call(layer, doubled, (x,)), layer(x) * 2)


@pytest.mark.parametrize("name", ["grouped", "cpu"])
def test_compiled_layers_equal_eager_ones(name: str) -> None:
    """In bfloat16 the grouped products are one graph; the loop breaks the graph where it learns how
    many rows each expert has.
    """
    layer, x = layer_of(name).bfloat16(), torch.randn(24, 32).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=name == "grouped")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_float32_layers_equal_eager_ones(name: str) -> None:
    layer, x = layer_of(name), torch.randn(24, 32)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_where_no_slot_is_used(name: str) -> None:
    routing, bank, x = (
        random_routing(9, 4, 2, 1.0),
        ExpertBank(4, 32, 16),
        torch.randn(9, 32, requires_grad=True),
    )
    y = BACKENDS[name](x, routing, bank)
    assert torch.equal(y, torch.zeros(9, 32))
    for gradient in torch.autograd.grad(y.sum(), [x, bank.gate_up, bank.down]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", NAMES)
def test_inference_keeps_nothing(name: str) -> None:
    layer, x = layer_of(name), torch.randn(12, 32)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y, layer(x).detach())


ODD = {  # tokens, experts, zero-compute experts, slots, unused slots
    "as many slots as experts": (5, 4, 0, 4, 0.0),
    "one token": (1, 4, 2, 2, 0.0),
    "one expert": (9, 1, 0, 1, 0.0),
    "no token": (0, 4, 0, 2, 0.0),
}


@pytest.mark.parametrize("case", [*ODD, "all to one", "all zero-compute", "weights of any sign"])
@pytest.mark.parametrize("name", NAMES)
def test_odd_batches_equal_the_oracle_with_all_gradients(name: str, case: str) -> None:
    tokens, experts, zero, slots, unused = ODD.get(case, (9, 4, 2, 2, 0.0))
    routing, bank = (
        random_routing(tokens, experts + zero, slots, unused),
        ExpertBank(experts, 32, 16),
    )
    if case == "all to one":
        routing = replace(routing, indices=torch.tensor([[2, -1]]).expand(tokens, -1))
    elif case == "all zero-compute":
        routing = replace(routing, indices=torch.tensor([[4, 5]]).expand(tokens, -1))
    elif case == "weights of any sign":
        routing = replace(
            routing,
            weights=torch.linspace(-2, 2, 18).view(9, 2).masked_fill(routing.indices == 1, 0),
        )
    routing = replace(routing, num_experts=experts, num_zero_experts=zero)
    results = []
    for backend in (BACKENDS[name], oracle):
        x = torch.ones(tokens, 32).cumsum(dim=1).cos().requires_grad_()
        own = replace(routing, weights=routing.weights.clone().requires_grad_())
        inputs = [x, own.weights, bank.gate_up, bank.down]
        y = backend(x, own, bank)
        found = [None] * 4
        if y.requires_grad:
            found = torch.autograd.grad(y.square().sum(), inputs, allow_unused=True)
        zeros = [torch.zeros_like(value) for value in inputs]
        results.append([y, *(z if g is None else g for g, z in zip(found, zeros, strict=True))])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["experts", "tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_what_needs_no_gradient_gets_none_and_changes_no_other(name: str, frozen: str) -> None:
    layer, x = layer_of(name), torch.randn(20, 32, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = {key: value.grad for key, value in layer.named_parameters()} | {"x": x.grad}
    other, fixed = copy.deepcopy(layer), frozen == "experts"
    other.zero_grad()
    other.experts.requires_grad_(not fixed)
    inside = x.detach().requires_grad_(fixed)
    other(inside).square().sum().backward()
    found = {key: value.grad for key, value in other.named_parameters()} | {"x": inside.grad}
    for key, grad in found.items():
        if key.startswith("experts") if fixed else key == "x":
            assert grad is None
        else:
            torch.testing.assert_close(grad, wanted[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_one_backend_gives_the_same_outputs_in_another(name: str) -> None:
    layer, x = layer_of(name), torch.randn(20, 32)
    other = layer_of("oracle")
    other.load_state_dict({key: value * 1 for key, value in layer.state_dict().items()})
    torch.testing.assert_close(other(x), copy.deepcopy(layer)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing_changes_no_gradient(name: str) -> None:
    layer, x = layer_of(name), torch.randn(20, 32, requires_grad=True)
    grads = []
    for y in (layer(x), checkpoint(layer, x, use_reentrant=True)):
        layer.zero_grad()
        x.grad = None
        y.square().sum().backward()
        grads.append([x.grad, layer.experts.down.grad, layer.router.weight.grad])
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", HALF)
def test_float16_under_autocast_stays_within_its_rounding(name: str) -> None:
    layer, x = layer_of(name), torch.randn(40, 32)
    wanted = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
