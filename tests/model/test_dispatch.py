"""Every dispatch backend equals the per-token oracle, forward and gradients, in float64."""

import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor

from moe_lab.errors import ConfigError
from moe_lab.model import ExpertBank, MoEConfig, MoELayer
from moe_lab.model.dispatch import BACKENDS, backend, native, oracle
from moe_lab.model.dispatch.grouped import can_group
from moe_lab.model.dispatch.order import slot_order
from moe_lab.routing import RouterConfig, Routing


class Weights(NamedTuple):
    gate_up: Tensor
    down: Tensor


needs_native = pytest.mark.skipif(not native.available(), reason=str(native.problem()))
FAST = sorted(set(BACKENDS) - {"oracle", "liger", "quack"})  # test_liger.py, test_quack.py


def random_routing(
    tokens: int,
    slots: int,
    experts: int,
    zero: int,
    unused: float,
    seed: int,
    on_input: bool = False,
) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, experts + zero, generator=generator)
    indices = noise.argsort(dim=1)[:, :slots]
    indices = torch.where(torch.rand(tokens, slots, generator=generator) < unused, -1, indices)
    weights = torch.rand(tokens, slots, generator=generator, dtype=torch.float64) * (indices >= 0)
    scores = noise.double().softmax(dim=1)
    return Routing(
        indices,
        weights.requires_grad_(),
        scores.log(),
        scores,
        experts,
        zero,
        weights_on_input=on_input,
    )


def run(name: str, x_TD: Tensor, routing: Routing, bank: ExpertBank) -> list[Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    weights = routing.weights.detach().clone().requires_grad_()
    own = Routing(
        routing.indices,
        weights,
        routing.logits,
        routing.scores,
        routing.num_experts,
        routing.num_zero_experts,
        weights_on_input=routing.weights_on_input,
    )
    y_TD = BACKENDS[name](x_TD, own, bank)
    weighting = torch.arange(y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD).cos()
    inputs = [x_TD, weights, bank.gate_up, bank.down]
    if not y_TD.requires_grad:
        return [y_TD, *(torch.zeros_like(value) for value in inputs)]
    gradients = torch.autograd.grad((y_TD * weighting).sum(), inputs, allow_unused=True)
    return [
        y_TD.detach(),
        *(torch.zeros_like(v) if g is None else g for g, v in zip(gradients, inputs, strict=True)),
    ]


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 23),
    experts=st.integers(1, 9),
    zero=st.integers(0, 4),
    slots=st.integers(1, 5),
    unused=st.sampled_from([0.0, 0.3, 1.0]),
    on_input=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backend_equals_the_oracle_with_all_gradients(
    name: str,
    tokens: int,
    experts: int,
    zero: int,
    slots: int,
    unused: float,
    on_input: bool,
    seed: int,
) -> None:
    routing = random_routing(
        tokens, min(slots, experts + zero), experts, zero, unused, seed, on_input
    )
    torch.manual_seed(seed)
    bank = ExpertBank(experts, d_model=6, d_expert=5).double()
    x_TD = torch.randn(tokens, 6, dtype=torch.float64)
    for got, wanted in zip(
        run(name, x_TD, routing, bank), run("oracle", x_TD, routing, bank), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAST)
def test_backend_takes_non_contiguous_tokens(name: str) -> None:
    routing = random_routing(12, 2, 4, 0, 0.0, seed=1)
    bank = ExpertBank(4, 6, 5).double()
    x_TD = torch.randn(6, 12, dtype=torch.float64).T
    assert not x_TD.is_contiguous()
    torch.testing.assert_close(BACKENDS[name](x_TD, routing, bank), oracle(x_TD, routing, bank))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", ["cpu", "grouped"])
