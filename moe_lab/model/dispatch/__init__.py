"""Dispatch: run each token through its selected real experts and add up the weighted outputs.

Every backend computes ``y_t = sum_k w_tk * E_{i_tk}(x_t)`` over the slots whose id is a real
expert; zero-compute experts are the layer's business and cost nothing here. They differ in speed
alone:

| name | what it does | where |
|---|---|---|
| ``oracle`` | the definition, token by token; the others are tested against it | anywhere, slowly |
| ``cpu`` | one autograd function, a few tensor calls per expert on rows in cache | anywhere |
| ``native`` | the same in C++, compiled once per machine | CPU, float32 and float64 |
| ``grouped`` | one ``grouped_mm`` for all experts, no host synchronisation | CUDA; right on a CPU |

``auto`` takes the fastest that can run what it is given, again at each call; ``choose`` returns its
name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lab.model.dispatch import native
from moe_lab.model.dispatch.bank import Bank, Gating, gating_of
from moe_lab.model.dispatch.grouped import can_group, grouped
from moe_lab.model.dispatch.loop import loop
from moe_lab.model.dispatch.oracle import oracle
from moe_lab.registry import Registry
from moe_lab.routing import Routing

__all__ = ["BACKENDS", "Backend", "Bank", "backend", "choose", "under_autocast"]


Backend = Callable[[Tensor, Routing, Bank], Tensor]

BACKENDS = Registry("a dispatch backend")
"""Name -> backend. Another one is added by ``@BACKENDS.register("name")``."""

_BUILT_IN: dict[str, Backend] = {
    "oracle": oracle,
    "cpu": loop,
    "native": native.experts,
    "grouped": grouped,
}
for _name, _backend in _BUILT_IN.items():
    BACKENDS.add(_name, _backend)


def choose(x_TD: Tensor, bank: Bank) -> str:
    """The name of the backend that ``auto`` runs for these tensors: their device, dtype and shape
    decide.
    """
    if x_TD.device.type == "cpu":
        return "native" if x_TD.dtype in native.DTYPES and native.available() else "cpu"
    # On the meta device nothing may wait for a value.
    whole = x_TD.device.type == "meta" or can_group(x_TD, bank.down)
    return "grouped" if whole else "cpu"


def auto(x_TD: Tensor, routing: Routing, bank: Bank) -> Tensor:
    return _BUILT_IN[choose(x_TD, bank)](x_TD, routing, bank)


def backend(name: str) -> Backend:
    """The backend of that name, or "auto". Raises ``ConfigError`` for another name."""
    return auto if name == "auto" else BACKENDS.find(name)


class _Weights(NamedTuple):
    gate_up: Tensor
    down: Tensor
    gating: Gating


def under_autocast(x_TD: Tensor, bank: Bank) -> tuple[Tensor, Bank]:
    """Tokens and weights in the dtype in which autocast runs matrix products, where it is on
    (float64 stays, as everywhere in autocast).
    """
    kind = x_TD.device.type
    if kind == "meta" or x_TD.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x_TD, bank
    dtype = torch.get_autocast_dtype(kind)
    return x_TD.to(dtype), _Weights(bank.gate_up.to(dtype), bank.down.to(dtype), gating_of(bank))
