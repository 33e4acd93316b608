"""``loop``: one autograd function over all experts, in tensor calls.

Each expert's rows go from gather to output while they are in cache, forward and backward. The
bank's gradient is one tensor that each expert's product is written into: indexing the bank per
expert inside autograd would allocate it E times. The gradient of a gate weight is ``<dL/dh, h>`` on
the hidden units h, so the experts' outputs are not kept. ``native`` is this, compiled.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.model.dispatch.bank import Bank, Gating, gating_of, takes_biases
from moe_lab.model.dispatch.order import SlotOrder, slot_order
from moe_lab.routing import Routing


@takes_biases
def loop(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Run one expert after another, with one host synchronisation (to learn where each expert's
    rows end).
    """
    return _Loop.apply(
        x_TD,
        routing.weights.to(x_TD.dtype),
        bank.gate_up,
        bank.down,
        slot_order(routing),
        routing.weights_on_input,
        gating_of(bank),
    )


class _Loop(torch.autograd.Function):
    """Rows are in expert order; ``act`` [N, 2F] holds gate and up of each, ``scale`` [N, 1] the
    weight of each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        slots: SlotOrder,
        on_input: bool,
        gating: Gating,
    ) -> Tensor:
        tokens, scale = slots.tokens, weights.reshape(-1)[slots.order].unsqueeze(1)
        act = x.new_empty(tokens.shape[0], gate_up.shape[1])
        rows = x.new_empty(tokens.shape[0], x.shape[1])
        for expert, (a, b) in enumerate(pairwise([0, *slots.ends.tolist()])):
            if a == b:
                continue
            inside = x.index_select(0, tokens[a:b])
            if on_input:
                inside = inside * scale[a:b]
            torch.mm(inside, gate_up[expert].t(), out=act[a:b])
            hidden = gating.hidden(act[a:b])
            torch.mm(
                hidden if on_input else hidden.mul_(scale[a:b]), down[expert].t(), out=rows[a:b]
            )
        ctx.save_for_backward(x, weights, gate_up, down, act)
        ctx.slots, ctx.on_input, ctx.gating = slots, on_input, gating
        return slots.put_back(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, gate_up, down, act = ctx.saved_tensors
        slots, on_input, gating = ctx.slots, ctx.on_input, ctx.gating
        if torch.is_grad_enabled():  # create_graph: the gradients need gradients of their own
            return _differentiable(
                grad, (x, weights, gate_up, down), ctx.needs_input_grad, slots, on_input, gating
            )
        tokens, scale = slots.tokens, weights.reshape(-1)[slots.order].unsqueeze(1)
        grad_gate_up, grad_down, rows = (
            torch.zeros_like(gate_up),
            torch.zeros_like(down),
            x.new_empty(tokens.shape[0], x.shape[1]),
        )
        grad_scale = scale.new_zeros(scale.shape[0])
        for expert, (a, b) in enumerate(pairwise([0, *slots.ends.tolist()])):
            if a == b:
                continue
            part, inside, gate_grad = (
                scale[a:b],
                x.index_select(0, tokens[a:b]),
                grad.index_select(0, tokens[a:b]),
            )
            gate, up = gating.halves(act[a:b])
            sigmoid = (gate * gating.alpha).sigmoid()
            silu = gate * sigmoid
            hidden, grad_hidden = silu * up, gate_grad @ down[expert]
            if not on_input:
                grad_scale[a:b] = (grad_hidden * hidden).sum(dim=1)
                hidden, grad_hidden = hidden * part, grad_hidden * part
            grad_act = torch.cat(
                [
                    grad_hidden * up * (sigmoid + gating.alpha * silu * (1 - sigmoid)),
                    grad_hidden * silu,
                ],
                dim=1,
            )
            if (inside_limit := gating.inside(act[a:b])) is not None:
                grad_act = grad_act * torch.cat(inside_limit, dim=1)
            torch.mm(gate_grad.t(), hidden, out=grad_down[expert])
            torch.mm(grad_act.t(), inside * part if on_input else inside, out=grad_gate_up[expert])
            torch.mm(grad_act, gate_up[expert], out=rows[a:b])
            if on_input:
                grad_scale[a:b] = (rows[a:b] * inside).sum(dim=1)
                rows[a:b] *= part
        grad_weights = grad_scale[slots.place].view_as(weights)
        return slots.put_back(rows), grad_weights, grad_gate_up, grad_down, None, None, None


def _differentiable(
    grad: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    needed: Sequence[bool],
    slots: SlotOrder,
    on_input: bool,
    gating: Gating,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``_Loop``, from operations that autograd can differentiate again.

    Of views of the inputs: where one input depends on another, as gate weights depend on the
    tokens that a router read, a gradient stops at each of them.
    """
    x, weights, gate_up, down = views = [value.view_as(value) for value in inputs]
    tokens, scale = slots.tokens, weights.reshape(-1)[slots.order].unsqueeze(1)
    bounds, blocks = [0, *slots.ends.tolist()], []
    for (a, b), into, out in zip(pairwise(bounds), gate_up.unbind(), down.unbind(), strict=True):
        inside = x.index_select(0, tokens[a:b])
        hidden = gating.hidden(F.linear(inside * scale[a:b] if on_input else inside, into))
        blocks.append(F.linear(hidden if on_input else hidden * scale[a:b], out))
    unused = x.new_zeros(len(tokens) - bounds[-1], x.shape[1])
    y = slots.put_back(torch.cat([*blocks, unused]))
    wanted = [value for value, need in zip(views, needed, strict=False) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return *(next(found) if need else None for need in needed[:4]), None, None, None