def test_gradients_of_gradients_are_right(name: str, on_input: bool) -> None:
    """Hessian products and gradient penalties: ``create_graph=True``."""
    routing = random_routing(5, 2, 3, 1, 0.2, seed=4)
    bank = ExpertBank(3, 4, 3).double()

    def f(x_TD: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        own = replace(routing, weights=weights, weights_on_input=on_input)
        return BACKENDS[name](x_TD, own, Weights(gate_up, down))

    inputs = (
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        torch.rand(5, 2, dtype=torch.float64, requires_grad=True),
        bank.gate_up.detach().requires_grad_(),
        bank.down.detach().requires_grad_(),
    )
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("name", ["cpu", "grouped"])
def test_a_gradient_penalty_equals_the_oracles_in_float32(name: str) -> None:
    routing = random_routing(16, 2, 4, 0, 0.2, seed=6)
    routing = replace(routing, weights=routing.weights.detach().float())
    bank = ExpertBank(4, 16, 16)
    x_TD = torch.randn(16, 16, requires_grad=True)

    def penalty(backend: str) -> list[Tensor]:
        y_TD = BACKENDS[backend](x_TD, routing, bank)
        (slope,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [x_TD, bank.gate_up, bank.down]))

    for got, wanted in zip(penalty(name), penalty("oracle"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cpu", "grouped"])
def test_a_gradient_penalty_through_a_router_counts_each_path_once(name: str) -> None:
    """Gate weights are a function of the tokens too."""

    def penalty(dispatch: str) -> list[Tensor]:
        torch.manual_seed(0)
        router = RouterConfig(num_experts=4, top_k=2)
        layer = MoELayer(MoEConfig(6, 5, router, dispatch=dispatch)).double()
        x_TD = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
        y_TD = layer(x_TD)
        (slope,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
        return [slope, *torch.autograd.grad(slope.square().sum(), list(layer.parameters()))]

    for got, wanted in zip(penalty(name), penalty("oracle"), strict=True):
        torch.testing.assert_close(got, wanted)


@needs_native
def test_the_compiled_backend_refuses_derivatives_that_it_does_not_have() -> None:
    routing = random_routing(5, 2, 3, 1, 0.2, seed=4)
    bank = ExpertBank(3, 4, 3).double().requires_grad_(False)
    x_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y_TD = BACKENDS["native"](x_TD, routing, bank)
    (slope,) = torch.autograd.grad(y_TD.square().sum(), x_TD, create_graph=True)
    with refused("dispatch"):
        torch.autograd.grad(slope.square().sum(), x_TD)
    with refused("dispatch"):  # it would be 0
        torch.func.jvp(lambda x: BACKENDS["native"](x, routing, bank), (x_TD,), (x_TD,))


@needs_native
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("gate_up", lambda x, r, b: (x.float(), r, b)),
        ("gate_up", lambda x, r, b: (x[:, :2], r, b)),
        ("gate_up", lambda x, r, b: (x, r, Weights(b.gate_up, b.down[..., 1:]))),
        ("gate_up", lambda x, r, b: (x, r, Weights(b.gate_up[1:], b.down[1:]))),
        ("down", lambda x, r, b: (x, r, Weights(b.gate_up, b.down.float()))),
        ("down", lambda x, r, b: (x, r, Weights(b.gate_up, b.down.to("meta")))),
        ("indices", lambda x, r, b: (x[1:], r, b)),
        ("indices", lambda x, r, b: (x, replace(r, indices=r.indices.int()), b)),
        ("weights", lambda x, r, b: (x, replace(r, weights=r.weights[:, :1]), b)),
    ],
)  # fmt: skip
def test_tensors_that_compiled_code_would_misread_are_refused(field: str, change: Any) -> None:
    routing, bank = random_routing(5, 2, 3, 1, 0.2, seed=4), ExpertBank(3, 4, 3).double()
    with refused(field):
        BACKENDS["native"](*change(torch.randn(5, 4, dtype=torch.float64), routing, bank))


class _AsOnBlackwell(torch.autograd.Function):
    """``grouped_mm`` that leaves in memory what it may leave there: rows past the last end, in both
    directions, and the weights' gradient of experts without rows.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, ends)
        found = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
        found[int(ends[-1]) :] = torch.nan
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        rows, weights, ends = ctx.saved_tensors
        used = int(ends[-1])
        with torch.enable_grad():
            inputs = [value.detach().requires_grad_() for value in (rows[:used], weights)]
            y = torch.nn.functional.grouped_mm(inputs[0], inputs[1], offs=ends)
            grad_rows, grad_weights = torch.autograd.grad(y, inputs, grad[:used])
        whole = torch.full_like(rows, torch.nan)
        whole[:used] = grad_rows
        empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return whole, grad_weights.masked_fill(empty.view(-1, 1, 1), 7.0), None


@pytest.mark.parametrize("on_input", [False, True])
def test_what_grouped_mm_leaves_in_memory_reaches_nothing(
    on_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["moe_lab.model.dispatch.grouped"]
    real = torch.nn.functional

    class Functional:
        grouped_mm = staticmethod(lambda a, b, offs: _AsOnBlackwell.apply(a, b, offs))

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    monkeypatch.setattr(module, "F", Functional())
    monkeypatch.setattr(module, "leaves_empty_experts", lambda x_TD: True)
    routing = random_routing(12, 2, 6, 2, 0.3, seed=3, on_input=on_input)
    routing = replace(routing, indices=routing.indices.masked_fill(routing.indices == 2, -1))
    routing = replace(routing, weights=routing.weights.detach().float())
    bank, x_TD = ExpertBank(6, 16, 8), torch.randn(12, 16)
    for got, wanted in zip(
        run("grouped", x_TD, routing, bank), run("oracle", x_TD, routing, bank), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_weights_that_grouped_mm_refuses_take_one_product_per_expert() -> None:
    """Too many experts; a flat parameter's part that begins between two 16 bytes; a slice."""
    flat = torch.randn(1 + 4 * 16 * 16 + 4 * 16 * 8)
    split = 1 + 4 * 16 * 16
    parts = Weights(flat[1:split].view(4, 16, 16), flat[split:].view(4, 16, 8))
    slices = Weights(torch.randn(4, 16, 32)[..., ::2], torch.randn(4, 16, 8))
    turned = Weights(torch.randn(4, 16, 16).mT, torch.randn(4, 8, 16).mT)
    x_TD, routing = torch.randn(9, 16), random_routing(9, 2, 4, 0, 0.0, seed=3)
    for bank, fits in ((parts, False), (slices, False), (turned, True)):
        assert can_group(x_TD, bank) == fits
        torch.testing.assert_close(
            BACKENDS["grouped"](x_TD, routing, bank), oracle(x_TD, routing, bank)
        )
    many = Weights(*(torch.empty(1024, 16, width, device="meta") for width in (16, 8)))
    assert not can_group(x_TD, many)


def test_more_slots_than_int32_counts_are_refused() -> None:
    many = torch.zeros(1, 1, dtype=torch.int64, device="meta").expand(2**31, 1)
    with pytest.raises(ConfigError, match="at most 2147483647 slots"):
        slot_order(Routing(many, many, many, many, 3))


@pytest.mark.parametrize("name", FAST)
def test_backend_passes_gradcheck(name: str) -> None:
    routing = random_routing(5, 2, 3, 1, 0.2, seed=2)
    bank = ExpertBank(3, 4, 3).double()

    def f(x_TD: Tensor, weights: Tensor) -> Tensor:
        own = Routing(routing.indices, weights, routing.logits, routing.scores, 3, 1)
        return BACKENDS[name](x_TD, own, bank)

    x_TD = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x_TD, routing.weights.detach().requires_grad_()))


def test_an_unknown_backend_is_named_with_the_known_ones() -> None:
    with refused("a dispatch backend"):
        backend("warp")
