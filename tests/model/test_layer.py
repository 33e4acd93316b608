"""The MoE layer against its definition, and against transformers' layers with the same weights."""

from typing import Any

import pytest
import torch
from refusals import refused
from torch import nn

from moe_lab.model import DecoderConfig, MoEConfig, MoELayer
from moe_lab.model.dispatch import BACKENDS
from moe_lab.routing import (
    ROUTERS,
    ControllerConfig,
    ControllerKind,
    RouterConfig,
    RouterContext,
    ZeroExpertKind,
)

LONGCAT = RouterConfig(
    kind="longcat", num_experts=6, num_zero_experts=4, top_k=3, routed_scaling_factor=2.5
)


def test_a_token_with_zero_experts_alone_returns_its_input_times_the_sum_of_weights() -> None:
    layer = MoELayer(MoEConfig(8, 4, LONGCAT)).double()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[6:] = 1.0
    x = torch.rand(5, 8, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    assert routing.ffn_count().tolist() == [0] * 5
    torch.testing.assert_close(y, x * routing.weights.sum(dim=1, keepdim=True))


def test_zero_experts_add_no_parameters_but_their_router_rows() -> None:
    with_zero = MoELayer(MoEConfig(8, 4, LONGCAT))
    without = MoELayer(MoEConfig(8, 4, LONGCAT.replace(num_zero_experts=0)))
    numel = [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in (with_zero, without)
    ]
    assert numel[0] - numel[1] == 4 * 8


def test_moepp_zero_copy_and_constant_experts_return_what_the_paper_says() -> None:
    """Slot by slot: ``0``, ``x``, and ``a_1 x + a_2 v`` with ``[a_1, a_2] = softmax(W_c x)``."""
    config = RouterConfig(kind="moepp", num_experts=3, num_zero_experts=4, top_k=5)
    assert config.zero_kinds == (
        ZeroExpertKind.CONSTANT,
        ZeroExpertKind.CONSTANT,
        ZeroExpertKind.IDENTITY,
        ZeroExpertKind.ZERO,
    )
    layer = MoELayer(MoEConfig(8, 4, config, dispatch="oracle")).double()
    x = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    y, routing = layer(x, return_routing=True)
    real = layer.dispatch(x, routing, layer.experts)
    for token in range(11):
        wanted = real[token]
        for expert, weight in zip(
            routing.indices[token].tolist(), routing.weights[token], strict=True
        ):
            if expert == 5:
                wanted = wanted + weight * x[token]
            elif expert in (3, 4):
                share = (layer.zero_experts.mixture[expert - 3] @ x[token]).softmax(dim=0)
                wanted = wanted + weight * (
                    share[0] * x[token] + share[1] * layer.zero_experts.vector[expert - 3]
                )
        torch.testing.assert_close(y[token], wanted)
    y.square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in layer.zero_experts.parameters()
    )


def test_gates_of_shared_experts_scale_each_of_them() -> None:
    config = RouterConfig(kind="inkling", num_experts=4, top_k=2, num_shared_gates=2)
    layer = MoELayer(MoEConfig(8, 4, config, num_shared_experts=2)).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    y, routing = layer(x, return_routing=True)
    gate, up = layer.shared.gate_up.chunk(2)
    wanted = layer.dispatch(x, routing, layer.experts)
    for expert in range(2):
        rows = slice(4 * expert, 4 * expert + 4)
        hidden = torch.nn.functional.silu(x @ gate[rows].T) * (x @ up[rows].T)
        wanted = wanted + routing.shared_weights[:, expert : expert + 1] * (
            hidden @ layer.shared.down[:, rows].T
        )
    torch.testing.assert_close(y, wanted)
    with refused("num_shared_experts"):
        MoELayer(MoEConfig(8, 4, config, num_shared_experts=1))(x.float())


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_router_drives_a_layer_forward_and_backward(kind: str) -> None:
    """Kinds that need more than the defaults get it here; the oracle and the fast dispatch must
    agree on what each selects.
    """
    needs: dict[str, dict[str, Any]] = {
        "hash": {"vocab_size": 50},
        "token_lookup": {"vocab_size": 50},
        "scored_hash": {"vocab_size": 50},
    }
    needs |= {
        "zaya": {"num_zero_experts": 1, "top_k": 1},
        "moepp": {"num_zero_experts": 2},
        "adamoe": {"num_zero_experts": 2},
    }
    needs |= {"mixture_of_depths": {"num_experts": 1, "top_k": 1}, "base": {"top_k": 1}}
    needs |= {"llama4": {"top_k": 1}, "switch": {"top_k": 1}, "inkling": {"num_shared_gates": 1}}
    options: dict[str, Any] = {"kind": kind, "num_experts": 4, "top_k": 2} | needs.get(kind, {})
    config = MoEConfig(8, 4, RouterConfig(**options), num_shared_experts=1)
    torch.manual_seed(0)
    fast, plain = (
        MoELayer(config.replace(dispatch=name)).double().eval() for name in ("auto", "oracle")
    )
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(16, 8, dtype=torch.float64)
    context = RouterContext(token_ids=torch.randint(0, 50, (16,)), sequence_length=8)
    results = []
    for layer in (fast, plain):
        torch.manual_seed(1)
        inputs = x.clone().requires_grad_()
        y, routing = layer(inputs, context, return_routing=True)
        routing.check()
        assert int(routing.counts().sum()) == int((routing.indices >= 0).sum())
        y.square().sum().backward()
        results.append((y, inputs.grad))
    torch.testing.assert_close(results[0], results[1])


