"""Clipping leaves short gradients alone, and equals torch's where they are too long."""

import copy

import pytest
import torch
from torch import nn

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
