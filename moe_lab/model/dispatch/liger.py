"""``liger``: the fused Triton kernels of liger-kernel (extra ``gpu``, BSD-2): gather, gate and up,
activation in one kernel, down in a second, and the sum over a token's slots in a third.

``LigerFusedMoEFunction`` takes the layout of ``ExpertBank`` and a real expert in every slot. Where
a router gives zero-compute, dropped or unused slots, or weights the experts' input, the slots that
run a real expert go in as tokens of one slot each, sorted by expert, and are added up by token
afterwards. Each call waits two or three times for the device: whether every slot runs, how many
do, and how many tiles the kernels need. Products of float32 are rounded to TF32.

liger-kernel would time 240 variants of its kernels at the first call of each pair of widths and
dtype, in each process: minutes. ``LIGER_FUSED_MOE_AUTOTUNE=1`` in the environment lets it; else one
variant is compiled.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import require
from moe_lab.model.dispatch.bank import (
    INSTALL,
    SWIGLU,
    Bank,
    gating_of,
    require_first_order,
    require_fit,
    takes_biases,
)
from moe_lab.model.dispatch.grouped import grouped
from moe_lab.model.dispatch.order import InOrder, PutBack, TakeRows, slot_order
from moe_lab.routing import Routing
from moe_lab.versions import older_than

OLDEST = "0.8.5"
ARGUMENTS = ("ctx", "x", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPABILITY = (8, 0)
"""Of the oldest device with bfloat16 products on its matrix units (Ampere)."""

FusedExperts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(tokens [T, D], gate_up [E, 2F, D], down [E, D, F], experts [T, K] int32, weights [T, K]) -> [T,
D].
"""


@cache
def kernels() -> FusedExperts | None:
    """liger-kernel's function, or None where the package is missing or older than 0.8.5 (wrong
    gradients on Blackwell, linkedin/Liger-Kernel#1413), Triton is missing, or a newer version takes
    other arguments.
    """
    if older_than("liger-kernel", OLDEST) or find_spec("triton") is None:
        return None
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read at import
    try:
        function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    except (ImportError, AttributeError):
        return None
    return function.apply if tuple(signature(function.forward).parameters) == ARGUMENTS else None


def obstacle(x_TD: Tensor, bank: Bank) -> str:
    """Why ``liger`` cannot run these tokens, in words; "" where it can.

    ``TRITON_INTERPRET=1`` in the environment (before Triton is imported) lets the kernels run on a
    CPU, for tests: thousands of times slower.
    """
    if torch.compiler.is_compiling():
        return "torch.compile does not trace it"
    if gating_of(bank) != SWIGLU:
        return "its experts are SwiGLU without a limit"
    if x_TD.dtype not in DTYPES:
        return "it takes bfloat16, float16 and float32"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradient of the gate weights is added up in any order"
    if x_TD.device.type == "cuda":
        if torch.cuda.get_device_capability(x_TD.device) < CAPABILITY:
            return "the device is older than compute capability 8.0"
    elif x_TD.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CUDA devices"
    if kernels() is None:
        return f"liger-kernel {OLDEST} (or newer alike) with Triton is missing: {INSTALL}"
    return ""


@takes_biases
def liger(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Raises ``ConfigError`` where ``obstacle`` names one."""
    why = obstacle(x_TD, bank)
    require(not why, "tensors that backend liger runs", why, "dispatch='auto'", field="dispatch")
    require_fit(x_TD, routing, bank)
    run = kernels()
    assert run is not None
    weights = routing.weights.to(x_TD.dtype)
    flat = routing.indices
    plain = not routing.weights_on_input and len(x_TD) > 0
    if plain and bool(((flat >= 0) & (flat < routing.num_experts)).all()):
        return _Once.apply(run(x_TD, bank.gate_up, bank.down, flat.int(), weights))
    slots = slot_order(routing)
    count = int(slots.ends[-1])
    if count == 0:
        return grouped(x_TD, routing, bank)  # nothing runs: zeros with their gradients
    rows_ND = TakeRows.apply(x_TD, slots)[:count]
    scale_N1 = InOrder.apply(weights, slots)[:count].unsqueeze(1)
    if routing.weights_on_input:
        rows_ND, scale_N1 = rows_ND * scale_N1, torch.ones_like(scale_N1)
    experts_N1 = flat.reshape(-1)[slots.order[:count]].unsqueeze(1).int()
    y_ND = _Once.apply(run(rows_ND, bank.gate_up, bank.down, experts_N1, scale_N1))
    return PutBack.apply(F.pad(y_ND, (0, 0, 0, flat.numel() - count)), slots)


class _Once(torch.autograd.Function):
    """Does nothing, but refuses gradients of gradients: those of the kernels would be constants."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        require_first_order("liger")
        return grad
