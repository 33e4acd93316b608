"""``quack``: grouped matrix products of quack-kernels (extra ``gpu``, Apache-2.0, CUTLASS) for
Hopper and newer: the kernels that SonicMoE (arXiv 2512.14080) is made of.

Six products a step, none of which copies a row of tokens: gate and up gather tokens and end in
SwiGLU; the backward of SwiGLU and of the gate weights ends the product with ``down``; weight
gradients are products over each expert's rows. Nothing waits for the host, nothing is added up in
any order: the same call gives the same bits.

``gate_up`` [E, 2F, D] has the gate's rows first. The kernels read and write it as rows in turns
(gate 0, up 0, gate 1, ...), which is what ``concat_layout`` says; hidden units between the products
[N, 2F] are in turns. Signatures are those of quack-kernels 0.6.5.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any, NamedTuple

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
from moe_lab.model.dispatch.order import InOrder, PutBack, SlotOrder, TakeRows, slot_order
from moe_lab.routing import Routing
from moe_lab.versions import older_than

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)
"""Of the oldest device whose kernels SonicMoE uses (Hopper)."""
OLDEST = "0.6.5"
ALIGNMENT = 16  # bytes that every row must be a multiple of


class Kernels(NamedTuple):
    """Functions of ``quack.gemm_interface``: A [M, K] times B [E, K, N], each expert's rows apart.

    ``cu_seqlens_m`` [E + 1] int32: where each expert's rows begin and end; ``cu_seqlens_k`` the
    same for products over rows, [D, N] times [N, F] -> [E, D, F]. ``A_idx`` [N] int32: the row (or
    the column, for products over rows) of A in that place.
    """

    gemm: Callable[..., Tensor]
    gemm_gated: Callable[..., tuple[Tensor | None, Tensor]]
    gemm_dgated: Callable[..., tuple[Tensor, Tensor, Tensor]]


_EVERY = {"A", "B", "A_idx", "cu_seqlens_m", "tuned"}
ARGUMENTS = (
    {*_EVERY, "out", "cu_seqlens_k", "concat_layout"},
    {*_EVERY, "activation", "store_preact", "concat_layout"},
    {*_EVERY, "PreAct", "activation", "colvec_scale", "colvec_reduce", "dynamic_scheduler"},
)
"""What the backend gives to each function."""


@cache
def kernels() -> Kernels | None:
    """quack-kernels' functions, or None where the package is missing, older than 0.6.5, lacks
    CUTLASS, or is a newer one that takes other arguments.
    """
    if older_than("quack-kernels", OLDEST):
        return None
    try:
        module = import_module("quack.gemm_interface")
        found = Kernels(module.gemm, module.gemm_gated, module.gemm_dgated)
    except (ImportError, AttributeError):
        return None
    fits = (
        names <= set(signature(function).parameters)
        for names, function in zip(ARGUMENTS, found, strict=True)
    )
    return found if all(fits) else None


def obstacle(x_TD: Tensor, bank: Bank) -> str:
    """Why ``quack`` cannot run these tokens, in words; "" where it can."""
    if torch.compiler.is_compiling():
        return "torch.compile does not trace it"
    if gating_of(bank) != SWIGLU:
        return "its experts are SwiGLU without a limit"
    if x_TD.dtype not in DTYPES or bank.gate_up.dtype != x_TD.dtype:
        return "it takes tokens and weights that are both bfloat16 or both float16"
    if any(width * x_TD.element_size() % ALIGNMENT for width in bank.down.shape[1:]):
        return "it takes widths of whole 16 bytes"
    if x_TD.device.type != "cuda":
        return "it runs on CUDA devices"
    if torch.cuda.get_device_capability(x_TD.device) < CAPABILITY:
        return "the device is older than compute capability 9.0"
    if kernels() is None:
        return f"quack-kernels {OLDEST} (or newer alike) is missing: {INSTALL}"
    return ""


@takes_biases
def quack(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Raises ``ConfigError`` where ``obstacle`` names one."""
    why = obstacle(x_TD, bank)
    require(not why, "tensors that backend quack runs", why, "dispatch='auto'", field="dispatch")
    require_fit(x_TD, routing, bank)
    weights, slots = routing.weights.to(x_TD.dtype), slot_order(routing)
    keep = torch.is_grad_enabled()
    if not routing.weights_on_input:
        return _Quack.apply(x_TD, weights, bank.gate_up, bank.down, slots, keep)
    rows_ND = TakeRows.apply(x_TD, slots) * InOrder.apply(weights, slots).unsqueeze(1)
    one_each = slots.one_each()
    ones_N1 = torch.ones_like(rows_ND[:, :1])
    y_ND = _Quack.apply(rows_ND, ones_N1, bank.gate_up, bank.down, one_each, keep)
    return PutBack.apply(y_ND, slots)


class _Quack(torch.autograd.Function):
    """Rows of slots that run nothing lie past the last expert's end: kernels leave them as they
    were in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        slots: SlotOrder,
        keep: bool,
    ) -> Tensor:
        run = kernels()
        assert run is not None
        # The kernels take no tensor that requires a gradient.
        x, gate_up, down = (value.detach().contiguous() for value in (x, gate_up, down))
        tokens, bounds = slots.tokens.int(), F.pad(slots.ends, (1, 0))
        act, hidden = run.gemm_gated(
            x,
            gate_up.transpose(1, 2),
            activation="swiglu",
            cu_seqlens_m=bounds,
            A_idx=tokens,
            store_preact=keep,
            concat_layout=("B",),
            tuned=False,
        )
        rows = x.new_empty(len(tokens) + 1, x.shape[1])
        run.gemm(hidden, down.transpose(1, 2), out=rows[:-1], cu_seqlens_m=bounds, tuned=False)
        ctx.save_for_backward(x, weights, gate_up, down, act, tokens, bounds)
        ctx.slots = slots
        return slots.add_up(rows, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        require_first_order("quack")
        run = kernels()
        assert run is not None
        x, weights, gate_up, down, act, tokens, bounds = ctx.saved_tensors
        grad = grad.contiguous()
        grad_act, scaled_hidden, grad_scale = run.gemm_dgated(
            grad,
            down,
            act,
            activation="swiglu",
            colvec_scale=weights.reshape(-1)[ctx.slots.order].float(),
            colvec_reduce=True,
            cu_seqlens_m=bounds,
            A_idx=tokens,
            dynamic_scheduler=False,  # on Hopper it does not go with a gather
            tuned=False,
        )
        grad_x = grad_gate_up = grad_down = None
        if ctx.needs_input_grad[0]:
            rows = x.new_empty(len(tokens) + 1, x.shape[1])
            run.gemm(
                grad_act,
                gate_up,
                out=rows[:-1],
                cu_seqlens_m=bounds,
                concat_layout=("B",),
                tuned=False,
            )
            grad_x = ctx.slots.add_up(rows)
        if ctx.needs_input_grad[2]:
            grad_gate_up = torch.empty_like(gate_up)
            run.gemm(
                x.T,
                grad_act,
                out=grad_gate_up.transpose(1, 2),
                cu_seqlens_k=bounds,
                A_idx=tokens,
                concat_layout=("out",),
                tuned=False,
            )
        if ctx.needs_input_grad[3]:
            grad_down = run.gemm(
                grad.T, scaled_hidden, cu_seqlens_k=bounds, A_idx=tokens, tuned=False
            )
        grad_weights = ctx.slots.to_slots(grad_scale).to(weights.dtype)
        return grad_x, grad_weights, grad_gate_up, grad_down, None, None
