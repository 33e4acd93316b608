"""Rules that move one number: DTop-p's probability mass and ReMoE's L1 coefficient.

The selection bias stays zero.
"""

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected, require
from moe_lab.routing.controllers.base import (
    Controller,
    ControllerConfig,
    register_controller,
)

SMALLEST_P = 1e-3


@register_controller("top_p")
class TopPController(Controller):
    """DTop-p (arXiv 2512.13996): ``p = p_0 + K_p e + K_i sum e`` with ``e = (k - a) / N``, a the
    mean number of experts per token.

    p is held in [0.001, 1], and the sum does not grow further in a direction in which p is at its
    bound (anti-windup).
    """

    p: Tensor
    integral: Tensor

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        self.initial = 0.4 if config.initial is None else config.initial
        require(self.initial <= 1, "initial (p) of at most 1", self.initial)
        self.register_buffer("p", torch.tensor(self.initial))
        self.register_buffer("integral", torch.zeros(()))

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        tokens = _tokens(num_tokens, counts_E, self.config.kind)
        gap = (self.top_k - counts_E.sum() / tokens.clamp_min(1)) / counts_E.shape[0]
        outward = ((self.p >= 1) & (gap > 0)) | ((self.p <= SMALLEST_P) & (gap < 0))
        rate = self.config.rate / (1 + self.config.decay * self.steps)
        integral = self.integral + torch.where(outward, 0.0, rate * gap)
        p = (self.initial + (self.config.proportional_gain or 0) * gap + integral).clamp(
            SMALLEST_P, 1.0
        )
        self.integral.copy_(torch.where(tokens > 0, integral, self.integral))
        self.p.copy_(torch.where(tokens > 0, p, self.p))
        self.steps += tokens > 0


@register_controller("relu_lambda")
class ReluLambda(Controller):
    """ReMoE (arXiv 2412.14711, eq. 9): lambda grows by ``factor`` while more than k of E experts
    are active, and shrinks otherwise.

    Without ``limit`` it winds up: as long as the router cannot become sparser, lambda grows by 1.2
    each step, without end.
    """

    coefficient: Tensor

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        self.register_buffer(
            "coefficient", torch.tensor(1e-8 if config.initial is None else config.initial)
        )

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        tokens = _tokens(num_tokens, counts_E, self.config.kind)
        factor = 1.2 if self.config.factor is None else self.config.factor
        too_dense = counts_E.sum() > self.top_k * tokens
        moved = torch.where(too_dense, self.coefficient * factor, self.coefficient / factor)
        moved = moved.clamp(max=float("inf") if self.config.limit is None else self.config.limit)
        self.coefficient.copy_(torch.where(tokens > 0, moved, self.coefficient))
        self.steps += tokens > 0


def _tokens(num_tokens: Tensor | int | None, counts_E: Tensor, kind: str) -> Tensor:
    if num_tokens is None:
        raise ConfigError(
            expected(
                f"num_tokens for controller {str(kind)!r}", None, "update(counts, num_tokens)"
            ),
            field="num_tokens",
        )
    return torch.as_tensor(num_tokens, device=counts_E.device)
