"""Backends, the decoder, a run and a capture on a CUDA device give what they give on a CPU.

``MOE_LAB_DEVICE`` names the device (default cuda); without it these tests are skipped. With ``cpu``
they rehearse.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_dispatch import random_routing
from torch import Tensor

from moe_lab.model import Decoder, DecoderConfig, ExpertBank, MoEConfig
from moe_lab.model.dispatch import BACKENDS
from moe_lab.routing import RouterConfig, Routing
from moe_lab.text import TextConfig
from moe_lab.text.tokenizer import TokenizerKind
from moe_lab.trace import capture, open_trace
from moe_lab.training import RunConfig, train

DEVICE = os.environ.get("MOE_LAB_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no CUDA device"
)
NAMES = sorted(set(BACKENDS) - {"oracle", "native"})
OBSTACLES = {
    name: sys.modules[f"moe_lab.model.dispatch.{name}"].obstacle for name in ("liger", "quack")
}


def moved(routing: Routing, device: str, dtype: torch.dtype) -> Routing:
    tensors = {
        name: getattr(routing, name).detach().to(device, dtype)
        for name in ("weights", "logits", "scores")
    }
    return replace(routing, indices=routing.indices.to(device), **tensors)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("unused", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_equals_the_oracle_on_a_cpu(
    name: str, dtype: torch.dtype, unused: float, on_input: bool
) -> None:
    torch.manual_seed(0)
    exact = ExpertBank(6, d_model=64, d_expert=32).double()
    x_TD = torch.randn(200, 64, dtype=torch.float64)
    routing = random_routing(200, 3, 6, 2, unused, seed=1, on_input=on_input)
    if unused:  # an expert without a token, and one with a single one
        first, second = routing.indices == 0, routing.indices == 1
        second[int(second.any(dim=1).nonzero()[0])] = False
        routing = replace(routing, indices=routing.indices.masked_fill(first | second, -1))
    there = ExpertBank(6, d_model=64, d_expert=32)
    there.load_state_dict(exact.state_dict())
    there.to(DEVICE, dtype)
    if name in OBSTACLES and (why := OBSTACLES[name](x_TD.to(DEVICE, dtype), there)):
        pytest.skip(f"{name}: {why}")

    def results(run: str, x: Tensor, own: Routing, bank: ExpertBank) -> list[Tensor]:
        inputs = [x.requires_grad_(), own.weights.requires_grad_(), bank.gate_up, bank.down]
        y = BACKENDS[run](x, own, bank)
        grads = torch.autograd.grad(y.sin().sum(), inputs)
        return [value.detach().double().cpu() for value in (y, *grads)]

    got = results(name, x_TD.to(DEVICE, dtype, copy=True), moved(routing, DEVICE, dtype), there)
    want = results("oracle", x_TD.clone(), moved(routing, "cpu", torch.float64), exact)
    # float32 products may run as TF32 (10 bits); bfloat16 has 8.
    bound = 5e-3 if dtype == torch.float32 else 5e-2
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < bound


@pytest.mark.parametrize(
    ("tokens", "slots", "unused"), [(0, 2, 0.0), (1, 2, 0.0), (9, 2, 1.0), (9, 6, 0.0)]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_takes_odd_batches(name: str, tokens: int, slots: int, unused: float) -> None:
    """No token, one token, nothing that runs, and as many slots as experts."""
    torch.manual_seed(0)
    bank = ExpertBank(6, d_model=64, d_expert=32).to(DEVICE, torch.bfloat16)
    x_TD = torch.randn(tokens, 64, device=DEVICE, dtype=torch.bfloat16)
    if name in OBSTACLES and (why := OBSTACLES[name](x_TD, bank)):
        pytest.skip(f"{name}: {why}")
    routing = moved(random_routing(tokens, slots, 6, 0, unused, seed=1), DEVICE, torch.bfloat16)
    results = []
    for run in (BACKENDS[name], BACKENDS["oracle"]):
        x = x_TD.clone().requires_grad_()
        y = run(x, routing, bank)
        inputs = [x, bank.gate_up, bank.down]
        found = [None] * 3
        if y.requires_grad:
            found = torch.autograd.grad(y.float().sin().sum(), inputs, allow_unused=True)
        zeros = [torch.zeros_like(value) for value in inputs]
        results.append(
            [y.detach(), *(z if g is None else g for g, z in zip(found, zeros, strict=True))]
        )
    for a, b in zip(*results, strict=True):
        assert float((a - b).float().norm()) <= 5e-2 * float(b.float().norm())


def small(zero: int = 2) -> DecoderConfig:
    router = RouterConfig(kind="longcat", num_experts=6, num_zero_experts=zero, top_k=3)
    return DecoderConfig(
        vocab_size=257,
        d_model=64,
        num_layers=2,
        num_heads=2,
        context_length=64,
        moe=MoEConfig(64, 32, router),
    )


def test_a_decoder_has_the_losses_that_it_has_on_a_cpu() -> None:
    torch.manual_seed(0)
    here = Decoder(small())
    there = Decoder(small())
    there.load_state_dict(here.state_dict())
    there.to(DEVICE)
    ids = torch.randint(0, 256, (4, 33))
    ours, theirs = (
        model(ids.to(device)[:, :-1], ids.to(device)[:, 1:]).loss
        for model, device in ((here, "cpu"), (there, DEVICE))
    )
    assert ours is not None
    assert theirs is not None
    assert theirs.item() == pytest.approx(ours.item(), rel=2e-3)


def test_a_capture_counts_every_slot(tmp_path: Path) -> None:
    model = Decoder(small()).to(DEVICE).eval()
    with torch.no_grad(), capture(model, tmp_path / "trace", losses=True):
        model(torch.randint(0, 256, (3, 20), device=DEVICE))
    counts = open_trace(tmp_path / "trace").check().counts()
    assert counts.group_by("layer").sum()["count"].to_list() == [180, 180]


def test_a_run_trains(tmp_path: Path) -> None:
    text = TextConfig(
        corpus=str(Path(__file__).parents[2] / "examples"), tokenizer=TokenizerKind.BYTE
    )
    config = RunConfig(
        model=small(), text=text, seq_length=32, train_tokens=4096, eval_tokens=500, device=DEVICE
    )
    result = train(config, tmp_path / "run")
    assert 2 < result.record["loss"] < 6
