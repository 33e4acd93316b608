"""Feed-forwards: ``SwiGLU`` (dense, shared experts) and ``ExpertBank`` (all routed experts of a
layer, stacked).

``E_i(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T`` (arXiv 2002.05202, SwiGLU).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.model.dispatch.bank import SWIGLU, Biases, Gating


def swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    scale: Tensor | None = None,
    gating: Gating = SWIGLU,
) -> Tensor:
    """[..., D] -> [..., D] with ``gate_up`` [2F, D] (gate first), ``down`` [D, F]; ``scale`` [...,
    F] multiplies hidden units.
    """
    hidden = gating.hidden(F.linear(x, gate_up))
    return F.linear(hidden if scale is None else hidden * scale.to(hidden.dtype), down)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, d_hidden: int, gating: Gating = SWIGLU) -> None:
        super().__init__()
        self.gating = gating
        self.gate_up = nn.Parameter(torch.empty(2 * d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(d_model, d_hidden))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return swiglu(x, self.gate_up, self.down, scale, self.gating)


class ExpertBank(nn.Module):
    """E experts of width F on D channels: ``gate_up`` [E, 2F, D] and ``down`` [E, D, F]; with
    ``bias`` also ``gate_up_bias`` [E, 2F] and ``down_bias`` [E, D] (gpt-oss).

    Dispatch backends read the tensors.
    """

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        gating: Gating = SWIGLU,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.gating = gating
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        for name, width in (("gate_up_bias", 2 * d_expert), ("down_bias", d_model)):
            zeros = nn.Parameter(torch.zeros(num_experts, width)) if bias else None
            self.register_parameter(name, zeros)

    def extra_repr(self) -> str:
        num_experts, d_model, d_expert = self.down.shape
        return f"{num_experts} experts, d_model={d_model}, d_expert={d_expert}"

    @property
    def biases(self) -> Biases | None:
        if self.gate_up_bias is None or self.down_bias is None:
            return None
        return Biases(self.gate_up_bias, self.down_bias)

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]
