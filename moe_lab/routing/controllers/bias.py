"""Rules that move the selection bias from counts.

| class | rule | source | |---|---|---| | ``SignBias`` | b += u sign(target - c) | loss-free
balancing, arXiv 2408.15664, algorithm 1 | | ``CentredSignBias`` | b += u (sign(e) - mean sign(e)) |
Ling 2.0 | | ``ProportionalBias`` | b += mu (K_e/(K N) - T_i/(K T)), zero-compute experts held at 0
| LongCat-Flash, arXiv 2509.01322, section 2.1 | | ``PIDBias`` | b = K_p e + K_i sum e + K_d (e -
e'), with limits and conditional integration | the full form of what LongCat names PID | |
``BudgetSignBias`` | b += a [sign(Q - F) - mean sign(Q - F) + sign(k - count)] | kexue.fm 10815 |
"""

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected, require
from moe_lab.routing.controllers.base import (
    Controller,
    ControllerConfig,
    register_controller,
)


@register_controller("sign")
class SignBias(Controller):
    """``b_i += u * sign(target_i - c_i)``, the target being the mean count of all experts unless
    ``target_ffn_count`` is given.
    """

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        if config.target_ffn_count is not None:
            self.check_target(config.target_ffn_count)

    def step(self, counts_E: Tensor) -> Tensor:
        if self.config.target_ffn_count is None:
            return torch.sign(counts_E.mean() - counts_E)
        return torch.sign(self.target_shares() * counts_E.sum() - counts_E)


@register_controller("centred_sign")
class CentredSignBias(SignBias):
    """The sign rule less its mean over experts, so that the biases never drift together."""

    def step(self, counts_E: Tensor) -> Tensor:
        sign = super().step(counts_E)
        return sign - sign.mean()


class _ShareRule(Controller):
    """Rules on the gap between target and measured share of slots; zero-compute experts have no
    gap, so their bias stays 0.
    """

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        target = (
            top_k
            if config.target_ffn_count is None and not num_zero_experts
            else config.target_ffn_count
        )
        self.check_target(target)
        self.target = float(target or 0)

    def step(self, counts_E: Tensor) -> Tensor:
        gap = self.target / self.top_k / self.num_experts - counts_E / counts_E.sum().clamp_min(1)
        gap[self.num_experts :] = 0
        return gap


@register_controller("proportional")
class ProportionalBias(_ShareRule):
    """LongCat: ``b_i += mu * ((K_e / K) / N - T_i / (K * T_all))`` for real experts; zero-compute
    experts stay at 0.

    At the fixed point each real expert gets ``K_e / (K * N)`` of all slots and zero-compute experts
    the remaining ``(K - K_e) / K``. In control terms the bias is the integral of the gap: the rule
    is the I of a PID controller whose output is the bias.
    """


@register_controller("pid")
class PIDBias(_ShareRule):
    """``b = K_p e + I + K_d (e - e')`` with ``I += K_i e`` and ``|b| <= limit``; e is the gap of
    ``ProportionalBias``.

    Anti-windup by conditional integration: an expert whose bias is at its limit does not integrate
    a gap that would push it further. With ``K_p = K_d = 0`` and no limit it is
    ``ProportionalBias``.
    """

    integral: Tensor
    previous: Tensor

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        self.register_buffer("integral", torch.zeros_like(self.bias))
        self.register_buffer("previous", torch.zeros_like(self.bias))

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        require(
            counts_E.shape == self.bias.shape,
            f"counts of shape {list(self.bias.shape)}",
            list(counts_E.shape),
            field="counts",
        )
        config, any_counted = self.config, counts_E.sum() > 0
        gap = self.step(counts_E.to(self.bias.dtype))
        limit = float("inf") if config.limit is None else config.limit
        winding_up = (self.bias.abs() >= limit) & (torch.sign(gap) == torch.sign(self.bias))
        integral = self.integral + config.rate / (1 + config.decay * self.steps) * torch.where(
            winding_up, 0.0, gap
        )
        # The first step has no previous gap to differentiate.
        change = torch.where(self.steps > 0, gap - self.previous, 0.0)
        bias = (
            (config.proportional_gain or 0) * gap
            + integral
            + (config.derivative_gain or 0) * change
        )
        for state, moved in (
            (self.integral, integral),
            (self.previous, gap),
            (self.bias, bias.clamp(-limit, limit)),
        ):
            state.copy_(torch.where(any_counted, moved, state))
        self.steps += any_counted


@register_controller("budget_sign")
class BudgetSignBias(Controller):
    """For routers that select where score + bias > 0: evens the load and steers the mean count per
    token to ``top_k`` at once.
    """

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        if num_tokens is None:
            raise ConfigError(
                expected("num_tokens for the budget_sign controller", None), field="num_tokens"
            )
        require(
            counts_E.shape == self.bias.shape,
            f"counts of shape {list(self.bias.shape)}",
            list(counts_E.shape),
            field="counts",
        )
        counts = counts_E.to(self.bias.dtype)
        tokens = torch.as_tensor(num_tokens, device=counts.device)
        sign = torch.sign(counts.mean() - counts)
        direction = sign - sign.mean() + torch.sign(self.top_k * tokens - counts.sum())
        # Zero counts are a signal here (nothing selected): only a step without tokens changes
        # nothing.
        any_token = tokens > 0
        self.bias += torch.where(
            any_token, self.config.rate / (1 + self.config.decay * self.steps) * direction, 0.0
        )
        self.steps += any_token