def test_shared_experts_are_added_to_every_token() -> None:
    config = MoEConfig(8, 4, RouterConfig(num_experts=4, top_k=2), num_shared_experts=2)
    layer = MoELayer(config).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    whole = layer(x)
    shared = layer.shared
    assert shared is not None
    layer.shared = None
    torch.testing.assert_close(whole - layer(x), shared(x))


def test_the_layer_keeps_the_shape_and_returns_the_routing_on_request() -> None:
    layer = MoELayer(MoEConfig(8, 4, RouterConfig(num_experts=4, top_k=2)))
    y, routing = layer(torch.randn(2, 3, 8), return_routing=True)
    assert y.shape == (2, 3, 8)
    assert routing.indices.shape == (6, 2)
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)


def test_a_wrong_width_names_both_widths() -> None:
    layer = MoELayer(MoEConfig(8, 4, RouterConfig(num_experts=4, top_k=2)))
    with refused("d_model"):
        layer(torch.randn(2, 7))


def test_one_oracle_dispatched_layer_equals_the_fast_one_after_a_training_step() -> None:
    torch.manual_seed(0)
    fast, plain = (
        MoELayer(MoEConfig(8, 4, LONGCAT, num_shared_experts=1, dispatch=name)).double()
        for name in ("auto", "oracle")
    )
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(20, 8, dtype=torch.float64)
    for layer in (fast, plain):
        layer(x).square().sum().backward()
    for got, wanted in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)


def _copy(layer: MoELayer, gate: nn.Parameter, gate_up: nn.Parameter, down: nn.Parameter) -> None:
    with torch.no_grad():
        layer.router.weight.copy_(gate)
        layer.experts.gate_up.copy_(gate_up[: layer.experts.num_experts])
        layer.experts.down.copy_(down)


@pytest.mark.hf
def test_softmax_topk_layer_equals_transformers_qwen3_moe() -> None:
    qwen = pytest.importorskip(
        "transformers.models.qwen3_moe.modeling_qwen3_moe", reason="needs the extra hf"
    )
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    theirs = qwen.Qwen3MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MoELayer(MoEConfig(16, 12, RouterConfig(num_experts=8, top_k=3, norm_topk_prob=True)))
    _copy(ours, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj)
    x = torch.randn(2, 9, 16)
    wanted = theirs(x)
    torch.testing.assert_close(
        ours(x), wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.hf
def test_longcat_layer_equals_transformers_longcat_flash() -> None:
    longcat = pytest.importorskip(
        "transformers.models.longcat_flash.modeling_longcat_flash", reason="needs the extra hf"
    )
    from transformers import LongcatFlashConfig

    config = LongcatFlashConfig(
        hidden_size=16,
        expert_ffn_hidden_size=12,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_topk=3,
        routed_scaling_factor=6.0,
    )
    config._experts_implementation = "eager"
    theirs = longcat.LongcatFlashMoE(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.router.e_score_correction_bias.normal_(std=0.05)
    router = RouterConfig(
        kind="longcat",
        num_experts=8,
        num_zero_experts=4,
        top_k=3,
        routed_scaling_factor=6.0,
        controller=ControllerConfig(kind=ControllerKind.FIXED),
    )
    ours = MoELayer(MoEConfig(16, 12, router))
    _copy(
        ours, theirs.router.classifier.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj
    )
    assert ours.router.controller is not None
    ours.router.controller.bias.copy_(theirs.router.e_score_correction_bias)
    x = torch.randn(2, 9, 16)
    wanted = theirs(x)
    torch.testing.assert_close(
        ours(x), wanted[0] if isinstance(wanted, tuple) else wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["moepp", "zaya"])
def test_every_parameter_of_a_first_layer_has_a_gradient(kind: str) -> None:
    """Plain DDP stops at the second step where a parameter has none."""
    zero = {"moepp": 3, "zaya": 1}[kind]
    config = MoEConfig(8, 4, RouterConfig(kind=kind, num_experts=4, top_k=2, num_zero_experts=zero))
    decoder = DecoderConfig(
        vocab_size=11, num_layers=2, d_model=8, num_heads=2, context_length=8, moe=config
    ).build()
    output = decoder(torch.randint(11, (2, 8)), torch.randint(11, (2, 8)))
    output.loss.backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("dispatch", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_runs_on_the_meta_device_forward_and_backward(
    dtype: torch.dtype, dispatch: str
) -> None:
    router = RouterConfig(num_experts=4, top_k=2)
    config = MoEConfig(16, 16, router, num_shared_experts=1, dispatch=dispatch)
    with torch.device("meta"):
        layer = config.build().to(dtype)
        x = torch.randn(12, 16, dtype=dtype, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((12, 16), dtype)
    assert x.grad is not None
    assert all(p.grad is not None for p in layer.experts.parameters())
