"""Clipping leaves short gradients alone and equals torch's where they are too long, also with norms
that the backward pass has added up.
"""

import copy

import pytest
import torch
from torch import nn

from moe_lab.cpu_kernels.noted_squares import noted_squares
from moe_lab.model import ExpertBank, MoEConfig, MoELayer
from moe_lab.model.dispatch import native
from moe_lab.routing import RouterConfig
from moe_lab.training import keep_freed_memory
from moe_lab.training.optimizer import clip_gradients


def model_with_gradients(scale: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    (model(torch.randn(11, 7)).square().mean() * scale).backward()
    return model


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_equals_torchs(scale: float) -> None:
    ours, theirs = model_with_gradients(scale), model_with_gradients(scale)
    norm = clip_gradients(ours, 1.0)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=0)


def test_a_nan_gradient_is_not_taken_for_a_short_one() -> None:
    model = model_with_gradients(1.0)
    next(model.parameters()).grad.fill_(float("nan"))
    assert clip_gradients(model, 1.0).isnan()
    assert all(parameter.grad.isnan().all() for parameter in model.parameters())


def test_a_model_without_gradients_has_no_norm() -> None:
    assert float(clip_gradients(copy.deepcopy(nn.Linear(2, 2)), 1.0)) == 0.0


def test_tensors_live_on_after_memory_is_kept() -> None:
    keep_freed_memory()
    blocks = [torch.ones(1 << 20) for _ in range(8)]
    del blocks[::2]
    assert [float(block.sum()) for block in blocks] == [float(1 << 20)] * 4


@pytest.mark.skipif(not native.available(), reason=f"no compiled experts: {native.problem()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    ["none", "a second batch", "in place", "replaced", "a bank in two layers", "compiled"],
)
def test_the_norm_of_the_gradients_is_of_what_they_are_now(change: str, dtype: torch.dtype) -> None:
    """The backward pass notes the squares of a bank's gradient, with experts of odd widths, of many
    blocks of rows and of none.
    """
    torch.manual_seed(0)
    router = RouterConfig(num_experts=40, top_k=1)
    layers = nn.Sequential(*(MoELayer(MoEConfig(37, 131, router)) for _ in range(2))).to(dtype)
    first, second = layers
    assert isinstance(first.experts, ExpertBank)
    if change == "a bank in two layers":
        second.experts = first.experts
    if change == "replaced":
        first.experts.down.register_hook(lambda gradient: gradient * 2)
    x_TD = torch.randn(600, 37, dtype=dtype)
    x_TD[:550] = x_TD[0]
    run = torch.compile(layers, backend="aot_eager") if change == "compiled" else layers
    run(x_TD).square().sum().backward()
    if change == "a second batch":
        run(x_TD).sum().backward()
    if change == "in place":
        first.experts.down.grad.mul_(3)
    bank = [parameter.grad for parameter in first.experts.parameters()]
    noted = [one is not None and noted_squares(one) is not None for one in bank]
    assert noted == {
        "none": [True, True],
        "in place": [True, False],
        "replaced": [True, False],
    }.get(change, [False, False])
    gradients = [parameter.grad for parameter in layers.parameters()]
    wanted = torch.nn.utils.get_total_norm([gradient.double() for gradient in gradients])
    got = clip_gradients(layers, float("inf"))
    assert got.dtype == dtype
    within = 1e-4 if dtype == torch.float32 else 1e-12  # torch's own float32 norm is off by 6e-6
    torch.testing.assert_close(got.double(), wanted, rtol=within, atol=0)
