"""``grouped``: all experts in one grouped matrix product, ``torch.nn.functional.grouped_mm``,
without host synchronisation.

Rows past the last expert's end belong to slots that run no real expert. ``grouped_mm`` leaves them
as they were in memory, in both directions: whatever they hold is masked where rows become tokens
and where a row's weight gets its gradient.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.model.dispatch.bank import Bank, gating_of, takes_biases
from moe_lab.model.dispatch.order import InOrder, PutBack, TakeRows, slot_order
from moe_lab.routing import Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes that every row must be a multiple of


def can_group(x_TD: Tensor, down_EDF: Tensor) -> bool:
    """Whether ``grouped_mm`` takes the dtype and the widths (torch 2.13 traces it for
    ``torch.compile`` in bfloat16 only).
    """
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else DTYPES
    return x_TD.dtype in dtypes and not any(
        width * x_TD.element_size() % ALIGNMENT for width in down_EDF.shape[1:]
    )


@takes_biases
def grouped(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Run all experts in grouped matrix products. Float64, and widths that ``can_group`` refuses,
    take one product per expert and a host synchronisation: correct, but slow.
    """
    product = F.grouped_mm if can_group(x_TD, bank.down) else _products
    if x_TD.device.type == "meta":
        product = _shapes
    slots = slot_order(routing)
    rows = TakeRows.apply(x_TD, slots)
    scale = InOrder.apply(routing.weights.to(x_TD.dtype), slots).unsqueeze(1)
    if routing.weights_on_input:
        rows = rows * scale
    hidden = gating_of(bank).hidden(product(rows, bank.gate_up.transpose(1, 2), offs=slots.ends))
    if not routing.weights_on_input:
        hidden = hidden * scale
    return PutBack.apply(product(hidden, bank.down.transpose(1, 2), offs=slots.ends), slots)


def _products(rows_ND: Tensor, bank_EDF: Tensor, offs: Tensor) -> Tensor:
    """What ``grouped_mm`` computes, with zeros in the rows past the last end."""
    ends = offs.tolist()
    groups = rows_ND[: ends[-1]].split([b - a for a, b in pairwise([0, *ends])])
    blocks = [group @ weight for group, weight in zip(groups, bank_EDF.unbind(), strict=True)]
    return torch.cat([*blocks, rows_ND.new_zeros(rows_ND.shape[0] - ends[-1], bank_EDF.shape[2])])


def _shapes(rows_ND: Tensor, bank_EDF: Tensor, offs: Tensor) -> Tensor:
    """On the meta device, where ``grouped_mm`` has no float32: its shapes and its FLOPs."""
    return rows_ND @ bank_EDF.sum(dim=0)
