"""``Bank``: the expert weights that a dispatch backend reads; ``Gating``: what makes hidden units
of the two halves that they give; ``takes_biases``: experts with biases in every backend.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.errors import ConfigError, expected, require
from moe_lab.routing import Routing


class Gating(NamedTuple):
    """``h = g sigmoid(alpha g) (u + offset)`` with ``g = min(gate, limit)`` and ``u`` = up within
    ``-limit`` and ``limit``.

    The default is SwiGLU (arXiv 2002.05202). DeepSeek-V4 has a limit (arXiv 2606.19348), gpt-oss
    (arXiv 2508.10925) limit 7, alpha 1.702 and offset 1.
    """

    limit: float = float("inf")
    alpha: float = 1.0
    offset: float = 0.0

    def halves(self, act: Tensor) -> tuple[Tensor, Tensor]:
        """g and ``u + offset`` of [..., 2F], the gate first."""
        gate, up = act.chunk(2, dim=-1)
        if self.limit != float("inf"):
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate, up + self.offset if self.offset else up

    def hidden(self, act: Tensor) -> Tensor:
        """[..., 2F] -> [..., F]."""
        gate, up = self.halves(act)
        return gate * (gate * self.alpha if self.alpha != 1.0 else gate).sigmoid() * up

    def inside(self, act: Tensor) -> tuple[Tensor, Tensor] | None:
        """True where gate and up are within the limit and so have a gradient; None if they are
        everywhere.
        """
        if self.limit == float("inf"):
            return None
        gate, up = act.chunk(2, dim=-1)
        return gate <= self.limit, up.abs() <= self.limit


SWIGLU = Gating()


def gating_of(bank: Any) -> Gating:
    """The gating of a bank: plain SwiGLU unless the bank states another."""
    return getattr(bank, "gating", SWIGLU)


class Biases(NamedTuple):
    """``gate_up`` [E, 2F] is added before the gating, ``down`` [E, D] to the expert's output."""

    gate_up: Tensor
    down: Tensor


class Bank(Protocol):
    """The weights that a backend reads: ``gate_up`` [E, 2F, D] (gate first) and ``down`` [E, D, F].

    One whose hidden units are not SwiGLU's has a ``gating`` beside them, one with biases has
    ``biases``.
    """

    @property
    def gate_up(self) -> Tensor: ...
    @property
    def down(self) -> Tensor: ...


class Weights(NamedTuple):
    """A bank of plain tensors."""

    gate_up: Tensor
    down: Tensor
    gating: Gating = SWIGLU
    biases: Biases | None = None


Dispatch = Callable[[Tensor, Routing, Bank], Tensor]
INSTALL = "pip install 'moe_lab[gpu]'"
PAD = 8
"""Channels that carry a bias: rows stay multiples of the 16 bytes that ``grouped_mm`` needs."""


def biases_of(bank: Any) -> Biases | None:
    """The biases of a bank, None where it has none."""
    return getattr(bank, "biases", None)


def require_fit(x_TD: Tensor, routing: Routing, bank: Bank) -> None:
    """For kernels that read memory by the shapes that they are given: raise ``ConfigError`` unless
    everything has one dtype and device and the shapes of one layer.
    """
    experts, width, hidden = routing.num_experts, x_TD.shape[1], bank.down.shape[-1]
    slots = len(x_TD), routing.indices.shape[-1]
    for name, value, shape, dtype in (
        ("indices", routing.indices, slots, torch.int64),
        ("weights", routing.weights, slots, None),
        ("gate_up", bank.gate_up, (experts, 2 * hidden, width), x_TD.dtype),
        ("down", bank.down, (experts, width, hidden), x_TD.dtype),
    ):
        fits = value.shape == shape and dtype in (None, value.dtype)
        if not fits or value.device != x_TD.device:
            wanted = f"{name} {list(shape)} in {dtype or 'any dtype'} on {x_TD.device}"
            given = f"{list(value.shape)} in {value.dtype} on {value.device}"
            raise ConfigError(expected(wanted, given), field=name)


def require_first_order(backend: str) -> None:
    """For the backward pass of a backend whose gradients have no gradients."""
    require(
        not torch.is_grad_enabled(),
        "first derivatives",
        f"gradients of gradients (create_graph) with backend {backend}",
        "dispatch='grouped'",
        field="dispatch",
    )


def takes_biases(dispatch: Dispatch) -> Dispatch:
    """The backend for banks with biases too.

    The backend's own products add the bias of gate and up, as the weights of a channel that is 1 in
    every token. The biases of the outputs are one product with the gate weights, [T, E] @ [E, D].

    Raises:
        ConfigError: gate weights on the input of experts with biases.
    """

    @functools.wraps(dispatch)
    def run(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
        biases = biases_of(bank)
        if biases is None:
            return dispatch(x_TD, routing, bank)
        require(
            not routing.weights_on_input,
            "gate weights on the output of experts with biases",
            "a router that puts them on the input",
            field="expert_bias",
        )
        width = x_TD.shape[1]
        ones = F.pad(x_TD.new_ones(len(x_TD), 1), (0, PAD - 1))
        into = F.pad(biases.gate_up.unsqueeze(2), (0, PAD - 1))
        wide = Weights(
            torch.cat([bank.gate_up, into], dim=2), F.pad(bank.down, (0, 0, 0, PAD)),
            gating_of(bank),
        )  # fmt: skip
        y_TD = dispatch(torch.cat([x_TD, ones], dim=1), routing, wide)[:, :width]
        real_TK = (routing.indices >= 0) & (routing.indices < routing.num_experts)
        weights_TK = routing.weights.to(x_TD.dtype).masked_fill(~real_TK, 0.0)
        weights_TE = x_TD.new_zeros(len(x_TD), len(biases.down)).scatter_add(
            1, routing.indices.masked_fill(~real_TK, 0), weights_TK
        )
        return y_TD + weights_TE @ biases.down

    return run
