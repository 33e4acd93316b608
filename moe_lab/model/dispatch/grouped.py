"""``grouped``: all experts in one grouped matrix product, ``torch.nn.functional.grouped_mm``,
without host synchronisation.

Rows past the last expert's end belong to slots that run no real expert. ``grouped_mm`` leaves them
as they were in memory, in both directions: whatever they hold is masked where rows become tokens
and where a row's weight gets its gradient.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.model.dispatch.bank import Bank, gating_of, takes_biases
from moe_lab.model.dispatch.order import InOrder, PutBack, TakeRows, slot_order
from moe_lab.routing import Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes that every row must be a multiple of, and that weights begin at
MOST_EXPERTS = 1023
"""Of one CUDA kernel of ``grouped_mm``."""


def can_group(x_TD: Tensor, bank: Bank) -> bool:
    """Whether ``grouped_mm`` takes the dtype, the widths, the number of experts and the weights as
    they lie in memory (torch 2.13 traces it for ``torch.compile`` in bfloat16 only, and not where
    in memory a weight begins: it is taken to fit then, as a parameter of its own does).
    """
    compiling = torch.compiler.is_compiling()
    dtypes = (torch.bfloat16,) if compiling else DTYPES
    return (
        x_TD.dtype in dtypes
        and len(bank.down) <= MOST_EXPERTS
        and not any(width * x_TD.element_size() % ALIGNMENT for width in bank.down.shape[1:])
        and all(
            (weight.is_contiguous() or weight.mT.is_contiguous())
            and (compiling or weight.storage_offset() * weight.element_size() % ALIGNMENT == 0)
            for weight in (bank.gate_up, bank.down)
        )
    )


def leaves_empty_experts(x_TD: Tensor) -> bool:
    """Whether the gradient of an expert without rows is whatever was in memory: so it is in
    bfloat16 on compute capability 10 (pytorch/pytorch#172439).
    """
    if x_TD.device.type != "cuda" or x_TD.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(x_TD.device)[0] == 10


@takes_biases
def grouped(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Run all experts in grouped matrix products. What ``can_group`` refuses takes one product per
    expert and a host synchronisation: correct, but slow.
    """
    product = F.grouped_mm if can_group(x_TD, bank) else _products
    if x_TD.device.type == "meta":
        product = _shapes
    slots = slot_order(routing)
    gate_up, down = bank.gate_up, bank.down
    if leaves_empty_experts(x_TD):
        gate_up, down = (_ZeroWhereEmpty.apply(weight, slots.ends) for weight in (gate_up, down))
    rows = TakeRows.apply(x_TD, slots)
    scale = InOrder.apply(routing.weights.to(x_TD.dtype), slots).unsqueeze(1)
    if routing.weights_on_input:
        rows = rows * scale
    hidden = gating_of(bank).hidden(product(rows, gate_up.transpose(1, 2), offs=slots.ends))
    if not routing.weights_on_input:
        hidden = hidden * scale
    return PutBack.apply(product(hidden, down.transpose(1, 2), offs=slots.ends), slots)


class _ZeroWhereEmpty(torch.autograd.Function):
    """[E, ...] weights as they are; the gradient of an expert without rows is 0."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(ends_E)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (ends_E,) = ctx.saved_tensors
        empty_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0
        return grad.masked_fill(empty_E.view(-1, 1, 1), 0.0), None


def _products(rows_ND: Tensor, bank_EDF: Tensor, offs: Tensor) -> Tensor:
    """What ``grouped_mm`` computes, with zeros in the rows past the last end."""
    ends = offs.tolist()
    groups = rows_ND[: ends[-1]].split([b - a for a, b in pairwise([0, *ends])])
    blocks = [group @ weight for group, weight in zip(groups, bank_EDF.unbind(), strict=True)]
    return torch.cat([*blocks, rows_ND.new_zeros(rows_ND.shape[0] - ends[-1], bank_EDF.shape[2])])


def _shapes(rows_ND: Tensor, bank_EDF: Tensor, offs: Tensor) -> Tensor:
    """On the meta device, where ``grouped_mm`` has no float32: its shapes and its FLOPs."""
    return rows_ND @ bank_EDF.sum(dim=0)
