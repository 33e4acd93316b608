"""AdamW over decayed matrices and undecayed vectors, and the warm-up-stable-decay factor."""

import torch
from torch import Tensor, nn

from moe_lab.cpu_kernels.noted_squares import noted_squares
from moe_lab.training.checkpoint import whole
from moe_lab.training.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.dim() < 2],
            "weight_decay": 0.0,
        },
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their total norm is at most ``max_norm``; returns the norm
    before. [] float32. Sharded gradients count as whole ones.

    On a CPU, gradients within the norm are left alone: multiplying them by one would read and write
    the whole bank. Where the backward pass has added up the squares of a bank's gradient, they are
    not added up again; the norm then differs by rounding.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    noted = [noted_squares(gradient) for gradient in gradients]
    known = [squares for squares in noted if squares is not None]
    others = [one for one, squares in zip(gradients, noted, strict=True) if squares is None]
    norm = whole(torch.nn.utils.get_total_norm(others))
    if known:
        norm = torch.stack([norm.double().square(), *known]).sum().sqrt().to(norm.dtype)
    if norm.device.type != "cpu" or not norm <= max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def lr_factor(step: int, steps: int, config: OptimizerConfig) -> float:
    """Multiplier of the peak learning rate at 0-based ``step`` of ``steps``."""
    warmup, decay = round(config.warmup_fraction * steps), round(config.decay_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if step < steps - decay:
        return 1.0
    remaining = (steps - step) / (decay + 1)
    return config.final_lr_ratio + (1 - config.final_lr_ratio) * remaining
