"""``experts``: the routed experts of a layer in C++ on a CPU (``moe_lab.cpu_kernels``), forward and
backward. Under ``torch.compile`` the layer is one opaque operator.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

from moe_lab.cpu_kernels import DTYPES, available, integers, library, pointers, problem
from moe_lab.cpu_kernels.noted_squares import note_squares
from moe_lab.errors import ConfigError, expected
from moe_lab.model.dispatch.bank import Bank, gating_of, require_fit, takes_biases
from moe_lab.model.dispatch.order import require_countable
from moe_lab.routing import Routing


@takes_biases
def experts(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    """Run the routed experts in C++ on a CPU. Raises ``ConfigError`` for another device or dtype,
    or if there is no library.
    """
    if x_TD.device.type != "cpu" or x_TD.dtype not in DTYPES:
        raise ConfigError(
            expected(
                "float32 or float64 tokens on the CPU",
                f"{x_TD.dtype} on {x_TD.device}",
                "dispatch='auto'",
            ),
            field="dispatch",
        )
    if not available():
        raise ConfigError(expected("a compiled expert library", problem(), "dispatch='cpu'"))
    weights = routing.weights.to(x_TD.dtype)
    require_fit(x_TD, routing, bank)
    if not torch.compiler.is_compiling() and any(
        unpack_dual(value).tangent is not None for value in (x_TD, weights, bank.gate_up, bank.down)
    ):
        raise ConfigError(
            expected("reverse-mode derivatives", "a forward-mode one (jvp)", "dispatch='oracle'"),
            field="dispatch",
        )
    save = torch.is_grad_enabled() and any(
        value.requires_grad for value in (x_TD, weights, bank.gate_up, bank.down)
    )
    on_input = routing.weights_on_input
    return torch.ops.moe_lab.experts(
        x_TD, routing.indices, weights, bank.gate_up, bank.down, on_input, [*gating_of(bank)], save
    )[0]


@torch.library.custom_op("moe_lab::experts", mutates_args=(), device_types="cpu")
def _experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    on_input: bool,
    gating: list[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D]; and for the backward pass act [N, 2F] in expert order (empty unless ``save``),
    order [N], starts [E + 1], place [N].
    """
    indices, num_slots, num_experts = indices.contiguous(), indices.numel(), down.shape[0]
    require_countable(num_slots)
    order, starts, place = (
        torch.empty(size, dtype=torch.int32) for size in (num_slots, num_experts + 1, num_slots)
    )
    library().moe_plan(
        *pointers(indices), *integers(num_slots, num_experts), *pointers(order, starts, place)
    )
    x, weights, gate_up, down = (value.contiguous() for value in (x, weights, gate_up, down))
    # Pages that nothing is written to are never touched: unused slots cost no memory.
    y, act = torch.empty_like(x), x.new_empty(num_slots if save else 0, gate_up.shape[1])
    layer = _layer(x, indices, weights, gate_up, down, order, starts, place, on_input, gating)
    getattr(library(), f"moe_forward_{DTYPES[x.dtype]}")(
        *layer, *pointers(act if save else None, y)
    )
    return y, act, order, starts, place


@_experts.register_fake
def _(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    on_input: bool,
    gating: list[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_slots = indices.shape[0] * indices.shape[1]
    act = x.new_empty(num_slots if save else 0, gate_up.shape[1])
    order, starts, place = (
        x.new_empty(size, dtype=torch.int32) for size in (num_slots, down.shape[0] + 1, num_slots)
    )
    return torch.empty_like(x), act, order, starts, place


@torch.library.custom_op("moe_lab::experts_backward", mutates_args=(), device_types="cpu")
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Tensor,
    order: Tensor,
    starts: Tensor,
    place: Tensor,
    on_input: bool,
    gating: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down; [2] float64, sums of squares of the last two."""
    grad, x, weights, gate_up, down = (
        value.contiguous() for value in (grad, x, weights, gate_up, down)
    )
    gradients = [torch.empty_like(value) for value in (x, weights, gate_up, down)]
    layer = _layer(x, indices, weights, gate_up, down, order, starts, place, on_input, gating)
    squares = torch.empty(2, dtype=torch.float64)
    getattr(library(), f"moe_backward_{DTYPES[x.dtype]}")(
        *layer, *pointers(grad, act, *gradients, squares)
    )
    return gradients[0], gradients[1], gradients[2], gradients[3], squares


@_experts_backward.register_fake
def _(grad: Tensor, x: Tensor, indices: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
    weights, gate_up, down, *_ = tensors
    gradients = (torch.empty_like(value) for value in (x, weights, gate_up, down))
    return *gradients, x.new_empty(2, dtype=torch.float64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.on_input, ctx.gating, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_weights, grad_gate_up, grad_down, squares = torch.ops.moe_lab.experts_backward(
        grad, *ctx.saved_tensors, ctx.on_input, ctx.gating
    )
    if type(squares) is Tensor and peek_interpreter_stack() is None:  # not while it is traced
        note_squares(grad_gate_up, squares[0])
        note_squares(grad_down, squares[1])
    return grad_x, None, grad_weights, grad_gate_up, grad_down, None, None, None


@register_flop_formula(torch.ops.moe_lab.experts)
def _flops(
    x_shape: tuple[int, int],
    indices_shape: tuple[int, int],
    weights: Any,
    gate_up: Any,
    down_shape: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Of the matrix products, for torch's counter; it sees shapes only, so slots that run no real
    expert are counted as if they did.
    """
    return 2 * 3 * indices_shape[0] * indices_shape[1] * down_shape[1] * down_shape[2]


@register_flop_formula(torch.ops.moe_lab.experts_backward)
def _backward_flops(grad_shape: Any, *shapes: Any, **kwargs: Any) -> int:
    return 2 * _flops(*shapes)


_experts.register_autograd(_backward, setup_context=_keep)


def _refuse(ctx: Any, *gradients: Any) -> None:
    raise ConfigError(
        expected("first derivatives", "gradients of gradients (create_graph)", "dispatch='cpu'"),
        field="dispatch",
    )


_experts_backward.register_autograd(_refuse)


def _layer(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    order: Tensor,
    starts: Tensor,
    place: Tensor,
    on_input: bool,
    gating: Sequence[float],
) -> list[Any]:
    """The arguments that both directions begin with."""
    sizes = integers(torch.get_num_threads(), *indices.shape, *down.shape)
    return [
        *sizes,
        ctypes.c_bool(on_input),
        *map(ctypes.c_double, gating),
        *pointers(x, weights, gate_up, down, order, starts, place),
    ]
