"""``Controller``: the state of a balancing rule, moved once per optimiser step.

The selection bias decides which experts are selected and never enters a weight, and no gradient
flows through it. A controller is updated from the routings of all micro-batches after the optimiser
step, never in ``forward``: gradient accumulation, activation checkpointing and evaluation cannot
count twice, and data-parallel ranks are summed once. Its state is buffers, so it is saved and
loaded with the model; they stay float32 when the model is cast to half precision, where a step of
1e-3 would be lost.
"""

from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lab.config import require
from moe_lab.routing.controllers.config import (
    CONTROLLER_FACTS,
    CONTROLLERS,
    ControllerConfig,
    ControllerFacts,
    Moves,
)
from moe_lab.routing.routing import Routing


class Controller(nn.Module):
    """Holds the selection bias [E] (real experts first, then zero-compute ones); a fixed one unless
    a subclass moves it.

    Rules that move something else than the bias (p of DTop-p, lambda of ReMoE) keep it at zero.
    """

    bias: Tensor
    steps: Tensor

    def __init__(
        self, config: ControllerConfig, num_experts: int, num_zero_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.config, self.num_experts, self.num_zero_experts, self.top_k = (
            config,
            num_experts,
            num_zero_experts,
            top_k,
        )
        self.register_buffer("bias", torch.zeros(num_experts + num_zero_experts))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, counts_E: Tensor, num_tokens: Tensor | int | None = None) -> None:
        """One step from integer slot counts [E] and the number of tokens they come from. Counts
        that are all zero change nothing.

        Raises:
            ConfigError: the counts have another shape, or the rule needs ``num_tokens`` and got
                none.
        """
        require(
            counts_E.shape == self.bias.shape,
            f"counts of shape {list(self.bias.shape)}",
            list(counts_E.shape),
            field="counts",
        )
        rate = self.config.rate / (1 + self.config.decay * self.steps)
        any_counted = counts_E.sum() > 0
        self.bias += torch.where(any_counted, rate * self.step(counts_E.to(self.bias.dtype)), 0.0)
        self.steps += any_counted

    @torch.no_grad()
    def update_from(self, routings: Sequence[Routing]) -> None:
        """One step from the routings of a whole optimiser step; under ``torch.distributed`` from
        those of every rank.
        """
        counts = torch.stack([routing.selected_counts() for routing in routings]).sum(dim=0)
        tokens = torch.stack([routing.num_valid() for routing in routings]).sum()
        packed = all_reduced(torch.cat([counts, tokens.reshape(1)]))
        self.update(packed[:-1], packed[-1])

    def step(self, counts_E: Tensor) -> Tensor:
        """Direction [E] of the move, before the rate."""
        return torch.zeros_like(counts_E)

    def target_shares(self) -> Tensor:
        """[E]: the share of all slots that each expert should get.

        ``target_ffn_count`` gives real experts K_e / (K N) each.
        """
        total = self.bias.shape[0]
        target = self.config.target_ffn_count
        if target is None:
            return torch.full_like(self.bias, 1 / total)
        shares = torch.full_like(
            self.bias, (self.top_k - target) / self.top_k / max(self.num_zero_experts, 1)
        )
        shares[: self.num_experts] = target / self.top_k / self.num_experts
        return shares

    def check_target(self, target: float | None) -> None:
        """Raise ``ConfigError`` unless a mean of ``target`` real experts can be reached."""
        low, high = max(self.top_k - self.num_zero_experts, 0), min(self.top_k, self.num_experts)
        span = f"from {low} to {high}" if low else f"above 0 and at most {high}"
        setup = f"top_k {self.top_k}, {self.num_experts} + {self.num_zero_experts} experts"
        require(
            target is not None and 0 < target <= high and target >= low,
            f"target_ffn_count {span} ({setup})",
            target,
            field="target_ffn_count",
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {
            name: buffer
            for name, buffer in self._buffers.items()
            if buffer is not None and buffer.dtype == torch.float32
        }
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != torch.float32:
                # Cast from the float32 value, so that nothing was rounded on the way.
                self._buffers[name] = before.to(after.device)
        return self


def all_reduced(values: Tensor) -> Tensor:
    """The sum over data-parallel ranks; unchanged without ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_gathered(rows: Tensor, fill: float) -> Tensor:
    """[T, E] values of all data-parallel ranks joined; ranks with fewer rows than the largest are
    filled up.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    most = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    padded = torch.cat([rows, rows.new_full((int(most) - rows.shape[0], rows.shape[1]), fill)])
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)


C = TypeVar("C", bound=type[Controller])


def register_controller(
    kind: str, *, moves: Moves = Moves.BIAS, options: tuple[str, ...] = ()
) -> Callable[[C], C]:
    """Class decorator that registers a controller as a ``ControllerConfig.kind``.

    Args:
        moves: what it moves; routers that accept this can follow it.
        options: ``ControllerConfig`` fields that it reads beside ``rate`` and ``decay``.

    Raises:
        ConfigError: another controller has the name.

    Example:
        >>> @register_controller("half_sign")
        ... class HalfSign(Controller):
        ...     def step(self, counts_E):
        ...         return 0.5 * (counts_E.mean() - counts_E).sign()
    """

    def file(cls: C) -> C:
        CONTROLLERS.add(kind, cls)
        CONTROLLER_FACTS.setdefault(kind, ControllerFacts("", frozenset({moves}), options))
        return cls

    return file


register_controller("fixed")(Controller)
