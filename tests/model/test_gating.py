"""Clamped SwiGLU: every dispatch backend equals the oracle with its gradients, and a layer with the
weights of DeepSeek-V4's or gpt-oss's experts equals transformers' module.
"""

import importlib
from typing import Any, NamedTuple

import pytest
import torch
from refusals import refused
from test_dispatch import FAST, Routing, random_routing, run
from torch import Tensor

from moe_lab.model import ExpertBank, MoEConfig
from moe_lab.model.dispatch import BACKENDS, native
from moe_lab.model.dispatch.bank import SWIGLU, Gating
from moe_lab.model.layer import MoELayer
from moe_lab.routing import RouterConfig

V4 = Gating(limit=0.7)
GPT_OSS = Gating(limit=0.7, alpha=1.702, offset=1.0)
GATINGS = {"v4": V4, "gpt_oss": GPT_OSS, "alpha alone": Gating(alpha=1.702)}


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
@pytest.mark.parametrize("name", FAST)
def test_backend_equals_the_oracle_with_all_gradients(
    name: str, gating: Gating, on_input: bool
) -> None:
    routing = random_routing(23, 3, 5, 2, 0.2, seed=3, on_input=on_input)
    torch.manual_seed(0)
    bank = ExpertBank(5, 6, 7, gating).double()
    x_TD = 2 * torch.randn(23, 6, dtype=torch.float64)
    act = torch.einsum("td,efd->etf", x_TD, bank.gate_up.detach())
    assert (act.abs() > 0.7).any()  # the limit is met
    assert (act.abs() < 0.7).any()
    for got, wanted in zip(
        run(name, x_TD, routing, bank), run("oracle", x_TD, routing, bank), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["cpu", "grouped", "native"])
def test_gradients_are_right(name: str) -> None:
    if name == "native" and not native.available():
        pytest.skip("the experts are not compiled here")
    routing = random_routing(4, 2, 3, 0, 0.0, seed=5)
    torch.manual_seed(1)
    x_TD = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bank = ExpertBank(3, 3, 4, GPT_OSS).double()

    class Weights(NamedTuple):
        gate_up: Tensor
        down: Tensor
        gating: Gating

    def layer(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return BACKENDS[name](x_TD, routing, Weights(gate_up, down, GPT_OSS))

    inputs = (x_TD, bank.gate_up.detach().requires_grad_(), bank.down.detach().requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs)
    if name != "native":  # it refuses second-order gradients
        assert torch.autograd.gradgradcheck(layer, inputs)


def test_nan_stays_nan() -> None:
    routing = random_routing(2, 1, 1, 0, 0.0, seed=0)
    bank = ExpertBank(1, 3, 4, V4).double()
    x_TD = torch.full((2, 3), torch.nan, dtype=torch.float64)
    with torch.no_grad():
        for name in ["oracle", *FAST]:
            assert BACKENDS[name](x_TD, routing, bank).isnan().all(), name


def routed(ids: Tensor, weights: Tensor, experts: int) -> Routing:
    scores = torch.rand(len(ids), experts)
    return Routing(ids, weights, scores.log(), scores, experts, 0)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["oracle", *FAST])
@pytest.mark.parametrize("family", ["deepseek_v4", "gpt_oss"])
def test_experts_equal_those_of_transformers(family: str, name: str) -> None:
    """gpt-oss's biases are zero here: ``ExpertBank`` has none."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    package = f"transformers.models.{family}"
    configurations = importlib.import_module(f"{package}.configuration_{family}")
    classes = importlib.import_module(f"{package}.modeling_{family}")
    stem = {"deepseek_v4": "DeepseekV4", "gpt_oss": "GptOss"}[family]
    sizes = {"hidden_size": 16, "num_local_experts": 4, "swiglu_limit": 0.7}
    width = {"deepseek_v4": "moe_intermediate_size", "gpt_oss": "intermediate_size"}[family]
    experts = {"n_routed_experts": 4} if family == "deepseek_v4" else {}
    config = getattr(configurations, f"{stem}Config")(**sizes, **experts, **{width: 8})
    config._experts_implementation = "eager"
    theirs: Any = getattr(classes, f"{stem}Experts")(config).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            drawn = torch.randn_like(parameter) / 3
            parameter.copy_(torch.zeros_like(drawn) if "bias" in key else drawn)
    bank = ExpertBank(4, 16, 8, GPT_OSS if family == "gpt_oss" else V4).double()
    with torch.no_grad():
        gate_up, down = theirs.gate_up_proj, theirs.down_proj
        if family == "gpt_oss":  # [E, D, 2F] with gate and up in turn, and [E, F, D]
            turned = gate_up.transpose(1, 2)
            gate_up = torch.cat([turned[:, ::2], turned[:, 1::2]], dim=1)
            down = down.transpose(1, 2)
        bank.gate_up.copy_(gate_up)
        bank.down.copy_(down)
    x_TD = torch.randn(9, 16, dtype=torch.float64)
    ids = torch.rand(9, 4).argsort(dim=1)[:, :2]
    weights = torch.rand(9, 2, dtype=torch.float64)
    with torch.no_grad():
        got = BACKENDS[name](x_TD, routed(ids, weights, 4), bank)
        torch.testing.assert_close(got, theirs(x_TD, ids, weights), rtol=1e-10, atol=1e-12)


def test_a_layer_takes_the_option_and_a_plain_one_keeps_its_hash() -> None:
    router = RouterConfig(num_experts=4, top_k=2)
    plain = MoEConfig(8, 6, router, num_shared_experts=1)
    assert "swiglu_limit" not in plain.to_dict()
    clamped = plain.replace(swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_offset=1.0)
    assert MoEConfig.from_dict(clamped.to_dict()) == clamped
    assert clamped.hash() != plain.hash()
    layer = clamped.build()
    assert isinstance(layer, MoELayer)
    assert layer.experts.gating == layer.shared.gating == Gating(7.0, 1.702, 1.0)
    assert plain.build().experts.gating == SWIGLU
    assert layer(torch.randn(3, 8)).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).isfinite().all()
    with refused("swiglu_limit"):
        plain.replace(swiglu_limit=-1.0)
