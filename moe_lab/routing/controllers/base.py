"""``ControllerConfig`` and ``Controller``: the state of a balancing rule, moved once per optimiser
step.

The selection bias decides which experts are selected and never enters a weight, and no gradient
flows through it. A controller is updated from the routings of all micro-batches after the optimiser
step, never in ``forward``: gradient accumulation, activation checkpointing and evaluation cannot
count twice, and data-parallel ranks are summed once. Its state is buffers, so it is saved and
loaded with the model; they stay float32 when the model is cast to half precision, where a step of
1e-3 would be lost.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_lab.config import Config, require
from moe_lab.errors import ConfigError, expected
from moe_lab.routing.routing import Routing


class ControllerKind(StrEnum):
    FIXED = "fixed"
    SIGN = "sign"
    CENTRED_SIGN = "centred_sign"
    PROPORTIONAL = "proportional"
    PID = "pid"
    BUDGET_SIGN = "budget_sign"
    QUANTILE = "quantile"
    QUANTILE_EMA = "quantile_ema"
    THRESHOLD_EMA = "threshold_ema"
    TOP_P = "top_p"
    RELU_LAMBDA = "relu_lambda"


@dataclass(frozen=True)
class ControllerConfig(Config):
    """
    Attributes:
        kind: the rule.
        rate: step size: ``u`` of the sign rules, ``mu`` of the proportional rule (LongCat does not
            publish its value), the integral gain of PID and of DTop-p.
        target_ffn_count: expected number of real experts per token, K_e. Needed by the proportional
            rule where there are zero-compute experts; elsewhere None means the same share for every
            expert.
        decay: after ``update`` number t the rate is ``rate / (1 + decay * t)`` (LongCat advises a
            decaying mu; 0 keeps it constant).
        proportional_gain, derivative_gain: of PID (and the proportional gain of DTop-p); 0 if None.
        limit: largest absolute bias (PID), or largest lambda (ReMoE); None: unlimited.
        momentum: share of the old cut-off that an update keeps (threshold rules).
        warmup: updates until which training routes by the batch's own cut-offs (threshold rules; 1
            if None, Expert Threshold has 4000).
        factor: by which ReMoE's lambda grows or shrinks in a step; 1.2 if None.
        initial: first value of DTop-p's p (0.4 if None) or of ReMoE's lambda (1e-8 if None).
    """

    kind: ControllerKind = ControllerKind.FIXED
    rate: float = 1e-3
    target_ffn_count: float | None = None
    decay: float = 0.0
    proportional_gain: float | None = None
    derivative_gain: float | None = None
    limit: float | None = None
    momentum: float | None = None
    warmup: int | None = None
    factor: float | None = None
    initial: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "kind", choice(ControllerKind, self.kind, "a controller kind among")
        )
        require(self.rate >= 0, "a controller rate of at least 0", self.rate)
        require(self.decay >= 0, "a rate decay of at least 0", self.decay)
        for name in ("proportional_gain", "derivative_gain"):
            require((getattr(self, name) or 0) >= 0, f"{name} of at least 0", getattr(self, name))
        for name in ("limit", "initial"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} above 0", value)
        require(
            self.momentum is None or 0 <= self.momentum < 1,
            "momentum from 0 to below 1",
            self.momentum,
        )
        require(self.warmup is None or self.warmup >= 1, "warmup of at least 1", self.warmup)
        require(self.factor is None or self.factor > 1, "factor above 1", self.factor)
        readable = {"kind", "rate", "decay", *_OPTIONS.get(self.kind, ())}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            unread = field.name not in readable and value != field.default
            require(
                not unread, f"{field.name} left unset for controller {self.kind.value!r}", value
            )


E = TypeVar("E", bound=StrEnum)


def choice(options: type[E], value: str, what: str) -> E:
    """The member of ``options`` that ``value`` names, so that configurations take plain strings.

    Raises ``ConfigError`` for another.
    """
    try:
        return options(value)
    except ValueError:
        raise ConfigError(
            expected(f"{what} {', '.join(item.value for item in options)}", repr(value))
        ) from None


_OPTIONS: dict[ControllerKind, tuple[str, ...]] = {}
"""Controller kind -> optional ``ControllerConfig`` fields that it reads (filled by ``controller``).
"""

CONTROLLERS: dict[ControllerKind, type["Controller"]] = {}


C = TypeVar("C", bound=type["Controller"])


def controller(kind: ControllerKind) -> Callable[[C], C]:
    """Class decorator: file a controller under its kind."""

    def file(cls: C) -> C:
        CONTROLLERS[kind] = cls
        _OPTIONS[kind] = cls.options
        return cls

    return file


class Controller(nn.Module):
    """Holds the selection bias [E] (real experts first, then zero-compute ones); a fixed one unless
    a subclass moves it.

    Rules that move something else than the bias (p of DTop-p, lambda of ReMoE) keep it at zero.
    """

    options: ClassVar[tuple[str, ...]] = ()
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
        if counts_E.shape != self.bias.shape:
            raise ConfigError(
                expected(f"counts of shape {list(self.bias.shape)}", list(counts_E.shape))
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
        """Raise ``ConfigError`` unless a mean of ``target`` real experts per token can be reached."""
        low, high = max(self.top_k - self.num_zero_experts, 0), min(self.top_k, self.num_experts)
        span = f"from {low} to {high}" if low else f"above 0 and at most {high}"
        setup = f"top_k {self.top_k}, num_experts {self.num_experts}, num_zero_experts {self.num_zero_experts}"
        require(
            target is not None and 0 < target <= high and target >= low,
            f"target_ffn_count {span} ({setup})",
            target,
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
    """The sum over data-parallel ranks, where there are any."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_gathered(rows: Tensor, fill: float) -> Tensor:
    """[T, E] of each data-parallel rank, where there are any, as one; those with fewer rows than
    the largest are filled up.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    most = torch.tensor(rows.shape[0], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    padded = torch.cat([rows, rows.new_full((int(most) - rows.shape[0], rows.shape[1]), fill)])
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)


controller(ControllerKind.FIXED)(Controller)
