"""Rules that set the selection bias from order statistics of the scores, not from counts.

``QuantileBias`` (kexue.fm 11619, Kimi K3 arXiv 2607.24653): one step of the dual of the balanced
assignment problem. With beta = -b, ``alpha_t`` is the (k+1)-th largest of ``s_t - beta`` and the
new ``beta_j`` the (T k/E + 1)-th largest of ``s_.j - alpha``, less its mean. Used from the next
step on.

``ThresholdEMA`` (Expert Threshold, arXiv 2603.11535): the cut-off of expert j moves to the (T
k/E)-th largest logit of the batch, ``c <- m c + (1 - m) c_batch``. ``QuantileEMA`` (dynamic
quantile balancing, kexue.fm 11626) takes the next one, the (T k/E + 1)-th.
A young mean must not remember the untrained router for a thousand steps: after t updates m is at
most ``(1 + t) / (10 + t)``.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moe_lab.errors import ConfigError, expected
from moe_lab.routing.controllers.base import (
    Controller,
    ControllerConfig,
    all_gathered,
    all_reduced,
    register_controller,
)
from moe_lab.routing.routing import Routing


def order_statistic(values_TE: Tensor, rank_E: Tensor) -> Tensor:
    """[E]: in each column the value with ``rank_E`` larger ones (0: the maximum), the smallest
    where there are not that many.
    """
    ordered = values_TE.sort(dim=0, descending=True).values
    return ordered.gather(0, rank_E.clamp(0, values_TE.shape[0] - 1).long().unsqueeze(0)).squeeze(0)


class _ScoreRule(Controller):
    """Rules that need the scores of the step: counts alone do not determine them."""

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        raise ConfigError(
            expected(
                f"routings for controller {str(self.config.kind)!r}",
                "counts",
                "update_from(routings)",
            ),
            field="routings",
        )

    @torch.no_grad()
    def update_from(self, routings: Sequence[Routing]) -> None:
        values = torch.cat([self.values(routing) for routing in routings]).to(self.bias.dtype)
        valid = torch.cat(
            [
                torch.ones_like(r.indices[:, 0], dtype=torch.bool) if r.valid is None else r.valid
                for r in routings
            ]
        )
        # Padding sorts last, behind every rank that counts. An order statistic is no sum: ranks of
        # data-parallel training show each other their values, and each finds the same one.
        values, tokens = (
            all_gathered(values.masked_fill(~valid.unsqueeze(1), float("-inf")), float("-inf")),
            all_reduced(valid.sum()),
        )
        if values.shape[0] == 0:
            return
        found = torch.where(tokens > 0, self.statistic(values, tokens), 0.0)
        self.bias.copy_(torch.where(tokens > 0, self.moved(found), self.bias))
        self.steps += tokens > 0

    def values(self, routing: Routing) -> Tensor:
        """[T, E]: what the order is taken of."""
        return routing.logits

    def statistic(self, values_TE: Tensor, tokens: Tensor) -> Tensor:
        """[E]: this batch's cut-offs."""
        raise TypeError(f"{type(self).__name__} does not define statistic()")

    def moved(self, cutoffs_E: Tensor) -> Tensor:
        """[E]: the new bias."""
        raise TypeError(f"{type(self).__name__} does not define moved()")


@register_controller("quantile")
class QuantileBias(_ScoreRule):
    """Sets the bias so that, at last step's scores, each expert is chosen by its share of the
    tokens. ``rate`` is not used.
    """

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__(config, num_experts, num_zero_experts, top_k)
        if config.target_ffn_count is not None:
            self.check_target(config.target_ffn_count)

    def values(self, routing: Routing) -> Tensor:
        return routing.scores

    def statistic(self, values_TE: Tensor, tokens: Tensor) -> Tensor:
        if self.top_k >= values_TE.shape[1]:
            return torch.zeros_like(self.bias)
        biased = values_TE + self.bias
        alpha = biased.topk(self.top_k + 1, dim=1).values[:, -1:]
        # A rank that is a whole number must not be floored below itself by the rounding of 1 / E.
        rank_E = torch.floor(tokens * self.top_k * self.target_shares().double() + 1e-3)
        # A row of padding is -inf everywhere and must stay so: -inf - -inf would be NaN.
        return order_statistic(values_TE - alpha.nan_to_num(neginf=0.0), rank_E)

    def moved(self, cutoffs_E: Tensor) -> Tensor:
        return cutoffs_E.mean() - cutoffs_E


@register_controller("threshold_ema")
class ThresholdEMA(_ScoreRule):
    """Keeps ``bias = -cut-off``; the first update sets the cut-offs, later ones move them by ``1 -
    momentum``.
    """

    default_momentum: ClassVar[float] = 0.999
    offset: ClassVar[int] = -1

    def statistic(self, values_TE: Tensor, tokens: Tensor) -> Tensor:
        return batch_cutoffs(values_TE, tokens, self.top_k, self.offset)

    def warming_up(self, training: bool) -> Tensor:
        """[] bool: whether the batch's own cut-offs are to be used: in training until ``warmup``
        updates, else until the first.
        """
        return self.steps < ((self.config.warmup or 1) if training else 1)

    def moved(self, cutoffs_E: Tensor) -> Tensor:
        momentum = self.default_momentum if self.config.momentum is None else self.config.momentum
        kept = torch.where(
            self.steps > 0, ((1 + self.steps) / (10 + self.steps)).clamp(max=momentum), 0.0
        )
        return kept * self.bias - (1 - kept) * cutoffs_E


@register_controller("quantile_ema")
class QuantileEMA(ThresholdEMA):
    default_momentum = 0.9
    offset = 0


def batch_cutoffs(values_TE: Tensor, tokens: Tensor | int, top_k: int, offset: int) -> Tensor:
    """[E]: the value at which an expert takes its fair share T k/E of the tokens; offset -1: the
    last one taken, 0: the first left out.
    """
    share = (
        torch.floor(torch.as_tensor(tokens, device=values_TE.device) * top_k / values_TE.shape[1])
        + offset
    )
    return order_statistic(values_TE, share.expand(values_TE.shape[1]))
