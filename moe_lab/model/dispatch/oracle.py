"""``oracle``: the definition of a layer's experts, computed token by token and slot by slot. Other
backends are tested against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.model.dispatch.bank import Bank, gating_of, takes_biases
from moe_lab.routing import Routing


@takes_biases
def oracle(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    gate_up, down, gating = bank.gate_up.unbind(), bank.down.unbind(), gating_of(bank)
    rows = []
    for token, experts in enumerate(routing.indices.tolist()):
        row = torch.zeros_like(x_TD[token])
        for slot, expert in enumerate(experts):
            if 0 <= expert < routing.num_experts:
                weight = routing.weights[token, slot].to(x_TD.dtype)
                inside, outside = (weight, 1.0) if routing.weights_on_input else (1.0, weight)
                hidden = gating.hidden(F.linear(x_TD[token] * inside, gate_up[expert]))
                row = row + outside * F.linear(hidden, down[expert])
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)
