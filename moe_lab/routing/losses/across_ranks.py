"""Losses that are not means over tokens, where several ranks share a micro-batch: CV^2 of its
importance, products of two of its sums.

Inside ``shared_by`` such a loss takes the sums of the whole micro-batch from ``summed``, so that
every rank has the loss of the whole. The gradient of ``summed`` is that of the number of ranks
times the own part: gradients averaged over the ranks are those of the whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SHARED: ContextVar[tuple[int, Any] | None] = ContextVar("micro-batch shared by", default=None)


@contextmanager
def shared_by(ranks: int, group: Any = None) -> Iterator[None]:
    """Within the block, ``ranks`` ranks of a process group (None: all of them) hold a micro-batch
    together.
    """
    token = _SHARED.set((ranks, group) if ranks > 1 else None)
    try:
        yield
    finally:
        _SHARED.reset(token)


def summed(values: Tensor) -> Tensor:
    """Values summed over the ranks that share the micro-batch; unchanged if it is not shared."""
    shared = _SHARED.get()
    if shared is None:
        return values
    return _Summed.apply(values, *shared) if values.requires_grad else _reduced(values, shared[1])


def _reduced(values: Tensor, group: Any) -> Tensor:
    values = values.detach().clone()
    dist.all_reduce(values, group=group)
    return values


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: int, group: Any) -> Tensor:
        ctx.ranks = ranks
        return _reduced(values, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks * gradients[0], None, None
