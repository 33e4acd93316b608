"""Clamped SwiGLU and biases: every dispatch backend equals the oracle with its gradients, and
equals transformers' modules with the weights of DeepSeek-V4's or gpt-oss's experts.
"""

import importlib
import sys
from typing import Any

import pytest
import torch
from quack_stand_in import STAND_IN
from refusals import refused
from test_dispatch import FAST, Routing, random_routing, run
from test_liger import plain_kernels
from torch import Tensor

from moe_lab.model import ExpertBank, MoEConfig
from moe_lab.model.dispatch import BACKENDS, native
from moe_lab.model.dispatch.bank import SWIGLU, Biases, Gating, Weights
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


@pytest.mark.parametrize("name", ["liger", "quack"])
def test_kernels_of_other_packages_take_biases_and_refuse_the_clamp(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With plain functions of the kernels' contracts; gpt-oss has both."""
    module = sys.modules[f"moe_lab.model.dispatch.{name}"]
    stand_in = {"liger": plain_kernels, "quack": STAND_IN}[name]
    monkeypatch.setattr(module, "kernels", lambda: stand_in)
    routing = random_routing(11, 3, 4, 2, 0.2, seed=3)
    x_TD = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    with refused("dispatch") as error:
        BACKENDS[name](x_TD, routing, ExpertBank(4, 16, 8, GPT_OSS, bias=True).double())
    assert "without a limit" in str(error.value)
    monkeypatch.setattr(module, "obstacle", lambda x_TD, bank: "")
    bank = ExpertBank(4, 16, 8, bias=True).double()
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [x_TD, routing.weights.requires_grad_(), *bank.parameters()]
    both = [
        [y_TD, *torch.autograd.grad(y_TD.sin().sum(), inputs)]
        for y_TD in (BACKENDS[backend](x_TD, routing, bank) for backend in (name, "oracle"))
    ]
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.hf
@pytest.mark.parametrize("name", ["oracle", *FAST])
@pytest.mark.parametrize("family", ["deepseek_v4", "gpt_oss"])
def test_experts_equal_those_of_transformers(family: str, name: str) -> None:
    """Outputs and every gradient, biases included."""
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
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    gate_up, down, gating, biases = theirs.gate_up_proj, theirs.down_proj, V4, None
    if family == "gpt_oss":  # [E, D, 2F] with gate and up in turn, and [E, F, D]
        gating = GPT_OSS
        turned, bias = gate_up.transpose(1, 2), theirs.gate_up_proj_bias
        gate_up = torch.cat([turned[:, ::2], turned[:, 1::2]], dim=1)
        down = down.transpose(1, 2)
        biases = Biases(torch.cat([bias[:, ::2], bias[:, 1::2]], dim=1), theirs.down_proj_bias)
    x_TD = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    ids = torch.rand(9, 4).argsort(dim=1)[:, :2]
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    inputs = [x_TD, weights, *theirs.parameters()]
    bank = Weights(gate_up, down, gating, biases)
    outputs = BACKENDS[name](x_TD, routed(ids, weights, 4), bank), theirs(x_TD, ids, weights)
    both = [[y, *torch.autograd.grad(y.square().sum(), inputs)] for y in outputs]
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FAST)
def test_backend_with_biases_equals_the_plain_sum(name: str) -> None:
    """Unused and zero-compute slots add no bias."""
    routing = random_routing(23, 3, 5, 2, 0.2, seed=4)
    torch.manual_seed(2)
    bank = ExpertBank(5, 6, 7, GPT_OSS, bias=True).double()
    with torch.no_grad():
        for bias in bank.biases or ():
            bias.normal_()
    x_TD = torch.randn(23, 6, dtype=torch.float64)
    wanted = torch.zeros_like(x_TD)
    for token, (ids, weights) in enumerate(zip(routing.indices, routing.weights, strict=True)):
        for expert, weight in zip(ids.tolist(), weights, strict=True):
            if 0 <= expert < 5:
                act = bank.gate_up[expert] @ x_TD[token] + bank.gate_up_bias[expert]
                out = bank.down[expert] @ GPT_OSS.hidden(act) + bank.down_bias[expert]
                wanted[token] += weight.detach() * out.detach()
    torch.testing.assert_close(BACKENDS[name](x_TD, routing, bank), wanted)
    with refused("expert_bias"):
        BACKENDS[name](x_TD, random_routing(23, 3, 5, 2, 0.2, seed=4, on_input=True), bank)


@pytest.mark.hf
def test_a_layer_equals_that_of_gpt_oss() -> None:
    """Router with its bias, softmax over the chosen ones, clamped experts with biases."""
    pytest.importorskip("transformers", reason="needs the extra hf")
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=4,
                          num_experts_per_tok=2)  # fmt: skip
    config._experts_implementation = "eager"
    theirs = GptOssMLP(config).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours = MoELayer(MoEConfig(16, 8, RouterConfig.from_hf(config), swiglu_limit=7.0,
                              swiglu_alpha=1.702, swiglu_offset=1.0,
                              expert_bias=True)).double()  # fmt: skip
    with torch.no_grad():
        ours.router.load_hf(theirs.router)
        experts = theirs.experts
        for mine, parameter in (("gate_up", experts.gate_up_proj.transpose(1, 2)),
                                ("gate_up_bias", experts.gate_up_proj_bias)):  # fmt: skip
            parts = torch.cat([parameter[:, ::2], parameter[:, 1::2]], dim=1)
            getattr(ours.experts, mine).copy_(parts)
        ours.experts.down.copy_(experts.down_proj.transpose(1, 2))
        ours.experts.down_bias.copy_(experts.down_proj_bias)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=1e-8, atol=1e-10)
    assert sum(p.numel() for p in ours.parameters()) == sum(
        piece.params for piece in ours.config.pieces()
    )


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
    assert "expert_bias" not in clamped.to_dict()
    biased = plain.replace(expert_bias=True)
    assert MoEConfig.from_dict(biased.to_dict()) == biased
    with torch.autocast("cpu", torch.bfloat16):
        assert biased.build()(torch.randn(3, 8)).isfinite().all()
    with refused("swiglu_limit"):
        plain.replace(swiglu_limit=-1.0)
