"""``SlotOrder``: the slots of a batch sorted by expert, and the inverse of that order.

Rows are put back by the inverse permutation and added over a token's slots: unlike ``index_add_``
this is fast on a CPU and deterministic on CUDA. Shape letters: N = T * K slots.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import require
from moe_lab.routing import Routing

MAX_SLOTS = 2**31 - 1
"""Kernels take the ends of experts' rows as int32."""


class SlotOrder(NamedTuple):
    """Attributes: order: [N] int64, the slots of expert 0, of expert 1, ..., and last those that
    run no real expert. Stable. ends: [E] int32, where each expert's rows end. place: [T, K] int64,
    the row of each slot. runs: [T, K] bool, whether the slot runs a real expert.
    """

    order: Tensor
    ends: Tensor
    place: Tensor
    runs: Tensor

    @property
    def tokens(self) -> Tensor:
        """[N]: the token of each row."""
        return self.order // self.place.shape[1]

    def put_back(self, rows: Tensor) -> Tensor:
        """[N, D] rows -> [T, D], each token's slots added up; rows of slots that run nothing may
        hold anything.
        """
        slots_TKD = rows.index_select(0, self.place.reshape(-1)).view(
            *self.place.shape, rows.shape[1]
        )
        slots_TKD.masked_fill_(~self.runs.unsqueeze(2), 0.0)
        return slots_TKD.sum(dim=1, dtype=rows.dtype)  # autocast on CUDA would give float32

    def add_up(self, rows: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """``put_back`` of weighted rows in one call that reads each row once, without gradients.

        rows: [N + 1, D]; the last one may hold anything too.
        """
        last = len(self.order)
        place_TK = self.place.masked_fill(~self.runs, last)
        return F.embedding_bag(
            place_TK, rows, mode="sum", per_sample_weights=weights_TK, padding_idx=last
        )

    def to_slots(self, values_N: Tensor) -> Tensor:
        """[N] in the order of the rows -> [T, K]; 0 in slots that run nothing."""
        return values_N[self.place].masked_fill(~self.runs, 0.0)

    def one_each(self) -> "SlotOrder":
        """The order of these rows, each a token of one slot."""
        rows_N = torch.arange(len(self.order), device=self.order.device)
        runs_N1 = self.runs.reshape(-1)[self.order].unsqueeze(1)
        return SlotOrder(rows_N, self.ends, rows_N.unsqueeze(1), runs_N1)


def require_countable(num_slots: int) -> None:
    """Raise ``ConfigError`` above ``MAX_SLOTS``."""
    fits = num_slots <= MAX_SLOTS
    require(fits, f"at most {MAX_SLOTS} slots in one call", num_slots, "smaller batches")


def slot_order(routing: Routing) -> SlotOrder:
    """Sort the slots of a routing by expert, without host synchronisation."""
    require_countable(routing.indices.numel())
    flat = routing.indices.reshape(-1)
    runs = (flat >= 0) & (flat < routing.num_experts)
    key = torch.where(runs, flat, routing.num_experts)
    order = torch.argsort(key, stable=True)
    rows = torch.arange(flat.numel(), device=flat.device)
    place = torch.empty_like(order).scatter_(0, order, rows).view(routing.indices.shape)
    bounds = torch.arange(routing.num_experts, device=flat.device)
    ends = torch.searchsorted(key[order], bounds, right=True).to(torch.int32)
    return SlotOrder(order, ends, place, runs.view(routing.indices.shape))


# Each of these linear maps has another one as its backward pass, so that gradients of gradients
# are right.


class TakeRows(torch.autograd.Function):
    """[T, D] -> [N, D], the token of each row.

    (The backward of ``index_select`` itself would be an ``index_add_``.)
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return x_TD.index_select(0, slots.tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return PutBack.apply(grad, ctx.slots), None


class PutBack(torch.autograd.Function):
    """[N, D] -> [T, D], each token's slots added up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return slots.put_back(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return TakeRows.apply(grad, ctx.slots), None


class InOrder(torch.autograd.Function):
    """[T, K] -> [N] in the order of the rows; rows of slots that run nothing give no gradient."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return weights_TK.reshape(-1).index_select(0, slots.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _ToSlots.apply(grad, ctx.slots), None


class _ToSlots(torch.autograd.Function):
    """[N] in the order of the rows -> [T, K]; 0 in slots that run nothing."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, slots: SlotOrder) -> Tensor:
        ctx.slots = slots
        return slots.to_slots(values_N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return InOrder.apply(grad, ctx.slots), None
