"""``linear``: ``F.linear`` of a router on a CPU in the package's own products.

At a router's shapes (thousands of tokens, tens to hundreds of experts) their tiles are faster than
torch's products, forward and backward. Letters: c [m, n] = op(a) op(b), op transposes where asked.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from moe_lab.cpu_kernels import DTYPES, available, integers, library, pointers

MIN_COLUMNS = 8
"""Experts from which the tiles are faster, a vector or a good part of one."""
MIN_TERMS = 2**22
"""Multiplications beside which the call of an operator written in Python is short."""


def linear(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``F.linear(x_TD, weight_ED, bias_E)``, compiled where that is faster.

    The bits of the result do not depend on the number of threads. Gradients of gradients are right;
    forward mode and ``torch.func`` get torch's.
    """
    small = len(weight_ED) < MIN_COLUMNS or x_TD.shape[0] * weight_ED.numel() < MIN_TERMS
    if small or x_TD.device.type != "cpu" or x_TD.dtype not in DTYPES or not available():
        return F.linear(x_TD, weight_ED, bias_E)
    if not torch.compiler.is_compiling() and _transformed(x_TD, weight_ED):
        return F.linear(x_TD, weight_ED, bias_E)
    y_TE = torch.ops.moe_lab.mm(x_TD, weight_ED, False, True)
    return y_TE if bias_E is None else y_TE + bias_E


def _transformed(*values: Tensor) -> bool:
    """Whether somebody asks for more than reverse mode: the operator would drop a tangent."""
    inside = peek_interpreter_stack() is not None
    return inside or any(unpack_dual(value).tangent is not None for value in values)


def _sizes(a: Any, b: Any, ta: bool, tb: bool) -> tuple[int, int, int]:
    """m, n and the terms of each sum."""
    return a[1] if ta else a[0], b[0] if tb else b[1], a[0] if ta else a[1]


@torch.library.custom_op("moe_lab::mm", mutates_args=(), device_types="cpu")
def _mm(a: Tensor, b: Tensor, ta: bool, tb: bool) -> Tensor:
    """``op(a) @ op(b)``."""
    a, b = a.contiguous(), b.contiguous()
    m, n, depth = _sizes(a.shape, b.shape, ta, tb)
    c = a.new_empty(m, n)
    flags = ctypes.c_bool(ta), ctypes.c_bool(tb)
    getattr(library(), f"moe_product_{DTYPES[a.dtype]}")(
        *integers(torch.get_num_threads()), *flags, *integers(m, n, depth), *pointers(a, b, c)
    )
    return c


@_mm.register_fake
def _(a: Tensor, b: Tensor, ta: bool, tb: bool) -> Tensor:
    return a.new_empty(_sizes(a.shape, b.shape, ta, tb)[:2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.ta, ctx.tb = inputs
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    mm, ta, tb = torch.ops.moe_lab.mm, ctx.ta, ctx.tb
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = mm(b, grad, tb, True) if ta else mm(grad, b, False, not tb)
    if ctx.needs_input_grad[1]:
        grad_b = mm(grad, a, True, ta) if tb else mm(a, grad, not ta, False)
    return grad_a, grad_b, None, None


_mm.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.moe_lab.mm)
def _flops(a_shape: Any, b_shape: Any, ta: bool, tb: bool, *args: Any, **kwargs: Any) -> int:
    m, n, depth = _sizes(a_shape, b_shape, ta, tb)
    return 2 * m * n * depth
